"""Copy, export and import a study, put failed trials back into the queue, delete a study.

Each is one transaction on tables and columns as they are found: what Optuna or we keep of a trial in future goes along.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from storage import object_store
from storage.engine import database_time, upsert
from storage.errors import UserError
from storage.optuna_internals import DASHBOARD_NOTE, models
from storage.queries import STATE_NAMES
from storage.retry import retry
from storage.schema import (
    CHECKPOINTS,
    EPOCHS,
    LEASES,
    METADATA,
    REPORTS,
    SPENDING,
    STUDIES,
    TRIAL_ATTRS,
    TRIAL_SYSTEM_ATTRS,
    TRIAL_VALUES,
    TRIALS,
)
from storage.url import file_of

HEARTBEATS: sa.Table = models.TrialHeartbeatModel.__table__
STUDY_SYSTEM_ATTRS: sa.Table = models.StudySystemAttributeModel.__table__
_EVERY = (*models.BaseModel.metadata.sorted_tables, *METADATA.sorted_tables)
OF_STUDY = tuple(table for table in _EVERY if "study_id" in table.c and table not in (STUDIES, TRIALS))
OF_TRIAL = tuple(table for table in _EVERY if "trial_id" in table.c and table is not TRIALS)

BATCH = 100
"""Trials that are read and written at a time: 20,000 rows of 200 epochs each."""
PATIENCE_SECONDS = 30.0
"""Somebody waits at a terminal, so a database that is away becomes an error sooner than a worker's does."""


def copy(source: RDBStorage, target: RDBStorage, name: str, new_name: str | None = None) -> int:
    """Copy a study to another database, or within one under another name: export and import are both this.

    Everything is as in the source except the ids, and the leases, which are released: whoever claims an unfinished
    trial of the copy goes on from its checkpoint. A SQLite source is best opened with `reading=True`, which lets
    others write to it meanwhile.

    Returns:
        The number of trials.

    Raises:
        UserError: no such study, one of that name in the target, or trials that are being worked on.
    """
    called = new_name or name

    def once() -> int:
        with target.engine.begin() as into, _reading(source, target, into) as found:
            if target.engine.dialect.name == "postgresql":  # checkpoints may take long to read
                into.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            old = _study_id(found, name)
            _refuse_live(found, old, name, "copying", "stop those workers first")
            (row,) = _rows(found, STUDIES, "study_id", [old])
            row = {"study_name": called} | {key: row[key] for key in row.keys() - {"study_id", "study_name"}}
            insert = upsert(target.engine, STUDIES).values(row).on_conflict_do_nothing()
            new = into.execute(insert.returning(STUDIES.c.study_id)).scalar_one_or_none()
            if new is None:
                raise UserError(f"a study {called!r} is in the target already; choose another --name")
            ids = _copy_trials(found, into, old, new)
            into.execute(sa.delete(SPENDING).where(SPENDING.c.study_id == new))  # SQLite may give the id again
            for table in OF_STUDY:
                if table is SPENDING:  # whoever works on the copy adds up anew
                    continue
                rows = _rows(found, table, "study_id", [old])
                _put(into, table, "study_id", {old: new}, _renamed(rows, ids) if table is STUDY_SYSTEM_ATTRS else rows)
            return len(ids)

    return retry(once, PATIENCE_SECONDS)


def requeue(storage: RDBStorage, name: str, *, trials: Collection[int] | None) -> list[int]:
    """Put failed trials back into the queue as if nobody had worked on them: all, or those with the numbers `trials`.

    They keep their numbers, parameters and attributes; what the failed attempts reported and stored goes. Their leases
    stay, with the next token: a worker that is still at one of them must not write to it any more.

    Returns:
        The numbers of the trials put back.

    Raises:
        UserError: no such study, or some of `trials` are not failed trials of it; nothing was changed.
    """

    def once() -> list[int]:
        with storage.engine.begin() as connection:
            study_id = _study_id(connection, name, lock=True)
            query = sa.select(TRIALS.c.number, TRIALS.c.state, TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id)
            found = {row.number: row for row in connection.execute(query.order_by(TRIALS.c.number))}
            failed = [number for number, row in found.items() if row.state == TrialState.FAIL]
            wrong = sorted(set(trials or ()) - set(failed))
            if wrong:
                states = [f"{n} ({STATE_NAMES[found[n].state] if n in found else 'not there'})" for n in wrong]
                raise UserError(
                    f"only failed trials can be put back, got {_some(states)}; failed in {name!r}: {_some(failed)}"
                )
            chosen = failed if trials is None else sorted(set(trials))
            for ids in _batches([found[number].trial_id for number in chosen], BATCH):
                _start_over(connection, ids)
            return chosen

    return retry(once, PATIENCE_SECONDS)


def delete(storage: RDBStorage, name: str, *, force: bool = False) -> None:
    """Delete a study and everything of it, in Optuna's tables and in ours.

    Args:
        force: even while trials are being worked on; their workers find their leases gone and write no more.

    Raises:
        UserError: no such study, or trials that are being worked on.
    """

    def once() -> Sequence[str]:
        with storage.engine.begin() as connection:
            study_id = _study_id(connection, name, lock=True)
            trials = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id)
            # Leases first, as workers do: they wait there for us, and then find nothing. Nobody claims a locked trial.
            for locked in (sa.select(LEASES.c.trial_id).where(LEASES.c.trial_id.in_(trials)), trials):
                connection.execute(locked.with_for_update()).all()
            if not force:
                _refuse_live(connection, study_id, name, "deleting", "stop those workers first, or --force")
            kept = sa.select(CHECKPOINTS.c.location).where(CHECKPOINTS.c.trial_id.in_(trials))
            locations = connection.scalars(kept.where(CHECKPOINTS.c.location.is_not(None))).all()
            for table in OF_TRIAL:
                connection.execute(sa.delete(table).where(table.c.trial_id.in_(trials)))
            for table in (TRIALS, *OF_STUDY, STUDIES):
                connection.execute(sa.delete(table).where(table.c.study_id == study_id))
            return locations

    for location in retry(once, PATIENCE_SECONDS):
        object_store.remove(location)


@contextmanager
def _reading(source: RDBStorage, target: RDBStorage, into: sa.Connection) -> Iterator[sa.Connection]:
    """One state of the source for all that is read of it, whatever is written meanwhile."""
    ends = file_of(source.engine.url), file_of(target.engine.url)
    if ends[0] is not None and ends[1] is not None and os.path.samefile(ends[0], ends[1]):
        yield into  # a second connection that wants to write would wait for this one for ever
        return
    engine = source.engine
    if engine.dialect.name == "postgresql":
        engine = engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.connect() as connection:
        yield connection


def _study_id(connection: sa.Connection, name: str, lock: bool = False) -> int:
    query = sa.select(STUDIES.c.study_id).where(STUDIES.c.study_name == name)
    found = connection.scalar(query.with_for_update() if lock else query)
    if found is None:
        names = list(connection.scalars(sa.select(STUDIES.c.study_name).order_by(STUDIES.c.study_name)))
        there = f"studies there: {', '.join(names)}" if names else "there are none yet"
        raise UserError(f"no study {name!r} in this storage; {there}")
    return int(found)


def _refuse_live(connection: sa.Connection, study_id: int, name: str, doing: str, fix: str) -> None:
    held = TRIALS.join(LEASES, TRIALS.c.trial_id == LEASES.c.trial_id)
    live = sa.and_(TRIALS.c.study_id == study_id, LEASES.c.expires_at > database_time(connection.engine))
    count = connection.scalar(sa.select(sa.func.count()).select_from(held).where(live))
    if count:
        held_now = f"workers hold {count} trial{'s' if count > 1 else ''} of {name!r}"
        raise UserError(f"{doing} needs a study at rest, but {held_now}; {fix}")


def _copy_trials(found: sa.Connection, into: sa.Connection, old: int, new: int) -> dict[int, int]:
    """The trials of a study and all that is theirs; old to new trial ids."""
    trials = _rows(found, TRIALS, "study_id", [old])
    old_ids = [row.pop("trial_id") for row in trials]
    insert = sa.insert(TRIALS).returning(TRIALS.c.trial_id, sort_by_parameter_order=True)
    new_ids = into.scalars(insert, [row | {"study_id": new} for row in trials]).all() if trials else []
    ids = dict(zip(old_ids, new_ids, strict=True))
    anew = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == new)
    for table in OF_TRIAL:
        # SQLite may give a deleted study's trial ids again.
        into.execute(sa.delete(table).where(table.c.trial_id.in_(anew)))
        if table is HEARTBEATS:
            continue
        size, having = BATCH, old_ids
        if table is CHECKPOINTS:  # up to hundreds of megabytes each
            of_study = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == old)
            size, having = 1, list(found.scalars(sa.select(table.c.trial_id).where(table.c.trial_id.in_(of_study))))
        for batch in _batches(having, size):
            rows = _rows(found, table, "trial_id", batch)
            for row in rows if table is CHECKPOINTS else ():
                if row["location"] is not None:  # a file is one trial's own: the copy has its checkpoint with it
                    row |= {"payload": object_store.read(row["location"]), "location": None}
            _put(into, table, "trial_id", ids, rows)
    into.execute(sa.update(LEASES).where(LEASES.c.trial_id.in_(anew)).values(expires_at=0.0))
    return ids


def _rows(found: sa.Connection, table: sa.Table, key: str, ids: Sequence[int]) -> list[dict[str, Any]]:
    """In the order in which they were made, which Optuna gives parameters and trials back in."""
    query = sa.select(table).where(table.c[key].in_(ids)).order_by(*table.primary_key)
    return [dict(row) for row in found.execute(query).mappings()]


def _put(into: sa.Connection, table: sa.Table, key: str, ids: Mapping[int, int], rows: list[dict[str, Any]]) -> None:
    """The rows under their new `key`; an id of their own they get from the database."""
    own = table.autoincrement_column
    for row in rows:
        row[key] = ids[row[key]]
        if own is not None:
            del row[own.name]
    if rows:
        into.execute(sa.insert(table), rows)


def _renamed(attributes: list[dict[str, Any]], ids: Mapping[int, int]) -> list[dict[str, Any]]:
    """Notes follow their trials. One on no trial of the study (Optuna's own copy makes such) might clash: left out."""
    kept = []
    for row in attributes:
        note = DASHBOARD_NOTE.match(row["key"])
        if note is None:
            kept.append(row)
        elif int(note[1]) in ids:
            kept.append(row | {"key": f"dashboard:{ids[int(note[1])]}:{row['key'][note.end() :]}"})
    return kept


def _start_over(connection: sa.Connection, ids: Sequence[int]) -> None:
    """Take from failed trials what their attempts left, and make them WAITING."""
    # First: from here on nobody who was at one of them writes to it.
    released = {"token": LEASES.c.token + 1, "expires_at": 0.0, "attempts": 0, "last_error": None}
    connection.execute(sa.update(LEASES).where(LEASES.c.trial_id.in_(ids)).values(released))
    for table in (TRIAL_VALUES, REPORTS, EPOCHS, CHECKPOINTS):
        connection.execute(sa.delete(table).where(table.c.trial_id.in_(ids)))
    connection.execute(sa.delete(TRIAL_ATTRS).where(TRIAL_ATTRS.c.trial_id.in_(ids), TRIAL_ATTRS.c.key == "error"))
    # How far successive halving had let the failed attempt come.
    rungs = TRIAL_SYSTEM_ATTRS.c.key.startswith("completed_rung_", autoescape=True)
    connection.execute(sa.delete(TRIAL_SYSTEM_ATTRS).where(TRIAL_SYSTEM_ATTRS.c.trial_id.in_(ids), rungs))
    waiting = {"state": TrialState.WAITING, "datetime_start": None, "datetime_complete": None}
    connection.execute(sa.update(TRIALS).where(TRIALS.c.trial_id.in_(ids)).values(waiting))


def _batches(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _some(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:10])) + (f" and {len(items) - 10} more" if len(items) > 10 else "") or "none"
