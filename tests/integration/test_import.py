"""Files to import: whatever is in them, they are imported whole and usable, or refused in one line and nothing left."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from dashboards import logs, status, study_data
from dashboards.reports import json as json_report
from storage import checkpoints, import_check, object_store, transfer
from storage.engine import close, open_engine, open_storage
from storage.errors import UserError
from storage.import_check import OPTIONAL, REQUIRED
from storage.queue import Queue
from storage.url import sqlite_url
from study.config.loading import parse_config
from tests.support.harness import Harness, StopAfter, config_of

SECONDS = 5.0
"""Time limit of a check here; the file is small."""
Change = Callable[[sqlite3.Connection], object]


@functools.cache
def exported() -> bytes:
    """A study with a complete, a pruned, a failed, an interrupted and waiting trials."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Harness(
            sqlite_url(f"{folder}/study.db"),
            config_of(policy={"beta": [0.3, 0.6, 0.7], "alpha": [60, 90]}, checkpoint={"every_seconds": 0}),
        )
        bench.work(most=1)
        queue = bench.queue()
        lease = queue.claim()
        assert lease is not None
        queue.finish(lease, TrialState.PRUNED, [0.25])
        lease = queue.claim()
        assert lease is not None
        queue.fail(lease, "boom")
        bench.work(StopAfter(3), most=1)
        target = open_storage(sqlite_url(f"{folder}/s.study"))
        transfer.copy(bench.storage, target, "s")
        close(target.engine)
        return Path(folder, "s.study").read_bytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "s.study"
    path.write_bytes(exported())
    return path


def change(file: Path, *statements: str | Change) -> None:
    connection = sqlite3.connect(file, isolation_level=None)
    for statement in statements:
        if isinstance(statement, str):
            connection.execute(statement)
        else:
            statement(connection)
    connection.close()


def import_(file: Path, target: str, **options: Any) -> tuple[str, int]:
    return transfer.import_study(file, target, check_config=parse_config, **options)


def use(url: str, name: str) -> None:
    """What people do with an imported study first."""
    seen = status.read(open_engine(url), name)
    json.dumps(status.document(seen))
    for line in logs.read(open_engine(url), name):
        assert logs.text(line).plain.isprintable()
    storage = open_storage(url, create=False, reading=True)
    json.dumps(json_report.report(study_data.read(storage, name)))
    optuna.load_study(study_name=name, storage=storage).get_trials()


def test_an_export_comes_back_on_both_databases(file: Path, url: str) -> None:
    before = file.read_bytes()
    assert import_(file, url) == ("s", 6)
    assert import_(file, url, new_name="t") == ("t", 6)
    for name in ("s", "t"):
        use(url, name)
    states = status.read(open_engine(url), "s").progress.states
    assert states == {"waiting": 2, "running": 1, "complete": 1, "pruned": 1, "failed": 1}
    with pytest.raises(UserError, match="'s' is in the target already"):
        import_(file, url)
    assert file.read_bytes() == before
    assert sorted(path.name for path in file.parent.iterdir() if path.name.startswith("s.")) == ["s.study"]


def test_the_store_of_an_imported_study_is_the_importers(file: Path, tmp_path: Path) -> None:
    for section in ("checkpoint", "artifacts"):
        change(file, "UPDATE study_user_attributes SET value_json = "
               f"json_set(value_json, '$.{section}.store', '/etc') WHERE key = 'config'")  # fmt: skip
    url = sqlite_url(tmp_path / "target.db")
    import_(file, url)
    import_(file, url, new_name="t", stores={"checkpoint": str(tmp_path)})
    storage = open_storage(url)
    configs = [optuna.load_study(study_name=name, storage=storage).user_attrs["config"] for name in ("s", "t")]
    assert [config["checkpoint"]["store"] for config in configs] == [object_store.DATABASE, str(tmp_path)]
    assert [config["artifacts"]["store"] for config in configs] == [object_store.DATABASE, object_store.DATABASE]


def test_a_damaged_checkpoint_is_left_out(file: Path, tmp_path: Path) -> None:
    change(file, "UPDATE trial_checkpoints SET payload = zeroblob(100)")
    url = sqlite_url(tmp_path / "target.db")
    import_(file, url)
    with open_engine(url).connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM trial_checkpoints").scalar() == 0


ENDLESS = "WITH RECURSIVE n(x) AS (VALUES(1) UNION ALL SELECT x + 1 FROM n) SELECT"


def view(table: str) -> tuple[str, ...]:
    """An endless query in a table's place."""
    return (f"ALTER TABLE {table} RENAME TO real_{table}", f"CREATE VIEW {table} AS {ENDLESS} x AS trial_id FROM n")


def column(table: str, name: str, value: str) -> tuple[str]:
    return (f"UPDATE {table} SET {name} = {value} WHERE rowid = (SELECT min(rowid) FROM {table})",)


def rewritten(table: str) -> Change:
    """The same table without any constraint, and a row twice."""

    def rewrite(connection: sqlite3.Connection) -> None:
        connection.execute(f"CREATE TABLE loose AS SELECT * FROM {table}")
        connection.execute(f"DROP TABLE {table}")
        connection.execute(f"ALTER TABLE loose RENAME TO {table}")
        connection.execute(f"INSERT INTO {table} SELECT * FROM {table} LIMIT 1")

    return rewrite


def config(text: str) -> tuple[str]:
    return (f"UPDATE study_user_attributes SET value_json = {text} WHERE key = 'config'",)


HOSTILE: dict[str, tuple[str | Change, ...]] = {
    "no config": ("DELETE FROM study_user_attributes WHERE key = 'config'",),
    "a config that is no object": config("'[1]'"),
    "a config with an unknown key": config("json_set(value_json, '$.nonsense', 1)"),
    "a config that is no JSON": config("'{'"),
    "a config nested deeply": config("replace(hex(zeroblob(50000)), '00', '[')"),
    "no fingerprint": ("DELETE FROM study_user_attributes WHERE key = 'data_fingerprint'",),
    "a distribution that is none": column("trial_params", "distribution_json", "'{}'"),
    "a value outside its distribution": column("trial_params", "param_value", "1e300"),
    "an infinite accuracy": column("trial_epochs", "accuracy", "9e999"),
    "an accuracy above one": column("trial_epochs", "accuracy", "1.5"),
    "a text for a number": column("trial_epochs", "loss", "'x'"),
    "a blob for an owner": column("trial_leases", "owner", "x'37'"),
    "a blob for a text": column("study_user_attributes", "value_json", "x'00'"),
    "a negative trial": column("trials", "number", "-1"),
    "a gap in the trials": column("trials", "number", "77"),
    "a doubled trial": (rewritten("trials"),),
    "a doubled epoch": (rewritten("trial_epochs"),),
    "a doubled parameter": (rewritten("trial_params"),),
    "a doubled attribute": (rewritten("trial_user_attributes"),),
    "a number beyond PostgreSQL's": column("trial_epochs", "images", "9223372036854775807"),
    "an unknown state": column("trials", "state", "'DONE'"),
    "a bad date": column("trials", "datetime_start", "'yesterday'"),
    "a date that no time zone has": column("trials", "datetime_start", "'0001-01-01 00:00:00.000000'"),
    "a complete trial without a value": ("DELETE FROM trial_values",),
    "a value of no kind": column("trial_values", "value", "NULL"),
    "a name of three megabytes": column("studies", "study_name", "replace(hex(zeroblob(1500000)), '00', 'ab')"),
    "a name that is not UTF-8": column("studies", "study_name", "CAST(x'80ff' AS TEXT)"),
    "an empty name": column("studies", "study_name", "''"),
    "a name with an escape": column("studies", "study_name", "char(27) || '[2J'"),
    "an attribute with a zero": column("trial_user_attributes", "value_json", "'\"' || char(0) || '\"'"),
    "an attribute that is computed with": (
        "UPDATE trial_user_attributes SET value_json = '\"many\"' WHERE key = 'train_seconds'",
    ),
    "a checkpoint elsewhere": ("UPDATE trial_checkpoints SET payload = NULL, location = '/etc/passwd'",),
    "a checkpoint without content": ("UPDATE trial_checkpoints SET payload = NULL",),
    "a token that cannot grow": column("trial_leases", "token", "2147483647"),
    "a log line at no date": column("trial_logs", "at", "1e300"),
    "an attempt that began at no date": column("trial_attempts", "started_at", "-1.0"),
    "an attempt that ended at no date": column("trial_attempts", "ended_at", "1e12"),
    "a log line of no level": column("trial_logs", "level", "'loud'"),
    "a log line of too many characters": column("trial_logs", "message", "replace(hex(zeroblob(501)), '00', 'a')"),
    "more log lines than an attempt has": column("trial_logs", "position", "200"),
    "a log line from the end of time": column("trial_logs", "at", "1e300"),
    "no study": ("DELETE FROM studies",),
    "two studies": ("INSERT INTO studies (study_name) VALUES ('t')",),
    "trials of another study": ("UPDATE trials SET study_id = 9 WHERE number = 5",),
    "no direction": ("DELETE FROM study_directions",),
    "an endless view for trials": view("trials"),
    "an endless view for studies": view("studies"),
    "an endless view for epochs": view("trial_epochs"),
    "a computed column": (
        "ALTER TABLE trials RENAME TO t",
        "CREATE TABLE trials (trial_id INTEGER PRIMARY KEY, number, study_id, state AS (hex(zeroblob(400000000))), "
        "datetime_start, datetime_complete)",
        "INSERT INTO trials SELECT trial_id, number, study_id, datetime_start, datetime_complete FROM t",
    ),
    "a column in capitals": ("ALTER TABLE trial_attempts RENAME COLUMN error TO ERROR",),
    "a missing column": ("ALTER TABLE trial_leases DROP COLUMN owner",),
    "a schema version that is a number": (
        "DROP TABLE study_alembic_version",
        "CREATE TABLE study_alembic_version (version_num INTEGER)",
        "INSERT INTO study_alembic_version VALUES (5)",
    ),
    "a schema version that is a blob": ("UPDATE study_alembic_version SET version_num = x'3035'",),
    "a schema version of 5,000 digits": (
        "UPDATE study_alembic_version SET version_num = replace(hex(zeroblob(2500)), '0', '1')",
    ),
    "a schema version of two megabytes": ("UPDATE study_alembic_version SET version_num = hex(zeroblob(1000000))",),
    "a version of Optuna that is a blob": ("UPDATE alembic_version SET version_num = x'3035'",),
    "the present version without a column": ("ALTER TABLE trial_epochs DROP COLUMN joules",),
    "the present version without a table": ("DROP TABLE trial_logs",),
    "a budget of no unit": (
        "INSERT INTO study_user_attributes (study_id, key, value_json) SELECT study_id, 'budgets', "
        "'{\"apples\": 1}' FROM studies",
    ),
    "an excluded trial of 5,000 digits": (
        "INSERT INTO study_user_attributes (study_id, key, value_json) SELECT study_id, 'excluded', "
        "'{\"' || replace(hex(zeroblob(2500)), '0', '1') || '\": \"x\"}' FROM studies",
    ),
    "a newer schema": ("UPDATE study_alembic_version SET version_num = '0099'",),
    "a newer Optuna": ("UPDATE alembic_version SET version_num = 'v9.0.0.a'",),
}


@pytest.mark.parametrize("statements", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_in_one_line(
    statements: tuple[str | Change, ...], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_check, "SECONDS", SECONDS)
    change(file, "PRAGMA legacy_alter_table = ON", *statements)
    digest = hashlib.sha256(file.read_bytes()).digest()
    with pytest.raises(UserError) as refusal:
        import_(file, sqlite_url(tmp_path / "target.db"))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["s.study"]
    assert hashlib.sha256(file.read_bytes()).digest() == digest


def test_keys_like_those_of_notes_do_not_clash(file: Path, url: str) -> None:
    for key in ("dashboard:1:note_ver", "dashboard:01:note_ver", f"dashboard:{'1' * 400}:note_ver"):
        change(file, "INSERT INTO study_system_attributes (study_id, key, value_json) "
               f"SELECT study_id, '{key}', '1' FROM studies")  # fmt: skip
    assert import_(file, url, new_name="first") == ("first", 6)
    assert import_(file, url, new_name="second") == ("second", 6)
    use(url, "second")


def test_only_the_tables_of_a_study_are_looked_at(file: Path, tmp_path: Path) -> None:
    change(file, f"CREATE VIEW other AS {ENDLESS} x FROM n", "CREATE TABLE more (x)")
    assert import_(file, sqlite_url(tmp_path / "target.db")) == ("s", 6)


def test_no_trigger_of_the_file_runs(file: Path, tmp_path: Path) -> None:
    for table in ("studies", "trials", "trial_epochs"):
        for when in ("BEFORE INSERT", "BEFORE UPDATE", "BEFORE DELETE"):
            name = f"{table}_{when.replace(' ', '_')}"
            change(file, f"CREATE TRIGGER {name} {when} ON {table} BEGIN SELECT RAISE(ABORT, 'trigger'); END")
    assert import_(file, sqlite_url(tmp_path / "target.db")) == ("s", 6)
    with open_engine(sqlite_url(tmp_path / "target.db")).connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM sqlite_master WHERE type = 'trigger'").scalar() == 0


def test_a_check_has_a_time_limit(file: Path) -> None:
    """Rows enough for a check of seconds."""

    def many(connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")
        connection.execute(
            "INSERT INTO trial_system_attributes (trial_id, key, value_json) "
            "WITH RECURSIVE n(x) AS (VALUES(1) UNION ALL SELECT x + 1 FROM n WHERE x < 300000) "
            "SELECT 1, 'k' || x, '{\"a\": [1, 2, 3]}' FROM n"
        )
        connection.execute("COMMIT")

    change(file, many)
    with pytest.raises(UserError, match="checking it takes more than"):
        import_check.check_export(file, parse_config, seconds=-import_check.SECONDS_PER_MEGABYTE * 1e3)


@pytest.mark.parametrize("kind", ["nothing", "a folder", "a pipe", "empty", "text", "a truncated file", "noise"])
def test_files_that_are_no_exports_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s.study"
    match kind:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "text":
            path.write_text("hello" * 100)
        case "a truncated file":
            path.write_bytes(exported()[:40_000])
        case "noise":
            path.write_bytes(exported()[:100] + os.urandom(len(exported())))
    with pytest.raises(UserError, match=r"s\.study") as refusal:
        import_(path, sqlite_url(tmp_path / "target.db"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "target.db").exists()


@pytest.mark.parametrize("name", ["a?b.study", "a#b.study", "a%20b.study", "~.study", "a b.study", "日本.study"])
def test_files_of_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("sqlite:///study.db")
    study = optuna.create_study(study_name="s", storage=storage)
    study.set_user_attr("config", {})
    study.set_user_attr("data_fingerprint", "x")
    target = open_storage(sqlite_url(name))
    transfer.copy(storage, target, "s")
    close(target.engine)
    close(storage.engine)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "study.db"])
    assert transfer.import_study(Path(name), "sqlite:///target.db") == ("s", 0)


VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-3, 12),
    st.floats(allow_nan=False),
    st.sampled_from([0.5, 1.0, -0.0, 1e308, float("inf"), float("-inf")]),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.sampled_from(
        [
            *("COMPLETE", "FAIL", "WAITING", "RUNNING", "PRUNED", "FINITE", "INF_POS", "INF_NEG", "NAN", "MAXIMIZE"),
            *("config", "budgets", "stop", "images", "uid", "error", "best_epoch", "queue_position", "ticket"),
            *("{}", "[]", "null", "1", "-1", '"x"', "NaN", "Infinity", "1e999", "[" * 60 + "]" * 60, '{"a":{"b":[]}}'),
            *("2026-01-01 00:00:00.000000", "9999-12-31 23:59:59.999999", "0001-01-01 00:00:00", "2026-01-01"),
            '{"name": "IntDistribution", "attributes": {"log": false, "step": 0, "low": 1, "high": 1e400}}',
            '{"name": "CategoricalDistribution", "attributes": {"choices": [[1], {"a": 2}]}}',
            '{"name": "FloatDistribution", "attributes": {"step": 1e-320, "low": 0, "high": 1, "log": false}}',
            "../../etc/passwd", "x" * 3000, "\x1b]0;x\x07", "\u202e", "a\x00b",
        ]
    ),
)  # fmt: skip
CELLS = [
    (table.name, column.name)
    for table in (*REQUIRED, *OPTIONAL)
    for column in table.c
    if column is not table.autoincrement_column
]


@pytest.fixture(scope="module")
def shared_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all that is imported below: creating one takes longer than the rest."""
    url = sqlite_url(tmp_path_factory.mktemp("target") / "target.db")
    close(open_storage(url).engine)
    return url


EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
"""Without it the same examples each time."""


@settings(max_examples=int(EXAMPLES or 20), derandomize=EXAMPLES is None, deadline=None, print_blob=True)
@given(changes=st.lists(st.tuples(st.sampled_from(CELLS), st.integers(0, 40), VALUES), min_size=1, max_size=2))
def test_any_value_anywhere_is_refused_or_harmless(
    shared_target: str, changes: list[tuple[tuple[str, str], int, Any]]
) -> None:
    url = shared_target
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "s.study")
        file.write_bytes(exported())
        connection = sqlite3.connect(file, isolation_level=None)
        for (table, name), row, value in changes:
            query = f"UPDATE {table} SET {name} = ? WHERE rowid = (SELECT rowid FROM {table} LIMIT 1 OFFSET ?)"
            try:
                connection.execute(query, [value, row])
            except (sqlite3.IntegrityError, UnicodeEncodeError):
                continue  # this file's own constraints; the hostile files above include some without
        connection.close()
        refusal: str | None = None
        try:
            name, _ = import_(file, url)
        except UserError as error:
            refusal = str(error)
        assert os.listdir(folder) == ["s.study"]
    storage = open_storage(url, create=False)
    if refusal is not None:
        assert "\n" not in refusal
        assert optuna.get_all_study_names(storage) == []
        return
    use(url, name)
    worker = Queue(storage.engine, optuna.load_study(study_name=name, storage=storage)._study_id)
    while (lease := worker.claim()) is not None:
        checkpoints.load(worker, lease)
        worker.fail(lease, "enough")
    transfer.delete(storage, name)
    close(storage.engine)
