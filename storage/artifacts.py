"""The trained models that finished trials leave: in chunks in the study's own database, or as files in its store.

Of a study with `artifacts.keep = k` exactly the best k remain, however many workers finish trials at once: a worker
writes the content under its lease, then names it, and removes what falls out of the best k, in the transaction that
finishes the trial. What is named is listed by `optuna.artifacts` and optuna-dashboard. Content without a name is what a
crash left; the trial's next attempt or `collect_garbage` removes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NoReturn, cast

import sqlalchemy as sa
from optuna.artifacts.exceptions import ArtifactNotFound

from storage import object_store
from storage.engine import live_lease, reader
from storage.exclusions import excluded
from storage.retry import retry
from storage.schema import ARTIFACT_CHUNKS, ARTIFACTS, LEASES, STUDIES, TRIAL_SYSTEM_ATTRS, TRIAL_VALUES, TRIALS
from storage.study_attributes import store_key, store_of

if TYPE_CHECKING:
    from storage.queue import Lease, Queue

Row = sa.Row[*tuple[Any, ...]]
"""Of `trial_artifacts`."""

logger = logging.getLogger(__name__)

ATTRIBUTE = "artifacts:"
"""What keys of system attributes that describe an artifact begin with, for `optuna.artifacts` and the dashboard."""
CHUNK_BYTES = 2**20
IN_MEMORY_BYTES = 2**24
"""Of an artifact that is read; a larger one goes through a temporary file."""


@dataclass(frozen=True)
class NewArtifact:
    """Content that is stored and has no name yet: `Queue.finish` names it."""

    id: str
    size: int
    sha256: str
    location: str | None
    """The name of its file; None: it is in chunks in the database."""
    store: str
    keep: int | None
    """How many trials' models the study keeps; None: all."""


@dataclass(frozen=True)
class StoredArtifact:
    """The model of a finished trial."""

    id: str
    trial: int
    """The trial's number."""
    value: float
    size: int
    """Bytes."""


def is_wanted(queue: Queue, lease: Lease, value: float, keep: int | None) -> bool:
    """Whether a trial that ends with `value` would be among the best `keep` of those that have a model."""
    if keep is None or keep == 0:
        return keep is None
    better = sa.or_(
        TRIAL_VALUES.c.value > value, sa.and_(TRIAL_VALUES.c.value == value, TRIALS.c.number < lease.number)
    )
    query = sa.select(TRIALS.c.number).select_from(_valued()).where(TRIALS.c.study_id == queue.study_id, better)

    def once() -> bool:
        with reader(queue.engine).connect() as connection:
            numbers = set(connection.scalars(query)) - excluded(connection, queue.study_id).keys()
            return len(numbers) < keep

    return retry(once, stopping=queue.stopping)


def save(queue: Queue, lease: Lease, content: bytes, *, store: str, keep: int | None) -> NewArtifact:
    """Store the content of a trial's model, for `Queue.finish` to name.

    Args:
        store: the study's `artifacts.store`.
        keep: how many trials' models the study keeps; None: all.

    Raises:
        LeaseLost: the trial has been taken over.
        OSError: the store did not take it.
    """
    artifact_id, location = str(uuid.uuid4()), None
    if len(content) > object_store.MOST_BYTES:
        raise OSError(f"the model has {len(content):,} bytes, more than {object_store.MOST_BYTES:,}")
    if store != object_store.DATABASE:
        key = store_key(queue.engine, queue.study_id)
        location = object_store.file_name(key, lease.trial_id, lease.token, object_store.MODEL)
        object_store.write(store, location, content)
    else:
        for position, start in enumerate(range(0, len(content), CHUNK_BYTES)):
            _save_chunk(queue, lease, artifact_id, position, content[start : start + CHUNK_BYTES])
    return NewArtifact(artifact_id, len(content), hashlib.sha256(content).hexdigest(), location, store, keep)


def _save_chunk(queue: Queue, lease: Lease, artifact_id: str, position: int, content: bytes) -> None:
    """In a transaction of its own: the lease is renewed with each, and no other writer waits for all of them."""
    key = {"trial_id": lease.trial_id, "artifact_id": artifact_id, "position": position}
    this = sa.and_(*(ARTIFACT_CHUNKS.c[name] == value for name, value in key.items()))

    def once() -> None:
        with queue.engine.begin() as connection:
            queue.fence(connection, lease)
            connection.execute(sa.delete(ARTIFACT_CHUNKS).where(this))  # of a try that was committed unnoticed
            connection.execute(sa.insert(ARTIFACT_CHUNKS).values(content=content, **key))

    retry(once)


def lock_study(connection: sa.Connection, study_id: int) -> None:
    """Until the end of the transaction no other changes which models the study keeps."""
    # Not FOR UPDATE, for which everybody would wait who inserts a row that refers to the study.
    query = sa.select(STUDIES.c.study_id).where(STUDIES.c.study_id == study_id)
    connection.execute(query.with_for_update(key_share=True)).all()


def name(connection: sa.Connection, study_id: int, lease: Lease, artifact: NewArtifact) -> list[str]:
    """Make the content the model of the trial, whose value is stored, and remove what falls out of the best. Under
    `lock_study`.

    Returns:
        Files to be removed once the transaction is committed.
    """
    if artifact.location is None:
        length = sa.func.coalesce(sa.func.sum(sa.func.length(ARTIFACT_CHUNKS.c.content)), 0)
        mine = sa.and_(ARTIFACT_CHUNKS.c.trial_id == lease.trial_id, ARTIFACT_CHUNKS.c.artifact_id == artifact.id)
        if connection.scalar(sa.select(length).where(mine)) != artifact.size:
            logger.warning("trial %d: its model was removed before it had a name; it is not kept", lease.number)
            return []
    put(connection, lease.trial_id, lease.number, lease.token, artifact)
    left = sa.and_(ARTIFACT_CHUNKS.c.trial_id == lease.trial_id, ARTIFACT_CHUNKS.c.artifact_id != artifact.id)
    connection.execute(sa.delete(ARTIFACT_CHUNKS).where(left))  # by earlier attempts
    return trim(connection, study_id, artifact.keep)


def put(connection: sa.Connection, trial_id: int, number: int, token: int, artifact: NewArtifact) -> None:
    """The rows that name an artifact: ours, and the system attribute by which Optuna and its dashboard list it."""
    row: dict[str, Any] = {"trial_id": trial_id, "token": token, "size": artifact.size}
    row |= {"sha256": artifact.sha256, "location": artifact.location}
    connection.execute(sa.insert(ARTIFACTS).values(artifact_id=artifact.id, **row))
    meta: dict[str, Any] = {"artifact_id": artifact.id, "filename": f"trial-{number}.safetensors"}
    meta |= {"mimetype": "application/octet-stream", "encoding": None}
    value = json.dumps(json.dumps(meta))  # a text in JSON, as optuna.artifacts.upload_artifact stores it
    attribute = {"trial_id": trial_id, "key": ATTRIBUTE + artifact.id, "value_json": value}
    connection.execute(sa.insert(TRIAL_SYSTEM_ATTRS).values(attribute))


def trim(connection: sa.Connection, study_id: int, keep: int | None) -> list[str]:
    """Remove the models that fall out of the best `keep`; None: none does. Under `lock_study`.

    Returns:
        Files to be removed once the transaction is committed.
    """
    if keep is None:
        return []
    files = []
    left_out = excluded(connection, study_id)
    ranked = sa.select(ARTIFACTS, TRIALS.c.number).select_from(_valued()).where(TRIALS.c.study_id == study_id)
    rows = connection.execute(ranked.order_by(TRIAL_VALUES.c.value.desc(), TRIALS.c.number)).all()
    for row in sorted(rows, key=lambda row: row.number in left_out)[keep:]:
        for table in (ARTIFACTS, ARTIFACT_CHUNKS):
            this = sa.and_(table.c.trial_id == row.trial_id, table.c.artifact_id == row.artifact_id)
            connection.execute(sa.delete(table).where(this))
        of_trial = TRIAL_SYSTEM_ATTRS.c.trial_id == row.trial_id
        attribute = sa.and_(of_trial, TRIAL_SYSTEM_ATTRS.c.key == ATTRIBUTE + row.artifact_id)
        connection.execute(sa.delete(TRIAL_SYSTEM_ATTRS).where(attribute))
        files += [row.location] if row.location is not None else []
    return files


def _valued() -> sa.Join:
    """Artifacts with the trials that they belong to and those trials' values (the first objective's)."""
    value = sa.and_(TRIAL_VALUES.c.trial_id == TRIALS.c.trial_id, TRIAL_VALUES.c.objective == 0)
    return ARTIFACTS.join(TRIALS, TRIALS.c.trial_id == ARTIFACTS.c.trial_id).join(TRIAL_VALUES, value)


def stored(engine: sa.Engine, study_id: int) -> list[StoredArtifact]:
    """The models of a study, the best first; of two with the same value, the one of the lower number. Those of trials
    that a person has excluded come last.
    """
    query = sa.select(ARTIFACTS.c.artifact_id, TRIALS.c.number, TRIAL_VALUES.c.value, ARTIFACTS.c.size)
    query = query.select_from(_valued()).where(TRIALS.c.study_id == study_id)
    with reader(engine).connect() as connection:
        rows = connection.execute(query.order_by(TRIAL_VALUES.c.value.desc(), TRIALS.c.number)).all()
        left_out = excluded(connection, study_id)
    return sorted((StoredArtifact(*row) for row in rows), key=lambda model: model.trial in left_out)


class DatabaseArtifactStore:
    """The models of all studies of a database as an artifact store of Optuna's, to read: `download_artifact` and the
    dashboard take it. Workers store models, in the transaction that finishes their trial; nothing else writes here.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The content, once it is known to be whole.

        Raises:
            ArtifactNotFound: there is none, or it is damaged.
            OSError: the store does not answer.
        """
        row, store = self._find(artifact_id)
        if not (isinstance(row.size, int) and 0 <= row.size <= object_store.MOST_BYTES):
            raise ArtifactNotFound(f"the artifact {artifact_id} has an impossible size")
        file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 — the caller closes it
        digest, size = hashlib.sha256(), 0
        for part in self._parts(row, store):
            size += len(part)
            if size > row.size:
                break
            digest.update(part)
            file.write(part)
        if size != row.size or digest.hexdigest() != row.sha256:
            file.close()
            raise ArtifactNotFound(f"the artifact {artifact_id} is missing or damaged (checksum)")
        file.seek(0)
        return cast(BinaryIO, file)

    def write(self, artifact_id: str, content_body: IO[bytes]) -> NoReturn:
        """Raises:
        OSError: always.
        """
        raise OSError("models are stored by workers alone, as their trials finish")

    def remove(self, artifact_id: str) -> NoReturn:
        """Raises:
        OSError: always.
        """
        raise OSError("models are removed with their study, or when others become better")

    def _find(self, artifact_id: str) -> tuple[Row, str]:
        columns = (ARTIFACTS.c.trial_id, ARTIFACTS.c.artifact_id, ARTIFACTS.c.size, ARTIFACTS.c.sha256)
        query = sa.select(*columns, ARTIFACTS.c.location).where(ARTIFACTS.c.artifact_id == artifact_id)
        with reader(self.engine).connect() as connection:
            row: Row | None = connection.execute(query).one_or_none()
            if row is None:
                raise ArtifactNotFound(f"no artifact {artifact_id}: no longer among the best, or never there")
            study = sa.select(TRIALS.c.study_id).where(TRIALS.c.trial_id == row.trial_id)
            store = object_store.DATABASE
            if row.location is not None:
                store = store_of(connection, connection.scalar(study) or 0, "artifacts")
        return row, store

    def _parts(self, row: Row, store: str) -> Iterator[bytes]:
        if row.location is not None:
            content = None if store == object_store.DATABASE else object_store.read(store, row.location)
            yield content or b""
            return
        with reader(self.engine).connect() as connection:
            yield from chunks(connection, row.trial_id, row.artifact_id, row.size)


def chunks(connection: sa.Connection, trial_id: int, artifact_id: str, size: int) -> Iterator[bytes]:
    """The content of an artifact of `size` bytes that is in the database, as far as it is there, a chunk at a time."""
    query = sa.select(ARTIFACT_CHUNKS.c.content).where(
        ARTIFACT_CHUNKS.c.trial_id == trial_id,
        ARTIFACT_CHUNKS.c.artifact_id == artifact_id,
        sa.func.length(ARTIFACT_CHUNKS.c.content) <= CHUNK_BYTES,
    )
    for position in range(-(-size // CHUNK_BYTES)):
        content = connection.scalar(query.where(ARTIFACT_CHUNKS.c.position == position))
        if not isinstance(content, bytes):  # SQLite has any value in any column
            return
        yield content


def copy_content(into: sa.Connection, trial_id: int, number: int, row: Row, parts: Iterable[bytes]) -> bool:
    """Store the content of an artifact in chunks for another trial, under a new id; False:
    it is missing or damaged, and nothing was stored.
    """
    if not (isinstance(row.size, int) and 0 <= row.size <= object_store.MOST_BYTES):
        return False
    artifact_id, digest, size = str(uuid.uuid4()), hashlib.sha256(), 0
    for position, part in enumerate(parts):
        size += len(part)
        if size > row.size:
            break
        digest.update(part)
        chunk = {"trial_id": trial_id, "artifact_id": artifact_id, "position": position, "content": part}
        into.execute(sa.insert(ARTIFACT_CHUNKS).values(chunk))
    if size != row.size or digest.hexdigest() != row.sha256:
        this = sa.and_(ARTIFACT_CHUNKS.c.trial_id == trial_id, ARTIFACT_CHUNKS.c.artifact_id == artifact_id)
        into.execute(sa.delete(ARTIFACT_CHUNKS).where(this))
        return False
    copied = NewArtifact(artifact_id, size, row.sha256, None, object_store.DATABASE, None)
    put(into, trial_id, number, row.token, copied)
    return True


def collect_garbage(engine: sa.Engine, study_id: int, store: str) -> tuple[int, list[str]]:
    """Remove what crashes and refused removals left of the study's models: chunks in the database and files in the
    store that nothing names, except those of trials under a live lease.

    Args:
        store: the study's `artifacts.store`.

    Returns:
        The number of artifacts whose chunks were removed, and the names of the removed files.

    Raises:
        OSError: the store cannot be listed.
    """
    of_study = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id)
    held = sa.select(LEASES.c.trial_id).where(live_lease(engine))
    unnamed = sa.and_(
        ARTIFACT_CHUNKS.c.trial_id.in_(of_study),
        ARTIFACT_CHUNKS.c.trial_id.not_in(held),
        ARTIFACT_CHUNKS.c.artifact_id.not_in(sa.select(ARTIFACTS.c.artifact_id)),
    )

    def once() -> int:
        with engine.begin() as connection:
            lock_study(connection, study_id)
            found = connection.scalars(sa.select(ARTIFACT_CHUNKS.c.artifact_id).where(unnamed).distinct()).all()
            connection.execute(sa.delete(ARTIFACT_CHUNKS).where(unnamed))
            return len(found)

    count = retry(once)
    if store == object_store.DATABASE:
        return count, []
    key = store_key(engine, study_id)
    # In this order: who wrote a file before it was listed and has not named it yet still holds its lease.
    files = object_store.names(store, object_store.MODEL)
    matches = {file: match for file in files if (match := object_store.NAME.fullmatch(file))}
    with reader(engine).connect() as connection:
        named = set(connection.scalars(sa.select(ARTIFACTS.c.location).where(ARTIFACTS.c.location.is_not(None))))
        working = set(connection.scalars(held))
    return count, object_store.remove_files(
        store,
        [
            file
            for file, match in matches.items()
            if match["key"] == key and file not in named and int(match["trial"]) not in working
        ],
    )
