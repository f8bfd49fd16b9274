"""The models that finished trials leave: which remain, who may store them, and what a database or a file may claim."""

from __future__ import annotations

import http.client
import json
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.artifacts import download_artifact, get_all_artifact_meta
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from storage import artifacts, object_store, transfer
from storage.artifacts import DatabaseArtifactStore
from storage.engine import close, open_storage
from storage.enqueue import enqueue_trials
from storage.errors import UserError
from storage.exclusions import exclude
from storage.queue import Lease, LeaseLost, Queue
from storage.schema import ARTIFACT_CHUNKS, ARTIFACTS, LEASES, TRIAL_SYSTEM_ATTRS, TRIALS
from storage.url import sqlite_url as sqlite_url_of
from tests.support.served import dashboard

LARGE = artifacts.CHUNK_BYTES + 1000
"""Bytes, of two chunks."""


def content_of(number: int) -> bytes:
    return f"model {number};".encode() * (LARGE // 8)


class Shelf:
    """A study whose queued trials are finished by hand."""

    def __init__(
        self, url: str, trials: int, *, store: str = object_store.DATABASE, objectives: int = 1, name: str = "s"
    ) -> None:
        self.name, self.store = name, store
        self.storage = open_storage(url)
        self.engine = self.storage.engine
        directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][:objectives]
        self.study = optuna.create_study(study_name=name, storage=self.storage, directions=directions)
        self.study_id: int = self.study._study_id
        queued = [create_trial(state=TrialState.WAITING, user_attrs={"queue_position": i}) for i in range(trials)]
        attributes = {"config": {"artifacts": {"store": store}}, "data_fingerprint": "0"}
        enqueue_trials(self.engine, self.study_id, attributes, queued)

    def worker(self) -> Queue:
        return Queue(self.engine, self.study_id)

    def finish(self, values: Sequence[float], keep: int | None, worker: Queue | None = None) -> Lease:
        """Claim the next trial and finish it with a model, as a worker does."""
        queue = worker or self.worker()
        lease = claimed(queue)
        artifact = None
        if artifacts.is_wanted(queue, lease, values[0], keep):
            artifact = artifacts.save(queue, lease, content_of(lease.number), store=self.store, keep=keep)
        queue.finish(lease, TrialState.COMPLETE, values, artifact=artifact)
        return lease

    def models(self) -> dict[int, bytes]:
        """Trial number to content, as Optuna lists and downloads it; nothing else may be stored."""
        store, found, ids = DatabaseArtifactStore(self.engine), {}, set()
        for trial in optuna.load_study(study_name=self.name, storage=self.storage).trials:
            for meta in get_all_artifact_meta(trial, storage=self.storage):
                assert (meta.filename, meta.mimetype) == (
                    f"trial-{trial.number}.safetensors",
                    "application/octet-stream",
                )
                with store.open_reader(meta.artifact_id) as file:
                    found[trial.number] = file.read()
                ids.add(meta.artifact_id)
        of_study = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == self.study_id)
        with self.engine.connect() as connection:
            named, chunked = (
                set(connection.scalars(sa.select(table.c.artifact_id).where(table.c.trial_id.in_(of_study))))
                for table in (ARTIFACTS, ARTIFACT_CHUNKS)
            )
        assert named == ids
        assert chunked == (ids if self.store == object_store.DATABASE else set())
        return found


def claimed(queue: Queue) -> Lease:
    lease = queue.claim()
    assert lease is not None
    return lease


def expected(numbers: Sequence[int]) -> dict[int, bytes]:
    return {number: content_of(number) for number in numbers}


@pytest.fixture(params=["database", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return object_store.DATABASE if request.param == "database" else str(tmp_path / "store")


def files_in(store: str) -> int:
    return 0 if store == object_store.DATABASE else len(list(Path(store).glob("*")))


VALUES = [0.3, 0.9, 0.5, 0.9, 0.1, 0.7]


def test_the_best_remain(url: str, store: str) -> None:
    """Of equal values the trial of the lower number is the better one, as `study status` has it."""
    cases: dict[int | None, list[int]] = {1: [1], 3: [1, 3, 5], None: [1, 3, 5, 2, 0, 4], 0: []}
    files = 0
    for keep, left in cases.items():
        shelf = Shelf(url, len(VALUES), store=store, name=f"keep-{keep}")
        for value in VALUES:
            shelf.finish([value], keep)
        assert shelf.models() == expected(left)
        assert [model.trial for model in artifacts.stored(shelf.engine, shelf.study_id)] == left
        files += len(left)
        assert files_in(store) == (0 if store == object_store.DATABASE else files)


def test_with_two_objectives_the_accuracy_counts(sqlite_url: str) -> None:
    shelf = Shelf(sqlite_url, 3, objectives=2)
    for accuracy, images in ((0.5, 900.0), (0.8, 5000.0), (0.7, 1.0)):
        shelf.finish([accuracy, images], 1)
    assert shelf.models() == expected([1])


def test_models_of_excluded_trials_make_room_first(url: str) -> None:
    shelf = Shelf(url, 4)
    for value in (0.9, 0.8):
        shelf.finish([value], 2)
    exclude(shelf.engine, shelf.study_id, [0], "the camera was off")
    assert [model.trial for model in artifacts.stored(shelf.engine, shelf.study_id)] == [1, 0]
    for value in (0.3, 0.2):
        shelf.finish([value], 2)
    assert shelf.models() == expected([1, 2])


@pytest.mark.parametrize("keep", [1, 3])
def test_workers_that_finish_at_once_leave_exactly_the_best(url: str, keep: int) -> None:
    """All have asked whether their model is wanted, and stored it, before the first of them finishes its trial."""
    rounds, workers = 3, 6
    shelf = Shelf(url, rounds * workers)
    values = [((7 * number) % 19) / 20 for number in range(rounds * workers)]
    together = threading.Barrier(workers)

    def work(_: int) -> None:
        queue = Queue(open_storage(url).engine, shelf.study_id)
        for _ in range(rounds):
            lease = claimed(queue)
            content = content_of(lease.number)
            artifact = artifacts.save(queue, lease, content, store=object_store.DATABASE, keep=keep)
            together.wait(60)
            queue.finish(lease, TrialState.COMPLETE, [values[lease.number]], artifact=artifact)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    best = sorted(range(len(values)), key=lambda number: (-values[number], number))[:keep]
    assert shelf.models() == expected(best)


def test_who_has_lost_the_lease_stores_and_names_nothing(url: str, store: str) -> None:
    shelf = Shelf(url, 1, store=store)
    first, second = shelf.worker(), shelf.worker()
    lease = claimed(first)
    artifact = artifacts.save(first, lease, content_of(7), store=store, keep=1)
    with shelf.engine.begin() as connection:
        connection.execute(sa.update(LEASES).values(expires_at=1.0))
    taken = claimed(second)
    with pytest.raises(LeaseLost):
        first.finish(lease, TrialState.COMPLETE, [0.9], artifact=artifact)
    if store == object_store.DATABASE:
        with pytest.raises(LeaseLost):
            artifacts.save(first, lease, content_of(7), store=store, keep=1)
    mine = artifacts.save(second, taken, content_of(0), store=store, keep=1)
    second.finish(taken, TrialState.COMPLETE, [0.5], artifact=mine)
    assert shelf.models() == expected([0])  # and nothing that the first had stored
    assert files_in(store) == (0 if store == object_store.DATABASE else 1)


def test_garbage_is_what_nothing_names_and_nobody_holds(url: str, store: str) -> None:
    shelf = Shelf(url, 3, store=store)
    shelf.finish([0.5], 1)
    crashed, working = shelf.worker(), shelf.worker()
    lost, held = claimed(crashed), claimed(working)
    artifacts.save(crashed, lost, content_of(1), store=store, keep=1)
    artifact = artifacts.save(working, held, content_of(2), store=store, keep=1)
    with shelf.engine.begin() as connection:
        connection.execute(sa.update(LEASES).where(LEASES.c.trial_id == lost.trial_id).values(expires_at=1.0))
    if store != object_store.DATABASE:
        Path(store, "notes.txt").write_text("mine")
    contents, files = artifacts.collect_garbage(shelf.engine, shelf.study_id, store)
    assert (contents, len(files)) == ((1, 0) if store == object_store.DATABASE else (0, 1))
    working.finish(held, TrialState.COMPLETE, [0.9], artifact=artifact)
    assert shelf.models() == expected([2])
    assert artifacts.collect_garbage(shelf.engine, shelf.study_id, store) == (0, [])
    assert files_in(store) == (0 if store == object_store.DATABASE else 2)


def test_content_that_is_gone_is_not_named(url: str, caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(url, 1)
    queue = shelf.worker()
    lease = claimed(queue)
    artifact = artifacts.save(queue, lease, content_of(0), store=object_store.DATABASE, keep=1)
    with shelf.engine.begin() as connection:
        connection.execute(sa.delete(ARTIFACT_CHUNKS).where(ARTIFACT_CHUNKS.c.position == 1))
    queue.finish(lease, TrialState.COMPLETE, [0.5], artifact=artifact)
    assert shelf.study.trials[0].values == [0.5]
    assert not artifacts.stored(shelf.engine, shelf.study_id)
    assert "it is not kept" in caplog.text


def test_what_is_damaged_is_neither_read_nor_copied(
    sqlite_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = ARTIFACT_CHUNKS.c.position == 0, ARTIFACT_CHUNKS.c.position == 1
    damages: list[sa.Update | sa.Delete] = [
        sa.update(ARTIFACT_CHUNKS).where(first).values(content=b"\0" * artifacts.CHUNK_BYTES),
        sa.update(ARTIFACT_CHUNKS).where(second).values(content=b"short"),
        sa.update(ARTIFACT_CHUNKS).where(first).values(content=b"\0" * 2 * LARGE),
        sa.delete(ARTIFACT_CHUNKS).where(first),
        sa.update(ARTIFACTS).values(sha256="0" * 64),
        sa.update(ARTIFACTS).values(size=2**31 - 1),
        sa.update(ARTIFACTS).values(size=-1),
        sa.update(ARTIFACTS).values(size=sa.literal_column("'many'")),
        sa.update(ARTIFACT_CHUNKS).where(first).values(content=sa.literal_column("'text'")),
        sa.update(ARTIFACTS).values(location="/etc/passwd"),
        sa.update(ARTIFACTS).values(location="../../trial-1-1-01234567.safetensors"),
    ]
    shelf = Shelf(sqlite_url, len(damages) + 1)
    for damage in damages:
        lease = shelf.finish([0.5], None)
        with shelf.engine.begin() as connection:
            connection.execute(damage.where(damage.table.c.trial_id == lease.trial_id))
    for model in artifacts.stored(shelf.engine, shelf.study_id):
        with pytest.raises(ArtifactNotFound, match=r"size|damaged"):
            DatabaseArtifactStore(shelf.engine).open_reader(model.id)
    whole = shelf.finish([0.5], None)
    target = open_storage(f"sqlite:///{tmp_path / 'target.db'}")
    transfer.copy(shelf.storage, target, "s")
    for number in range(len(damages)):
        assert f"the model of trial {number} is missing or damaged and was not copied" in caplog.text
    assert [model.trial for model in artifacts.stored(target.engine, 1)] == [whole.number]
    with target.engine.connect() as connection:
        for table, rows in ((ARTIFACTS, 1), (ARTIFACT_CHUNKS, 2), (TRIAL_SYSTEM_ATTRS, 1)):
            assert len(connection.execute(sa.select(table)).all()) == rows


def test_optuna_downloads_them_and_cannot_change_them(sqlite_url: str, tmp_path: Path) -> None:
    shelf = Shelf(sqlite_url, 1)
    shelf.finish([0.5], 1)
    (model,) = artifacts.stored(shelf.engine, shelf.study_id)
    store, file = DatabaseArtifactStore(shelf.engine), tmp_path / "model"
    download_artifact(artifact_store=store, file_path=str(file), artifact_id=model.id)
    assert file.read_bytes() == content_of(0)
    with pytest.raises(OSError, match="by workers alone"):
        optuna.artifacts.upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=shelf.study)
    with pytest.raises(OSError, match="are removed with their study"):
        store.remove(model.id)
    with pytest.raises(ArtifactNotFound):
        store.open_reader("0" * 36)
    assert shelf.models() == expected([0])


def test_a_store_that_refuses_to_remove_costs_a_warning(
    sqlite_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store"
    shelf = Shelf(sqlite_url, 2, store=str(folder))
    shelf.finish([0.5], 1)
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()  # unlink() refuses it
    with caplog.at_level(logging.WARNING):
        shelf.finish([0.9], 1)
    assert f"the file '{file.name}' was not removed" in caplog.text
    assert shelf.models() == expected([1])


def test_models_go_with_copies_exports_and_imports(url: str, store: str, tmp_path: Path) -> None:
    shelf = Shelf(url, 3, store=store)
    for value in (0.3, 0.9, 0.5):
        shelf.finish([value], 2)
    transfer.copy(shelf.storage, shelf.storage, "s", "twin")
    exported = open_storage(sqlite_url_of(tmp_path / "s.study"))
    transfer.copy(shelf.storage, exported, "s")
    close(exported.engine)
    other = tmp_path / "other.db"
    transfer.import_study(tmp_path / "s.study", sqlite_url_of(other))
    ids = set()
    for storage, name in ((shelf.storage, "s"), (shelf.storage, "twin"), (open_storage(sqlite_url_of(other)), "s")):
        study = optuna.load_study(study_name=name, storage=storage)
        for model in artifacts.stored(storage.engine, study._study_id):
            ids.add(model.id)
            with DatabaseArtifactStore(storage.engine).open_reader(model.id) as file:
                assert file.read() == content_of(model.trial)
            (meta,) = get_all_artifact_meta(study.trials[model.trial], storage=storage)
            assert meta.artifact_id == model.id
        assert [model.trial for model in artifacts.stored(storage.engine, study._study_id)] == [1, 2]
    assert len(ids) == 6  # each copy has ids of its own: one may be read under the name of no other
    transfer.delete(shelf.storage, "twin")
    assert shelf.models() == expected([1, 2])
    transfer.delete(shelf.storage, "s")
    assert files_in(store) == 0
    with shelf.engine.connect() as connection:
        for table in (ARTIFACTS, ARTIFACT_CHUNKS):
            assert connection.execute(sa.select(table)).all() == []


def test_an_imported_files_descriptions_are_written_anew(sqlite_url: str, tmp_path: Path) -> None:
    """The type that the dashboard would send, and ids of artifacts that the file does not have, are not taken over."""
    shelf = Shelf(sqlite_url, 2)
    for value in (0.3, 0.9):
        shelf.finish([value], None)
    exported = open_storage(f"sqlite:///{tmp_path / 's.study'}")
    transfer.copy(shelf.storage, exported, "s")
    evil = json.dumps(json.dumps({"artifact_id": "f" * 36, "filename": "a.html", "mimetype": "text/html"}))
    with exported.engine.begin() as connection:
        connection.execute(sa.update(TRIAL_SYSTEM_ATTRS).values(value_json=evil))
        row = {"trial_id": 1, "key": f"artifacts:{'f' * 36}", "value_json": evil}
        connection.execute(sa.insert(TRIAL_SYSTEM_ATTRS).values(row))
    close(exported.engine)
    transfer.import_study(tmp_path / "s.study", sqlite_url, "t")
    metas = [
        meta
        for trial in optuna.load_study(study_name="t", storage=shelf.storage).trials
        for meta in get_all_artifact_meta(trial, storage=shelf.storage)
    ]
    assert [(m.filename, m.mimetype) for m in metas] == [
        (f"trial-{n}.safetensors", "application/octet-stream") for n in range(2)
    ]


@pytest.mark.parametrize(
    ("table", "values", "fault"),
    [
        (ARTIFACTS, {"location": "trial-1-1-01234567.safetensors"}, "location IS NULL"),
        (ARTIFACTS, {"size": object_store.MOST_BYTES + 1}, "size BETWEEN"),
        (ARTIFACTS, {"sha256": "x" * 64}, "sha256"),
        (ARTIFACTS, {"artifact_id": "x" * 200}, "artifact_id"),
        (ARTIFACT_CHUNKS, {"content": b"\0" * (artifacts.CHUNK_BYTES + 1)}, "length"),
        (ARTIFACT_CHUNKS, {"position": -1}, "position"),
    ],
)
def test_files_with_impossible_artifacts_are_refused(
    sqlite_url: str, tmp_path: Path, table: sa.Table, values: dict[str, Any], fault: str
) -> None:
    file = tmp_path / "s.study"
    shelf = Shelf(f"sqlite:///{file}", 1)
    queue = shelf.worker()
    lease = claimed(queue)
    artifact = artifacts.save(queue, lease, b"small", store=object_store.DATABASE, keep=1)
    queue.finish(lease, TrialState.COMPLETE, [0.5], artifact=artifact)
    with shelf.engine.begin() as connection:
        connection.execute(sa.update(table).values(values))
    close(shelf.engine)
    with pytest.raises(UserError, match=fault):
        transfer.import_study(file, sqlite_url)


def test_the_dashboard_lists_and_downloads_them_and_changes_none(sqlite_url: str, tmp_path: Path) -> None:
    """Whatever their description says: they are saved, never shown, and no route writes or deletes one."""
    shelf = Shelf(sqlite_url, 2)
    shelf.finish([0.3], None)
    queue = shelf.worker()
    lease = claimed(queue)
    large = b"large" * (artifacts.IN_MEMORY_BYTES // 4)  # goes through a temporary file
    artifact = artifacts.save(queue, lease, large, store=object_store.DATABASE, keep=None)
    queue.finish(lease, TrialState.COMPLETE, [0.9], artifact=artifact)
    first, second = (
        model.id for model in sorted(artifacts.stored(shelf.engine, shelf.study_id), key=lambda m: m.trial)
    )
    evil = {"artifact_id": first, "filename": "a.html", "mimetype": "text/html", "encoding": "gzip"}
    with shelf.engine.begin() as connection:
        row = TRIAL_SYSTEM_ATTRS.c.key == artifacts.ATTRIBUTE + first
        connection.execute(sa.update(TRIAL_SYSTEM_ATTRS).where(row).values(value_json=json.dumps(json.dumps(evil))))
    with dashboard(sqlite_url, tmp_path) as served:

        def ask(method: str, path: str, body: str | None = None) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

        listed = json.loads(ask("GET", "/api/studies/1")[2])["trials"]
        assert [[each["artifact_id"] for each in trial["artifacts"]] for trial in listed] == [[first], [second]]
        for number, (artifact_id, content) in enumerate([(first, content_of(0)), (second, large)]):
            status, headers, body = ask("GET", f"/artifacts/1/{number + 1}/{artifact_id}")
            assert (status, body == content) == (200, True)
            assert headers["content-type"] == "application/octet-stream"
            assert headers["content-disposition"] == f'attachment; filename="trial-{number}.safetensors"'
            assert headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in headers
            assert not {"content-encoding", "content-encodings"} & headers.keys()
        assert ask("GET", f"/artifacts/1/1/{second}")[0] == 404  # not this trial's
        file = json.dumps({"file": "data:text/html;base64,PHA+", "filename": "a.html"})
        for method, path in (
            ("POST", "/api/artifacts/1"),
            ("POST", "/api/artifacts/1/1"),
            ("DELETE", f"/api/artifacts/1/{first}"),
            ("DELETE", f"/api/artifacts/1/1/{first}"),
        ):
            assert ask(method, path, file)[0] == 403
        with shelf.engine.begin() as connection:
            connection.execute(sa.delete(ARTIFACT_CHUNKS).where(ARTIFACT_CHUNKS.c.artifact_id == first))
        status, _, body = ask("GET", f"/artifacts/1/1/{first}")
        assert (status, "damaged" in body.decode()) == (404, True)
        assert ask("DELETE", "/api/studies/1")[0] == 204  # the study, and its models with it
        with shelf.engine.connect() as connection:
            for table in (ARTIFACTS, ARTIFACT_CHUNKS, TRIAL_SYSTEM_ATTRS):
                assert connection.execute(sa.select(table)).all() == []
    assert "Traceback" not in served.log.read_text()
