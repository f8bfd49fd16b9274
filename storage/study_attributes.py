"""Attributes of a study, read and written with one statement each."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from storage import object_store
from storage.engine import reader, upsert
from storage.errors import UserError
from storage.retry import retry
from storage.schema import STUDY_ATTRS, STUDY_SYSTEM_ATTRS

STORE_KEY = "checkpoint_key"
"""Key of the user attribute that marks the files of one study in one database; a copy of the study gets its own."""
PATIENCE_SECONDS = 30.0
"""How long to wait for an unavailable database: somebody is waiting at a terminal."""


def read_attributes(engine: sa.Engine, study_id: int, keys: Sequence[str]) -> dict[str, Any]:
    """Those of `keys` that the study has."""
    query = sa.select(STUDY_ATTRS.c.key, STUDY_ATTRS.c.value_json)
    query = query.where(STUDY_ATTRS.c.study_id == study_id, STUDY_ATTRS.c.key.in_(keys))
    with reader(engine).connect() as connection:
        return {key: decoded(key, value) for key, value in connection.execute(query)}


def decoded(key: str, text: str) -> Any:
    """The value of an attribute of a study.

    Raises:
        UserError: it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the study's attribute {key!r} is no JSON ({error}); correct it in the database") from None


def set_attribute(engine: sa.Engine, study_id: int, key: str, value: Any) -> None:
    """Set one attribute; `value` is anything that JSON holds."""

    def once() -> None:
        with engine.begin() as connection:
            insert = upsert(engine, STUDY_ATTRS).values(study_id=study_id, key=key, value_json=json.dumps(value))
            again = {"value_json": insert.excluded.value_json}
            connection.execute(insert.on_conflict_do_update(index_elements=["study_id", "key"], set_=again))

    retry(once, PATIENCE_SECONDS)


def store_key(engine: sa.Engine, study_id: int) -> str:
    """What the names of the study's files in its stores begin with; made once."""
    stored = read_attributes(engine, study_id, [STORE_KEY]).get(STORE_KEY)
    if stored is None:

        def once() -> None:
            insert = upsert(engine, STUDY_ATTRS).values(
                study_id=study_id, key=STORE_KEY, value_json=f'"{secrets.token_hex(8)}"'
            )
            with engine.begin() as connection:
                connection.execute(insert.on_conflict_do_nothing(index_elements=["study_id", "key"]))

        retry(once)
        stored = read_attributes(engine, study_id, [STORE_KEY]).get(STORE_KEY)
    if not isinstance(stored, str) or not re.fullmatch("[0-9a-f]{16}", stored):
        stored = secrets.token_hex(8)  # it was altered: files with the old key are left to people
        set_attribute(engine, study_id, STORE_KEY, stored)
    return stored


def store_of(connection: sa.Connection, study_id: int, section: str) -> str:
    """Where a study keeps its files: `store` of the `section` of its config (`checkpoint` or `artifacts`)."""
    query = sa.select(STUDY_ATTRS.c.value_json).where(STUDY_ATTRS.c.study_id == study_id, STUDY_ATTRS.c.key == "config")
    try:
        store = json.loads(connection.scalar(query) or "{}")[section]["store"]
    except (ValueError, TypeError, LookupError):
        return object_store.DATABASE
    return store if isinstance(store, str) else object_store.DATABASE


def read_system_attributes(engine: sa.Engine, study_id: int, pattern: str) -> dict[str, Any]:
    """Optuna's and optuna-dashboard's attributes of the study whose key is LIKE `pattern`."""
    of_study = STUDY_SYSTEM_ATTRS.c.study_id == study_id
    query = sa.select(STUDY_SYSTEM_ATTRS.c.key, STUDY_SYSTEM_ATTRS.c.value_json)
    with reader(engine).connect() as connection:
        rows = connection.execute(query.where(of_study, STUDY_SYSTEM_ATTRS.c.key.like(pattern)))
        return {key: decoded(key, value) for key, value in rows}


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
