"""A PostgreSQL that demands a password, and a study on it: the password is seen nowhere."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.e2e.test_command import SMALL, held_in_mid_trial, started, study
from tests.support.postgres import Postgres

ONE_TRIAL = [*SMALL, "--set", "policy.alpha=100", "--set", "policy.beta=0.3"]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """One that demands a password."""
    server = Postgres()
    engine = sa.create_engine(server.url().replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER USER postgres PASSWORD 'hunter2'")
    (server.server.pgdata / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
    server.control("reload")
    yield server
    server.stop()


@pytest.mark.parametrize(
    # libpq reads the variables itself: of the three only the URL passes through our code.
    "way",
    ["url", pytest.param("PGPASSWORD", marks=pytest.mark.slow), pytest.param("pgpass", marks=pytest.mark.slow)],
)
def test_a_password_is_seen_nowhere(
    way: str, server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for in all output, the process list and everything in the database."""
    with monkeypatch.context() as known:
        known.setenv("PGPASSWORD", "hunter2")
        url = server.new_database()
    secret = url.replace("postgres@", "postgres:hunter2@")
    environment = os.environ | {"STUDY_STORAGE": secret if way == "url" else url}
    if way == "PGPASSWORD":
        environment["PGPASSWORD"] = "hunter2"
    if way == "pgpass":
        (tmp_path / "pgpass").write_text("127.0.0.1:*:*:postgres:hunter2\n")
        (tmp_path / "pgpass").chmod(0o600)
        environment["PGPASSFILE"] = str(tmp_path / "pgpass")
    without = study("launch", "quick", *ONE_TRIAL, cwd=tmp_path, env=os.environ | {"STUDY_STORAGE": url})
    assert without.returncode == 2
    assert "password" in without.stderr

    launcher = started("launch", "quick", *ONE_TRIAL, cwd=tmp_path, env=environment)
    worker, seen = held_in_mid_trial(secret), set[str]()
    while launcher.poll() is None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                seen.add(entry.read_bytes().decode(errors="replace"))
        if worker:
            os.kill(worker, signal.SIGCONT)
            worker = 0
        time.sleep(0.2)
    out, err = launcher.communicate()
    assert launcher.returncode == 0, err
    assert any("worker" in line and "quick" in line for line in seen)  # we did look while they ran
    status = study("status", "quick", "--json", "-", cwd=tmp_path, env=environment)
    assert status.returncode == 0

    stored = []
    engine = sa.create_engine(secret.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        for table in sa.inspect(connection).get_table_names():
            stored += [str(tuple(row)) for row in connection.exec_driver_sql(f"SELECT * FROM {table}")]
    assert any("train_images" in row for row in stored)
    for text in (out, err, status.stdout, status.stderr, without.stderr, *seen, *stored):
        assert "hunter2" not in text
