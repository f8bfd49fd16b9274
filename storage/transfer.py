"""Copy, export and import a study, requeue failed trials, delete a study.

Each is one transaction on all tables and columns of the schema: a new one goes along without a change here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import DataError, IntegrityError

from storage import artifacts, bulk, object_store
from storage.engine import live_lease, open_storage, reader, upsert
from storage.errors import UserError
from storage.import_check import check_export
from storage.optuna_internals import DASHBOARD_NOTE, models
from storage.queries import STATE_NAMES
from storage.retry import retry
from storage.schema import (
    ARTIFACT_CHUNKS,
    ARTIFACTS,
    CHECKPOINTS,
    EPOCHS,
    LEASES,
    METADATA,
    REPORTS,
    SPENDING,
    STUDIES,
    STUDY_ATTRS,
    STUDY_SYSTEM_ATTRS,
    TRIAL_ATTRS,
    TRIAL_SYSTEM_ATTRS,
    TRIAL_VALUES,
    TRIALS,
)
from storage.study_attributes import STORE_KEY, read_attributes, set_attribute, store_of
from storage.study_name import check_study_name
from storage.url import sqlite_url

logger = logging.getLogger(__name__)

HEARTBEATS: sa.Table = models.TrialHeartbeatModel.__table__

_EVERY = (*models.BaseModel.metadata.sorted_tables, *METADATA.sorted_tables)
OF_STUDY = tuple(table for table in _EVERY if "study_id" in table.c and table not in (STUDIES, TRIALS))
OF_TRIAL = tuple(table for table in _EVERY if "trial_id" in table.c and table is not TRIALS)

ORIGINAL_NAME = "original_name"
"""Key of a copy's user attribute: the name that its pruner goes by."""
COPIED_TO = "copied_to"
"""Key of a source's user attribute: where its copy is, as it may be shown."""
BATCH = 100
"""Trials that are changed at a time."""
IN_DATABASE = {"checkpoint": object_store.DATABASE, "artifacts": object_store.DATABASE}
"""Section of a config to its `store`."""
PATIENCE_SECONDS = 30.0
"""How long to wait for an unavailable database: less than a worker, because somebody waits at a terminal."""


def copy(source: RDBStorage, target: RDBStorage, name: str, new_name: str | None = None) -> int:
    """Copy a study between two databases of one's own, or within one under another name. An export is this too.

    Everything is as in the source except the ids and the leases, which are released: whoever claims an unfinished trial
    of the copy resumes it from its checkpoint. Files of checkpoints and models are read from the study's stores before
    the target is locked, and go into the target's database. A source is best opened with `reading=True`, which lets
    others write to it meanwhile.

    Returns:
        The number of trials.

    Raises:
        UserError: no such study, one of that name in the target, or trials that are being worked on.
    """
    with tempfile.TemporaryDirectory(prefix="study-copy-") as folder:
        return _copy(source, target, name, new_name or name, files_of(source, name, Path(folder)), {})


def check_source(source: RDBStorage, name: str, new_name: str | None = None) -> None:
    """What `copy` refuses whatever the target is, for who does not want to make a target in vain.

    Raises:
        UserError: no such study, a name that no study may have, or trials that are being worked on.
    """
    check_study_name(new_name or name)
    with reader(source.engine).connect() as connection:
        _refuse_live(connection, find_study(connection, name), name, "copying", "stop those workers first")


def is_ours(storage: RDBStorage, name: str) -> bool:
    """Whether `study launch` or `study derive` created it: other studies of Optuna have no config.

    Raises:
        UserError: no such study.
    """
    with reader(storage.engine).connect() as connection:
        study_id = find_study(connection, name)
    return bool(read_attributes(storage.engine, study_id, ["config"]))


def refuse_if_copied(engine: sa.Engine, name: str, fix: str) -> None:
    """Of a study that gets work: its copy and it would diverge.

    Args:
        fix: what to do instead.

    Raises:
        UserError: no such study, or it was copied.
    """
    with reader(engine).connect() as connection:
        study_id = find_study(connection, name)
    if copy := read_attributes(engine, study_id, [COPIED_TO]).get(COPIED_TO):
        raise UserError(f"the study {name!r} was copied (to {copy}); {fix}")


def forget_copy(engine: sa.Engine, name: str) -> None:
    """From here on the study counts as one that was not copied."""
    with reader(engine).connect() as connection:
        study_id = find_study(connection, name)
    if read_attributes(engine, study_id, [COPIED_TO]).get(COPIED_TO):
        set_attribute(engine, study_id, COPIED_TO, None)


def import_study(
    file: Path,
    target: str,
    new_name: str | None = None,
    *,
    stores: Mapping[str, str] = IN_DATABASE,
    check_config: Callable[[dict[str, Any]], object] = lambda config: None,
) -> tuple[str, int]:
    """Bring the study of a file that `study export` wrote into a database. Nobody vouches for such a file: all of it is
    checked before the target is opened, and only what is in it is read.

    Args:
        target: database URL.
        stores: the imported study's `checkpoint.store` and `artifacts.store`, by section, whatever the file says.
        check_config: raises UserError if the study's config is not one.

    Returns:
        The study's name in the target and the number of its trials.

    Raises:
        UserError: the file is not an exported study, or a study of that name is in the target.
    """
    name = check_export(file, check_config)
    check_study_name(new_name or name)
    source = open_storage(sqlite_url(file), create=False, reading=True)
    own = IN_DATABASE | dict(stores)
    try:
        return new_name or name, _copy(source, open_storage(target), name, new_name or name, {}, own)
    finally:
        source.engine.dispose()


def _copy(
    source: RDBStorage,
    target: RDBStorage,
    name: str,
    new_name: str,
    files: Mapping[str, Path],
    stores: Mapping[str, str],
) -> int:
    """Args:
    files: location to content, for checkpoints and models that are not in the source's database.
    stores: the copy's stores, by section of its config; a section that is not named is as in the source.
    """
    check_study_name(new_name)

    def once() -> int:
        with values_as_one_line(name), bulk.ends(source, target) as (out_of, into):
            if target.engine.dialect.name == "postgresql":  # checkpoints may take long to read
                into.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            old = find_study(out_of, name)
            _refuse_live(out_of, old, name, "copying", "stop those workers first")
            (row,) = _rows(out_of, STUDIES, "study_id", [old])
            row = {"study_name": new_name} | {key: row[key] for key in row.keys() - {"study_id", "study_name"}}
            insert = upsert(target.engine, STUDIES).values(row).on_conflict_do_nothing()
            new = into.execute(insert.returning(STUDIES.c.study_id)).scalar_one_or_none()
            if new is None:
                raise UserError(f"a study {new_name!r} is in the target already; choose another --name")
            ids = copy_trials(out_of, into, old, new, files)
            into.execute(sa.delete(SPENDING).where(SPENDING.c.study_id == new))  # SQLite may give the id again
            for table in OF_STUDY:
                if table is SPENDING:  # whoever works on the copy adds up anew
                    continue
                rows = _rows(out_of, table, "study_id", [old])
                if table is STUDY_SYSTEM_ATTRS:
                    rows = with_new_ids(rows, ids)
                if table is STUDY_ATTRS:
                    rows = _with_original_name(_with_own_stores(rows, stores), old, name, new_name)
                _put(into, table, "study_id", {old: new}, rows)
            return len(ids)

    return retry(once, PATIENCE_SECONDS)


@contextmanager
def values_as_one_line(name: str) -> Iterator[None]:
    """Values that the target does not take: SQLite has a value of any type and length in any column, PostgreSQL not.

    Raises:
        UserError: in the place of the database's error.
    """
    try:
        yield
    except (DataError, IntegrityError) as error:
        reason = str(error.orig).splitlines()[0]
        raise UserError(
            f"the study {name!r} has a value that the target does not take ({reason}); correct it in the source"
        ) from None


def files_of(source: RDBStorage, name: str, folder: Path, only: Collection[int] | None = None) -> dict[str, Path]:
    """The files of the study's checkpoints and models, read into `folder`: location to content.

    Args:
        only: of these trials, by their ids. None: of all.

    Raises:
        UserError: a store does not answer.
    """
    of_study = sa.select(TRIALS.c.trial_id).join(STUDIES).where(STUDIES.c.study_name == name)
    places: list[tuple[str, str]] = []
    with source.engine.connect() as connection:
        for section, table in (("checkpoint", CHECKPOINTS), ("artifacts", ARTIFACTS)):
            query = sa.select(table.c.trial_id, table.c.location)
            rows = connection.execute(query.where(table.c.trial_id.in_(of_study), table.c.location.is_not(None))).all()
            if locations := [row.location for row in rows if only is None or row.trial_id in only]:
                store = store_of(connection, find_study(connection, name), section)
                places += [(store, location) for location in locations if store != object_store.DATABASE]
    files = {}
    for number, (store, location) in enumerate(places):
        try:
            content = object_store.read(store, location)
        except OSError as error:
            raise UserError(f"cannot read the files of {name!r} from {store!r}: {error}") from None
        if content is not None:
            files[location] = folder / str(number)
            files[location].write_bytes(content)
    return files


def requeue(storage: RDBStorage, name: str, *, trials: Collection[int] | None) -> list[int]:
    """Queue failed trials again as if nobody had worked on them: all, or those with the numbers `trials`.

    They keep their numbers, parameters and attributes; what the failed attempts reported and stored goes. Their leases
    stay, with the next token: a worker that is still at one of them must not write to it any more.

    Returns:
        The numbers of the requeued trials.

    Raises:
        UserError: no such study, or some of `trials` are not failed trials of it; nothing was changed.
    """

    def once() -> tuple[list[int], str, list[str]]:
        with storage.engine.begin() as connection:
            study_id = find_study(connection, name, lock=True)
            query = sa.select(TRIALS.c.number, TRIALS.c.state, TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id)
            rows = {row.number: row for row in connection.execute(query.order_by(TRIALS.c.number))}
            failed = [number for number, row in rows.items() if row.state == TrialState.FAIL]
            wrong = sorted(set(trials or ()) - set(failed))
            if wrong:
                states = [f"{n} ({STATE_NAMES[rows[n].state] if n in rows else 'not there'})" for n in wrong]
                raise UserError(
                    f"only failed trials can be requeued, got {_some(states)}; failed in {name!r}: {_some(failed)}"
                )
            chosen = failed if trials is None else sorted(set(trials))
            files: list[str] = []
            for ids in _batches([rows[number].trial_id for number in chosen], BATCH):
                files += _start_over(connection, ids)
            return chosen, store_of(connection, study_id, "checkpoint"), files

    numbers, store, files = retry(once, PATIENCE_SECONDS)
    object_store.remove_files(store, files)
    return numbers


def delete(storage: RDBStorage, name: str, *, force: bool = False) -> None:
    """Delete a study and everything of it, in Optuna's tables, in ours, and in its stores.

    Args:
        force: even while trials are being worked on; their workers find their leases gone and write no more.

    Raises:
        UserError: no such study, or trials that are being worked on.
    """

    def once() -> list[tuple[str, Sequence[str]]]:
        with storage.engine.begin() as connection:
            study_id = find_study(connection, name, lock=True)
            trials = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id)
            # Leases first, as workers do: they wait there for us, and then find nothing. Nobody claims a locked trial.
            for locked in (sa.select(LEASES.c.trial_id).where(LEASES.c.trial_id.in_(trials)), trials):
                connection.execute(locked.with_for_update()).all()
            if not force:
                _refuse_live(connection, study_id, name, "deleting", "stop those workers first, or --force")
            files = []
            for section, table in (("checkpoint", CHECKPOINTS), ("artifacts", ARTIFACTS)):
                stored = sa.select(table.c.location).where(table.c.trial_id.in_(trials), table.c.location.is_not(None))
                files.append((store_of(connection, study_id, section), connection.scalars(stored).all()))
            for table in OF_TRIAL:
                connection.execute(sa.delete(table).where(table.c.trial_id.in_(trials)))
            for table in (TRIALS, *OF_STUDY, STUDIES):
                connection.execute(sa.delete(table).where(table.c.study_id == study_id))
            return files

    for store, names in retry(once, PATIENCE_SECONDS):
        object_store.remove_files(store, names)


def find_study(connection: sa.Connection, name: str, lock: bool = False) -> int:
    """The id of a study.

    Raises:
        UserError: there is none of that name.
    """
    query = sa.select(STUDIES.c.study_id).where(STUDIES.c.study_name == name)
    study_id = connection.scalar(query.with_for_update() if lock else query)
    if study_id is None:
        names = list(connection.scalars(sa.select(STUDIES.c.study_name).order_by(STUDIES.c.study_name)))
        there = f"studies there: {', '.join(names)}" if names else "there are none yet"
        raise UserError(f"no study {name!r} in this storage; {there}")
    return int(study_id)


def _refuse_live(connection: sa.Connection, study_id: int, name: str, doing: str, fix: str) -> None:
    held = TRIALS.join(LEASES, TRIALS.c.trial_id == LEASES.c.trial_id)
    live = sa.and_(TRIALS.c.study_id == study_id, live_lease(connection.engine))
    count = connection.scalar(sa.select(sa.func.count()).select_from(held).where(live))
    if count:
        workers = f"workers hold {count} trial{'s' if count > 1 else ''} of {name!r}"
        raise UserError(f"{doing} needs a study at rest, but {workers}; {fix}")


def copy_trials(
    out_of: sa.Connection,
    into: sa.Connection,
    old: int,
    new: int,
    files: Mapping[str, Path],
    only: Collection[int] | None = None,
) -> dict[int, int]:
    """Copy the trials of a study and all that is theirs, models and checkpoints included.

    Args:
        old, new: ids of the studies.
        files: location to content, for checkpoints and models that are not in the source's database.
        only: ids of the trials; their copies are numbered anew from 0. None: all, under their numbers.

    Returns:
        Old to new trial ids.
    """
    trials = _rows(out_of, TRIALS, "study_id", [old])
    if only is not None:
        kept = sorted((row for row in trials if row["trial_id"] in only), key=lambda row: row["number"])
        trials = [row | {"number": number} for number, row in enumerate(kept)]
    numbers: dict[int, int] = {row.pop("trial_id"): row["number"] for row in trials}
    if twice := [number for number, count in Counter(numbers.values()).items() if count > 1]:
        raise UserError(f"two trials of the study have the number {twice[0]}; give one of them another in the source")
    insert = sa.insert(TRIALS).returning(TRIALS.c.number, TRIALS.c.trial_id)
    made = into.execute(insert, [row | {"study_id": new} for row in trials]).all() if trials else []
    new_ids = {row.number: row.trial_id for row in made}
    ids = {old_id: new_ids[number] for old_id, number in numbers.items()}
    of_copy = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == new)
    for table in OF_TRIAL:
        # SQLite may give a deleted study's trial ids again.
        into.execute(sa.delete(table).where(table.c.trial_id.in_(of_copy)))
        if table in (HEARTBEATS, ARTIFACTS, ARTIFACT_CHUNKS):
            continue
        if table is CHECKPOINTS:
            _copy_checkpoints(out_of, into, old, ids, files)
        elif table is TRIAL_SYSTEM_ATTRS:
            bulk.copy_rows(out_of, into, table, ids, _is_no_artifact)
        else:
            bulk.copy_rows(out_of, into, table, ids)
    into.execute(sa.update(LEASES).where(LEASES.c.trial_id.in_(of_copy)).values(expires_at=0.0))
    _copy_artifacts(out_of, into, old, ids, numbers, files)
    return ids


def _is_no_artifact(attributes: sa.Table) -> sa.ColumnElement[bool]:
    """Artifacts get new ids. Not LIKE, which takes capitals for small letters on SQLite."""
    return sa.func.substr(attributes.c.key, 1, len(artifacts.ATTRIBUTE)) != artifacts.ATTRIBUTE


def _copy_checkpoints(
    out_of: sa.Connection, into: sa.Connection, old: int, ids: Mapping[int, int], files: Mapping[str, Path]
) -> None:
    """One by one: each may have hundreds of megabytes."""
    query = sa.select(CHECKPOINTS.c.trial_id).join(TRIALS, TRIALS.c.trial_id == CHECKPOINTS.c.trial_id)
    for trial_id in out_of.scalars(query.where(TRIALS.c.study_id == old).order_by(CHECKPOINTS.c.trial_id)).all():
        if trial_id in ids:
            rows = [_whole(row, files) for row in _rows(out_of, CHECKPOINTS, "trial_id", [trial_id])]
            _put(into, CHECKPOINTS, "trial_id", ids, [row for row in rows if row is not None])


def _copy_artifacts(
    out_of: sa.Connection,
    into: sa.Connection,
    old: int,
    ids: Mapping[int, int],
    numbers: Mapping[int, int],
    files: Mapping[str, Path],
) -> None:
    """The models of the trials in `ids`, under new ids, as far as they are whole.

    Args:
        numbers: of the trials' copies, by old trial id.
    """
    query = sa.select(ARTIFACTS, TRIALS.c.number).join(TRIALS, TRIALS.c.trial_id == ARTIFACTS.c.trial_id)
    for row in out_of.execute(query.where(TRIALS.c.study_id == old).order_by(TRIALS.c.number)).all():
        if row.trial_id not in ids:
            continue
        if row.location is None:
            parts = artifacts.chunks(out_of, row.trial_id, row.artifact_id, row.size)
        else:
            parts = _file_parts(files.get(row.location))
        if not artifacts.copy_content(into, ids[row.trial_id], numbers[row.trial_id], row, parts):
            logger.warning("the model of trial %d is missing or damaged and was not copied", row.number)


def _file_parts(file: Path | None) -> Iterator[bytes]:
    if file is not None:
        with file.open("rb") as content:
            while part := content.read(artifacts.CHUNK_BYTES):
                yield part


def _whole(row: dict[str, Any], files: Mapping[str, Path]) -> dict[str, Any] | None:
    """A checkpoint's row with its content, wherever it was; None if that is missing or damaged."""
    if row["location"] is not None:
        file = files.get(row["location"])
        row |= {"payload": None if file is None else file.read_bytes(), "location": None}
    if not isinstance(row["payload"], bytes) or hashlib.sha256(row["payload"]).hexdigest() != row["sha256"]:
        logger.warning("a checkpoint is missing or damaged and was not copied: its trial starts again from epoch 0")
        return None
    return row


def _rows(out_of: sa.Connection, table: sa.Table, key: str, ids: Sequence[int]) -> list[dict[str, Any]]:
    """In the order in which they were made, which is Optuna's order of parameters and trials."""
    query = sa.select(table).where(table.c[key].in_(ids)).order_by(*table.primary_key)
    try:
        return [dict(row) for row in out_of.execute(query).mappings()]
    except (ValueError, TypeError, LookupError) as error:  # SQLAlchemy's, of a date or a state that is none
        raise UserError(
            f"the table {table.name} has a value that nobody can read: {error}; correct it in the source"
        ) from None


def _put(into: sa.Connection, table: sa.Table, key: str, ids: Mapping[int, int], rows: list[dict[str, Any]]) -> None:
    """The rows under their new `key`; an id of their own they get from the database."""
    own = table.autoincrement_column
    for row in rows:
        row[key] = ids[row[key]]
        if own is not None:
            del row[own.name]
    if rows:
        into.execute(sa.insert(table), rows)


def with_new_ids(attributes: list[dict[str, Any]], ids: Mapping[int, int]) -> list[dict[str, Any]]:
    """Notes follow their trials. One on no trial of the study (Optuna's own copy makes such) might clash: left out."""
    kept = []
    for row in attributes:
        note = DASHBOARD_NOTE.match(row["key"])
        if note is None:
            kept.append(row)
        elif int(note[1]) in ids:
            kept.append(row | {"key": f"dashboard:{ids[int(note[1])]}:{row['key'][note.end() :]}"})
    return kept


def _with_own_stores(attributes: list[dict[str, Any]], stores: Mapping[str, str]) -> list[dict[str, Any]]:
    """The copy names files in its stores by a key of its own; and it has other stores, if `stores` says so."""
    rows = [row for row in attributes if row["key"] != STORE_KEY]
    for row in rows:
        if row["key"] == "config" and stores:
            config = json.loads(row["value_json"])
            for section, store in stores.items():
                config[section] = config.get(section, {}) | {"store": store}
            row["value_json"] = json.dumps(config)
    return rows


def _with_original_name(
    attributes: list[dict[str, Any]], study_id: int, name: str, new_name: str
) -> list[dict[str, Any]]:
    """Hyperband hashes the study's name to choose a trial's bracket: a copy under another name keeps the first."""
    rows = [row for row in attributes if row["key"] != COPIED_TO]
    if new_name != name and not any(row["key"] == ORIGINAL_NAME for row in rows):
        own = str(STUDY_ATTRS.autoincrement_column.name) if STUDY_ATTRS.autoincrement_column is not None else "key"
        rows.append({own: 0, "study_id": study_id, "key": ORIGINAL_NAME, "value_json": json.dumps(name)})
    return rows


def _start_over(connection: sa.Connection, ids: Sequence[int]) -> list[str]:
    """Remove from failed trials what their attempts left, and make them WAITING; the checkpoint files that are left."""
    # First: from here on no worker that still holds one of them writes to it.
    released = {"token": LEASES.c.token + 1, "expires_at": 0.0, "attempts": 0, "last_error": None}
    connection.execute(sa.update(LEASES).where(LEASES.c.trial_id.in_(ids)).values(released))
    stored = sa.select(CHECKPOINTS.c.location).where(CHECKPOINTS.c.trial_id.in_(ids))
    files = list(connection.scalars(stored.where(CHECKPOINTS.c.location.is_not(None))))
    for table in (TRIAL_VALUES, REPORTS, EPOCHS, CHECKPOINTS, ARTIFACT_CHUNKS):
        connection.execute(sa.delete(table).where(table.c.trial_id.in_(ids)))
    connection.execute(sa.delete(TRIAL_ATTRS).where(TRIAL_ATTRS.c.trial_id.in_(ids), TRIAL_ATTRS.c.key == "error"))
    # How far successive halving had let the failed attempt come.
    rungs = TRIAL_SYSTEM_ATTRS.c.key.startswith("completed_rung_", autoescape=True)
    connection.execute(sa.delete(TRIAL_SYSTEM_ATTRS).where(TRIAL_SYSTEM_ATTRS.c.trial_id.in_(ids), rungs))
    waiting = {"state": TrialState.WAITING, "datetime_start": None, "datetime_complete": None}
    connection.execute(sa.update(TRIALS).where(TRIALS.c.trial_id.in_(ids)).values(waiting))
    return files


def _batches(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _some(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:10])) + (f" and {len(items) - 10} more" if len(items) > 10 else "") or "none"
