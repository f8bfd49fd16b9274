"""Queues the trials of a study: all of them, before anyone trains, and once."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from storage.retry import retry
from storage.schema import (
    ARTIFACT_CHUNKS,
    ARTIFACTS,
    ATTEMPTS,
    CHECKPOINTS,
    EPOCHS,
    LEASES,
    REPORTS,
    STUDIES,
    STUDY_ATTRS,
    TRIAL_ATTRS,
    TRIAL_PARAMS,
    TRIAL_SYSTEM_ATTRS,
    TRIAL_VALUES,
    TRIALS,
)
from storage.study_attributes import PATIENCE_SECONDS

QUEUE_POSITION = "queue_position"
"""User attribute of a trial that this program queued."""


def enqueue_trials(
    engine: sa.Engine,
    study_id: int,
    attributes: Mapping[str, Any],
    trials: Sequence[FrozenTrial],
    replaced: Mapping[str, Any] | None = None,
    first: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Give a study its attributes and its queued trials, all or nothing, once.

    Attributes that the study has already stay as they are; if one of them has another value, nothing is queued. As many
    trials as it has already (those with the user attribute `queue_position`) are left out at the beginning of `trials`,
    so a longer sequence adds work and a repeated call adds none.

    Args:
        trials: WAITING trials with the user attribute `queue_position`, which counts from 0.
        replaced: the old values of attributes that do get their new value, if they are still stored.
        first: further attributes of a study that has none yet.

    Returns:
        The study's user attributes.
    """

    def once() -> dict[str, Any]:
        with engine.begin() as connection:
            connection.execute(
                sa.select(STUDIES.c.study_id).where(STUDIES.c.study_id == study_id).with_for_update()
            ).one()
            query = sa.select(STUDY_ATTRS.c.key, STUDY_ATTRS.c.value_json).where(STUDY_ATTRS.c.study_id == study_id)
            stored = {key: json.loads(text) for key, text in connection.execute(query)}
            missing = {key: value for key, value in attributes.items() if key not in stored}
            missing |= {} if stored else dict(first or {})
            if missing:
                rows = [{"study_id": study_id, "key": k, "value_json": json.dumps(v)} for k, v in missing.items()]
                connection.execute(sa.insert(STUDY_ATTRS), rows)
            for key, old in (replaced or {}).items():
                if stored.get(key) == old:
                    this = sa.and_(STUDY_ATTRS.c.study_id == study_id, STUDY_ATTRS.c.key == key)
                    connection.execute(
                        sa.update(STUDY_ATTRS).where(this).values(value_json=json.dumps(attributes[key]))
                    )
                    stored[key] = attributes[key]
            of_study = TRIALS.c.study_id == study_id
            count = connection.execute(sa.select(sa.func.count()).select_from(TRIALS).where(of_study)).scalar_one()
            queued = connection.execute(
                sa.select(sa.func.count())
                .select_from(TRIALS.join(TRIAL_ATTRS, TRIALS.c.trial_id == TRIAL_ATTRS.c.trial_id))
                .where(of_study, TRIAL_ATTRS.c.key == QUEUE_POSITION)
            ).scalar_one()
            # Two first launches with different settings: the second gets the attributes of the first, and adds no work.
            if all(stored.get(key, value) == value for key, value in attributes.items()):
                insert_trials(connection, study_id, count, trials[queued:])
            return stored | missing

    return retry(once)


def add_trial(engine: sa.Engine, study_id: int, trial: FrozenTrial, *, seed_by_number: bool = False) -> int:
    """Queue one more trial, which is none of those that the study's config asks for.

    Args:
        trial: WAITING, without the user attribute `queue_position`.
        seed_by_number: add its number to its user attribute `seed`.

    Returns:
        Its number.
    """

    def once() -> int:
        with engine.begin() as connection:
            connection.execute(
                sa.select(STUDIES.c.study_id).where(STUDIES.c.study_id == study_id).with_for_update()
            ).one()
            of_study = TRIALS.c.study_id == study_id
            number = connection.execute(sa.select(sa.func.count()).select_from(TRIALS).where(of_study)).scalar_one()
            queued = copy.copy(trial)
            if seed_by_number:
                queued.user_attrs = trial.user_attrs | {"seed": trial.user_attrs["seed"] + number}
            insert_trials(connection, study_id, number, [queued])
            return int(number)

    return retry(once, PATIENCE_SECONDS)


def insert_trials(connection: sa.Connection, study_id: int, first: int, trials: Sequence[FrozenTrial]) -> None:
    """Insert WAITING trials with the numbers from `first` on, with their parameters and user attributes."""
    if not trials:
        return
    rows = [{"study_id": study_id, "number": first + i, "state": TrialState.WAITING} for i in range(len(trials))]
    insert = sa.insert(TRIALS).returning(TRIALS.c.trial_id, sort_by_parameter_order=True)
    ids = list(connection.execute(insert, rows).scalars())
    # SQLite gives a deleted study's trial ids again, and its workers may have written since. (These ids are ours alone
    # and in a row there; PostgreSQL's never return.)
    if connection.dialect.name == "sqlite":
        ours = (LEASES, ATTEMPTS, CHECKPOINTS, EPOCHS, ARTIFACTS, ARTIFACT_CHUNKS)
        for table in (*ours, REPORTS, TRIAL_VALUES, TRIAL_SYSTEM_ATTRS):
            connection.execute(sa.delete(table).where(table.c.trial_id.between(min(ids), max(ids))))
    insert_parameters(connection, dict(zip(ids, trials, strict=True)))
    attributes = [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for trial_id, trial in zip(ids, trials, strict=True)
        for key, value in trial.user_attrs.items()
    ]
    if attributes:
        connection.execute(sa.insert(TRIAL_ATTRS), attributes)


def insert_parameters(connection: sa.Connection, trials: Mapping[int, FrozenTrial]) -> None:
    """Insert the parameters of trials, by trial id."""
    params = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": trial.distributions[name].to_internal_repr(value),
            "distribution_json": distribution_to_json(trial.distributions[name]),
        }
        for trial_id, trial in trials.items()
        for name, value in trial.params.items()
    ]
    if params:
        connection.execute(sa.insert(TRIAL_PARAMS), params)
