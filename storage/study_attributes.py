"""User attributes of a study, read and written with one statement each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from storage.engine import upsert
from storage.retry import retry
from storage.schema import STUDY_ATTRS

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
