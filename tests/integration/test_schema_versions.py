"""Databases of other schema versions: older ones are migrated or read as they are, newer ones refused, none changed by
looking.

`tests/fixtures/study-0.1.0.db.gz` was written by version 0.1.0 of this program: the study "old" of three trials, the
first complete, the second released after its first epoch with a checkpoint, the third never claimed.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory
from optuna.trial import TrialState

from dashboards import logs, status, study_data
from storage import migrations, queries, transfer
from storage.engine import close, open_engine, open_storage, upgrade
from storage.errors import UserError
from storage.optuna_internals import schema_revisions
from storage.schema import BASELINE, METADATA, SCHEMA_VERSION
from study.config.loading import parse_config
from tests.support.harness import Harness, config_of

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1.0.db.gz"
MISSING = {
    "trial_epochs": ("selection_seconds", "seen", "joules"),
    "trial_attempts": ("images", "joules", "share"),
}
"""Columns that development versions before 0.1.0 did not have."""
LOCATION = "s3://bucket/checkpoints/trial-2-1-0123abcd.checkpoint"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The database of version 0.1.0."""
    path = tmp_path / "study.db"
    path.write_bytes(gzip.decompress(FIXTURE.read_bytes()))
    return path


def older(path: Path) -> Path:
    """The same as a development version before 0.1.0 might have left it."""
    with sqlite3.connect(path) as connection:
        for table, columns in MISSING.items():
            for column in columns:
                connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        connection.execute("DROP TABLE study_spending")
    connection.close()
    return path


def contents(folder: Path) -> dict[str, str]:
    """File name to digest."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def schema(path: Path) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Our tables: columns by name, with type, nullability and key."""
    with sqlite3.connect(path) as connection:
        return {
            table.name: {
                str(name): (str(kind), notnull, key)
                for _, name, kind, notnull, _, key in connection.execute(f"PRAGMA table_info({table.name})")
            }
            for table in METADATA.sorted_tables
        }


def test_our_version_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_current_head() == SCHEMA_VERSION
    assert scripts.get_base() == BASELINE
    names = [revision.revision for revision in scripts.walk_revisions()]
    assert names == sorted(names, key=int, reverse=True)


def test_a_study_of_version_0_1_0_is_migrated_and_resumed_to_its_end(old: Path) -> None:
    url = f"sqlite:///{old}"
    storage = open_storage(url, create=False)  # as a worker does
    study = optuna.load_study(study_name="old", storage=storage)
    assert [trial.user_attrs["queue_position"] for trial in study.trials] == [0, 1, 2]
    assert not any("ticket" in trial.user_attrs for trial in study.trials)
    assert [a.outcome for a in queries.attempts(storage.engine, study._study_id)] == ["finished", "released"]
    before = queries.epoch_rows(storage.engine, study._study_id)
    assert {number: len(rows) for number, rows in before.items()} == {0: 3, 1: 1}
    bench = Harness(url, config_of(**_sections(study)), "old")
    assert len(bench.study.trials) == 3  # none was queued again
    bench.work()
    ended = optuna.load_study(study_name="old", storage=bench.storage).trials
    assert [trial.state for trial in ended] == [TrialState.COMPLETE] * 3
    after = queries.epoch_rows(storage.engine, study._study_id)
    assert {number: len(rows) for number, rows in after.items()} == dict.fromkeys(range(3), 3)
    assert after[0] == before[0]
    assert after[1][:1] == before[1]


def _sections(study: optuna.Study) -> dict[str, Any]:
    """The study's config as arguments of `config_of`."""
    config = study.user_attrs["config"]
    sections = ("network", "policy", "training", "checkpoint", "data")
    return {name: dict(config[name]) for name in sections}


@pytest.mark.parametrize("prepare", [lambda path: path, older], ids=["0.1.0", "before"])
def test_a_migrated_database_is_as_a_new_one(old: Path, tmp_path: Path, prepare: Any) -> None:
    path, new = prepare(old), tmp_path / "new.db"
    close(open_storage(f"sqlite:///{path}").engine)
    close(open_storage(f"sqlite:///{new}").engine)
    assert schema(path) == schema(new)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version_num FROM study_alembic_version").fetchall() == [(SCHEMA_VERSION,)]
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(schema_revisions()[-1],)]
    close(open_storage(f"sqlite:///{path}").engine)  # a second time there is nothing to do


def test_locations_become_file_names(old: Path) -> None:
    with sqlite3.connect(old) as connection:
        connection.execute("UPDATE trial_checkpoints SET location = ?, payload = NULL", [LOCATION])
    connection.close()
    readers = (
        open_storage(f"sqlite:///{old}", create=False, reading=True).engine,
        open_storage(f"sqlite:///{old}").engine,
    )
    for engine in readers:
        with engine.connect() as opened:
            location = opened.exec_driver_sql("SELECT location FROM trial_checkpoints").scalar()
        assert location == LOCATION.rpartition("/")[2]


@pytest.mark.parametrize("prepare", [lambda path: path, older], ids=["0.1.0", "before 0.1.0"])
def test_a_file_of_an_older_version_is_imported(old: Path, prepare: Any, url: str, tmp_path: Path) -> None:
    old = prepare(old.rename(tmp_path / "old.study"))
    before = old.read_bytes()
    assert transfer.import_study(old, url, check_config=parse_config) == ("old", 3)
    imported, original = (
        optuna.load_study(study_name="old", storage=storage).trials
        for storage in (open_storage(url), open_storage(f"sqlite:///{old}", create=False, reading=True))
    )
    assert [(t.number, t.state, t.values, t.params, t.intermediate_values) for t in imported] == [
        (t.number, t.state, t.values, t.params, t.intermediate_values) for t in original
    ]
    assert old.read_bytes() == before


def test_the_attributes_of_other_programs_stay(old: Path) -> None:
    plain = optuna.create_study(study_name="plain", storage=f"sqlite:///{old}")
    plain.enqueue_trial({"x": 1.0}, user_attrs={"ticket": "theirs"})
    for options in ({"create": False, "reading": True}, {}):
        storage = open_storage(f"sqlite:///{old}", **options)
        assert optuna.load_study(study_name="plain", storage=storage).trials[0].user_attrs == {"ticket": "theirs"}


@pytest.mark.parametrize("prepare", [lambda path: path, older], ids=["0.1.0", "before"])
def test_looking_at_an_older_database_works_and_changes_nothing(old: Path, tmp_path: Path, prepare: Any) -> None:
    folder = tmp_path / "looked at"
    folder.mkdir()
    path = folder / "study.db"
    shutil.copy(prepare(old), path)
    before = contents(folder)
    url = f"sqlite:///{path}"
    engine = open_engine(url)
    seen = status.read(engine, "old")
    assert seen.progress.states == {"waiting": 1, "running": 1, "complete": 1, "pruned": 0, "failed": 0}
    assert [a.outcome for a in queries.attempts(engine, 1)] == ["finished", "released"]
    assert list(logs.read(engine, "old", 0)) == []  # that version stored none
    storage = open_storage(url, create=False, reading=True)
    assert len(study_data.read(storage, "old").rows) == 3
    for_dashboard = open_storage(url, create=False, reading=True, may_write=True)
    assert len(optuna.load_study(study_name="old", storage=for_dashboard).trials) == 3
    target = open_storage(f"sqlite:///{tmp_path / 'copy.db'}")
    assert transfer.copy(storage, target, "old") == 3
    assert [t.user_attrs["queue_position"] for t in optuna.load_study(study_name="old", storage=target).trials] == [
        0,
        1,
        2,
    ]
    with target.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM trial_checkpoints").scalar() == 1
    for opened in (engine, storage.engine, for_dashboard.engine):
        opened.dispose()
    assert contents(folder) == before
    assert len(before) == 1


def test_looking_at_a_present_database_changes_nothing_either(tmp_path: Path) -> None:
    folder = tmp_path / "looked at"
    folder.mkdir()
    url = f"sqlite:///{folder / 'study.db'}"
    bench = Harness(url, config_of())
    close(bench.storage.engine)
    before = contents(folder)
    assert list(before) == ["study.db"]
    engine = open_engine(url)
    status.read(engine, "s")
    storage = open_storage(url, create=False, reading=True)
    study_data.read(storage, "s")
    with pytest.raises(sa.exc.OperationalError, match="readonly"), storage.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM trials")
    for opened in (engine, storage.engine):
        opened.dispose()
    assert contents(folder) == before


def test_older_tables_are_read_and_migrated_on_both_databases(empty_url: str) -> None:
    """A database of today, changed into one of version 0.1.0 with the differences that a migration knows."""
    bench = Harness(empty_url, config_of())
    bench.work(most=1)
    with bench.storage.engine.begin() as connection:
        for statement in (
            "DROP TABLE study_alembic_version",
            "DROP TABLE study_spending",
            "DROP TABLE trial_artifacts",
            "DROP TABLE trial_logs",
            "DROP TABLE trial_artifact_chunks",
            "ALTER TABLE trial_leases DROP COLUMN seconds",
            "ALTER TABLE trial_attempts DROP COLUMN share",
            "ALTER TABLE trial_epochs DROP COLUMN joules",
            "ALTER TABLE trial_epochs DROP COLUMN validation_loss",
            "ALTER TABLE trial_epochs DROP COLUMN balanced_accuracy",
            "ALTER TABLE trial_epochs DROP COLUMN macro_f1",
            "UPDATE trial_attempts SET outcome = 'settled'",
            "UPDATE trial_user_attributes SET key = 'ticket' WHERE key = 'queue_position'",
        ):
            connection.exec_driver_sql(statement)
    close(bench.storage.engine)

    def seen(engine: sa.Engine) -> tuple[Any, ...]:
        totals = queries.epoch_totals(engine, 1)
        return (
            [attempt.outcome for attempt in queries.attempts(engine, 1)],
            {number: (total.epochs, total.joules) for number, total in totals.items()},
            queries.progress(engine, 1).states,
            status.read(engine, "s").spent["images"],
        )

    reader = open_storage(empty_url, create=False, reading=True)
    positions = [
        trial.user_attrs["queue_position"] for trial in optuna.load_study(study_name="s", storage=reader).trials
    ]
    assert positions == [0, 1, 2, 3]
    before = seen(reader.engine)
    assert before[0] == ["finished"]
    assert before == seen(open_engine(empty_url))
    reader.engine.dispose()
    assert upgrade(empty_url) == [f"this program's tables: {BASELINE} to {SCHEMA_VERSION}"]
    assert seen(open_storage(empty_url, create=False).engine) == before


def stamp(url: str, table: str, version: str) -> None:
    engine = open_storage(url).engine
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {table} SET version_num = '{version}'")
    close(engine)


OPENERS = (
    lambda url: open_storage(url),
    lambda url: open_storage(url, create=False),
    lambda url: open_storage(url, create=False, reading=True),
    lambda url: open_storage(url, create=False, reading=True, may_write=True),
    lambda url: open_engine(url),
    lambda url: upgrade(url),
)


@pytest.mark.parametrize(
    ("table", "version", "message"),
    [
        ("study_alembic_version", "0099", r"schema version '0099' of a newer version of this program, .*'{ours}'"),
        ("study_alembic_version", "abc", r"schema version 'abc' of a newer version of this program, .*'{ours}'"),
        ("alembic_version", "v9.0.0.a", r"schema version 'v9.0.0.a' of a newer Optuna; .*'{optunas}'"),
    ],
)
def test_a_newer_schema_is_refused_in_one_line(empty_url: str, table: str, version: str, message: str) -> None:
    stamp(empty_url, table, version)
    with sa.create_engine(empty_url.replace("postgresql:", "postgresql+psycopg:")).begin() as connection:
        connection.exec_driver_sql("DROP TABLE study_spending")  # whoever creates tables would do it here
    expected = message.format(ours=SCHEMA_VERSION, optunas=re.escape(schema_revisions()[-1]))
    for opener in OPENERS:
        with pytest.raises(UserError, match=expected) as refusal:
            opener(empty_url)
        assert "\n" not in str(refusal.value)
    engine = sa.create_engine(empty_url.replace("postgresql:", "postgresql+psycopg:"))
    assert "study_spending" not in sa.inspect(engine).get_table_names()


def test_an_older_schema_of_optuna_is_migrated_by_upgrade_only(empty_url: str) -> None:
    """The last of Optuna's migrations only changes an index and a column's kind, so its tables can be stamped back."""
    stamp(empty_url, "alembic_version", "v3.0.0.d")
    for opener in OPENERS[:-1]:
        with pytest.raises(UserError, match=r"Optuna's schema version 'v3.0.0.d'.*study upgrade --storage"):
            opener(empty_url)
    assert upgrade(empty_url) == [f"Optuna's tables: v3.0.0.d to {schema_revisions()[-1]}"]
    open_storage(empty_url)
    assert upgrade(empty_url) == []


def test_upgrade_migrates_ours(old: Path) -> None:
    url = f"sqlite:///{old}"
    assert upgrade(url) == [f"this program's tables: {BASELINE} to {SCHEMA_VERSION}"]
    assert upgrade(url) == []
    assert not old.with_name("study.db.lock").exists()


def test_a_live_lease_stops_only_a_needed_migration(empty_url: str) -> None:
    """Also where another process has created our tables, and was about to stamp Optuna's when this one looked."""
    bench = Harness(empty_url, config_of())
    assert bench.queue().claim() is not None
    assert upgrade(empty_url) == []
    with bench.storage.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM alembic_version")
    assert len(optuna.load_study(study_name="s", storage=open_storage(empty_url)).trials) == 4


def test_a_migration_waits_for_workers_of_the_older_version(old: Path) -> None:
    with sqlite3.connect(old) as connection:
        connection.execute("UPDATE trial_leases SET expires_at = unixepoch() + 50 WHERE trial_id = 2")
    connection.close()
    before = contents(old.parent)
    for opener in (*OPENERS[:2], OPENERS[-1]):
        with pytest.raises(UserError, match="workers hold 1 trial; stop them"):
            opener(f"sqlite:///{old}")
    assert contents(old.parent) == before
    assert status.read(open_engine(f"sqlite:///{old}"), "old").progress.states["running"] == 1
    with sqlite3.connect(old) as connection:  # no lease, but a clock that was ahead by a year
        connection.execute("UPDATE trial_leases SET expires_at = unixepoch() + 3e7 WHERE trial_id = 2")
    connection.close()
    open_storage(f"sqlite:///{old}")


def test_a_migration_that_fails_leaves_the_database_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate = migrations.migrate

    def break_off(connection: sa.Connection) -> None:
        migrate(connection)
        raise OSError("power cut")

    with sqlite3.connect(old) as connection:
        before = list(connection.iterdump())
    connection.close()
    monkeypatch.setattr(migrations, "migrate", break_off)
    with pytest.raises(UserError, match="power cut"):
        open_storage(f"sqlite:///{old}")
    with sqlite3.connect(old) as connection:
        assert list(connection.iterdump()) == before
    connection.close()


@pytest.mark.parametrize("state", ["ours", "nothing"])
def test_readers_of_a_database_that_is_not_complete_are_refused(state: str, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with sqlite3.connect(path) as connection:
        if state == "ours":
            connection.execute("CREATE TABLE trial_leases (trial_id INTEGER PRIMARY KEY)")
    connection.close()
    before = contents(tmp_path)
    for opener in OPENERS[2:]:
        with pytest.raises(UserError, match="holds no studies"):
            opener(f"sqlite:///{path}")
    assert contents(tmp_path) == before
