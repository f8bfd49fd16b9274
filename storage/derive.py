"""Copies finished trials of a study into a new one of the same database, beside the trials that it has to run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from storage import artifacts, transfer
from storage.engine import upsert
from storage.enqueue import insert_parameters, insert_trials
from storage.errors import UserError
from storage.optuna_internals import DASHBOARD, DASHBOARD_NOTE, models
from storage.retry import retry
from storage.schema import (
    SPENDING,
    STUDIES,
    STUDY_ATTRS,
    STUDY_SYSTEM_ATTRS,
    TRIAL_ATTRS,
    TRIAL_PARAMS,
    TRIAL_SYSTEM_ATTRS,
    TRIALS,
)
from storage.study_name import check_study_name

DIRECTIONS: sa.Table = models.StudyDirectionModel.__table__


def derive(
    storage: RDBStorage,
    name: str,
    new_name: str,
    attributes: Mapping[str, Any],
    taken: Mapping[int, FrozenTrial],
    queued: Sequence[FrozenTrial],
    *,
    replaced: Sequence[str],
    dropped: Sequence[str],
    keep: int | None,
) -> None:
    """Create the study `new_name` with copies of trials of `name` and with queued trials, in one transaction.

    The copies are numbered from 0 in the order of the originals and keep all that is theirs: values, reports, epochs,
    attempts, models. The queued trials come after them.

    Args:
        attributes: the new study's user attributes.
        taken: id of a complete or pruned trial of `name` to the parameters and further user attributes of its copy.
        queued: WAITING trials.
        replaced: keys of the copies' user attributes that they do not keep.
        dropped: what keys of the copies' system attributes begin with that they do not keep.
        keep: how many trials' models the new study keeps; None: all.

    Raises:
        UserError: no such study, one of the new name, or a trial that is no longer what it was; nothing was changed.
    """
    check_study_name(new_name)
    with tempfile.TemporaryDirectory(prefix="study-derive-") as folder:
        files = transfer.files_of(storage, name, Path(folder), taken.keys())

        def once() -> None:
            with transfer.values_as_one_line(name), storage.engine.begin() as connection:
                if connection.dialect.name == "postgresql":  # models may take long to copy
                    connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
                old = transfer.find_study(connection, name)
                artifacts.lock_study(connection, old)  # nobody deletes it or its models meanwhile
                _check(connection, old, name, taken)
                new = _insert_study(connection, old, new_name, attributes)
                ids = transfer.copy_trials(connection, connection, old, new, files, taken.keys())
                _change(connection, {ids[trial_id]: trial for trial_id, trial in taken.items()}, replaced, dropped)
                _copy_system_attributes(connection, old, new, ids)
                insert_trials(connection, new, len(ids), queued)
                artifacts.trim(connection, new, keep)  # copies have no files

        retry(once, transfer.PATIENCE_SECONDS)


def _check(connection: sa.Connection, study_id: int, name: str, taken: Mapping[int, FrozenTrial]) -> None:
    final = TRIALS.c.state.in_((TrialState.COMPLETE, TrialState.PRUNED))
    there = set(connection.scalars(sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id, final)))
    if not taken.keys() <= there:
        raise UserError(f"the study {name!r} was changed meanwhile; try again")


def _insert_study(connection: sa.Connection, old: int, new_name: str, attributes: Mapping[str, Any]) -> int:
    insert = upsert(connection.engine, STUDIES).values(study_name=new_name).on_conflict_do_nothing()
    new = connection.execute(insert.returning(STUDIES.c.study_id)).scalar_one_or_none()
    if new is None:
        raise UserError(f"a study {new_name!r} is in this storage already; choose another name")
    connection.execute(sa.delete(SPENDING).where(SPENDING.c.study_id == new))  # SQLite may give the id again
    columns = (DIRECTIONS.c.direction, DIRECTIONS.c.objective)
    for row in connection.execute(sa.select(*columns).where(DIRECTIONS.c.study_id == old)).mappings().all():
        connection.execute(sa.insert(DIRECTIONS).values(study_id=new, **row))
    rows = [{"study_id": new, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
    connection.execute(sa.insert(STUDY_ATTRS), rows)
    return int(new)


def _change(
    connection: sa.Connection, trials: Mapping[int, FrozenTrial], replaced: Sequence[str], dropped: Sequence[str]
) -> None:
    """Give the copies their parameters in the new space, which stores them in another way, and their attributes.

    Args:
        trials: by trial id.
    """
    ids = list(trials)
    for start in range(0, len(ids), transfer.BATCH):
        batch = {trial_id: trials[trial_id] for trial_id in ids[start : start + transfer.BATCH]}
        connection.execute(sa.delete(TRIAL_PARAMS).where(TRIAL_PARAMS.c.trial_id.in_(batch)))
        insert_parameters(connection, batch)
        keys = {*replaced, *(key for trial in batch.values() for key in trial.user_attrs)}
        old = sa.and_(TRIAL_ATTRS.c.trial_id.in_(batch), TRIAL_ATTRS.c.key.in_(keys))
        connection.execute(sa.delete(TRIAL_ATTRS).where(old))
        rows = [
            {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
            for trial_id, trial in batch.items()
            for key, value in trial.user_attrs.items()
        ]
        connection.execute(sa.insert(TRIAL_ATTRS), rows)
        for beginning in dropped:
            drop = TRIAL_SYSTEM_ATTRS.c.key.startswith(beginning, autoescape=True)
            connection.execute(sa.delete(TRIAL_SYSTEM_ATTRS).where(TRIAL_SYSTEM_ATTRS.c.trial_id.in_(batch), drop))


def _copy_system_attributes(connection: sa.Connection, old: int, new: int, ids: Mapping[int, int]) -> None:
    """Optuna's own, such as how far a quasi-random sequence has come, and notes on the copied trials; the dashboard's
    note and figures are about the other study.
    """
    columns = (STUDY_SYSTEM_ATTRS.c.key, STUDY_SYSTEM_ATTRS.c.value_json)
    rows = [dict(row) for row in connection.execute(
        sa.select(*columns).where(STUDY_SYSTEM_ATTRS.c.study_id == old)).mappings()]  # fmt: skip
    kept = [row for row in rows if DASHBOARD_NOTE.match(row["key"]) or not row["key"].startswith(DASHBOARD)]
    copied = [row | {"study_id": new} for row in transfer.with_new_ids(kept, ids)]
    if copied:
        connection.execute(sa.insert(STUDY_SYSTEM_ATTRS), copied)
