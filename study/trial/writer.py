"""Writes what a trial produces to the database from a thread of its own, in order: epochs, decisions, checkpoints.

Training continues meanwhile, also while the database is unavailable. The pruner decides about epoch n from the reports
of the epochs up to n alone, so its decision does not depend on how far training has gone. It is stored with the epoch
and never made again, also not by another worker. If it is to prune, what was trained past n is dropped.
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
from storage.optuna_internals import storage_of, study_id_of, with_storage
from storage.queue import Lease, Queue
from storage.retry import retry
from storage.transfer import ORIGINAL_NAME
from study.training.trainer import EpochResult
from study.trial.checkpoint import Identity, State, to_bytes


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
        self._jobs: standard.Queue[Callable[[], None] | None] = standard.Queue()
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
        self._jobs.put(lambda: self._write_epoch(result, reports, last))

    def write_checkpoint(self, epoch: int, state: State) -> None:
        """Store a checkpoint; `state` belongs to the writer from now on."""
        self.saving, self.checkpoint_error = True, ""
        self._jobs.put(lambda: self._write_checkpoint(epoch, state))

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
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 — the training thread handles it
                self.error = error
                return

    def _write_epoch(self, result: EpochResult, reports: Mapping[int, float], last: bool) -> None:
        if self.pruned_at is not None and result.epoch > self.pruned_at:
            return
        row, notes = epoch_row(result), None
        if not (isinstance(self.study.pruner, NopPruner) or result.epoch <= self.stored.decided or last):
            prune, notes = retry(lambda: self._ask_pruner(reports)) if reports else (False, {})
            row["decision"] = "prune" if prune else "go"
        self.queue.record(self.lease, row, reports, notes)
        if row.get("decision") == "prune":
            self.pruned_at = result.epoch

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
