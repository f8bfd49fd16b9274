"""Epochs on their way to the database: which are stored together, and that nothing else changes by that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState, create_trial

from storage.cached_storage import CachedStorage
from storage.engine import open_storage
from storage.enqueue import enqueue_trials
from storage.optuna_internals import storage_of, study_id_of
from storage.queries import epoch_rows
from storage.queue import Lease, Queue
from study.search.pruners import make_pruner
from study.training.policies import KEEP
from study.training.trainer import EpochResult
from study.trial import writer as module
from study.trial.writer import TrialWriter
from tests.support.harness import config_of

CURVE = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
WORSE = [0.3, 0.3, 0.1, 0.1, 0.1, 0.1]
"""Its best so far is below the median from the second epoch on."""


class Work:
    """A study whose trials are curves, and how many transactions store their epochs."""

    def __init__(self, url: str, **pruning: Any) -> None:
        storage = open_storage(url)
        config = config_of(pruning=pruning or {"kind": "none"}, training={"epochs": len(CURVE)})
        self.study = optuna.create_study(
            study_name="s", storage=CachedStorage(storage), direction="maximize", pruner=make_pruner(config, 200)
        )
        self.id = study_id_of(self.study)
        queued = [create_trial(state=TrialState.WAITING, user_attrs={"queue_position": i}) for i in range(4)]
        enqueue_trials(storage.engine, self.id, {}, queued)
        self.queue = Queue(storage.engine, self.id)
        self.groups: list[int] = []
        """Epochs of each statement that stores some."""
        sa.event.listen(storage.engine, "before_execute", self._listen)

    def _listen(self, _: Any, clause: Any, several: Any, one: Any, __: Any) -> None:
        if isinstance(clause, sa.sql.Insert) and clause.table.name == "trial_epochs":
            self.groups.append(len(several) or 1)

    @contextmanager
    def writing(self) -> Iterator[tuple[Lease, TrialWriter]]:
        lease = self.queue.claim()
        assert lease is not None
        with TrialWriter(self.study, self.queue, lease, identity={}) as writer:
            yield lease, writer

    def write(self, writer: TrialWriter, curve: list[float]) -> None:
        for n, accuracy in enumerate(curve, 1):
            result = EpochResult(n, accuracy, 0.0, 1, 0.0, 0.0, 0.0, 1, None, KEEP, 0.0, 0.0, 0.0)
            writer.write_epoch(result, {n: max(curve[:n])}, last=n == len(CURVE))

    def stored(self, lease: Lease) -> list[tuple[int, str | None]]:
        rows = epoch_rows(self.queue.engine, self.id).get(lease.number, [])
        return [(row["epoch"], row["decision"]) for row in rows]

    def reports(self, lease: Lease) -> dict[int, float]:
        return storage_of(self.study).get_trial(lease.trial_id).intermediate_values

    def run(self, curve: list[float]) -> int | None:
        """A whole trial; the epoch at which it was pruned."""
        with self.writing() as (lease, writer):
            self.write(writer, curve)
            assert writer.flush(30)
        pruned = writer.pruned_at
        self.queue.finish(lease, TrialState.PRUNED if pruned else TrialState.COMPLETE, [max(curve)])
        return pruned


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with workers without number: the epochs of a trial wait until something else takes them along."""
    monkeypatch.setattr(module, "MOST_SECONDS", 3600.0)
    monkeypatch.setattr(module, "SECONDS_A_WORKER", 3600.0)


@pytest.mark.usefixtures("crowded")
def test_epochs_that_follow_one_another_are_stored_together(url: str) -> None:
    """The first tells when the last transaction was, the second how many workers there are."""
    work = Work(url)
    with work.writing() as (lease, writer):
        work.write(writer, CURVE)
        assert writer.flush(30)
    assert work.groups == [1, 1, 4]
    assert work.stored(lease) == [(n, None) for n in range(1, 7)]
    assert work.reports(lease) == dict(enumerate(CURVE, 1))


@pytest.mark.usefixtures("crowded")
def test_what_must_not_wait_takes_the_epochs_along(sqlite_url: str) -> None:
    work = Work(sqlite_url)
    with work.writing() as (lease, writer):
        work.write(writer, CURVE[:4])
        writer.write_checkpoint(4, {})
        assert writer.flush(30)
        assert not writer.checkpoint_error
        assert [epoch for epoch, _ in work.stored(lease)] == [1, 2, 3, 4]
    work.queue.finish(lease, TrialState.COMPLETE, [0.5])
    with work.writing() as (lease, writer):
        work.write(writer, CURVE[:3])
    assert [epoch for epoch, _ in work.stored(lease)] == [1, 2, 3]  # the end of the context


def test_few_workers_do_not_wait(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_A_WORKER", 0.0)
    work = Work(sqlite_url)
    with work.writing() as (_, writer):
        work.write(writer, CURVE)
        assert writer.flush(30)
    assert work.groups == [1] * 6


@pytest.mark.usefixtures("crowded")
def test_decisions_in_a_group_are_those_of_single_epochs(url: str) -> None:
    """Pruned in the middle of a group: what was trained after it is dropped, as if each had been stored by itself."""
    work = Work(url, kind="median", n_startup_trials=2)
    assert [work.run(CURVE), work.run(CURVE)] == [None, None]
    with work.writing() as (lease, writer):
        work.write(writer, WORSE)
        assert writer.flush(30)
    assert writer.pruned_at == 3
    assert work.stored(lease) == [(1, "go"), (2, "go"), (3, "prune")]
    assert work.reports(lease) == {1: 0.3, 2: 0.3, 3: 0.3}


@pytest.mark.usefixtures("crowded")
def test_a_group_of_a_lost_lease_is_not_stored(url: str) -> None:
    work = Work(url)
    with work.writing() as (lease, writer):
        work.write(writer, CURVE[:2])
        assert writer.flush(30)
        other = Queue(work.queue.engine, work.id)
        with work.queue.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE trial_leases SET expires_at = 0")
        assert other.claim() is not None
        work.write(writer, CURVE)
        assert not writer.flush(30)
    assert [epoch for epoch, _ in work.stored(lease)] == [1, 2]


def test_live_leases_are_those_of_all_studies(url: str) -> None:
    work = Work(url)
    held = work.queue.claim()
    assert held is not None
    other = Queue(work.queue.engine, 77)
    assert other.live_leases(within=60.0) == 1
    work.queue.release(held)
    assert other.live_leases(within=60.0) == 1
    assert other.live_leases(within=0.0) == 0
