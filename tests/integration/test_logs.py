"""What workers log about their trials: stored with the attempt, bounded, fenced, taken along, shown as plain text."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

import study as api
from dashboards import logs
from storage import transfer
from storage.engine import close, open_engine, open_storage
from storage.errors import UserError
from storage.queue import Lease, LeaseLost, Queue
from storage.schema import LEASES, MOST_CHARACTERS, TRIAL_LOGS
from storage.text import without_passwords
from storage.trial_logs import KEPT_LAST, MOST_LINES, LogLine, TrialLog
from storage.url import sqlite_url
from study import logs as command_logs
from study.config import extensions
from study.config.loading import parse_config
from study.trial.logged import collect
from study.trial.runner import run_trial
from study.worker.stop_monitor import StopMonitor
from tests.support import own_code
from tests.support.command import process_state_kept, study
from tests.support.harness import Harness, StopAfter, config_of, scripted_accuracies
from tests.support.postgres import Postgres

CODE = Path(own_code.__file__).parent
ONE: dict[str, Any] = {"policy": {"alpha": 60, "beta": 0.5}, "training": {"epochs": 3}}


@pytest.fixture(autouse=True)
def _code_is_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(extensions.VARIABLE, str(CODE))
    path = list(sys.path)
    yield
    sys.path[:] = path


def claimed(queue: Queue) -> Lease:
    lease = queue.claim()
    assert lease is not None
    return lease


def lines_of(harness: Harness, trial: int | None = None) -> list[LogLine]:
    return list(logs.read(harness.storage.engine, "s", trial))


def messages(harness: Harness, trial: int | None = None) -> list[str]:
    return [line.message for line in lines_of(harness, trial)]


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def expire(harness: Harness) -> None:
    with harness.storage.engine.begin() as connection:
        connection.execute(sa.update(LEASES).values(expires_at=1.0))


# What is logged


def test_a_normal_trial_has_lines(url: str) -> None:
    harness = Harness(url, config_of(**ONE))
    harness.work()
    (line, *_) = lines_of(harness)
    assert (line.trial, line.attempt, line.level, line.owner.split(":")[1]) == (0, 1, "info", str(os.getpid()))
    assert abs(line.at - time.time()) < 60
    value = harness.study.trials[0].value
    begun, ended = messages(harness)
    assert begun.startswith("trial 0: seed 0, on cpu")
    assert ended.startswith(f"trial 0 is complete: accuracy {value:.4f} in epoch ")


def test_pruned_interrupted_and_resumed_trials_say_so(url: str) -> None:
    config = config_of(policy={"alpha": [60, 70, 90], "beta": 0.5}, pruning={"kind": "median", "n_startup_trials": 1})
    harness = Harness(url, config)
    accuracies = {60: 0.5, 70: 0.1, 90: 0.9}
    with scripted_accuracies(lambda trainer: accuracies[len(trainer.policy.active)]):
        harness.work(most=2)
        harness.work(StopAfter(4), most=1)
        harness.work(most=1)
    assert "trial 1 is pruned: accuracy 0.1000 in epoch 1 of 1" in messages(harness, 1)[-1]
    lines = [(line.attempt, line.message) for line in lines_of(harness, 2)]
    assert [attempt for attempt, _ in lines] == [1, 1, 2, 2, 2]
    assert lines[0][1] == lines[2][1] == f"trial 2: alpha 90, seed 0, on {harness.data.device}"
    assert [message for _, message in lines][1:4:2] == [
        "trial 2 is interrupted after epoch 1",
        "trial 2 resumes after epoch 1",
    ]


def test_a_failed_attempt_leaves_its_traceback(url: str) -> None:
    harness = Harness(url, config_of(**ONE))
    queue = harness.queue()
    lease = claimed(queue)

    def broken(_: object) -> float:
        raise RuntimeError("no more disk")

    with scripted_accuracies(broken), pytest.raises(RuntimeError):
        run_trial(harness.study, harness.config, harness.data, queue, lease, StopMonitor(), harness.fallback)
    queue.release(lease, error="RuntimeError: no more disk")  # as a worker does
    lines = lines_of(harness)
    assert lines[-1].level == "error"
    assert lines[-1].message.startswith("trial 0: attempt failed: RuntimeError: no more disk")
    assert any(line.message.endswith(", in broken") for line in lines)
    assert sum(line.message == '    raise RuntimeError("no more disk")' for line in lines) == 1


def test_a_trial_that_cannot_run_says_why(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}))
    harness.study.enqueue_trial({"alpha": 60, "beta": 7.0})
    harness.work()
    (line,) = lines_of(harness, 4)
    assert (line.level, "trial 4 failed: its parameters do not fit" in line.message) == ("warning", True)


def test_a_killed_worker_and_its_successor_are_two_attempts(url: str) -> None:
    """The first is a process of its own, killed with kill -9 in the middle of a trial. Own code logs and warns."""
    network = {"name": "own_code:talkative", "width": 1.0}
    harness = Harness(
        url,
        config_of(
            **ONE | {"training": {"epochs": 20}},
            network=network,
            checkpoint={"every_seconds": 0},
            artifacts={"keep": "none"},
        ),
    )
    worker = subprocess.Popen(
        [sys.executable, "-m", "study", "worker", "s", "--device", "cpu", "--storage", url],
        env=os.environ | {"STEP_SECONDS": "0.3"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: len(messages(harness)) > 2)
        queue = harness.queue()
        wait_for(lambda: queue.stored_progress(harness.study.trials[0]._trial_id).epochs >= 1)
    finally:
        worker.send_signal(signal.SIGKILL)
        _, console = worker.communicate()
    expire(harness)
    with process_state_kept():
        command_logs.configure()
        harness.work()
    assert [trial.state for trial in harness.study.trials] == [TrialState.COMPLETE]
    lines = lines_of(harness)
    attempts = [[line for line in lines if line.attempt == number] for number in (1, 2)]
    assert [int(each[0].owner.split(":")[1]) for each in attempts] == [worker.pid, os.getpid()]
    assert any("resumes after epoch" in line.message for line in attempts[1])
    assert "is complete" in attempts[1][-1].message
    for each in attempts:
        shown = {(line.level, line.message) for line in each}
        assert ("warning", "\\x1b[2J<b>50 images</b> from postgresql://me:***@db/x") in shown
        assert sum(line.message == "the weights are large" for line in each) == 1
    # On the terminal of a worker by hand: each warning once, and of a trial its end alone.
    assert console.splitlines().count("warning: the weights are large") == 1
    assert "seed 0" not in console
    assert "\x1b" not in console


def test_a_worker_stores_warnings_in_each_of_its_trials(sqlite_url: str) -> None:
    """Python shows a warning once a process, unless it is made to forget."""
    network = {"name": "own_code:talkative", "width": 1.0}
    config = config_of(
        policy={"alpha": [60, 90], "beta": 0.5}, training={"epochs": 1}, network=network, artifacts={"keep": "none"}
    )
    harness = Harness(sqlite_url, config)
    with process_state_kept():
        command_logs.configure()
        harness.work()
    for trial in (0, 1):
        assert messages(harness, trial).count("the weights are large") == 1


# Bounds and what a database may do


def test_an_attempt_stores_its_first_and_its_last_lines(url: str) -> None:
    harness = Harness(url, config_of(**ONE))
    queue = harness.queue()
    lease = claimed(queue)
    for number in range(1000):
        lease.log.add(logging.WARNING, f"line {number}")
        if number in (10, 700):
            queue.write_log(lease)
            assert len(lines_of(harness)) == (11 if number == 10 else MOST_LINES - KEPT_LAST - 1)
    queue.finish(lease, TrialState.COMPLETE, [0.5])
    lines = lines_of(harness)
    assert len(lines) == MOST_LINES
    assert lines[0].message == "line 0"
    assert "last 50 lines are stored when the attempt ends" in lines[-KEPT_LAST - 2].message
    assert lines[-KEPT_LAST - 1].message == "802 lines before this one were not stored"
    assert [line.message for line in lines[-KEPT_LAST:]] == [f"line {n}" for n in range(950, 1000)]
    assert [line.position for line in lines] == list(range(MOST_LINES))


def test_lines_are_short_and_without_control_characters() -> None:
    log = TrialLog()
    log.add(25, "a" * 10_000_000 + "\n\n\x00\x1b]0;x\x07\u202e\ud800 \t|\r\nlast")
    long, signs, last = log.unstored()
    assert (len(long.message), long.message[-2:], long.level) == (MOST_CHARACTERS, "a…", "info")
    assert signs.message == "\\x00\\x1b]0;x\\x07\\u202e\\ud800     |"
    assert last.message == "last"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:hunter2@db/x", "postgresql://me:***@db/x"),
        ("to s3://a:p@ss@host/x now", "to s3://a:***@host/x now"),
        ("db?sslpassword=hunter2&a=1", "db?sslpassword=***&a=1"),
        ("at http://127.0.0.1:8080/x", "at http://127.0.0.1:8080/x"),
    ],
)
def test_passwords_are_not_stored(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


def test_who_has_lost_the_lease_writes_nothing(url: str) -> None:
    harness = Harness(url, config_of(**ONE))
    first, second = harness.queue(), harness.queue()
    old = claimed(first)
    expire(harness)
    new = claimed(second)
    old.log.add(logging.WARNING, "from the past")
    with pytest.raises(LeaseLost):
        first.write_log(old)
    with pytest.raises(LeaseLost):
        first.finish(old, TrialState.COMPLETE, [0.5])
    first.release(old)
    assert messages(harness) == []
    new.log.add(logging.WARNING, "from now")
    second.write_log(new)
    assert [(line.attempt, line.message) for line in lines_of(harness)] == [(2, "from now")]


def test_writing_the_log_does_not_bring_a_released_lease_back(url: str) -> None:
    harness = Harness(url, config_of(**ONE))
    queue = harness.queue()
    lease = claimed(queue)
    queue.release(lease)
    lease.log.add(logging.INFO, "late")
    queue.write_log(lease)
    assert claimed(harness.queue()).token == 2


def test_a_database_that_cannot_hold_a_line_does_not_fail_the_trial(postgres: Postgres) -> None:
    """One in Latin-1 has no character for 学."""
    name = postgres.new_database().rpartition("/")[2] + "_latin"
    engine = sa.create_engine(postgres.url().replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(
            f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        )
    harness = Harness(postgres.url(name), config_of(**ONE))
    values = iter([0.1, 0.2, 0.3])

    def accuracy(_: object) -> float:
        logging.getLogger("own").warning("学")
        return next(values)

    with scripted_accuracies(accuracy):
        harness.work()
    assert [(t.state, t.value) for t in harness.study.trials] == [(TrialState.COMPLETE, 0.3)]


def test_the_beat_of_the_lease_stores_lines(url: str) -> None:
    harness = Harness(url, config_of(**ONE))
    queue = harness.queue(seconds=0.4)
    lease = claimed(queue)
    with queue.renewing(lease):
        lease.log.add(logging.INFO, "still here")
        wait_for(lambda: messages(harness) == ["still here"], 20)


# Taken along, and deleted


def rows(harness_engine: sa.Engine) -> list[tuple[Any, ...]]:
    columns = [column for column in TRIAL_LOGS.c if column.name != "trial_id"]
    with harness_engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(*columns).order_by(TRIAL_LOGS.c.at, *columns))]


def test_copies_exports_and_imports_have_the_lines_and_a_deleted_study_has_none(url: str, tmp_path: Path) -> None:
    harness = Harness(url, config_of(policy={"alpha": [60, 90], "beta": 0.5}, training={"epochs": 1}))
    harness.work()
    engine = harness.storage.engine
    before = rows(engine)
    assert len(before) == 4
    target = open_storage(sqlite_url(tmp_path / "s.study"))
    transfer.copy(harness.storage, target, "s")
    assert rows(target.engine) == before
    close(target.engine)
    transfer.delete(harness.storage, "s")
    assert rows(engine) == []
    transfer.import_study(tmp_path / "s.study", url, "again", check_config=parse_config)
    assert rows(engine) == before
    transfer.copy(harness.storage, harness.storage, "again", "twice")
    assert len(rows(engine)) == 8
    assert [line.message for line in logs.read(engine, "twice")] == [
        line.message for line in logs.read(engine, "again")
    ]


def test_a_requeued_trial_keeps_the_lines_of_its_attempts(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of(**ONE))
    queue = harness.queue()
    lease = claimed(queue)
    lease.log.add(logging.ERROR, "it broke")
    queue.fail(lease, "broken")
    transfer.requeue(harness.storage, "s", trials=None)
    harness.work()
    lines = [(line.attempt, line.message) for line in lines_of(harness)]
    assert lines[0] == (1, "it broke")
    assert (2, "trial 0 has no checkpoint: it starts from epoch 0") in lines


# Shown


@pytest.fixture
def shown(sqlite_url: str) -> Harness:
    """Two trials, one with lines."""
    harness = Harness(sqlite_url, config_of(policy={"alpha": [60, 90], "beta": 0.5}, training={"epochs": 1}))
    harness.work(most=1)
    return harness


def test_the_verb_shows_time_attempt_worker_and_level(shown: Harness, sqlite_url: str, tmp_path: Path) -> None:
    result = study("logs", "s", "--trial", "0", "--storage", sqlite_url, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    first, last = result.stdout.splitlines()
    worker = f"{os.uname().nodename}:{os.getpid()}"
    assert f" UTC trial 0 attempt 1 {worker} info    trial 0: alpha 60, seed 0, on cpu" in first
    assert first.startswith("20")
    assert " info    trial 0 is complete: accuracy " in last
    empty = study("logs", "s", "--trial", "1", "--storage", sqlite_url, cwd=tmp_path)
    assert (empty.returncode, empty.stdout) == (0, "")
    assert empty.stderr == "workers have logged nothing yet about trial 1\n"


@pytest.mark.parametrize("more", [(), ("--follow",)])
def test_a_trial_that_is_not_there_is_one_line(
    more: tuple[str, ...], shown: Harness, sqlite_url: str, tmp_path: Path
) -> None:
    result = study("logs", "s", "--trial", "7", *more, "--storage", sqlite_url, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "study: no trial 7 in this study; trials there: 0 to 1\n"


def test_a_hostile_line_does_nothing_on_a_terminal(shown: Harness, sqlite_url: str, tmp_path: Path) -> None:
    """Also one that was written into the database by hand."""
    values = {"message": "\x1b[2J\x1b]0;x\x07<script>[red]x[/red]\u202e\rtrial 9\n2026 forged", "at": 1e300}
    with shown.storage.engine.begin() as connection:
        connection.execute(sa.update(TRIAL_LOGS).where(TRIAL_LOGS.c.position == 0).values(values))
        connection.exec_driver_sql("UPDATE trial_attempts SET owner = 'h\x1b[2J:1\n:2', device = '\x1b'")
    result = study("logs", "s", "--storage", sqlite_url, cwd=tmp_path)
    assert result.returncode == 0
    assert all(line.isprintable() for line in result.stdout.splitlines())
    assert len(result.stdout.splitlines()) == 2
    assert "<script>[red]x[/red]\\u202e trial 9 2026 forged" in result.stdout
    assert "at an unknown time" in result.stdout


def test_following_shows_lines_as_they_come_and_ends_with_the_study(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SECONDS", 0.05)
    harness = Harness(url, config_of(policy={"alpha": [60, 90], "beta": 0.5}, training={"epochs": 1}))
    seen: list[LogLine] = []
    of_one: list[LogLine] = []

    def follow(into: list[LogLine], trial: int | None) -> None:
        for line in logs.follow(open_engine(url), "s", trial):
            into.append(line)

    follower = threading.Thread(target=follow, args=(seen, None))
    other = threading.Thread(target=follow, args=(of_one, 0))
    follower.start()
    other.start()
    queue = harness.queue()
    lease = claimed(queue)
    for number in range(300):
        lease.log.add(logging.INFO, f"line {number}")
    queue.write_log(lease)
    wait_for(lambda: len(of_one) > 100)
    queue.finish(lease, TrialState.COMPLETE, [0.5])
    other.join(30)
    assert not other.is_alive()  # that trial has finished
    assert follower.is_alive()  # the study has not
    harness.work()
    follower.join(30)
    assert not follower.is_alive()
    assert [(line.token, line.position) for line in of_one] == [(1, n) for n in range(MOST_LINES)]
    assert sorted(seen, key=lambda line: (line.trial, line.position)) == [
        *lines_of(harness, 0),
        *lines_of(harness, 1),
    ]


def test_following_is_left_with_ctrl_c(shown: Harness, sqlite_url: str) -> None:
    follower = subprocess.Popen(
        [sys.executable, "-m", "study", "logs", "s", "--follow", "--storage", sqlite_url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert follower.stdout is not None
    assert "trial 0: alpha 60" in follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=60)
    assert (follower.returncode, errors) == (130, "")


def test_python_has_them_as_a_table(shown: Harness, sqlite_url: str) -> None:
    table = api.open_study("s", sqlite_url).logs()
    assert isinstance(table, pandas.DataFrame)
    assert list(table.columns) == ["study", "trial", "attempt", "owner", "at", "level", "message"]
    assert list(table["level"]) == ["info", "info"]
    assert len(api.open_study("s", sqlite_url).logs(trial=1)) == 0
    with pytest.raises(UserError, match="no trial 5"):
        api.open_study("s", sqlite_url).logs(trial=5)


# The terminal of a worker


@pytest.mark.parametrize(("verbosity", "expected"), [(-1, []), (0, ["known"]), (1, ["known", "of a trial"])])
def test_what_is_stored_only_is_on_the_terminal_with_v(
    verbosity: int, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    log = TrialLog()
    lease = Lease(1, 0, 1, log=log)
    with process_state_kept():
        command_logs.configure(verbosity)
        with collect(lease):
            logging.getLogger("study.x").info("known")
            logging.getLogger("study.x").info("of a trial", extra={"console": False})
    assert capsys.readouterr().err.splitlines() == expected
    assert [line.message for line in log.unstored()] == ["known", "of a trial"]


def test_a_record_with_wrong_arguments_does_not_end_who_logs_it(capsys: pytest.CaptureFixture[str]) -> None:
    lease = Lease(1, 0, 1)
    with process_state_kept():
        logging.getLogger().handlers.clear()  # pytest's, which raise
        command_logs.configure()
        with collect(lease):
            logging.getLogger("own").warning("%d images", "many")
            logging.getLogger("own").warning("after")
    assert [line.message for line in lease.log.unstored()] == ["after"]
    assert "warning: after" in capsys.readouterr().err
