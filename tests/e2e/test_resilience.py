"""Unavailable databases, frozen workers, kills under a pruner: the outcome stays that of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from storage import retry as retry_module
from storage.engine import open_storage
from storage.queries import epoch_rows, progress
from storage.queue import Queue
from study import exit_codes
from study.create import load_study
from study.launchers.local import LocalLauncher
from study.launchers.progress import ProgressDisplay
from study.training.trainer import Trainer
from study.trial.runner import DatabaseUnavailable
from study.worker.worker import work
from tests.e2e.test_command import is_stopped, started, there, wait_for, within_a_transaction
from tests.support.command import process_state_kept, study
from tests.support.harness import Harness, StopAfter, config_of, scripted_accuracies, writers_have_ended
from tests.support.postgres import Postgres, free_port

Outcome = list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def server_of_these_tests() -> Iterator[Postgres]:
    """Not that of the session: others need theirs running."""
    server = Postgres()
    yield server
    server.stop()


@pytest.fixture
def restartable(server_of_these_tests: Postgres) -> Iterator[Postgres]:
    """A server that a test may restart, or stop and leave so."""
    yield server_of_these_tests
    if not server_of_these_tests.is_running():
        server_of_these_tests.control("start")


def test_restarts_of_the_database_are_waited_out(restartable: Postgres, undisturbed: Outcome) -> None:
    """Each begins at a step of training, which goes on meanwhile."""
    harness = Harness(restartable.new_database(), config_of(checkpoint={"every_seconds": 0}))
    steps = 0
    restarts: list[threading.Thread] = []

    def restart() -> bool:
        """Polled at every step, as the stop signal is; never true."""
        nonlocal steps
        steps += 1
        if steps in (3, 9, 15):
            if restarts:
                restarts[-1].join()
            restarts.append(threading.Thread(target=restartable.control, args=("restart", "-m", "immediate")))
            restarts[-1].start()
        return False

    harness.work(restart)
    assert len(restarts) == 3
    restarts[-1].join()
    assert harness.outcome() == undisturbed


def test_a_long_outage_keeps_a_fallback_checkpoint_and_resumes_from_it(
    restartable: Postgres, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(restartable.new_database(), config_of())
    steps, last = 0, 3 * 3
    """Of trial 0: three epochs of two steps of training and one of validation."""

    def stop_the_server() -> bool:
        """Polled at every step, as the stop signal is; never true."""
        nonlocal steps
        steps += 1
        if steps == 4:
            restartable.control("stop", "-m", "immediate")
        return False

    def clock() -> float:
        """Patience ends when the trial has been trained to its end."""
        return time.monotonic() + (1e6 if steps == last else 0.0)

    monkeypatch.setattr(retry_module, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))

    with pytest.raises(DatabaseUnavailable):
        harness.work(stop_the_server)
    (fallback_file,) = harness.fallback.glob("*.checkpoint")
    restartable.control("start")
    with harness.storage.engine.begin() as connection:  # the lease of the dead attempt, a minute later
        connection.exec_driver_sql("UPDATE trial_leases SET expires_at = 1")
    monkeypatch.setattr(retry_module, "time", time)
    harness.work()
    # Trained to its end while the database was unavailable: all of its epochs came from disk.
    assert "trial 0 resumes after epoch 3" in harness.messages
    assert not fallback_file.exists()
    assert harness.outcome() == undisturbed


def test_a_launch_ends_with_75_when_the_database_stays_unavailable(restartable: Postgres, tmp_path: Path) -> None:
    url = restartable.new_database()
    environment = os.environ | {"STUDY_PATIENCE_SECONDS": "1", "STUDY_STORAGE": url}
    asked = ["--device", "cpu", "--workers", "1", "--set", "training.epochs=500"]
    launched = started("launch", "quick", *asked, cwd=tmp_path, env=environment)
    engine, study_id = wait_for(lambda: there(url, "quick"))
    wait_for(lambda: progress(engine, study_id).running)
    engine.dispose()
    restartable.control("stop", "-m", "immediate")
    _, err = launched.communicate(timeout=200)
    assert launched.returncode == 75, err
    assert "when it is back: study resume quick" in err


@pytest.mark.parametrize(
    ("owner", "method", "reason"),
    [
        (ProgressDisplay, "__init__", "error: connection failed"),
        (LocalLauncher, "start", "error: the database was unavailable for over 1 s: cannot use the database"),
    ],
    ids=["the launcher", "its worker"],
)
def test_who_connects_again_when_the_database_is_unavailable_ends_with_75(
    owner: type[Any], method: str, reason: str, restartable: Postgres, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The launcher had it open before: it is not the URL that is wrong."""
    environment = os.environ | {"STUDY_STORAGE": restartable.new_database(), "STUDY_PATIENCE_SECONDS": "1"}
    connects = getattr(owner, method)

    def with_the_server_stopped(*arguments: Any) -> None:
        restartable.control("stop", "-m", "immediate")
        connects(*arguments)

    monkeypatch.setattr(owner, method, with_the_server_stopped)
    done = study("launch", "quick", "--device", "cpu", "--workers", "1", cwd=tmp_path, env=environment)
    assert done.returncode == exit_codes.DATABASE_UNAVAILABLE, done.stderr
    assert reason in done.stderr
    assert "when it is back: study resume quick" in done.stderr


def test_a_worker_that_is_to_stop_before_it_could_connect_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not refused, which on a Ray cluster would end the use of its node."""
    monkeypatch.setenv("STUDY_SUPERVISED", str(os.getppid() + 1))  # a launcher that has ended
    with process_state_kept():
        code = work("s", f"postgresql://postgres@127.0.0.1:{free_port()}/nothing", "cpu", None)
    assert code == exit_codes.INTERRUPTED


def test_asked_to_stop_while_the_database_is_unavailable(
    restartable: Postgres, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is asked to stop does not wait for the database: with such patience that would outlast the test."""
    monkeypatch.setattr(retry_module, "PATIENCE_SECONDS", 1e5)
    later = 0.0
    monkeypatch.setattr(
        retry_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later, sleep=time.sleep)
    )
    harness = Harness(restartable.new_database(), config_of())
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        if steps == 3:
            restartable.control("stop", "-m", "immediate")
        return steps >= 3

    harness.work(stop, most=1)
    assert any("its checkpoint is in" in line for line in harness.messages)
    later = 1e6  # its process would have ended, and the thread that still waits with it
    writers_have_ended()
    restartable.control("start")
    with harness.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_leases SET expires_at = 1")
    harness.work()
    assert any("resumes after epoch" in line for line in harness.messages)
    assert harness.outcome() == undisturbed


KILLS = 10
"""All within the first 41 steps, of at least 72; then the study goes undisturbed to its end."""


@pytest.mark.parametrize(
    "pruning",
    [
        pytest.param({"kind": "hyperband", "min_resource": 1, "reduction_factor": 2}, id="hyperband"),
        pytest.param(
            {"kind": "successive-halving", "min_resource": 1, "reduction_factor": 2},
            id="successive-halving",
            marks=pytest.mark.slow,  # which each of Hyperband's brackets is
        ),
        pytest.param({"kind": "median", "n_startup_trials": 2}, id="median"),
    ],
)
def test_pruners_decide_the_same_with_and_without_kills(pruning: dict[str, Any], tmp_path: Path) -> None:
    """A worker that vanishes at random steps (its lease expires, its checkpoint is an old one), and a quiet one."""
    config = config_of(
        policy={"alpha": [40, 60, 80, 100], "beta": [0.2, 0.8]},
        training={"epochs": 6},
        pruning=pruning,
        checkpoint={"every_seconds": 0},
        lease={"max_attempts": 100},
    )
    tops = {40: 0.5, 60: 0.3, 80: 0.6, 100: 0.4}

    def by_alpha(trainer: Trainer) -> float:
        """Some of the later trials are better than the earlier ones, and some are worse."""
        return tops[len(trainer.policy.active)] + 0.01 * len(trainer.history)

    quiet, killed = (Harness(f"sqlite:///{tmp_path / name}.db", config, "same-name") for name in ("quiet", "killed"))
    with scripted_accuracies(by_alpha):
        quiet.work()

    class Killed(Exception):
        pass

    chance, kills = random.Random(0), 0

    def kill() -> bool:
        if kills < KILLS and chance.random() < 0.4:
            raise Killed
        return False

    with scripted_accuracies(by_alpha):
        while True:
            try:
                killed.work(kill)
                break
            except Killed:
                kills += 1
                writers_have_ended()
                with killed.storage.engine.begin() as connection:
                    connection.exec_driver_sql("UPDATE trial_leases SET expires_at = 1")
    assert kills == KILLS
    assert killed.outcome() == quiet.outcome()
    assert {trial.state for trial in quiet.study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}


STOPS_ITSELF = """
import os, signal, time
from pathlib import Path
from study.cli.app import main as run
from study.training.trainer import Trainer

ended = Trainer._ended

def held(trainer, *rest):
    result = ended(trainer, *rest)
    while len(trainer.history) == 3 and not Path("go").exists():
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.01)
    return result

Trainer._ended = held
run()
"""
"""The command, but training stops its process after the third epoch, again and again until there is a file `go`."""


def freeze(worker: subprocess.Popen[str], harness: Harness) -> None:
    """Leave it stopped after its third epoch and between two transactions: one that is stopped within holds its locks
    for longer than its lease.
    """
    while True:
        wait_for(lambda: is_stopped(worker.pid))
        stored = epoch_rows(harness.storage.engine, harness.study._study_id).get(0, [])
        if len(stored) >= 2 and not within_a_transaction(harness.storage.engine):
            return
        os.kill(worker.pid, signal.SIGCONT)
        time.sleep(0.1)


@pytest.mark.parametrize(
    # Leases on SQLite are in test_queue.py.
    "url",
    [pytest.param("sqlite", marks=pytest.mark.slow), "postgresql"],
    indirect=True,
)
def test_a_frozen_worker_loses_its_trial_and_works_on(url: str, tmp_path: Path) -> None:
    """SIGSTOP for longer than the lease, the trial taken over and finished by another, then SIGCONT."""
    config = config_of(
        policy={"alpha": 90, "beta": [0.2, 0.6]}, training={"epochs": 16}, lease={"seconds": 1.0},
        checkpoint={"every_seconds": 0},
    )  # fmt: skip
    harness = Harness(url, config)
    environment = os.environ | {"STUDY_STORAGE": url}
    command = [sys.executable, "-c", STOPS_ITSELF, "worker", "s", "--device", "cpu"]
    worker = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        freeze(worker, harness)
        (tmp_path / "go").touch()
        wait_for(lambda: not progress(harness.storage.engine, harness.study._study_id).running)  # its lease ran out
        harness.work(most=1)  # takes over trial 0 and settles it
        before = harness.outcome()[0]
        assert before[1] == TrialState.COMPLETE
        os.kill(worker.pid, signal.SIGCONT)
        _, err = worker.communicate(timeout=100)
    finally:
        worker.kill()
    assert worker.returncode == 0, err
    assert "taken over, finished or deleted by somebody else; this worker drops it" in err
    assert harness.outcome()[0] == before
    quiet = Harness(f"sqlite:///{tmp_path}/quiet.db", config)
    quiet.work()
    assert harness.outcome() == quiet.outcome()


def test_a_worker_waits_for_others_and_takes_over(sqlite_url: str) -> None:
    """Nothing to claim while another's lease lasts; its trial, once that is over."""
    harness = Harness(sqlite_url, config_of(policy={"alpha": 60, "beta": 0.5}))
    other = Queue(harness.storage.engine, harness.study._study_id, owner="other")
    assert other.claim() is not None
    assert harness.queue().claim() is None
    assert harness.queue().unfinished() == 1
    with harness.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_leases SET expires_at = 1")
    harness.work()
    assert harness.study.trials[0].state == TrialState.COMPLETE


def test_stop_after_is_used() -> None:
    """The helper that these tests lean on does stop."""
    stop = StopAfter(2)
    assert [stop(), stop(), stop()] == [False, True, False]


def test_storages_open_while_studies_are_there(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    study, config = load_study(open_storage(sqlite_url, create=False, reading=True), "s")
    assert config == harness.config
    assert len(study.trials) == 4


def test_a_workers_start_waits_for_an_unavailable_database(restartable: Postgres, tmp_path: Path) -> None:
    """A launcher's worker does; one started by a person fails at once with what is wrong."""
    url = restartable.new_database()
    Harness(url, config_of(policy={"alpha": 60, "beta": 0.5}))
    restartable.control("stop", "-m", "immediate")
    command = [sys.executable, "-m", "study", "worker", "s", "--device", "cpu"]
    environment = os.environ | {"STUDY_STORAGE": url}
    person = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert person.returncode == 2
    assert "cannot use the database" in person.stderr
    supervised = environment | {"STUDY_SUPERVISED": str(os.getpid())}
    with socket.create_server(("127.0.0.1", restartable.port)) as nothing:
        worker = subprocess.Popen(command, env=supervised, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        nothing.settimeout(100)
        for _ in range(2):  # it has asked, got no answer and asked again
            nothing.accept()[0].close()
    restartable.control("start")
    _, err = worker.communicate(timeout=100)
    assert worker.returncode == 0, err
