"""Copies the rows of trials in bulk, between two databases or within one.

Where one connection sees both ends, the database does it by itself (`INSERT … SELECT`): within a database, and between
two SQLite files, of which the target's connection attaches the other. Else rows go as the drivers read them, a batch of
trials at a time, into SQLite by `executemany` and into PostgreSQL by `COPY`.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import sqlalchemy as sa
from optuna.storages import RDBStorage

from storage.engine import read_only_address
from storage.errors import UserError
from storage.older_schema import OLDER_SCHEMA
from storage.url import file_of

BATCH = 100
"""Trials whose rows of a table are copied at a time, 20,000 of 200 epochs a trial: they fit in memory, and in SQLite's
cache (1,000 trials at a time take a fifth longer)."""
ALIKE = (sa.Integer, sa.Float, sa.String, sa.LargeBinary)
"""Types that both drivers read and take in the same form. An enum, which is a `String`, is its name in both."""
ATTACHED = "source"
"""The schema name of a source that is attached."""


@contextmanager
def ends(source: RDBStorage, target: RDBStorage) -> Iterator[tuple[sa.Connection, sa.Connection]]:
    """A connection that sees one state of the source, whatever is written there meanwhile, and one in a transaction on
    the target; the same connection if both are one SQLite file.
    """
    files = file_of(source.engine.url), file_of(target.engine.url)
    if files[0] is None or files[1] is None or source.engine.get_execution_options().get(OLDER_SCHEMA):
        with _two_connections(source.engine, target.engine) as both:
            yield both
    elif os.path.samefile(files[0], files[1]):
        with target.engine.begin() as into:  # a second connection that wants to write would wait for this one for ever
            yield into, into
    else:
        with _attached(source.engine, read_only_address(files[0]), target.engine) as both:
            yield both


@contextmanager
def _two_connections(source: sa.Engine, target: sa.Engine) -> Iterator[tuple[sa.Connection, sa.Connection]]:
    if source.dialect.name == "postgresql":
        source = source.execution_options(isolation_level="REPEATABLE READ")
    if target.dialect.name == "postgresql" and not sa.event.contains(target, "do_execute", _copy_from):
        sa.event.listen(target, "do_execute", _copy_from)
    with target.begin() as into, source.connect() as out_of:
        yield out_of, into


@contextmanager
def _attached(source: sa.Engine, address: str, target: sa.Engine) -> Iterator[tuple[sa.Connection, sa.Connection]]:
    """One transaction on both: the target's connection sees the source's tables in a schema, where `out_of` reads.

    Nothing of the source but its tables' rows is used: no trigger, which only a write would start.
    """
    # The source's own connection stays open as long: the last one to close removes SQLite's log, which one that only
    # reads cannot.
    reading = source.execution_options(reading=True)
    with reading.connect() as beside, ExitStack() as afterwards, target.connect() as into:
        beside.exec_driver_sql("SELECT 1 FROM sqlite_master LIMIT 1")
        driver = into.connection.driver_connection
        assert driver is not None
        into.detach()  # from the pool: it is closed afterwards, and nobody else finds the source attached
        afterwards.callback(driver.close)  # Ctrl-C makes SQLAlchemy forget a detached connection, its lock with it
        driver.execute(f"ATTACH ? AS {ATTACHED}", [address])
        view = sa.create_engine(
            "sqlite://",
            creator=lambda: _Borrowed(driver),
            poolclass=sa.NullPool,
            execution_options={"schema_translate_map": {None: ATTACHED}},
        )
        with into.begin(), view.connect() as out_of:
            yield out_of, into


class _Borrowed:
    """A driver's connection whose transaction and end are its owner's business."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def _leave(self) -> None: ...

    commit = rollback = close = _leave


def copy_rows(
    out_of: sa.Connection,
    into: sa.Connection,
    table: sa.Table,
    ids: Mapping[int, int],
    which: Callable[[sa.Table], sa.ColumnElement[bool]] = lambda table: sa.true(),
) -> None:
    """Copy rows of trials: all columns but an id of the row's own, which it gets from the database.

    A trial's rows are inserted in the order in which they were made, which is Optuna's order of parameters.

    Args:
        out_of, into: of `ends`, or one connection twice.
        ids: old to new trial ids.
        which: the condition on a row of the table.
    """
    attached = out_of.get_execution_options().get("schema_translate_map", {}).get(None)
    if out_of is into or attached is not None:
        there = table.to_metadata(sa.MetaData(), schema=attached)
        for query in _queries(there, ids, which):
            into.execute(sa.insert(table).from_select(_names(table), query))
    else:
        read = (_read(out_of, table, query) for query in _queries(table, ids, which))
        for rows in _read_ahead(read) if into.dialect.name == "postgresql" else read:
            if rows:
                _insert(into, table, rows)


def _queries(
    table: sa.Table, ids: Mapping[int, int], which: Callable[[sa.Table], sa.ColumnElement[bool]]
) -> Iterator[sa.Select[Any]]:
    """The rows of a batch of trials each, with new trial ids, in the order in which they were made. By trials first, as
    an index has them: the database sorts a trial at a time.
    """
    names, key = _names(table), table.c.trial_id
    order = [key, *(column for column in table.primary_key if column is not key)]
    for first, last in _runs(ids):
        columns = (key + (ids[first] - first), *(table.c[name] for name in names[1:]))
        yield sa.select(*columns).where(key.between(first, last), which(table)).order_by(*order)


def _runs(ids: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """First and last of at most `BATCH` trials that follow one another in both studies, as nearly all do."""
    old = sorted(ids)
    start = 0
    for end in range(1, len(old) + 1):
        follows = end < len(old) and old[end] == old[end - 1] + 1 and ids[old[end]] == ids[old[end - 1]] + 1
        if not follows or end - start == BATCH:
            yield old[start], old[end - 1]
            start = end


def _read(out_of: sa.Connection, table: sa.Table, query: sa.Select[Any]) -> Sequence[Sequence[Any]]:
    """Rows as the driver reads them, if that will do."""
    result = out_of.execute(query)
    if not _is_alike(table):
        return result.all()
    try:
        return result.cursor.fetchall()
    except sqlite3.Error as error:  # text that is no UTF-8, a damaged file
        raise UserError(
            f"the table {table.name} cannot be read: {error}; use a copy of the study from before"
        ) from None


def _insert(into: sa.Connection, table: sa.Table, rows: Sequence[Sequence[Any]]) -> None:
    names, quoted = _names(table), into.dialect.identifier_preparer
    columns = f"{quoted.format_table(table)} ({', '.join(map(quoted.quote, names))})"
    if not _is_alike(table):
        into.execute(sa.insert(table), [dict(zip(names, row, strict=True)) for row in rows])
    elif into.dialect.name == "postgresql":
        into.exec_driver_sql(f"COPY {columns} FROM STDIN", (iter(rows),))
    else:
        into.exec_driver_sql(f"INSERT INTO {columns} VALUES ({', '.join('?' * len(names))})", rows)


def _copy_from(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    """Lets SQLAlchemy execute `COPY … FROM STDIN` as any statement: its errors are SQLAlchemy's, a lost connection
    is noticed.
    """
    if not statement.startswith("COPY "):
        return False
    with cursor.copy(statement) as copy:
        for row in parameters[0]:
            copy.write_row(row)
    return True


def _names(table: sa.Table) -> list[str]:
    """The columns to copy, `trial_id` first."""
    own = table.autoincrement_column
    return ["trial_id", *(column.name for column in table.c if column is not own and column.name != "trial_id")]


def _is_alike(table: sa.Table) -> bool:
    return all(isinstance(column.type, ALIKE) for column in table.c)


def _read_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The next batch is read in a thread while PostgreSQL works on the last one."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
