"""Leases: who may work on which of a study's queued trials.

A queued trial is a WAITING trial of Optuna's; a lease says which worker holds it and until when. Every write that a
worker makes about its trial goes through here, in one transaction with the check of its token: who has lost the lease
writes nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from storage import artifacts, object_store, trial_logs
from storage.engine import database_time, live_lease, reader, upsert
from storage.errors import UserError
from storage.retry import retry
from storage.schema import (
    ATTEMPTS,
    CHECKPOINTS,
    EPOCHS,
    LEASES,
    REPORT_TYPE,
    REPORTS,
    TRIAL_ATTRS,
    TRIAL_SYSTEM_ATTRS,
    TRIAL_VALUES,
    TRIALS,
    UNFINISHED,
    VALUE_TYPE,
)

logger = logging.getLogger(__name__)


STATE_SECONDS = 3.0
"""Between two looks whether somebody has finished or deleted a trial while a worker trains it."""


class LeaseLost(Exception):
    """Another worker has this trial now, or it is finished or deleted: nothing was written, drop it."""


@dataclass
class Lease:
    """The right to work on one trial, as long as its token is the latest."""

    trial_id: int
    number: int
    token: int
    lost: threading.Event = field(default_factory=threading.Event, repr=False)
    """Set by the renewing thread once the token is outdated."""
    images: int = 0
    """Recorded under this lease."""
    joules: float = 0.0
    log: trial_logs.TrialLog = field(default_factory=trial_logs.TrialLog, repr=False, compare=False)
    """What is logged under this lease; written with the epochs, the renewals and the end."""


@dataclass(frozen=True)
class StoredProgress:
    """What is stored of a trial: its epochs, those that the pruner decided about, and the one that it ended at."""

    epochs: int
    decided: int
    pruned: int | None


class Queue:
    """One worker's view of a study's queued trials. A worker holds one lease at a time."""

    def __init__(
        self,
        engine: sa.Engine,
        study_id: int,
        *,
        seconds: float = 60.0,
        max_attempts: int = 5,
        owner: str | None = None,
        device: str = "",
        share: float = 1.0,
        store: str = object_store.DATABASE,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args:
        seconds: length of a lease.
        max_attempts: attempts in a row without an epoch more, after which a trial has failed.
        owner: who holds the leases; by default host, process id and a random part.
        device: what the worker trains on, for the log of attempts.
        share: of a GPU, that the worker has.
        store: where the study keeps its checkpoints (`checkpoint.store` of its config).
        stopping: whether to give up waiting for an unavailable database.
        """
        self.engine, self.study_id, self.store, self.stopping = engine, study_id, store, stopping
        self.seconds, self.max_attempts, self.device, self.share = seconds, max_attempts, device, share
        # Containers share host names and process ids: the last part alone makes it one of a kind.
        self.owner = owner or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._live = -math.inf, 0
        epoch = upsert(engine, EPOCHS)
        undecided = sa.and_(EPOCHS.c.decision.is_(None), epoch.excluded.decision.is_not(None))
        self._epoch = epoch.on_conflict_do_update(
            index_elements=["trial_id", "epoch"], set_={"decision": epoch.excluded.decision}, where=undecided
        ).returning(EPOCHS.c.epoch)

    def claim(self) -> Lease | None:
        """A lease on an unfinished trial that nobody holds, the lowest number first; None if there is none.

        A trial whose last `max_attempts` attempts got no epoch further is failed, and the next one is looked at.
        """
        while True:
            files: list[str] = []
            outcome = retry(lambda files=files: self._claim_one(files), stopping=self.stopping)  # type: ignore[misc]
            object_store.remove_files(self.store, files)
            if not isinstance(outcome, bool):
                return outcome
            if not outcome:
                return None

    def _claim_one(self, files: list[str]) -> Lease | bool:
        """A lease; False if there is nothing to claim; True if the candidate went to another or had to be failed, in
        which case its checkpoint file is added to `files`.
        """
        clock = database_time(self.engine)
        # A live lease of our own is one whose claim was committed in a connection that then broke: we claim it again.
        free = sa.or_(LEASES.c.trial_id.is_(None), sa.not_(live_lease(self.engine)), LEASES.c.owner == self.owner)
        # When the last holder claimed or renewed it; unknown (NULL) where that would lie in the future.
        last_seen = LEASES.c.expires_at - sa.func.coalesce(LEASES.c.seconds, self.seconds)
        last_seen = sa.case((last_seen <= clock, last_seen), else_=None)
        candidate = (
            sa.select(
                TRIALS.c.trial_id, TRIALS.c.number, LEASES.c.attempts, LEASES.c.last_error, last_seen.label("last_seen")
            )
            .select_from(TRIALS.outerjoin(LEASES, TRIALS.c.trial_id == LEASES.c.trial_id))
            .where(TRIALS.c.study_id == self.study_id, TRIALS.c.state.in_(UNFINISHED), free)
            # Trials with failed attempts come last: the errors of a broken worker then fall on several trials, none of
            # which reaches max_attempts before that worker ends.
            .order_by(sa.case((LEASES.c.last_error.is_(None), 0), else_=LEASES.c.attempts), TRIALS.c.number)
            .limit(1)
            .with_for_update(of=TRIALS, skip_locked=True)
        )
        with self.engine.begin() as connection:
            row = connection.execute(candidate).one_or_none()
            if row is None:
                return False
            open_attempt = sa.and_(ATTEMPTS.c.trial_id == row.trial_id, ATTEMPTS.c.ended_at.is_(None))
            ended_at = ATTEMPTS.c.started_at if row.last_seen is None else row.last_seen
            vanished = sa.update(ATTEMPTS).where(open_attempt).values(ended_at=ended_at, outcome="vanished")
            if (row.attempts or 0) >= self.max_attempts:
                connection.execute(vanished)
                error = row.last_error or "its workers vanished (killed, out of memory, or cut off)"
                files += self._fail(connection, row.trial_id, f"{row.attempts} attempts got no further: {error}")
                return True
            lease = {"owner": self.owner, "expires_at": clock + self.seconds, "seconds": self.seconds}
            insert = upsert(self.engine, LEASES).values(trial_id=row.trial_id, token=1, attempts=1, **lease)
            update = {"token": LEASES.c.token + 1, "attempts": LEASES.c.attempts + 1}
            update |= {name: insert.excluded[name] for name in lease}
            still_free = sa.or_(sa.not_(live_lease(self.engine)), LEASES.c.owner == self.owner)
            claimed = insert.on_conflict_do_update(index_elements=["trial_id"], set_=update, where=still_free)
            token = connection.execute(claimed.returning(LEASES.c.token)).scalar_one_or_none()
            if token is None:
                return True
            connection.execute(vanished)
            attempt = {"owner": self.owner, "device": self.device, "share": self.share}
            attempt |= {"started_at": clock, "images": 0, "joules": 0.0}
            # A database whose leases were emptied by hand counts tokens anew: the later attempt takes the row.
            logged = upsert(self.engine, ATTEMPTS).values(trial_id=row.trial_id, token=token, **attempt)
            anew = attempt | {"ended_at": None, "outcome": None, "error": None}
            connection.execute(logged.on_conflict_do_update(index_elements=["trial_id", "token"], set_=anew))
            connection.execute(
                sa.update(TRIALS)
                .where(TRIALS.c.trial_id == row.trial_id, TRIALS.c.state == TrialState.WAITING)
                .values(state=TrialState.RUNNING, datetime_start=_utc())
            )
            return Lease(row.trial_id, row.number, token)

    @contextmanager
    def renewing(self, lease: Lease) -> Iterator[None]:
        """Renews the lease from a thread of its own, whatever the training thread and the database are doing."""
        done = threading.Event()

        def renew() -> None:
            every = self.seconds / 4
            next_renewal = time.monotonic() + every
            while not done.wait(min(every, STATE_SECONDS)):
                with suppress(SQLAlchemyError):  # the next beat tries again
                    try:
                        self._check_unfinished(lease)
                        if time.monotonic() >= next_renewal:
                            with self.engine.begin() as connection:
                                self.fence(connection, lease)
                            next_renewal = time.monotonic() + every
                        self.write_log(lease)
                    except LeaseLost:
                        lease.lost.set()
                        return

        thread = threading.Thread(target=renew, name=f"lease-{lease.number}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=5)

    def _check_unfinished(self, lease: Lease) -> None:
        """Raises:
        LeaseLost: somebody has finished the trial (optuna-dashboard, `study.tell`) or deleted it.
        """
        query = sa.select(TRIALS.c.state).where(TRIALS.c.trial_id == lease.trial_id)
        with reader(self.engine).connect() as connection:
            state = connection.scalar(query)
        if state not in UNFINISHED:
            raise LeaseLost(f"trial {lease.number} was finished or deleted by somebody else")

    def fence(self, connection: sa.Connection, lease: Lease, **also: Any) -> None:
        """Renew the lease in this transaction, or raise: what follows in the transaction is then ours to write.

        Raises:
            LeaseLost: the token is outdated.
        """
        values: dict[str, Any] = {"expires_at": database_time(self.engine) + self.seconds} | also
        # The owner too: tokens start anew where SQLite gives the trial ids of a deleted study again.
        held = sa.and_(LEASES.c.trial_id == lease.trial_id, LEASES.c.token == lease.token, LEASES.c.owner == self.owner)
        if connection.execute(sa.update(LEASES).where(held).values(values)).rowcount != 1:
            raise LeaseLost(f"trial {lease.number} has been taken over")

    def write_log(self, lease: Lease) -> None:
        """Store what has been logged under the lease since the last write.

        Raises:
            LeaseLost: nothing was stored.
        """
        lines = lease.log.unstored()
        if not lines:
            return
        held = sa.and_(LEASES.c.trial_id == lease.trial_id, LEASES.c.token == lease.token, LEASES.c.owner == self.owner)
        with self.engine.begin() as connection:
            # Checked and not renewed: it must not bring a lease back that is released at this moment.
            if connection.scalar(sa.select(LEASES.c.token).where(held).with_for_update()) is None:
                raise LeaseLost(f"trial {lease.number} has been taken over")
            trial_logs.write(connection, lease.trial_id, lease.token, lines)
        lease.log.forget(lines)

    def _end(self, connection: sa.Connection, lease: Lease, outcome: str, error: str | None = None) -> None:
        this = sa.and_(ATTEMPTS.c.trial_id == lease.trial_id, ATTEMPTS.c.token == lease.token)
        ended = {"ended_at": database_time(self.engine), "outcome": outcome, "error": error}
        connection.execute(sa.update(ATTEMPTS).where(this).values(ended))
        trial_logs.write(connection, lease.trial_id, lease.token, lease.log.unstored(ended=True))

    def record(
        self,
        lease: Lease,
        rows: Sequence[Mapping[str, Any]],
        reports: Mapping[int, float],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Store epochs (rows of `trial_epochs` without their trial_id), what they report to Optuna (step to value), and
        with the pruner's decisions its notes (the rungs of successive halving are system attributes of the trial).

        An epoch that is stored already stays as it is, so a resumed trial may repeat what it did since its checkpoint;
        only a decision that it lacks is added.

        Raises:
            LeaseLost: nothing was stored.
        """
        lease.images += sum(row["images"] for row in rows)
        lease.joules += sum(row.get("joules") or 0.0 for row in rows)
        spent = {"images": lease.images, "joules": lease.joules}  # sums, which may be written twice
        lines = lease.log.unstored()

        def once() -> None:
            this = sa.and_(ATTEMPTS.c.trial_id == lease.trial_id, ATTEMPTS.c.token == lease.token)
            with self.engine.begin() as connection:
                # Further than any attempt before: the attempts are counted anew.
                epochs = [{"trial_id": lease.trial_id, "decision": None, **row} for row in rows]
                further = bool(connection.execute(self._epoch, epochs).all())
                self.fence(connection, lease, **({"attempts": 0} if further else {}))
                connection.execute(sa.update(ATTEMPTS).where(this).values(spent))
                steps = [
                    {
                        "trial_id": lease.trial_id,
                        "step": step,
                        "intermediate_value": value,
                        "intermediate_value_type": REPORT_TYPE.FINITE,
                    }
                    for step, value in reports.items()
                ]
                if steps:
                    reported = upsert(self.engine, REPORTS)
                    unless_there = reported.on_conflict_do_nothing(index_elements=["trial_id", "step"])
                    # RETURNING makes it one statement for all rows, not one a row.
                    connection.execute(unless_there.returning(REPORTS.c.step), steps).all()
                self._set_attributes(connection, lease.trial_id, notes or {}, TRIAL_SYSTEM_ATTRS)
                trial_logs.write(connection, lease.trial_id, lease.token, lines)

        retry(once)
        lease.log.forget(lines)

    def finish(
        self,
        lease: Lease,
        state: TrialState,
        values: Sequence[float],
        attributes: Mapping[str, Any] | None = None,
        artifact: artifacts.NewArtifact | None = None,
    ) -> None:
        """Finish the trial: its values (one an objective), attributes and state; its checkpoint goes.

        Args:
            artifact: its model, stored under this lease; named now, unless better ones have taken its place.

        Raises:
            LeaseLost: nothing was stored.
        """
        files: list[str] = []
        outclassed: list[str] = []

        def once() -> None:
            with self.engine.begin() as connection:
                if artifact is not None:
                    artifacts.lock_study(connection, self.study_id)  # before any lease, as `transfer.delete` does
                self.fence(connection, lease, expires_at=0.0, attempts=0)
                files.extend(self._delete_checkpoint(connection, lease.trial_id))
                if not self._set_state(connection, lease.trial_id, state):
                    mine = connection.execute(
                        sa.select(TRIALS.c.state).where(TRIALS.c.trial_id == lease.trial_id)
                    ).scalar_one_or_none()
                    if mine == state:  # an earlier try was committed before its connection broke
                        return
                    raise LeaseLost(f"trial {lease.number} was finished or deleted by somebody else")
                for objective, value in enumerate(values):
                    row = {"objective": objective, "value": value, "value_type": VALUE_TYPE.FINITE}
                    connection.execute(sa.insert(TRIAL_VALUES).values(trial_id=lease.trial_id, **row))
                self._end(connection, lease, "finished")
                self._set_attributes(connection, lease.trial_id, attributes or {})
                if artifact is not None:
                    outclassed.extend(artifacts.name(connection, self.study_id, lease, artifact))

        try:
            retry(once)
        except LeaseLost:
            if artifact is not None and artifact.location is not None:
                object_store.remove_files(artifact.store, [artifact.location])
            raise
        object_store.remove_files(self.store, files)
        if artifact is not None:
            object_store.remove_files(artifact.store, outclassed)

    def release(self, lease: Lease, error: str | None = None) -> None:
        """Release the trial into the queue, claimable at once. With an `error` the attempt counts as failed, and the
        last of `max_attempts` such attempts in a row fails the trial. Does nothing if the lease is lost already.
        """
        files: list[str] = []

        def once() -> None:
            with self.engine.begin() as connection, suppress(LeaseLost):
                # Asked to stop: not the trial's fault.
                spared = sa.case((LEASES.c.attempts > 0, LEASES.c.attempts - 1), else_=0)
                attempts = spared if error is None else LEASES.c.attempts
                self.fence(connection, lease, expires_at=0.0, attempts=attempts, last_error=error)
                self._end(connection, lease, "released" if error is None else "error", error)
                if error is None:
                    return
                tried = sa.select(LEASES.c.attempts).where(LEASES.c.trial_id == lease.trial_id)
                if connection.execute(tried).scalar_one() >= self.max_attempts:
                    files.extend(self._fail(connection, lease.trial_id, error))

        retry(once)
        object_store.remove_files(self.store, files)

    def fail(self, lease: Lease, error: str) -> None:
        """Fail the trial for good: an error that another attempt would only repeat."""
        files: list[str] = []

        def once() -> None:
            with self.engine.begin() as connection, suppress(LeaseLost):
                self.fence(connection, lease, expires_at=0.0, last_error=error)
                self._end(connection, lease, "error", error)
                files.extend(self._fail(connection, lease.trial_id, error))

        retry(once)
        object_store.remove_files(self.store, files)

    def skip(self, number: int) -> None:
        """End a trial that has begun as pruned, whoever holds it: its worker finds it finished and writes no more.

        Its value is its last report, as Optuna's `tell` has it.

        Raises:
            UserError: no such trial, or one that has not begun or has finished.
        """
        files: list[str] = []

        def once() -> None:
            this = sa.and_(TRIALS.c.study_id == self.study_id, TRIALS.c.number == number)
            with self.engine.begin() as connection:
                row = connection.execute(
                    sa.select(TRIALS.c.trial_id, TRIALS.c.state).where(this).with_for_update()
                ).one_or_none()
                if row is None or row.state != TrialState.RUNNING:
                    state = "not there" if row is None else row.state.name.lower()
                    raise UserError(f"only a trial that has begun and not finished can be skipped; {number} is {state}")
                held = LEASES.c.trial_id == row.trial_id
                ended = {"token": LEASES.c.token + 1, "expires_at": 0.0, "attempts": 0}
                connection.execute(sa.update(LEASES).where(held).values(ended))
                open_attempt = sa.and_(ATTEMPTS.c.trial_id == row.trial_id, ATTEMPTS.c.ended_at.is_(None))
                outcome = {"ended_at": database_time(self.engine), "outcome": "skipped"}
                connection.execute(sa.update(ATTEMPTS).where(open_attempt).values(outcome))
                self._set_state(connection, row.trial_id, TrialState.PRUNED)
                self._set_value(connection, row.trial_id)
                self._set_attributes(connection, row.trial_id, {"skipped": True} | _epochs_so_far(connection, row[0]))
                files.extend(self._delete_checkpoint(connection, row.trial_id))

        retry(once)
        object_store.remove_files(self.store, files)

    def _set_value(self, connection: sa.Connection, trial_id: int) -> None:
        """Its last report, if it has one."""
        reports = sa.select(REPORTS.c.intermediate_value).where(REPORTS.c.trial_id == trial_id)
        value = connection.scalar(reports.order_by(REPORTS.c.step.desc()).limit(1))
        if value is not None:
            row = {"objective": 0, "value": value, "value_type": VALUE_TYPE.FINITE}
            connection.execute(sa.insert(TRIAL_VALUES).values(trial_id=trial_id, **row))

    def live_leases(self, within: float) -> int:
        """Trials that anybody holds, of all studies, as counted in the last `within` seconds: how many workers this
        database serves.
        """
        counted_at, count = self._live
        if time.monotonic() - counted_at > within:
            count = self._count(sa.select(sa.func.count()).select_from(LEASES).where(live_lease(self.engine)))
            self._live = time.monotonic(), count
        return count

    def unfinished(self) -> int:
        query = sa.select(sa.func.count()).select_from(TRIALS)
        query = query.where(TRIALS.c.study_id == self.study_id, TRIALS.c.state.in_(UNFINISHED))

        return self._count(query)

    def stored_progress(self, trial_id: int) -> StoredProgress:
        """How far all attempts at the trial have come together."""
        decided = sa.case((EPOCHS.c.decision.is_not(None), EPOCHS.c.epoch))
        pruned = sa.case((EPOCHS.c.decision == "prune", EPOCHS.c.epoch))
        query = sa.select(sa.func.max(EPOCHS.c.epoch), sa.func.max(decided), sa.func.max(pruned))
        query = query.where(EPOCHS.c.trial_id == trial_id)

        def once() -> StoredProgress:
            with reader(self.engine).connect() as connection:
                stored, last, stop = connection.execute(query).one()
            return StoredProgress(stored or 0, last or 0, stop)

        return retry(once, stopping=self.stopping)

    def _count(self, query: sa.Select[Any]) -> int:
        def once() -> int:
            with reader(self.engine).connect() as connection:
                return int(connection.scalar(query) or 0)

        return retry(once, stopping=self.stopping)

    def _set_state(self, connection: sa.Connection, trial_id: int, state: TrialState) -> bool:
        """Whether the trial had not finished before."""
        unfinished = sa.and_(TRIALS.c.trial_id == trial_id, TRIALS.c.state.in_(UNFINISHED))
        done = connection.execute(sa.update(TRIALS).where(unfinished).values(state=state, datetime_complete=_utc()))
        return done.rowcount == 1

    def _delete_checkpoint(self, connection: sa.Connection, trial_id: int) -> list[str]:
        """Its file, if it has one, is to be removed once the transaction is committed."""
        gone = sa.delete(CHECKPOINTS).where(CHECKPOINTS.c.trial_id == trial_id).returning(CHECKPOINTS.c.location)
        name = connection.scalar(gone)
        return [] if name is None else [name]

    def _fail(self, connection: sa.Connection, trial_id: int, error: str) -> list[str]:
        """Files to be removed once the transaction is committed."""
        if self._set_state(connection, trial_id, TrialState.FAIL):
            self._set_attributes(connection, trial_id, {"error": error})
        return self._delete_checkpoint(connection, trial_id)

    def _set_attributes(
        self, connection: sa.Connection, trial_id: int, attributes: Mapping[str, Any], table: sa.Table = TRIAL_ATTRS
    ) -> None:
        for key, value in attributes.items():
            insert = upsert(self.engine, table).values(trial_id=trial_id, key=key, value_json=json.dumps(value))
            again = {"value_json": insert.excluded.value_json}
            connection.execute(insert.on_conflict_do_update(index_elements=["trial_id", "key"], set_=again))


def _epochs_so_far(connection: sa.Connection, trial_id: int) -> dict[str, Any]:
    """What a worker records of a trial that has finished, as far as its epochs tell."""
    query = sa.select(EPOCHS).where(EPOCHS.c.trial_id == trial_id).order_by(EPOCHS.c.epoch)
    epochs = connection.execute(query).all()
    if not epochs:
        return {}
    sums = ("images", "train_seconds", "validation_seconds")
    return {
        "best_epoch": max(epochs, key=lambda row: (row.accuracy, -row.epoch)).epoch,
        "epochs": len(epochs),
        **{name: round(sum(getattr(row, name) for row in epochs), 3) for name in sums},
    }


def _utc() -> datetime:
    """Optuna's way of storing a time: UTC without saying so."""
    return datetime.now(UTC).replace(tzinfo=None)
