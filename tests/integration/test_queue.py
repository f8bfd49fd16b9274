"""Queued trials and leases, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage import checkpoints, queries
from storage import engine as engine_module
from storage import retry as retry_module
from storage.engine import open_storage
from storage.enqueue import enqueue_trials
from storage.errors import UserError
from storage.queue import Lease, LeaseLost, Queue
from storage.retry import is_transient, retry
from storage.schema import CHECKPOINTS, LEASES
from tests.e2e.test_command import wait_for
from tests.support.postgres import Postgres

SPAWN = multiprocessing.get_context("spawn")


def some_trials(count: int) -> list[FrozenTrial]:
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 100.0)}
    return [
        create_trial(
            state=TrialState.WAITING, params={"x": float(i)}, distributions=space, user_attrs={"queue_position": i}
        )
        for i in range(count)
    ]


def queued(url: str, count: int) -> tuple[optuna.Study, sa.Engine]:
    storage = open_storage(url)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize", load_if_exists=True)
    enqueue_trials(storage.engine, study._study_id, {"config": {"a": 1}}, some_trials(count))
    return study, storage.engine


def epoch(number: int, accuracy: float = 0.5) -> dict[str, Any]:
    zeros = dict.fromkeys(("loss", "train_seconds", "validation_seconds", "beta"), 0.0)
    return zeros | {"epoch": number, "accuracy": accuracy, "images": 10, "kind": "keep", "k": 0}


def expire(engine: sa.Engine, lease: Lease) -> None:
    with engine.begin() as connection:
        connection.execute(sa.update(LEASES).where(LEASES.c.trial_id == lease.trial_id).values(expires_at=1.0))


def claimed(queue: Queue) -> Lease:
    lease = queue.claim()
    assert lease is not None
    return lease


def state(study: optuna.Study, lease: Lease) -> FrozenTrial:
    return study._storage.get_trial(lease.trial_id)


def test_trials_are_queued_once_and_more_can_be_added(url: str) -> None:
    study, engine = queued(url, 5)
    assert [t.params["x"] for t in study.trials] == [0, 1, 2, 3, 4]
    assert [t.number for t in study.trials] == [0, 1, 2, 3, 4]
    assert {t.state for t in study.trials} == {TrialState.WAITING}
    stored = enqueue_trials(engine, study._study_id, {"config": {"a": 2}}, some_trials(9))
    assert stored == {"config": {"a": 1}}
    assert len(study.trials) == 5  # somebody else's study: nothing is added
    stored = enqueue_trials(engine, study._study_id, {"config": {"a": 1}, "new": [1]}, some_trials(7))
    assert stored == {"config": {"a": 1}, "new": [1]}
    assert [t.params["x"] for t in study.trials] == [0, 1, 2, 3, 4, 5, 6]
    assert study.user_attrs == stored


def test_a_queued_trial_is_what_optuna_would_have_enqueued(url: str) -> None:
    study, _ = queued(url, 1)
    stock = optuna.create_study(study_name="stock", storage=study._storage, direction="maximize")
    stock.add_trial(some_trials(1)[0])
    ours, theirs = study.trials[0], stock.trials[0]
    for name in ("number", "state", "params", "distributions", "user_attrs", "system_attrs", "intermediate_values"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_claim_gives_each_trial_once_in_order(url: str) -> None:
    study, engine = queued(url, 3)
    workers = [Queue(engine, study._study_id, owner=f"w{i}") for i in range(4)]
    leases = [worker.claim() for worker in workers]
    assert [lease and (lease.number, lease.token) for lease in leases] == [(0, 1), (1, 1), (2, 1), None]
    assert {t.state for t in study.trials} == {TrialState.RUNNING}
    assert all(t.datetime_start is not None for t in study.trials)


def test_every_attempt_is_logged_with_its_end(url: str) -> None:
    study, engine = queued(url, 3)
    first, second = (Queue(engine, study._study_id, owner=name, device=f"gpu {name}") for name in ("a", "b"))
    expired = claimed(first)
    expire(engine, expired)
    retaken = claimed(second)
    assert retaken.number == expired.number
    second.release(retaken)
    third = claimed(second)
    second.finish(third, TrialState.COMPLETE, [0.5])
    broken = claimed(second)
    second.release(broken, error="boom")
    second.fail(claimed(second), "for good")
    log = queries.attempts(engine, study._study_id)
    assert [(a.number, a.owner, a.device, a.outcome, a.error) for a in log] == [
        (0, "a", "gpu a", "vanished", None),
        (0, "b", "gpu b", "released", None),
        (0, "b", "gpu b", "finished", None),
        (1, "b", "gpu b", "error", "boom"),
        (2, "b", "gpu b", "error", "for good"),
    ]
    assert all(a.ended_at is not None and a.started_at > 1e9 for a in log)
    assert all(a.ended_at >= a.started_at for a in log[1:] if a.ended_at)


def test_an_expired_lease_is_taken_over_and_fences_the_old_worker(url: str) -> None:
    study, engine = queued(url, 1)
    old, new = (Queue(engine, study._study_id, owner=name) for name in ("old", "new"))
    stale = claimed(old)
    old.record(stale, [epoch(1)], {1: 0.5})
    assert new.claim() is None
    expire(engine, stale)
    lease = claimed(new)
    assert (lease.number, lease.token) == (stale.number, stale.token + 1)

    forbidden_writes: tuple[Callable[[], object], ...] = (
        lambda: old.record(stale, [epoch(2)], {2: 0.6}),
        lambda: old.finish(stale, TrialState.COMPLETE, [0.6]),
        lambda: checkpoints.save(old, stale, 1, b"old"),
    )
    for forbidden in forbidden_writes:
        with pytest.raises(LeaseLost):
            forbidden()
    old.release(stale, error="too late")  # quietly nothing
    old.fail(stale, "too late")
    trial = state(study, lease)
    assert (trial.state, trial.intermediate_values) == (TrialState.RUNNING, {1: 0.5})
    assert trial.user_attrs == {"queue_position": 0}
    assert checkpoints.load(new, lease) is None

    new.record(lease, [epoch(1, 0.9)], {1: 0.9})  # repeated since the checkpoint: the first record stays
    new.record(lease, [epoch(2)], {2: 0.7})
    new.finish(lease, TrialState.COMPLETE, [0.7], {"best_epoch": 2})
    trial = state(study, lease)
    assert (trial.value, trial.intermediate_values) == (0.7, {1: 0.5, 2: 0.7})
    assert [row["accuracy"] for row in queries.epoch_rows(engine, study._study_id)[0]] == [0.5, 0.5]
    with pytest.raises(LeaseLost):
        new.finish(stale, TrialState.FAIL, [])


@pytest.mark.parametrize("end", [TrialState.COMPLETE, TrialState.PRUNED])
def test_finishing_leaves_what_stock_optuna_leaves(url: str, end: TrialState) -> None:
    study, engine = queued(url, 1)
    worker = Queue(engine, study._study_id)
    lease = claimed(worker)
    for n, value in enumerate((0.25, 0.5), 1):
        worker.record(lease, [epoch(n)], {n: value})
    worker.finish(lease, end, [0.5], {"seconds": 1.5})
    stock = optuna.create_study(study_name="stock", storage=study._storage, direction="maximize")
    stock.add_trial(some_trials(1)[0])
    trial = stock.ask()
    for n, value in enumerate((0.25, 0.5), 1):
        trial.report(value, n)
    trial.set_user_attr("seconds", 1.5)
    stock.tell(trial, 0.5 if end == TrialState.COMPLETE else None, state=end)
    ours, theirs = study.trials[0], stock.trials[0]
    for name in ("number", "state", "params", "values", "user_attrs", "intermediate_values"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.datetime_complete is not None
    assert theirs.datetime_complete is not None
    assert abs((ours.datetime_complete - theirs.datetime_complete).total_seconds()) < 60


def test_release_is_claimable_at_once_and_costs_no_attempt(url: str) -> None:
    study, engine = queued(url, 1)
    workers = [Queue(engine, study._study_id, owner=f"w{i}", max_attempts=2) for i in range(2)]
    for turn in range(6):
        workers[turn % 2].release(claimed(workers[turn % 2]))
    assert claimed(workers[0]).token == 7


def test_errors_in_a_row_fail_the_trial_with_the_last_one(url: str) -> None:
    study, engine = queued(url, 1)
    worker = Queue(engine, study._study_id, max_attempts=3)
    for attempt in range(3):
        worker.release(claimed(worker), error=f"boom {attempt}")
    assert worker.claim() is None
    trial = study.trials[0]
    assert (trial.state, trial.user_attrs["error"]) == (TrialState.FAIL, "boom 2")


def test_vanishing_workers_fail_the_trial_too(url: str) -> None:
    study, engine = queued(url, 1)
    for attempt in range(3):
        worker = Queue(engine, study._study_id, owner=f"w{attempt}", max_attempts=3)
        expire(engine, claimed(worker))
    assert Queue(engine, study._study_id, owner="last", max_attempts=3).claim() is None
    assert study.trials[0].state == TrialState.FAIL
    assert "3 attempts got no further" in study.trials[0].user_attrs["error"]


def test_an_attempt_that_gets_further_starts_the_count_anew(url: str) -> None:
    study, engine = queued(url, 1)
    for attempt in range(10):
        worker = Queue(engine, study._study_id, owner=f"w{attempt}", max_attempts=2)
        lease = claimed(worker)
        worker.record(lease, [epoch(attempt + 1)], {attempt + 1: 0.5})
        expire(engine, lease)
    assert study.trials[0].state == TrialState.RUNNING


def test_the_lease_is_renewed_while_the_training_thread_is_busy(url: str) -> None:
    study, engine = queued(url, 1)
    worker = Queue(engine, study._study_id, owner="busy", seconds=8.0)
    thief = Queue(engine, study._study_id, owner="thief")
    lease = claimed(worker)

    def expires_at() -> float:
        with engine.connect() as connection:
            return float(connection.scalar(sa.select(LEASES.c.expires_at)) or 0.0)

    first = expires_at()
    with worker.renewing(lease):  # every 2 s
        wait_for(lambda: expires_at() > first)
        assert thief.claim() is None
    expire(engine, lease)
    taken = claimed(thief)
    with worker.renewing(lease):
        assert lease.lost.wait(60)
    assert taken.token == lease.token + 1


def test_a_lease_that_nobody_renews_runs_out(url: str) -> None:
    study, engine = queued(url, 1)
    lease = claimed(Queue(engine, study._study_id, owner="silent", seconds=0.5))
    thief = Queue(engine, study._study_id, owner="thief")
    assert wait_for(thief.claim).token == lease.token + 1


def test_a_trial_finished_by_hand_is_dropped(url: str) -> None:
    study, engine = queued(url, 1)
    worker = Queue(engine, study._study_id)
    lease = claimed(worker)
    study._storage.set_trial_state_values(lease.trial_id, TrialState.FAIL)
    with pytest.raises(LeaseLost):
        worker.finish(lease, TrialState.COMPLETE, [0.5])
    assert study.trials[0].values is None


def test_checkpoints_come_back_whole_or_not_at_all(url: str) -> None:
    study, engine = queued(url, 1)
    worker = Queue(engine, study._study_id)
    lease = claimed(worker)
    assert checkpoints.load(worker, lease) is None
    for n, payload in enumerate((b"one" * 100_000, bytes(range(256)))):
        checkpoints.save(worker, lease, n, payload)
        loaded = checkpoints.load(worker, lease)
        assert loaded == checkpoints.StoredCheckpoint(n, payload)
    with engine.begin() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(CHECKPOINTS)).scalar_one() == 1
        connection.execute(sa.update(CHECKPOINTS).values(payload=b"altered"))
    assert checkpoints.load(worker, lease) == checkpoints.StoredCheckpoint(1, None)
    worker.finish(lease, TrialState.COMPLETE, [0.5])
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(CHECKPOINTS)).scalar_one() == 0


def test_progress_counts(url: str) -> None:
    study, engine = queued(url, 4)
    worker = Queue(engine, study._study_id, owner="me")
    for end in (TrialState.COMPLETE, TrialState.PRUNED):
        lease = claimed(worker)
        worker.record(lease, [epoch(1)], {1: 0.5})
        worker.finish(lease, end, [0.5])
    lease = claimed(worker)
    worker.record(lease, [epoch(1, 0.25)], {1: 0.25})
    worker.record(lease, [epoch(2, 0.75)], {2: 0.75})
    now = queries.progress(engine, study._study_id)
    assert now.states == {"waiting": 1, "running": 1, "complete": 1, "pruned": 1, "failed": 0}
    assert (now.total, now.finished, now.epochs, now.best) == (4, 2, 2, 0.5)
    (running,) = now.running
    assert (running.number, running.owner, running.epoch, running.accuracy) == (2, "me", 2, 0.75)
    assert 0 < running.lease_seconds_left <= 60


def test_a_new_study_inherits_nothing_of_a_deleted_one(url: str) -> None:
    """SQLite gives the trial ids of a deleted study again."""
    study, engine = queued(url, 1)
    worker = Queue(engine, study._study_id)
    lease = claimed(worker)
    worker.record(lease, [epoch(1)], {1: 0.5})
    checkpoints.save(worker, lease, 1, b"x")
    optuna.delete_study(study_name="s", storage=study._storage)
    study, engine = queued(url, 1)
    fresh = Queue(engine, study._study_id)
    lease = claimed(fresh)
    assert lease.token == 1
    assert checkpoints.load(fresh, lease) is None
    assert queries.epoch_rows(engine, study._study_id) == {}


def test_calls_wait_for_a_database_that_becomes_available_again() -> None:
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise sa.exc.OperationalError("select", {}, Exception("server closed the connection"))
        return "done"

    assert retry(flaky) == "done"
    with pytest.raises(sa.exc.OperationalError):
        retry(lambda: (_ for _ in ()).throw(sa.exc.OperationalError("x", {}, Exception())), patience=0.3)
    with pytest.raises(sa.exc.IntegrityError):  # not a is_transient fault: at once
        retry(lambda: (_ for _ in ()).throw(sa.exc.IntegrityError("x", {}, Exception())))


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT nothing FROM studies",
        "SELECT 1 FROM nowhere",
        "SELECT CAST(x'ff' AS TEXT)",
        "SELECT abs(-9223372036854775807 - 1)",
    ],
)
def test_an_error_of_a_statement_is_not_waited_for(statement: str, sqlite_url: str) -> None:
    """SQLite's driver has one class for these and for a database that is locked or a disk that is full."""
    engine = open_storage(sqlite_url).engine
    calls = []

    def failing() -> None:
        calls.append(1)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement).all()

    with pytest.raises(sa.exc.OperationalError) as error:
        retry(failing, patience=1)
    assert (len(calls), is_transient(error.value)) == (1, False)


def test_a_locked_database_is_waited_for(sqlite_url: str) -> None:
    engine = open_storage(sqlite_url).engine
    other = sqlite3.connect(str(engine.url.database), timeout=0.01)
    with engine.begin(), pytest.raises(sqlite3.OperationalError, match="locked") as locked:
        other.execute("BEGIN IMMEDIATE")
    other.close()
    error = sa.exc.OperationalError("BEGIN", {}, locked.value)
    assert is_transient(error)


def _run_all(url: str) -> list[int]:
    """A worker: claim, record, finish, until nothing is left."""
    study, engine = queued(url, 40)
    worker, ran = Queue(engine, study._study_id), []
    while (lease := worker.claim()) is not None:
        worker.record(lease, [epoch(1)], {1: 0.5})
        worker.finish(lease, TrialState.COMPLETE, [0.5])
        ran.append(lease.number)
    return ran


def in_processes(function: Callable[[str], Any], url: str, processes: int) -> list[Any]:
    with ProcessPoolExecutor(processes, mp_context=SPAWN) as pool:
        return list(pool.map(function, [url] * processes))


def test_many_workers_create_one_study_at_once_and_run_every_trial_exactly_once(empty_url: str) -> None:
    ran = [number for worker in in_processes(_run_all, empty_url, 4) for number in worker]
    assert sorted(ran) == list(range(40))
    study, _ = queued(empty_url, 40)
    assert [t.number for t in study.trials] == list(range(40))
    assert {t.state for t in study.trials} == {TrialState.COMPLETE}


def test_readers_create_no_tables(empty_url: str) -> None:
    with pytest.raises(UserError, match=r"no database file|holds no studies"):
        open_storage(empty_url, create=False, reading=True)


def test_a_reader_does_not_hold_up_the_writers(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that was held up would find the database locked after BUSY_SECONDS, and not try again."""
    monkeypatch.setattr(retry_module, "PATIENCE_SECONDS", 0)
    study, engine = queued(sqlite_url, 1)
    worker = Queue(engine, study._study_id)
    lease = claimed(worker)
    reader = open_storage(sqlite_url, create=False, reading=True)
    with reader.engine.connect() as connection:
        connection.execute(sa.select(LEASES)).all()  # its transaction stays open
        worker.record(lease, [epoch(1)], {1: 0.5})


@pytest.mark.parametrize("doing", ["renewing", "recording"])
def test_a_connection_frozen_within_a_transaction_loses_its_locks(
    doing: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would outlive its lease, and its machine answers every keep-alive. (On SQLite it holds the whole file.)"""
    url = postgres.new_database()
    study, other_engine = queued(url, 1)
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 2)
    engine = open_storage(url).engine
    frozen, other = (Queue(of, study._study_id, seconds=0.5) for of in (engine, other_engine))
    lease = claimed(frozen)
    in_it, thaw, lost = threading.Event(), threading.Event(), threading.Event()

    @sa.event.listens_for(engine, "commit")
    def freeze_once(_: sa.Connection) -> None:
        if not in_it.is_set():
            in_it.set()
            assert thaw.wait(200)

    def renew() -> None:
        with engine.begin() as connection:
            frozen.fence(connection, lease)

    writes = {"renewing": lambda: retry(renew), "recording": lambda: frozen.record(lease, [epoch(1)], {1: 0.5})}

    def work() -> None:
        with pytest.raises(LeaseLost):
            writes[doing]()
        lost.set()

    threading.Thread(target=work, daemon=True).start()
    assert in_it.wait(60)
    taken = wait_for(other.claim)
    thaw.set()
    assert lost.wait(60)
    assert queries.epoch_rows(other.engine, study._study_id) == {}
    other.record(taken, [epoch(1)], {1: 0.5})
