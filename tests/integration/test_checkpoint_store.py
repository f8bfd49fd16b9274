"""Checkpoints outside the database: what a stored location or a store may make a worker do, and what is left behind."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

import fsspec
import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState, create_trial

from storage import checkpoints, object_store, study_attributes, transfer
from storage.engine import open_storage
from storage.enqueue import enqueue_trials
from storage.errors import UserError
from storage.queue import Lease, LeaseLost, Queue
from storage.schema import CHECKPOINTS, LEASES, STUDY_ATTRS

PAYLOAD = b"checkpoint" * 100
NAME = "0123456789abcdef-trial-1-1-01234567.checkpoint"


class Shelf:
    """A study of two trials whose checkpoints go to a folder, and a worker that holds the first."""

    def __init__(self, url: str, store: str, name: str = "s") -> None:
        self.storage = open_storage(url)
        self.store = store
        study = optuna.create_study(study_name=name, storage=self.storage, direction="maximize")
        self.study_id: int = study._study_id
        trials = [create_trial(state=TrialState.WAITING, user_attrs={"queue_position": i}) for i in range(2)]
        enqueue_trials(self.storage.engine, self.study_id, {"config": {"checkpoint": {"store": store}}}, trials)
        self.worker = Queue(self.storage.engine, self.study_id, store=store, max_attempts=1)
        self.lease = self.claim(self.worker)

    @staticmethod
    def claim(worker: Queue) -> Lease:
        lease = worker.claim()
        assert lease is not None
        return lease

    def locate(self, location: str, payload: bytes = PAYLOAD) -> None:
        """As whoever can write to the database would."""
        values = {"token": 1, "epoch": 1, "sha256": hashlib.sha256(payload).hexdigest(), "location": location}
        with self.storage.engine.begin() as connection:
            connection.execute(sa.delete(CHECKPOINTS))
            connection.execute(sa.insert(CHECKPOINTS).values(trial_id=self.lease.trial_id, payload=None, **values))

    def location(self) -> str | None:
        with self.storage.engine.connect() as connection:
            return connection.scalar(sa.select(CHECKPOINTS.c.location))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def shelf(url: str, folder: Path) -> Shelf:
    return Shelf(url, str(folder))


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_the_database_holds_a_name_and_the_store_the_file(url: str, folder: Path, scheme: str) -> None:
    shelf = Shelf(url, f"{scheme}{folder}")
    for epoch in (1, 2):
        checkpoints.save(shelf.worker, shelf.lease, epoch, PAYLOAD + bytes([epoch]))
        (file,) = folder.iterdir()
        assert shelf.location() == file.name
        assert object_store.NAME.fullmatch(file.name)
    assert checkpoints.load(shelf.worker, shelf.lease) == checkpoints.StoredCheckpoint(2, PAYLOAD + b"\2")
    shelf.worker.finish(shelf.lease, TrialState.COMPLETE, [0.5])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/secret",
        "memory://victim",
        "reference://::data:text/plain;base64,e30=",
        "../victim",
        f"../store2/{NAME}",
        f"sub/{NAME}",
        f"{NAME}/..",
        f"{NAME}\n",
        f"zip://{NAME}::file:///victim.zip",
        "",
        ".",
    ],
)
def test_a_location_that_is_no_name_of_ours_is_neither_read_nor_removed(
    shelf: Shelf, folder: Path, location: str
) -> None:
    victim = folder.parent / "victim"
    victim.write_bytes(PAYLOAD)
    (folder.parent / "store2").mkdir()
    (folder.parent / "store2" / NAME).write_bytes(PAYLOAD)
    shelf.locate(location)
    assert checkpoints.load(shelf.worker, shelf.lease) == checkpoints.StoredCheckpoint(1, None)
    shelf.worker.finish(shelf.lease, TrialState.COMPLETE, [0.5])
    assert victim.exists()
    assert (folder.parent / "store2" / NAME).exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link", "link to nothing", "huge"])
def test_only_regular_files_of_bounded_size_are_read(shelf: Shelf, folder: Path, kind: str) -> None:
    folder.mkdir()
    file, outside = folder / NAME, folder.parent / "outside"
    outside.write_bytes(PAYLOAD)
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "folder":
            file.mkdir()
        case "link":
            file.symlink_to(outside)
        case "link to nothing":
            file.symlink_to(folder / "nothing")
        case _:
            with file.open("wb") as sparse:
                sparse.truncate(object_store.MOST_BYTES + 1)
    shelf.locate(NAME)
    results: list[Any] = []
    reader = threading.Thread(target=lambda: results.append(checkpoints.load(shelf.worker, shelf.lease)), daemon=True)
    reader.start()
    reader.join(60)
    assert results == [checkpoints.StoredCheckpoint(1, None)]
    assert outside.read_bytes() == PAYLOAD


@pytest.mark.parametrize(
    "store",
    [
        "relative/folder",
        "memory://store",
        "http://127.0.0.1/store",
        "reference://x",
        "simplecache::file:///tmp/store",
        "s3://bucket::file:///tmp/store",
        "zip://x::/tmp/a.zip",
        "s3://",
        "file://host/folder",
        "nonsense://x",
        "database ",
        "/tmp/a\0b",
        "",
    ],
)
def test_stores_that_are_not_allowed(store: str) -> None:
    for function in (object_store.check, object_store.probe):
        with pytest.raises(UserError, match=r"checkpoint\.store must be") as refusal:
            function(store)
        assert "\n" not in str(refusal.value)


def test_stores_of_the_allowed_kinds_need_their_package_only() -> None:
    object_store.check("/any/folder")
    object_store.check("file:///any/folder")
    for protocol in object_store.PROTOCOLS[2:]:
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError:
            with pytest.raises(UserError, match=r"[iI]nstall"):
                object_store.check(f"{protocol}://bucket/folder")
        else:
            object_store.check(f"{protocol}://bucket/folder")


@pytest.mark.parametrize("store", ["/dev/null/x", "/proc/store", "file:///dev/null/x"])
def test_a_store_that_cannot_take_checkpoints_is_known_before_the_launch(store: str) -> None:
    with pytest.raises(UserError, match=f"write, read and delete, got '{store}': .*; name another"):
        object_store.probe(store)


def test_a_probe_leaves_nothing(folder: Path) -> None:
    object_store.probe(str(folder))
    assert list(folder.iterdir()) == []


def refuse_removal(folder: Path) -> None:
    """A folder in a file's place cannot be removed as a file, whoever tries."""
    for file in folder.iterdir():
        file.unlink()
        file.mkdir()


def allow_removal(folder: Path) -> None:
    for file in folder.iterdir():
        file.rmdir()
        file.write_bytes(PAYLOAD)


@pytest.mark.parametrize("end", ["finish", "fail", "release", "claim"])
def test_a_store_that_refuses_removal_costs_a_warning_and_no_trial(
    shelf: Shelf, folder: Path, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.save(shelf.worker, shelf.lease, 1, PAYLOAD)
    refuse_removal(folder)
    with caplog.at_level(logging.WARNING):
        match end:
            case "finish":
                shelf.worker.finish(shelf.lease, TrialState.COMPLETE, [0.5])
            case "fail":
                shelf.worker.fail(shelf.lease, "boom")
            case "release":
                shelf.worker.release(shelf.lease, error="boom")
            case _:  # its worker vanished, and it was its last attempt
                with shelf.storage.engine.begin() as connection:
                    connection.execute(sa.update(LEASES).values(expires_at=1.0))
                Shelf.claim(Queue(shelf.storage.engine, shelf.study_id, store=shelf.store, max_attempts=1))
    assert "was not removed" in caplog.text
    state = optuna.load_study(study_name="s", storage=shelf.storage).trials[0].state
    assert state == (TrialState.COMPLETE if end == "finish" else TrialState.FAIL)
    assert shelf.location() is None
    allow_removal(folder)
    assert len(checkpoints.collect_garbage(shelf.storage.engine, shelf.study_id, shelf.store)) == 1
    assert list(folder.iterdir()) == []


def test_a_file_is_removed_only_once_the_end_is_committed(shelf: Shelf, folder: Path) -> None:
    checkpoints.save(shelf.worker, shelf.lease, 1, PAYLOAD)
    with shelf.storage.engine.begin() as connection:
        connection.execute(sa.update(LEASES).values(token=LEASES.c.token + 1))
    with pytest.raises(LeaseLost):
        shelf.worker.finish(shelf.lease, TrialState.COMPLETE, [0.5])
    with pytest.raises(LeaseLost):
        checkpoints.save(shelf.worker, shelf.lease, 2, PAYLOAD)
    assert [file.name for file in folder.iterdir()] == [shelf.location()]


def test_garbage_is_what_no_database_names(shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    """Two studies of this database and a copy in another share a folder with other files."""
    other = Shelf(shelf.storage.url, shelf.store, "other")
    elsewhere = open_storage(f"sqlite:///{tmp_path / 'elsewhere.db'}")
    for each in (shelf, other):
        checkpoints.save(each.worker, each.lease, 1, PAYLOAD)
        each.worker.release(each.lease)
    transfer.copy(shelf.storage, elsewhere, "s")
    copied = optuna.load_study(study_name="s", storage=elsewhere)
    copying = Queue(elsewhere.engine, copied._study_id, store=shelf.store)
    lease = Shelf.claim(copying)
    assert checkpoints.load(copying, lease) == checkpoints.StoredCheckpoint(1, PAYLOAD)
    checkpoints.save(copying, lease, 2, PAYLOAD)
    copying.release(lease)
    needed = {file.name for file in folder.iterdir()}
    assert len(needed) == 3
    key = study_attributes.store_key(shelf.storage.engine, shelf.study_id)
    assert key != study_attributes.store_key(elsewhere.engine, copied._study_id)
    orphan, fresh = object_store.file_name(key, 1, 7), object_store.file_name(key, shelf.lease.trial_id + 1, 1)
    foreign = ("notes.txt", "trial-1-1-01234567.checkpoint", f"{key}-trial-1-1-01234567.checkpoint.part")
    for name in (orphan, fresh, *foreign):
        (folder / name).write_bytes(b"x")
    (folder / object_store.file_name(key, 1, 8)).symlink_to(folder / "notes.txt")
    held = Shelf.claim(shelf.worker)
    while held.trial_id != shelf.lease.trial_id + 1:  # whose worker has written a file and not named it yet
        held = Shelf.claim(Queue(shelf.storage.engine, shelf.study_id, store=shelf.store))
    with shelf.storage.engine.begin() as connection:
        connection.execute(sa.update(LEASES).where(LEASES.c.trial_id != held.trial_id).values(expires_at=0.0))
    assert checkpoints.collect_garbage(shelf.storage.engine, shelf.study_id, shelf.store) == [orphan]
    left = {file.name for file in folder.iterdir() if not file.is_symlink()}
    assert left == needed | {fresh, *foreign}


def test_an_altered_key_names_no_file_outside(shelf: Shelf, folder: Path) -> None:
    with shelf.storage.engine.begin() as connection:
        key = {"study_id": shelf.study_id, "key": study_attributes.STORE_KEY, "value_json": '"../../victim"'}
        connection.execute(sa.insert(STUDY_ATTRS).values(key))
    checkpoints.save(shelf.worker, shelf.lease, 1, PAYLOAD)
    assert [file.name for file in folder.iterdir()] == [shelf.location()]


def test_deleting_and_requeueing_remove_files_by_name_only(shelf: Shelf, folder: Path) -> None:
    victim = folder.parent / "victim"
    victim.write_bytes(b"x")
    checkpoints.save(shelf.worker, shelf.lease, 1, PAYLOAD)
    with shelf.storage.engine.begin() as connection:  # failed by somebody else: its checkpoint stays
        connection.exec_driver_sql("UPDATE trials SET state = 'FAIL' WHERE number = 0")
        connection.execute(sa.update(LEASES).values(expires_at=0.0))
    assert transfer.requeue(shelf.storage, "s", trials=None) == [0]
    assert list(folder.iterdir()) == []
    lease = Shelf.claim(shelf.worker)
    checkpoints.save(shelf.worker, lease, 1, PAYLOAD)
    shelf.worker.release(lease)
    transfer.delete(shelf.storage, "s")
    assert list(folder.iterdir()) == []
    again = Shelf(shelf.storage.url, str(folder))
    again.locate(f"file://{victim}")
    again.worker.release(again.lease)
    transfer.delete(again.storage, "s")
    assert victim.exists()


def test_a_copy_reads_the_store_before_it_locks_its_target(shelf: Shelf, folder: Path, tmp_path: Path) -> None:
    checkpoints.save(shelf.worker, shelf.lease, 1, PAYLOAD)
    shelf.worker.release(shelf.lease)
    target = open_storage(f"sqlite:///{tmp_path / 'target.db'}")
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()  # reading it is an error or nothing, and never a wait
    assert transfer.copy(shelf.storage, target, "s") == 2
    with target.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(CHECKPOINTS)) == 0  # its trial starts anew


def test_a_copy_does_not_read_what_a_location_points_at(shelf: Shelf, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(PAYLOAD)
    shelf.locate(str(secret))
    shelf.worker.release(shelf.lease)
    target = open_storage(f"sqlite:///{tmp_path / 'target.db'}")
    transfer.copy(shelf.storage, target, "s")
    with target.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(CHECKPOINTS)) == 0
