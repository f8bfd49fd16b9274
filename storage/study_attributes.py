"""Attributes of a study, read and written with one statement each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from storage.engine import upsert
from storage.retry import retry
from storage.schema import STUDY_ATTRS, STUDY_SYSTEM_ATTRS

PATIENCE_SECONDS = 30.0
"""How long to wait for an unavailable database: somebody is waiting at a terminal."""


def read_attributes(engine: sa.Engine, study_id: int, keys: Sequence[str]) -> dict[str, Any]:
    """Those of `keys` that the study has."""
    query = sa.select(STUDY_ATTRS.c.key, STUDY_ATTRS.c.value_json)
    query = query.where(STUDY_ATTRS.c.study_id == study_id, STUDY_ATTRS.c.key.in_(keys))
    with engine.execution_options(reading=True).connect() as connection:
        return {key: json.loads(value) for key, value in connection.execute(query)}


def set_attribute(engine: sa.Engine, study_id: int, key: str, value: Any) -> None:
    """Set one attribute; `value` is anything that JSON holds."""

    def once() -> None:
        with engine.begin() as connection:
            insert = upsert(engine, STUDY_ATTRS).values(study_id=study_id, key=key, value_json=json.dumps(value))
            again = {"value_json": insert.excluded.value_json}
            connection.execute(insert.on_conflict_do_update(index_elements=["study_id", "key"], set_=again))

    retry(once, PATIENCE_SECONDS)


def read_system_attributes(engine: sa.Engine, study_id: int, pattern: str) -> dict[str, Any]:
    """Optuna's and optuna-dashboard's attributes of the study whose key is LIKE `pattern`."""
    of_study = STUDY_SYSTEM_ATTRS.c.study_id == study_id
    query = sa.select(STUDY_SYSTEM_ATTRS.c.key, STUDY_SYSTEM_ATTRS.c.value_json)
    with engine.execution_options(reading=True).connect() as connection:
        rows = connection.execute(query.where(of_study, STUDY_SYSTEM_ATTRS.c.key.like(pattern)))
        return {key: json.loads(value) for key, value in rows}


def set_system_attributes(engine: sa.Engine, study_id: int, values: Mapping[str, Any]) -> None:
    """Set all of them in one transaction: Optuna's storage takes one for each."""
    if not values:
        return
    rows = [{"study_id": study_id, "key": key, "value_json": json.dumps(value)} for key, value in values.items()]

    def once() -> None:
        insert = upsert(engine, STUDY_SYSTEM_ATTRS)
        again = {"value_json": insert.excluded.value_json}
        with engine.begin() as connection:
            connection.execute(insert.on_conflict_do_update(index_elements=["study_id", "key"], set_=again), rows)

    retry(once, PATIENCE_SECONDS)
