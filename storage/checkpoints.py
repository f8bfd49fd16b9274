"""A trial's latest checkpoint: opaque bytes, in the study's own database, never more than one a trial."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import sqlalchemy as sa

from storage.queue import Lease, Queue, retrying, upsert
from storage.tables import CHECKPOINTS


@dataclass(frozen=True)
class Found:
    """A checkpoint that is there; `payload` is None if it was torn or altered."""

    epoch: int
    payload: bytes | None


def save(queue: Queue, lease: Lease, epoch: int, payload: bytes) -> None:
    """Put `payload`, taken after `epoch` whole epochs, in the place of the trial's checkpoint.

    Raises:
        LeaseLost: nothing was stored.
    """
    row = {
        "token": lease.token,
        "epoch": epoch,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "payload": payload,
    }

    def once() -> None:
        with queue.engine.begin() as connection:
            queue.fence(connection, lease)
            insert = upsert(queue.engine, CHECKPOINTS).values(trial_id=lease.trial_id, **row)
            connection.execute(insert.on_conflict_do_update(index_elements=["trial_id"], set_=row))

    retrying(once)


def load(queue: Queue, lease: Lease) -> Found | None:
    query = sa.select(CHECKPOINTS).where(CHECKPOINTS.c.trial_id == lease.trial_id)

    def once() -> Found | None:
        with queue.engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        intact = hashlib.sha256(row.payload).hexdigest() == row.sha256
        return Found(row.epoch, row.payload if intact else None)

    return retrying(once)
