"""Writes what a trial produces to the database from a thread of its own, in order: epochs, decisions, checkpoints.

Training continues meanwhile, also while the database is unavailable. Epochs that end soon after a transaction wait for
the next one, so that a thousand workers with epochs of a tenth of a second do not commit ten thousand times a second:
as many milliseconds as the database has workers, a second at most. Whatever must not wait (the last epoch, a
checkpoint, the end of a budget) takes them with it.

The pruner decides about epoch n from the reports of the epochs up to n alone, so its decision does not depend on how
far training has gone. It is stored with the epoch and never made again, also not by another worker. If it is to prune,
what was trained past n is dropped.
"""

from __future__ import annotations

import math
import queue as standard
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType
from typing import Any

import optuna
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from storage import checkpoints
from storage.cached_storage import CachedStorage
from storage.optuna_internals import storage_of, study_id_of, with_storage
from storage.queue import Lease, Queue
from storage.retry import retry
from storage.transfer import ORIGINAL_NAME
from study.training.trainer import EpochResult
from study.trial.checkpoint import Identity, State, to_bytes

SECONDS_A_WORKER = 0.001
"""Between two transactions with epochs of one trial, for each worker that the database serves."""
MOST_SECONDS = 1.0
COUNT_SECONDS = 60.0
"""Between two counts of the workers."""


@dataclass(frozen=True)
class _Epoch:
    result: EpochResult
    reports: Mapping[int, float]
    last: bool


def _nothing() -> None:
    pass


class TrialWriter:
    """Use as a context: leaving it ends the thread, whether or not everything could be written."""

    def __init__(
        self, study: optuna.Study, queue: Queue, lease: Lease, *, identity: Identity, store: str = checkpoints.DATABASE
    ) -> None:
        self.study, self.queue, self.lease, self.identity, self.store = study, queue, lease, identity, store
        self.stored = queue.stored_progress(lease.trial_id)
        self.pruned_at = self.stored.pruned
        """The epoch after which the pruner ended the trial, in this attempt or an earlier one."""
        self.error: Exception | None = None
        """What ended the thread: the lease is lost, or the database was unavailable for too long."""
        self.saving = False
        self.checkpoint_error = ""
        """Why the last checkpoint could not be stored, if it could not."""
        self.checkpoint_seconds = 0.0
        """What the last checkpoint took."""
        self._study_name = str(study.user_attrs.get(ORIGINAL_NAME, study.study_name))
        self._trial: FrozenTrial | None = None
        """The trial as the pruner sees it: read once, for while we hold its lease nobody else writes to it."""
        self._jobs: standard.Queue[_Epoch | Callable[[], None] | None] = standard.Queue()
        self._stored_at = -math.inf
        self._pause = 0.0
        self._thread = threading.Thread(target=self._run, name=f"writer-{lease.number}", daemon=True)

    def __enter__(self) -> TrialWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=1.0)  # at once if all is written; a thread that waits for a database is left behind

    @property
    def epochs_done(self) -> int:
        """The epochs, from the first, of which earlier attempts stored all there is."""
        return self.stored.epochs if isinstance(self.study.pruner, NopPruner) else self.stored.decided

    def write_epoch(self, result: EpochResult, reports: Mapping[int, float], *, last: bool) -> None:
        """Store an epoch, report it (step to value), and ask the pruner unless it is the last. In order of epochs."""
        self._jobs.put(_Epoch(result, reports, last))

    def write_checkpoint(self, epoch: int, state: State) -> None:
        """Store a checkpoint; `state` belongs to the writer from now on."""
        self.saving, self.checkpoint_error = True, ""
        self._jobs.put(lambda: self._write_checkpoint(epoch, state))

    def write_log(self) -> None:
        """Store what has been logged so far, if the database answers; later writes take it along otherwise."""
        self._jobs.put(self._write_log)

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until all is written, an error ends the thread, or `seconds` have passed; whether all was written."""
        written = threading.Event()
        self._jobs.put(written.set)
        deadline = None if seconds is None else time.monotonic() + seconds
        while not written.wait(0.005):
            if not self._thread.is_alive() or (deadline is not None and time.monotonic() > deadline):
                break
        return written.is_set() and self.error is None

    def _run(self) -> None:
        waiting: list[_Epoch] = []
        try:
            while True:
                job = self._next_job(self._seconds_to_wait() if waiting else None)
                if isinstance(job, _Epoch):
                    waiting.append(job)
                    if not job.last and self._seconds_to_wait() > 0:
                        continue
                if waiting:
                    self._write_epochs(waiting)
                    waiting = []
                if job is None:
                    return
                if not isinstance(job, _Epoch):
                    job()
        except Exception as error:  # noqa: BLE001 — the training thread handles it
            self.error = error

    def _write_log(self) -> None:
        with suppress(SQLAlchemyError):
            self.queue.write_log(self.lease)

    def _next_job(self, seconds: float | None) -> _Epoch | Callable[[], None] | None:
        """One that does nothing, if there is none within `seconds`; None ends the thread."""
        try:
            return self._jobs.get(timeout=seconds)
        except standard.Empty:
            return _nothing

    def _seconds_to_wait(self) -> float:
        """Until the next transaction with epochs alone."""
        return max(0.0, self._stored_at + self._pause - time.monotonic())

    def _write_epochs(self, epochs: Sequence[_Epoch]) -> None:
        rows: list[dict[str, Any]] = []
        reports: dict[int, float] = {}
        notes: dict[str, Any] = {}
        prune = self.pruned_at is not None
        storage = storage_of(self.study)
        with storage.one_look() if isinstance(storage, CachedStorage) else nullcontext():
            for epoch in epochs:
                number = epoch.result.epoch
                if prune and (self.pruned_at is None or number > self.pruned_at):
                    break
                row = epoch_row(epoch.result)
                if not (isinstance(self.study.pruner, NopPruner) or number <= self.stored.decided or epoch.last):
                    more: dict[str, Any] = {}
                    if epoch.reports:
                        prune, more = retry(partial(self._ask_pruner, epoch.reports))
                    row["decision"] = "prune" if prune else "go"
                    notes |= more
                rows.append(row)
                reports |= epoch.reports
        if not rows:
            return
        self.queue.record(self.lease, rows, reports, notes)
        if rows[-1].get("decision") == "prune":
            self.pruned_at = rows[-1]["epoch"]
        now = time.monotonic()
        if now - self._stored_at < MOST_SECONDS:
            self._pause = min(MOST_SECONDS, SECONDS_A_WORKER * self.queue.live_leases(COUNT_SECONDS))
        self._stored_at = now

    def _ask_pruner(self, reports: Mapping[int, float]) -> tuple[bool, dict[str, Any]]:
        """What `Trial.should_prune` says, and the system attributes that the pruner would have set on the trial."""
        storage = storage_of(self.study)
        recorder = _AttributeRecorder(storage, study_id_of(self.study))
        if self._trial is None:
            self._trial = storage.get_trial(self.lease.trial_id)
        for step, value in reports.items():
            self._trial.intermediate_values.setdefault(step, value)  # as the database: what is stored stays
        shadow = with_storage(self.study, recorder, self._study_name)  # type: ignore[arg-type]
        prune = self.study.pruner.prune(shadow, self._trial)
        self._trial.system_attrs.update(recorder.attributes)
        return prune, recorder.attributes

    def _write_checkpoint(self, epoch: int, state: State) -> None:
        started = time.monotonic()
        if self.pruned_at is None or epoch < self.pruned_at:
            payload = to_bytes(state, self.identity)
            try:
                checkpoints.save(self.queue, self.lease, epoch, payload)
            except OSError as error:  # the store, not the database: the last checkpoint stays, training continues
                self.checkpoint_error = str(error)
        self.checkpoint_seconds = time.monotonic() - started
        self.saving = False


class _AttributeRecorder:
    """A storage as pruners see it, which keeps what they write of a trial, to be stored with their decision."""

    def __init__(self, storage: BaseStorage, study_id: int) -> None:
        self._storage, self._study_id = storage, study_id
        self.attributes: dict[str, Any] = {}

    def get_study_id_from_name(self, study_name: str) -> int:
        """Hyperband opens the study again by its name, which for a copy is the original's."""
        return self._study_id

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.attributes[key] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def epoch_row(result: EpochResult) -> dict[str, Any]:
    """The row of `trial_epochs`."""
    row = asdict(result)
    resampling: dict[str, Any] = row.pop("resampling")
    return row | resampling
