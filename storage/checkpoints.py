"""A trial's latest checkpoint: opaque bytes, in the study's own database or in a folder, never more than one a trial.

And on disk, for the time that the database is away.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import sqlalchemy as sa

from storage import object_store
from storage.engine import upsert
from storage.queue import Lease, Queue
from storage.retry import retry
from storage.schema import CHECKPOINTS

DATABASE = "database"


@dataclass(frozen=True)
class Found:
    """A checkpoint that is there; `payload` is None if it was torn or altered."""

    epoch: int
    payload: bytes | None


def save(queue: Queue, lease: Lease, epoch: int, payload: bytes, store: str = DATABASE) -> None:
    """Put `payload`, taken after `epoch` whole epochs, in the place of the trial's checkpoint.

    Args:
        store: the database, or a folder that fsspec reaches; the database then holds where in it and the checksum.

    Raises:
        LeaseLost: nothing was stored.
        OSError: the folder did not take it; the checkpoint before is as it was.
    """
    location = None
    if store != DATABASE:
        location = f"{store.rstrip('/')}/trial-{lease.trial_id}-{lease.token}-{secrets.token_hex(4)}.checkpoint"
        object_store.write(location, payload)
    row = {
        "token": lease.token,
        "epoch": epoch,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "payload": payload if location is None else None,
        "location": location,
    }
    before = sa.select(CHECKPOINTS.c.location).where(CHECKPOINTS.c.trial_id == lease.trial_id)

    def once() -> str | None:
        with queue.engine.begin() as connection:
            queue.fence(connection, lease)
            old = connection.scalar(before)
            insert = upsert(queue.engine, CHECKPOINTS).values(trial_id=lease.trial_id, **row)
            connection.execute(insert.on_conflict_do_update(index_elements=["trial_id"], set_=row))
            return old

    try:
        superseded = retry(once)
    except BaseException:
        if location is not None:
            object_store.remove(location)
        raise
    if superseded not in (None, location):
        object_store.remove(superseded)


def load(queue: Queue, lease: Lease, store: str = DATABASE) -> Found | None:
    query = sa.select(CHECKPOINTS).where(CHECKPOINTS.c.trial_id == lease.trial_id)

    def once() -> Found | None:
        with queue.engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        payload = row.payload if row.location is None else object_store.read(row.location)
        intact = payload is not None and hashlib.sha256(payload).hexdigest() == row.sha256
        return Found(row.epoch, payload if intact else None)

    return retry(once)
