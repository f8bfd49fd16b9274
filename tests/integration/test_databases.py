"""Database files as people copy, protect and share them, and URLs as they write them."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import psycopg
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState, create_trial

from dashboards import status
from storage import budgets, queries, transfer
from storage.engine import close, open_engine, open_storage
from storage.enqueue import enqueue_trials
from storage.errors import UserError
from storage.queue import Queue
from storage.schema import ATTEMPTS, LEASES
from storage.study_name import check_study_name
from study import exit_codes
from tests.support.command import study, study_process
from tests.support.harness import Harness, config_of
from tests.support.postgres import Postgres

WRITER = """
import sys, time
from pathlib import Path
import optuna
from storage.engine import open_storage
storage = open_storage(f"sqlite:///{sys.argv[1]}")
optuna.create_study(study_name="s", storage=storage).set_user_attr("config", {})
Path(sys.argv[1] + ".written").touch()
if sys.argv[2] == "waits":
    while True:
        time.sleep(0.05)
"""


def alone(path: Path) -> list[str]:
    """The names of the studies in a file that was copied without those beside it."""
    copied = path.with_name("alone.db")
    shutil.copy(path, copied)
    with sqlite3.connect(copied) as connection:
        names = [name for (name,) in connection.execute("SELECT study_name FROM studies")]
    connection.close()
    return names


@pytest.mark.parametrize("end", ["returns", "is interrupted"])
@pytest.mark.parametrize("reader", [False, True], ids=["alone", "beside a reader"])
def test_the_file_alone_is_complete_when_its_writer_has_ended(end: str, reader: bool, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    if reader:
        close(open_storage(f"sqlite:///{path}").engine)
        watching = open_engine(f"sqlite:///{path}")
        watching.connect().close()  # it stays in the pool
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "returns" if end == "returns" else "waits"])
    if end == "is interrupted":
        deadline = time.monotonic() + 120
        while not Path(f"{path}.written").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    process.wait(120)
    assert alone(path) == ["s"]


def test_closing_moves_the_log_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    storage, other = open_storage(f"sqlite:///{path}"), open_storage(f"sqlite:///{path}")
    optuna.create_study(study_name="s", storage=storage)
    other.get_all_studies()
    close(storage.engine)
    assert alone(path) == ["s"]


@pytest.fixture
def protected() -> Iterator[Path]:
    """A folder that this process may only read, outside pytest's own, which others may not enter."""
    folder = Path(tempfile.mkdtemp(prefix="study-protected-"))
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


LOOK = """
import os, sys
from dashboards import status
from storage.engine import open_engine, open_storage
from storage.errors import UserError

def look(url):
    yield status.read(open_engine(url), "s").progress.states["waiting"]
    yield len(open_storage(url, create=False, reading=True).get_all_studies())
    yield len(open_storage(url, create=False, reading=True, may_write=True).get_all_studies())

list(look(sys.argv[2]))  # all is imported that is imported by need
if os.geteuid() == 0:  # whom no permission holds back
    os.setgid(65534)
    os.setuid(65534)
try:
    print(*look(sys.argv[1]))
except UserError as error:
    print(error)
"""


def look(path: Path, usual: str) -> str:
    """What somebody without permission to write sees; `usual`: a database that nobody protects."""
    command = [sys.executable, "-c", LOOK, f"sqlite:///{path}", usual]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('usual') / 'study.db'}"
    close(Harness(url, config_of()).storage.engine)
    return url


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_read_only_database_is_read(journal: str, protected: Path, usual: str) -> None:
    path = protected / "study.db"
    bench = Harness(f"sqlite:///{path}", config_of())
    close(bench.storage.engine)
    with sqlite3.connect(path) as connection:
        assert connection.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
    connection.close()
    path.chmod(0o444)
    protected.chmod(0o555)
    before = path.read_bytes()
    assert look(path, usual) == "4 1 1"
    assert [file.name for file in protected.iterdir()] == ["study.db"]
    assert path.read_bytes() == before


def test_a_log_that_cannot_be_read_is_named(protected: Path, usual: str) -> None:
    path = protected / "study.db"
    bench = Harness(f"sqlite:///{path}", config_of())
    shutil.copy(f"{path}-wal", protected / "log")
    close(bench.storage.engine)
    shutil.move(protected / "log", f"{path}-wal")
    for file in protected.iterdir():
        file.chmod(0o444)
    protected.chmod(0o555)
    assert "study.db-wal) that cannot be read in this folder; copy both" in look(path, usual)
    assert stat.S_IMODE(protected.stat().st_mode) == 0o555


def test_the_options_of_a_postgresql_url_are_kept(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA mine")
        connection.execute("CREATE SCHEMA other")
    mine = f"{url}?options=-csearch_path%3Dmine&application_name=me&connect_timeout=77"
    storage = open_storage(mine)
    optuna.create_study(study_name="s", storage=storage)
    with storage.engine.connect() as connection:
        shown = [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in ("search_path", "application_name")]
        zone, idle = (
            connection.exec_driver_sql(f"SHOW {name}").scalar()
            for name in ("timezone", "idle_in_transaction_session_timeout")
        )
    assert (shown, zone, idle) == (["mine", "me"], "UTC", "30s")
    with psycopg.connect(url) as connection:
        schemas = connection.execute("SELECT schemaname FROM pg_tables WHERE tablename IN ('trials', 'trial_leases')")
        assert {schema for (schema,) in schemas.fetchall()} == {"mine"}
    monkeypatch.setenv("PGOPTIONS", "-c search_path=other")
    open_storage(url)
    with psycopg.connect(url) as connection:
        schemas = connection.execute("SELECT schemaname FROM pg_tables WHERE tablename = 'trial_leases'")
        assert {schema for (schema,) in schemas.fetchall()} == {"mine", "other"}
    for look_at in (open_engine(mine), open_storage(mine, create=False, reading=True).engine):
        assert sa.inspect(look_at).has_table(LEASES.name)


YEAR = 365 * 86_400.0


def test_a_lease_longer_than_its_length_is_ignored(url: str) -> None:
    """The clock was a year ahead when the first worker claimed; its trial must not wait for a year."""
    storage = open_storage(url)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    trials = [create_trial(state=TrialState.WAITING, user_attrs={"queue_position": 0})]
    enqueue_trials(storage.engine, study._study_id, {"config": {}}, trials)
    first = Queue(storage.engine, study._study_id, owner="first", seconds=10)
    second = Queue(storage.engine, study._study_id, owner="second", seconds=10)
    lease = first.claim()
    assert lease is not None
    assert second.claim() is None  # a lease like any other
    with storage.engine.begin() as connection:
        ahead = {"expires_at": LEASES.c.expires_at + YEAR}
        connection.execute(sa.update(LEASES).values(ahead))
        connection.execute(sa.update(ATTEMPTS).values(started_at=ATTEMPTS.c.started_at - 5))
    assert queries.progress(storage.engine, study._study_id).running == ()
    assert budgets.spending(storage.engine, study._study_id).amounts["hours"] < 1
    transfer.copy(storage, storage, "s", "copy")  # nobody holds it
    taken = second.claim()
    assert taken is not None
    assert (taken.trial_id, taken.token) == (lease.trial_id, lease.token + 1)
    (vanished, _) = queries.attempts(storage.engine, study._study_id)
    assert vanished.outcome == "vanished"
    assert vanished.ended_at is not None
    assert 0 <= vanished.ended_at - vanished.started_at < 3600
    assert first.claim() is None


@pytest.mark.parametrize(
    "name", ["quick", "a/b?c#d", "日本語", "größe 2", "x" * 512, "a-b", "[bold]", "💥", "a&b;c|d $(e)"]
)
def test_names_that_a_study_may_have(name: str, url: str) -> None:
    check_study_name(name)
    storage = open_storage(url)
    optuna.create_study(study_name=name, storage=storage)
    assert optuna.get_all_study_names(storage) == [name]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("-x", "dash"),
        ("--help", "dash"),
        ("a\nb", "control"),
        ("a\x1b[2J", "control"),
        ("a\x00", "control"),
        ("a\u202eb", "control"),
        ("a\u2028b", "control"),
        ("x" * 513, "513 characters"),
        ("a\udcff", "not UTF-8"),
    ],
)
def test_names_that_no_study_may_have(name: str, fault: str, sqlite_url: str) -> None:
    with pytest.raises(UserError, match=fault) as refusal:
        check_study_name(name)
    assert str(refusal.value).isprintable()
    storage = open_storage(sqlite_url)
    optuna.create_study(study_name="s", storage=storage)
    if name:
        with pytest.raises(UserError, match=fault):
            transfer.copy(storage, storage, "s", name)


@pytest.mark.parametrize("tables", ["of Optuna", "of ours"])
def test_a_copy_by_optuna_is_recognised(tables: str, tmp_path: Path) -> None:
    """It has the trials' values, and neither epochs nor attempts nor checkpoints."""
    bench = Harness(f"sqlite:///{tmp_path / 'study.db'}", config_of())
    bench.work(most=1)
    copied = f"sqlite:///{tmp_path / 'copy.db'}"
    if tables == "of ours":
        close(open_storage(copied).engine)
    optuna.copy_study(from_study_name="s", from_storage=bench.storage, to_storage=copied)
    with pytest.raises(UserError, match=r"'s' in .* was copied by another program .*study copy s --from URL --to URL"):
        status.read(open_engine(copied), "s")
    if tables == "of ours":
        assert [s.name for s in queries.study_summaries(open_engine(copied))] == ["s"]
        transfer.delete(open_storage(copied), "s")


def test_a_dashboard_may_write_where_looking_may_not(sqlite_url: str) -> None:
    bench = Harness(sqlite_url, config_of())
    for_dashboard = open_storage(sqlite_url, create=False, reading=True, may_write=True)
    for_dashboard.set_study_user_attr(bench.study._study_id, "note", "by a visitor")
    assert optuna.load_study(study_name="s", storage=bench.storage).user_attrs["note"] == "by a visitor"
    with pytest.raises(optuna.exceptions.StorageInternalError):
        open_storage(sqlite_url, create=False, reading=True).set_study_user_attr(bench.study._study_id, "note", "x")


@pytest.mark.parametrize("name", ["", "-x", "a\x1b[2Jb", "x" * 513])
def test_a_launch_under_a_name_that_no_study_may_have_leaves_nothing(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "study", "launch", "quick", "--device", "cpu", f"--name={name}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "the name of a study is" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        (
            "UPDATE trial_epochs SET accuracy = 'high'",
            "trial_epochs has a value of accuracy that is no double",
        ),
        (
            "UPDATE trials SET state = 'PAUSED' WHERE number = 0",
            "trials has a value of state that is no enum",
        ),
        ("UPDATE trials SET datetime_start = 'yesterday'", "stored value that cannot be read"),
        ("UPDATE trial_params SET distribution_json = '{'", "the parameters of trial 1 cannot be read"),
        ("UPDATE trial_user_attributes SET value_json = '{'", "stored value that cannot be read"),
    ],
)
def test_a_value_that_cannot_be_read_is_named(statement: str, fault: str, tmp_path: Path) -> None:
    """SQLite takes any value in any column; whoever wrote it, no verb ends with a traceback."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    harness = Harness(url, config_of(search={"sampler": "tpe", "trials": 2}, training={"epochs": 1}))
    harness.work()
    close(harness.storage.engine)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute(statement)
    connection.close()
    ended = [study(*verb, cwd=tmp_path) for verb in (("status", "s"), ("list",), ("report", "s"), ("logs", "s"))]
    refused = [each for each in ended if each.returncode]
    assert refused
    for each in refused:
        assert each.returncode == exit_codes.BAD_INPUT, each.stderr
        assert re.fullmatch(r"study: .+; correct (it|them).*\n", each.stderr)
    assert any(fault in each.stderr for each in refused), refused


def test_a_trial_that_cannot_be_read_costs_the_others_no_attempt(tmp_path: Path) -> None:
    """The sampler reads all that have finished; what it cannot read is no fault of the trial that asks."""
    harness = Harness(
        f"sqlite:///{tmp_path / 'study.db'}",
        config_of(search={"sampler": "tpe", "trials": 3}, training={"epochs": 1}),
    )
    harness.work(most=1)
    with harness.storage.engine.begin() as connection:
        connection.execute(sa.text("UPDATE trial_params SET distribution_json = '{'"))
    ended = study_process("worker", "s", "--device", "cpu", cwd=tmp_path)
    assert ended.returncode == exit_codes.BAD_INPUT, ended.stderr
    assert re.fullmatch(r"study: the trial with the id 1 has a stored value that cannot be read .*\n", ended.stderr)
    with harness.storage.engine.connect() as connection:
        assert set(connection.scalars(sa.select(LEASES.c.attempts))) == {0}


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    for verb in (["list"], ["launch", "quick"]):
        refused = study(*verb, "--storage", f"sqlite:///{tmp_path}", cwd=tmp_path)
        assert refused.returncode == exit_codes.BAD_INPUT
        assert f"{tmp_path} is a folder" in refused.stderr


@pytest.mark.parametrize("version", ["x'00ff'", "17", "printf('%05000d', 7)", "''", "'-1'"])
def test_a_schema_version_of_another_form_is_refused(version: str, tmp_path: Path) -> None:
    close(open_storage(f"sqlite:///{tmp_path / 'study.db'}").engine)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute(f"UPDATE study_alembic_version SET version_num = {version}")
    connection.close()
    refused = study("list", cwd=tmp_path)
    assert refused.returncode in (exit_codes.OK, exit_codes.BAD_INPUT)  # 17 may be a version some day
    assert len(refused.stderr) < 400
    assert "unexpected" not in refused.stderr
