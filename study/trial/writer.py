"""What a trial has to say to the database, said by a thread of its own and in order: epochs, decisions, checkpoints.

Training goes on meanwhile, also while the database is away. A decision about epoch n is made from what the epochs up to
n reported, so it is the one that a trainer that waited would have got, and stored with the epoch, so it is made once
whatever happens to workers; if it is to prune, what was trained past n is dropped.
"""

from __future__ import annotations

import queue as standard
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any

import optuna
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from storage import checkpoints
from storage.optuna_internals import storage_of, with_storage
from storage.queue import Lease, Queue
from storage.retry import retry
from study.training.trainer import EpochResult
from study.trial.checkpoint import State, to_bytes


class TrialWriter:
    """Use as a context: leaving it ends the thread, whether or not everything could be said."""

    def __init__(self, study: optuna.Study, queue: Queue, lease: Lease, *, store: str = checkpoints.DATABASE) -> None:
        self.study, self.queue, self.lease, self.store = study, queue, lease, store
        self.standing = queue.standing(lease.trial_id)
        self.pruned = self.standing.pruned
        """The epoch after which the pruner said to stop, to this attempt or an earlier one."""
        self.fault: Exception | None = None
        """What ended the thread: the lease is lost, or the database was away for too long."""
        self.saving = False
        self.unsaved = ""
        """Why the last checkpoint could not be stored, if it could not."""
        self.cost = 0.0
        """Seconds that the last checkpoint took."""
        self._trial: FrozenTrial | None = None
        """The trial as the pruner sees it: read once, for while we hold its lease nobody else writes to it."""
        self._work: standard.Queue[Callable[[], None] | None] = standard.Queue()
        self._thread = threading.Thread(target=self._run, name=f"scribe-{lease.number}", daemon=True)

    def __enter__(self) -> TrialWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._work.put(None)
        self._thread.join(timeout=1.0)  # at once if all was said; a thread that waits for a database is left behind

    @property
    def told(self) -> int:
        """The epochs, from the first, that an earlier attempt said all about."""
        return self.standing.stored if isinstance(self.study.pruner, NopPruner) else self.standing.decided

    def tell(self, result: EpochResult, reports: Mapping[int, float], *, last: bool) -> None:
        """Store an epoch, report (step to value), decide unless it is the last. Epochs are told in their order."""
        self._work.put(lambda: self._record(result, reports, last))

    def save(self, epoch: int, state: State) -> None:
        """Store a checkpoint; `state` is the scribe's from now on."""
        self.saving, self.unsaved = True, ""
        self._work.put(lambda: self._save(epoch, state))

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until all is said, a fault ends the thread, or `seconds` are over; whether all was said."""
        said = threading.Event()
        self._work.put(said.set)
        deadline = None if seconds is None else time.monotonic() + seconds
        while not said.wait(0.005):
            if not self._thread.is_alive() or (deadline is not None and time.monotonic() > deadline):
                break
        return said.is_set() and self.fault is None

    def _run(self) -> None:
        while (job := self._work.get()) is not None:
            try:
                job()
            except Exception as fault:  # noqa: BLE001 — it is the training thread that has to know
                self.fault = fault
                return

    def _record(self, result: EpochResult, reports: Mapping[int, float], last: bool) -> None:
        if self.pruned is not None and result.epoch > self.pruned:
            return
        cells, notes = row(result), None
        if not (isinstance(self.study.pruner, NopPruner) or result.epoch <= self.standing.decided or last):
            prune, notes = retry(lambda: self._ask_the_pruner(reports)) if reports else (False, {})
            cells["decision"] = "prune" if prune else "go"
        self.queue.record(self.lease, cells, reports, notes)
        if cells.get("decision") == "prune":
            self.pruned = result.epoch

    def _ask_the_pruner(self, reports: Mapping[int, float]) -> tuple[bool, dict[str, Any]]:
        """What `Trial.should_prune` says, and the system attributes that the pruner would have set on the trial."""
        notes = _Notes(storage_of(self.study))
        shadow = with_storage(self.study, notes)  # type: ignore[arg-type]
        if self._trial is None:
            self._trial = storage_of(self.study).get_trial(self.lease.trial_id)
        for step, value in reports.items():
            self._trial.intermediate_values.setdefault(step, value)  # as the database: what is stored stays
        prune = self.study.pruner.prune(shadow, self._trial)
        self._trial.system_attrs.update(notes.taken)
        return prune, notes.taken

    def _save(self, epoch: int, state: State) -> None:
        started = time.monotonic()
        if self.pruned is None or epoch < self.pruned:
            try:
                checkpoints.save(self.queue, self.lease, epoch, to_bytes(state), self.store)
            except OSError as error:  # the folder, not the database: the checkpoint before stands, the training goes on
                self.unsaved = str(error)
        self.cost = time.monotonic() - started
        self.saving = False


class _Notes:
    """A storage as pruners see it, which holds back what they write of a trial, to be stored with their decision."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self.taken: dict[str, Any] = {}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.taken[key] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def row(result: EpochResult) -> dict[str, Any]:
    """The row of `trial_epochs`."""
    cells = asdict(result)
    resampling: dict[str, Any] = cells.pop("resampling")
    return cells | resampling
