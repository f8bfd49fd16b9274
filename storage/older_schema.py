"""Reads tables of an older schema version as if they were migrated, without changing them.

Every SELECT gets a common table expression for each table of ours that it names; the expression has that table's name,
its present columns and values, and hides it. This is what `storage/migrations` writes, as a query.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from storage.schema import ATTEMPTS, CHECKPOINTS, METADATA, TRIAL_ATTRS

VALUES: dict[sa.Column[Any], str] = {
    ATTEMPTS.c.outcome: "CASE outcome WHEN 'settled' THEN 'finished' ELSE outcome END",
    CHECKPOINTS.c.location: "replace(location, rtrim(location, replace(location, '/', '')), '')",
    TRIAL_ATTRS.c.key: (
        "CASE WHEN key = 'ticket' AND EXISTS (SELECT 1 FROM trials JOIN study_user_attributes AS a "
        "ON a.study_id = trials.study_id WHERE trials.trial_id = trial_user_attributes.trial_id AND a.key = 'config') "
        "THEN 'queue_position' ELSE key END"
    ),
}
"""Columns whose values changed with schema version 0002."""
OLDER_SCHEMA = "older_schema"
"""Execution option of an engine whose SELECTs are changed: no other connection finds the present schema there."""


def read_as_current(engine: sa.Engine) -> None:
    """From now on the SELECTs of `engine` find the present schema. Nothing may be written through it to our tables."""
    expressions = _expressions(engine)
    engine.update_execution_options(**{OLDER_SCHEMA: True})

    @sa.event.listens_for(engine, "before_cursor_execute", retval=True)
    def _hide_old_tables(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> tuple[str, Any]:
        needed = ", ".join(expression for table, expression in expressions.items() if table in statement)
        if needed and statement.startswith("SELECT"):
            statement = f"WITH {needed} {statement}"
        elif needed and statement.startswith("WITH "):
            statement = f"WITH {needed}, {statement.removeprefix('WITH ')}"
        return statement, parameters


def _expressions(engine: sa.Engine) -> dict[str, str]:
    """Table name to its common table expression."""
    inspector = sa.inspect(engine)
    tables = inspector.get_table_names()
    schema = "main." if engine.dialect.name == "sqlite" else ""  # SQLite takes the bare name for the expression's own
    expressions = {}
    for table in (*METADATA.sorted_tables, TRIAL_ATTRS):
        present = {c["name"] for c in inspector.get_columns(table.name)} if table.name in tables else set()
        columns = [
            f"{VALUES.get(column, column.name) if column.name in present else _null(column, engine)} AS {column.name}"
            for column in table.c
        ]
        source = f"FROM {schema}{table.name} AS {table.name}" if present else "WHERE 1 = 0"
        expressions[table.name] = f"{table.name} AS (SELECT {', '.join(columns)} {source})"
    return expressions


def _null(column: sa.Column[Any], engine: sa.Engine) -> str:
    return f"CAST(NULL AS {column.type.compile(engine.dialect)})"
