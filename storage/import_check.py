"""Checks a file to import, value by value, before anything of it is used; and any SQLite file that cannot be read.

Whoever made the file is not trusted: values may be of any type and size, rows doubled, tables views with endless
queries. The file is opened read-only, only real tables count, and the whole check has a time limit.
"""

from __future__ import annotations

import functools
import json
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution, json_to_distribution
from optuna.study import StudyDirection

from storage.artifacts import CHUNK_BYTES
from storage.budgets import UNITS
from storage.early_end import EARLY_END
from storage.errors import UserError
from storage.exclusions import EXCLUDED, is_exclusion
from storage.object_store import MOST_BYTES
from storage.optuna_internals import models
from storage.origins import AFTER, DERIVED_FROM, ORIGIN_TRIAL, is_finite, is_whole
from storage.schema import (
    ARTIFACT_CHUNKS,
    ARTIFACTS,
    ATTEMPTS,
    CHECKPOINTS,
    EPOCHS,
    LATEST,
    LEASES,
    METADATA,
    REPORTS,
    SCHEMA_VERSION,
    SPENDING,
    STUDIES,
    STUDY_ATTRS,
    STUDY_SYSTEM_ATTRS,
    TRIAL_ATTRS,
    TRIAL_LOGS,
    TRIAL_PARAMS,
    TRIAL_SYSTEM_ATTRS,
    TRIAL_VALUES,
    TRIALS,
    VERSION,
)
from storage.study_name import check_study_name
from storage.trial_logs import LEVELS, MOST_LINES

SECONDS, SECONDS_PER_MEGABYTE = 60.0, 1.0
"""How long the check of a file may take."""
MOST_TRIALS = 1_000_000
MOST_TEXT = 10_000_000
"""Characters in one value; the largest are figures for the dashboard."""
MOST_DEPTH = 50
"""Of lists and objects within each other."""
MOST_NUMBER = 2**31 - 1
"""PostgreSQL's INTEGER."""
HEADER = b"SQLite format 3\0"

DIRECTIONS: sa.Table = models.StudyDirectionModel.__table__

REQUIRED = (
    STUDIES, DIRECTIONS, STUDY_ATTRS, STUDY_SYSTEM_ATTRS, TRIALS, TRIAL_PARAMS, TRIAL_VALUES, REPORTS, TRIAL_ATTRS,
    TRIAL_SYSTEM_ATTRS, LEASES, CHECKPOINTS, EPOCHS,
)  # fmt: skip
OPTIONAL = (ATTEMPTS, SPENDING, ARTIFACTS, ARTIFACT_CHUNKS, TRIAL_LOGS)
"""Older versions may lack them."""
VERSIONS = (
    sa.Table("alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True)),
    VERSION,
)
"""Of Optuna's schema and of ours."""
NULLABLE = frozenset(
    (
        *(column for table in METADATA.sorted_tables for column in table.c if column.nullable),
        *(TRIALS.c.datetime_start, TRIALS.c.datetime_complete, TRIAL_VALUES.c.value, REPORTS.c.intermediate_value),
    )
)
"""Optuna's tables allow NULL in more columns than Optuna writes it to."""
RULES: dict[sa.Table, tuple[str, ...]] = {
    TRIALS: ("number >= 0", "state NOT IN ('COMPLETE', 'PRUNED', 'FAIL') OR datetime_complete IS NOT NULL"),
    TRIAL_PARAMS: ("is_distribution(distribution_json)", "is_in_distribution(distribution_json, param_value)"),
    TRIAL_VALUES: ("(value IS NULL) = (value_type <> 'FINITE')", "objective >= 0"),
    REPORTS: ("(intermediate_value IS NULL) = (intermediate_value_type <> 'FINITE')", "step >= 0"),
    STUDY_ATTRS: ("is_json(value_json)",),
    STUDY_SYSTEM_ATTRS: ("is_json(value_json)",),
    TRIAL_ATTRS: ("is_json(value_json)", "is_trial_attribute(key, value_json)"),
    TRIAL_SYSTEM_ATTRS: ("is_json(value_json)",),
    LEASES: ("token BETWEEN 1 AND 1000000000", "attempts BETWEEN 0 AND 1000000000"),
    CHECKPOINTS: (
        "location IS NULL AND payload IS NOT NULL",
        f"length(payload) <= {MOST_BYTES}",
        "epoch >= 0",
        "length(sha256) = 64 AND sha256 NOT GLOB '*[^0-9a-f]*'",
    ),
    ARTIFACTS: (
        "location IS NULL",
        f"size BETWEEN 0 AND {MOST_BYTES}",
        "length(sha256) = 64 AND sha256 NOT GLOB '*[^0-9a-f]*'",
    ),
    ARTIFACT_CHUNKS: (f"length(content) <= {CHUNK_BYTES}", "position >= 0"),
    EPOCHS: (
        "epoch >= 1",
        "accuracy BETWEEN 0 AND 1",
        "balanced_accuracy IS NULL OR balanced_accuracy BETWEEN 0 AND 1",
        "macro_f1 IS NULL OR macro_f1 BETWEEN 0 AND 1",
        "images >= 0",
        "k >= 0",
        "train_seconds >= 0 AND validation_seconds >= 0",
    ),
    TRIAL_LOGS: (
        "token >= 1",
        f"position BETWEEN 0 AND {MOST_LINES - 1}",
        f"level IN {LEVELS}",
    ),
    VERSION: ("version_num GLOB '[0-9]*' AND version_num NOT GLOB '*[^0-9]*'",),
    ATTEMPTS: ("outcome IS NULL OR outcome IN ('finished', 'settled', 'released', 'error', 'vanished', 'skipped')",),
}
"""What holds of every row beside the types of its columns, and of its times."""
TIMES = (ATTEMPTS.c.started_at, ATTEMPTS.c.ended_at, TRIAL_LOGS.c.at)
NUMBERS = frozenset(
    (
        "best_epoch", "epochs", "images", "seen", "train_seconds", "validation_seconds", "selection_seconds",
        "peak_memory_bytes", "joules", "test_accuracy", "seed", "cell", "replicate", "queue_position", "ticket",
        "network_parameters",
        ORIGIN_TRIAL,
    )
)  # fmt: skip
"""User attributes of a trial that this program computes with."""
STUDY_ATTRIBUTES: dict[str, type] = {
    "config": dict, "preset": str, "data_fingerprint": str, "images": dict, "protocol": str, "budgets": dict,
    "stop": bool, "uid": str, "classes": list, EXCLUDED: dict, EARLY_END: dict,
    "data_facts": dict, "confirms": dict, "test_asked": list, DERIVED_FROM: dict, AFTER: dict,
}  # fmt: skip


def check_export(file: Path, check_config: Callable[[dict[str, Any]], object], seconds: float = SECONDS) -> str:
    """The name of the one study in a file that `study export` wrote.

    Args:
        check_config: raises UserError if the study's config is not one.
        seconds: time limit, beside SECONDS_PER_MEGABYTE.

    Raises:
        UserError: the file is anything else, and what was wrong first.
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(file)!r}: {getattr(error, 'strerror', None) or error}") from None
    try:
        if not stat.S_ISREG(status.st_mode):
            raise _Wrong("it is no regular file")
        with file.open("rb") as content:
            if content.read(len(HEADER)) != HEADER:
                raise _Wrong("it is no SQLite file")
        limit = seconds + SECONDS_PER_MEGABYTE * status.st_size / 1e6
        return _check(file, check_config, limit)
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from None
    except _Wrong as error:
        raise UserError(f"{str(file)!r} is not a study that `study export` wrote: {error}") from None


class _Wrong(Exception):
    """The first fault."""


def stored_fault(file: Path) -> str | None:
    """The first value in a database, of whatever studies, that neither Optuna nor this program writes: for programs
    that could not read it. SQLite has a value of any type in any column. None: there is none.
    """
    try:
        with _opened(file, SECONDS) as connection:
            _check_tables(connection)
    except _Wrong as error:
        return str(error)
    return None


def _check(file: Path, check_config: Callable[[dict[str, Any]], object], seconds: float) -> str:
    with _opened(file, seconds) as connection:
        _check_tables(connection)
        _check_trials(connection)
        return _check_study(connection, check_config)


@contextmanager
def _opened(file: Path, seconds: float) -> Iterator[sqlite3.Connection]:
    """A connection that only reads, with the functions of the rules.

    Raises:
        _Wrong: in the place of errors of SQLite.
    """
    log = file.with_name(file.name + "-wal")
    mode = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
    connection = sqlite3.connect(f"file:{quote(str(file))}?{mode}", uri=True)
    deadline = time.monotonic() + seconds
    try:
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES + MOST_TEXT)
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "query_only = ON"):
            connection.execute(f"PRAGMA {pragma}")
        for name, arguments, function in _FUNCTIONS:
            connection.create_function(name, arguments, function, deterministic=True)
        yield connection
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            raise _Wrong(f"checking it takes more than {seconds:.0f} s") from None
        raise _Wrong(f"it cannot be read ({error})") from None
    except (sqlite3.Error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise _Wrong(f"it cannot be read ({error})") from None
    finally:
        connection.close()


def _check_tables(connection: sqlite3.Connection) -> None:
    columns = {table: _columns(connection, table) for table in REQUIRED}
    columns |= {
        table: present for table in (*OPTIONAL, *VERSIONS) if (present := _columns(connection, table, optional=True))
    }
    (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if state != "ok":
        raise _Wrong("it is damaged")
    for table, present in columns.items():
        _check_table(connection, table, present)
    if VERSION in columns and connection.execute(f"SELECT * FROM {VERSION.name}").fetchone() == (SCHEMA_VERSION,):
        _demand_all_columns(columns)


def _demand_all_columns(columns: Mapping[sa.Table, set[str]]) -> None:
    """A file of the present version has all of our columns; of an older one those that are new are read as NULL."""
    for table in METADATA.sorted_tables:
        if missing := [column.name for column in table.c if column.name not in columns.get(table, ())]:
            raise _Wrong(f"the table {table.name} has no column {missing[0]}")


def _columns(connection: sqlite3.Connection, table: sa.Table, optional: bool = False) -> set[str]:
    """The columns of a table that must be a real one."""
    entry = connection.execute(
        "SELECT type, sql FROM sqlite_master WHERE lower(name) = ? AND type <> 'index'", [table.name]
    ).fetchall()
    if not entry and optional:
        return set()
    if len(entry) != 1 or entry[0][0] != "table" or not str(entry[0][1]).upper().startswith("CREATE TABLE"):
        raise _Wrong(f"it has no table {table.name}")
    details = connection.execute(f"PRAGMA table_xinfo({table.name})").fetchall()
    if any(hidden for *_, hidden in details):
        raise _Wrong(f"the table {table.name} has computed columns")
    present = {str(name) for _, name, *_ in details}
    known = {column.name for column in table.c}
    if other := [name for name in present - known if name.lower() in known]:  # SQLite takes it for the known one
        raise _Wrong(f"the table {table.name} has a column {other[0]}")
    needed = {column.name for column in table.c if column not in NULLABLE or table.metadata is not METADATA}
    if missing := sorted(needed - present):
        raise _Wrong(f"the table {table.name} has no column {missing[0]}")
    return present


def _check_table(connection: sqlite3.Connection, table: sa.Table, present: set[str]) -> None:
    source = ", ".join(["*", *(f"NULL AS {column.name}" for column in table.c if column.name not in present)])
    source = f"(SELECT {source} FROM {table.name})"  # with the columns that an older version lacks
    for column in table.c:
        if column.name in present:
            condition = f"{column.name} IS NULL OR ({_fits(column)})" if column in NULLABLE else _fits(column)
            _demand(connection, table, source, condition, f"a value of {column.name} that is no {_kind(column)}")
    times = [time.name for time in TIMES if time.table is table]
    for rule in (*RULES.get(table, ()), *(f"{name} IS NULL OR {name} BETWEEN 0 AND {LATEST}" for name in times)):
        _demand(connection, table, source, rule, f"a row where not {rule}")
    keys = [constraint for constraint in table.constraints if isinstance(constraint, sa.UniqueConstraint)]
    unique = [[column.name for column in key.columns] for key in keys] + [[c.name for c in table.primary_key]]
    for names in unique:
        listed = ", ".join(names)
        query = f"SELECT 1 FROM {table.name} GROUP BY {listed} HAVING count(*) > 1 LIMIT 1"
        if connection.execute(query).fetchone():
            raise _Wrong(f"the table {table.name} has two rows with the same {listed}")


def _demand(connection: sqlite3.Connection, table: sa.Table, source: str, condition: str, fault: str) -> None:
    if connection.execute(f"SELECT 1 FROM {source} WHERE ({condition}) IS NOT 1 LIMIT 1").fetchone():
        raise _Wrong(f"the table {table.name} has {fault}")


def _fits(column: sa.Column[Any]) -> str:
    """The SQL condition that a value fits its column in either database."""
    name = column.name
    match column.type:
        case sa.Enum(enums=values):
            return f"{name} IN ({', '.join(repr(value) for value in values)})"
        case sa.Integer():
            return f"typeof({name}) = 'integer' AND {name} BETWEEN -{MOST_NUMBER} AND {MOST_NUMBER}"
        case sa.Float():
            return f"typeof({name}) IN ('real', 'integer') AND {name} BETWEEN -1.7e308 AND 1.7e308"
        case sa.DateTime():
            return f"is_time({name})"
        case sa.LargeBinary():
            return f"typeof({name}) = 'blob'"
        case _:
            most = getattr(column.type, "length", None) or MOST_TEXT
            return f"typeof({name}) = 'text' AND length(CAST({name} AS BLOB)) <= {4 * most} AND is_text({name}, {most})"


def _kind(column: sa.Column[Any]) -> str:
    return column.type.__class__.__name__.lower()


def _check_trials(connection: sqlite3.Connection) -> None:
    count, first, last = connection.execute("SELECT count(*), min(number), max(number) FROM trials").fetchone()
    numbers = connection.execute("SELECT count(DISTINCT number) FROM trials").fetchone()[0]
    if count > MOST_TRIALS:
        raise _Wrong(f"it has {count:,} trials, more than {MOST_TRIALS:,}")
    if count and (first != 0 or last != count - 1 or numbers != count):
        raise _Wrong("its trials are not numbered from 0 without gaps")
    gap = "SELECT 1 FROM trial_epochs GROUP BY trial_id HAVING count(*) <> max(epoch) LIMIT 1"
    if connection.execute(gap).fetchone():
        raise _Wrong("the epochs of a trial are not numbered from 1 without gaps")


def _check_study(connection: sqlite3.Connection, check_config: Callable[[dict[str, Any]], object]) -> str:
    studies = connection.execute("SELECT study_id, study_name FROM studies LIMIT 2").fetchall()
    if len(studies) != 1:
        raise _Wrong(f"it holds {len(studies) or 'no'} studies, not one")
    study_id, name = studies[0]
    check_study_name(name)
    if connection.execute("SELECT 1 FROM trials WHERE study_id <> ? LIMIT 1", [study_id]).fetchone():
        raise _Wrong("it has trials of another study")
    _check_objectives(connection, study_id)
    _check_attributes(connection, study_id, check_config)
    return str(name)


def _check_objectives(connection: sqlite3.Connection, study_id: int) -> None:
    query = "SELECT objective, direction FROM study_directions WHERE study_id = ? ORDER BY objective"
    directions = connection.execute(query, [study_id]).fetchall()
    allowed = {StudyDirection.MAXIMIZE.name, StudyDirection.MINIMIZE.name}
    if not 1 <= len(directions) <= 2 or any(
        objective != position or direction not in allowed for position, (objective, direction) in enumerate(directions)
    ):
        raise _Wrong("it does not have one or two objectives")
    incomplete = (
        "SELECT 1 FROM trials LEFT JOIN trial_values USING (trial_id) WHERE state = 'COMPLETE' "
        "GROUP BY trials.trial_id HAVING count(objective) <> ? OR max(objective) <> ? LIMIT 1"
    )
    if connection.execute(incomplete, [len(directions), len(directions) - 1]).fetchone():
        raise _Wrong("a complete trial has not one value an objective")
    if connection.execute("SELECT 1 FROM trial_values WHERE objective >= ? LIMIT 1", [len(directions)]).fetchone():
        raise _Wrong("a trial has a value of an objective that the study has not")


def _check_attributes(
    connection: sqlite3.Connection, study_id: int, check_config: Callable[[dict[str, Any]], object]
) -> None:
    query = "SELECT key, value_json FROM study_user_attributes WHERE study_id = ?"
    attributes = {key: json.loads(text) for key, text in connection.execute(query, [study_id])}
    _check_types(attributes)
    early_end = attributes.get(EARLY_END, {})
    if not all(value is None or (is_finite(value) and value > 0) for value in early_end.values()):
        raise _Wrong(f"its {EARLY_END} are not numbers")
    for key in ("images", "budgets"):
        if not all(is_finite(value) and value >= 0 for value in attributes.get(key, {}).values()):
            raise _Wrong(f"its {key} are not numbers")
    if unknown := attributes.get("budgets", {}).keys() - UNITS.keys():
        raise _Wrong(f"it has a budget in {min(unknown)[:50]!r}")
    if not all(is_exclusion(number, why) for number, why in attributes.get(EXCLUDED, {}).items()):
        raise _Wrong(f"its {EXCLUDED} are not trial numbers with reasons")
    if not is_whole(attributes):
        raise _Wrong(f"its {AFTER} or {DERIVED_FROM} is not what this program writes")
    try:
        check_config(attributes["config"])
    except UserError as error:
        raise _Wrong(str(error)) from None


def _check_types(attributes: Mapping[str, Any]) -> None:
    for key, kind in STUDY_ATTRIBUTES.items():
        if key in attributes and not isinstance(attributes[key], kind):
            raise _Wrong(f"its {key} is no {kind.__name__}")
    for key in ("config", "data_fingerprint"):
        if key not in attributes:
            raise _Wrong(f"it has no {key}")


def _is_text(value: object, most: int) -> bool:
    return isinstance(value, str) and len(value) <= most and "\0" not in value


def _is_json(text: object) -> bool:
    return _depth(text) <= MOST_DEPTH


def _depth(text: object) -> int:
    """How many levels of lists and objects a JSON text has; more than MOST_DEPTH if it is none."""
    try:
        level: list[Any] = [json.loads(text)]  # type: ignore[arg-type]
    except (ValueError, TypeError, RecursionError):
        return MOST_DEPTH + 1
    depth = 0
    while level := [child for value in level for child in _children(value)]:
        depth += 1
        if depth > MOST_DEPTH:
            break
    return depth


def _children(value: object) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _is_trial_attribute(key: object, text: object) -> bool:
    return key not in NUMBERS or (_is_json(text) and is_finite(json.loads(str(text))))


@functools.lru_cache
def _distribution(text: str) -> BaseDistribution | None:
    """None: it is no distribution."""
    try:
        distribution = json_to_distribution(text)
    except Exception:  # noqa: BLE001 — whatever Optuna raises over a text that it did not write
        return None
    if isinstance(distribution, CategoricalDistribution):
        fits = all(value is None or isinstance(value, bool | int | float | str) for value in distribution.choices)
    else:
        fits = all(is_finite(getattr(distribution, bound)) for bound in ("low", "high"))
    if isinstance(distribution, IntDistribution):
        fits = fits and max(abs(distribution.low), abs(distribution.high)) <= 2**53  # exact as a double
    return distribution if fits else None


def _is_distribution(text: object) -> bool:
    return isinstance(text, str) and _is_json(text) and _distribution(text) is not None


def _is_in_distribution(text: object, value: object) -> bool:
    distribution = _distribution(text) if isinstance(text, str) else None
    if distribution is None or not isinstance(value, int | float) or not is_finite(value):
        return False
    if isinstance(distribution, CategoricalDistribution):
        return value == int(value) and 0 <= value < len(distribution.choices)
    return bool(distribution.low <= value <= distribution.high)  # type: ignore[attr-defined]


def _is_time(text: object) -> bool:
    """As SQLAlchemy stores it. Years that every time zone's offset leaves in the calendar."""
    try:
        return isinstance(text, str) and len(text) <= 26 and 1970 <= datetime.fromisoformat(text).year < 9000
    except ValueError:
        return False


_FUNCTIONS: tuple[tuple[str, int, Callable[..., bool]], ...] = (
    ("is_text", 2, _is_text),
    ("is_json", 1, _is_json),
    ("is_time", 1, _is_time),
    ("is_trial_attribute", 2, _is_trial_attribute),
    ("is_distribution", 1, _is_distribution),
    ("is_in_distribution", 2, _is_in_distribution),
)
assert {*REQUIRED, *OPTIONAL} >= {*METADATA.sorted_tables}, "every table of ours is checked"
