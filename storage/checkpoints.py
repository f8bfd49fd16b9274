"""A trial's latest checkpoint: opaque bytes, in the study's own database or in its store, never more than one a trial.

Files are written before the database names them, and removed after the database has forgotten them: a crash in between
leaves a file too many, which `collect_garbage` removes, and never one too few.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import sqlalchemy as sa

from storage import object_store
from storage.engine import live_lease, reader, upsert
from storage.queue import Lease, Queue
from storage.retry import retry
from storage.schema import CHECKPOINTS, LEASES
from storage.study_attributes import store_key

DATABASE = object_store.DATABASE


@dataclass(frozen=True)
class StoredCheckpoint:
    """`payload` is None if it is missing, damaged, or not a file that this program wrote."""

    epoch: int
    payload: bytes | None


def save(queue: Queue, lease: Lease, epoch: int, payload: bytes) -> None:
    """Replace the trial's checkpoint by `payload`, taken after `epoch` whole epochs.

    Raises:
        LeaseLost: nothing was stored.
        OSError: the store did not take it; the checkpoint before is as it was.
    """
    name = None
    if queue.store != DATABASE:
        name = object_store.file_name(store_key(queue.engine, queue.study_id), lease.trial_id, lease.token)
        object_store.write(queue.store, name, payload)
    row = {
        "token": lease.token,
        "epoch": epoch,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "payload": payload if name is None else None,
        "location": name,
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
        if name is not None:
            object_store.remove_files(queue.store, [name])
        raise
    if superseded not in (None, name):
        object_store.remove_files(queue.store, [superseded])


def load(queue: Queue, lease: Lease) -> StoredCheckpoint | None:
    """The trial's checkpoint; None if it has none.

    Raises:
        OSError: the store does not answer.
    """
    query = sa.select(CHECKPOINTS).where(CHECKPOINTS.c.trial_id == lease.trial_id)

    def once() -> StoredCheckpoint | None:
        with reader(queue.engine).connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        payload = row.payload
        if row.location is not None:
            payload = None if queue.store == DATABASE else object_store.read(queue.store, row.location)
        intact = payload is not None and hashlib.sha256(payload).hexdigest() == row.sha256
        return StoredCheckpoint(row.epoch, payload if intact else None)

    return retry(once)


def collect_garbage(engine: sa.Engine, study_id: int, store: str) -> list[str]:
    """Remove the checkpoint files of this study that its database no longer names: what crashes and refused removals
    left. Files of other studies, of the same study in another database and of trials under a live lease stay.

    Args:
        store: the study's `checkpoint.store`.

    Returns:
        The names of the removed files.

    Raises:
        OSError: the store cannot be listed.
    """
    if store == DATABASE:
        return []
    key = store_key(engine, study_id)
    # In this order: who wrote a file before it was listed and has not named it yet still holds its lease.
    files = {name: match for name in object_store.names(store) if (match := object_store.NAME.fullmatch(name))}
    with reader(engine).connect() as connection:
        named = set(connection.scalars(sa.select(CHECKPOINTS.c.location).where(CHECKPOINTS.c.location.is_not(None))))
        held = set(connection.scalars(sa.select(LEASES.c.trial_id).where(live_lease(engine))))
    return object_store.remove_files(
        store,
        [
            name
            for name, match in files.items()
            if match["key"] == key and name not in named and int(match["trial"]) not in held
        ],
    )
