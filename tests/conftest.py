"""Fixtures: a cache of the test session's own, an empty database of each kind."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # test processes share the cores; one thread count everywhere means the same bits

import functools
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import util as alembic_util

from tests.support.harness import Harness, config_of
from tests.support.postgres import Postgres

# A script's background jobs ignore Ctrl-C, and so would all that we start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported stays: the search for garbage need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("STUDY_STORAGE", "STUDY_DATA_ROOT", "STUDY_SUPERVISED"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _migrations_are_loaded_once() -> Iterator[None]:
    """Alembic runs the file of every migration three times for each database that is made."""
    load = alembic_util.load_python_file
    remembered = functools.cache(load)

    def loaded(folder: Any, name: str) -> Any:
        return load(folder, name) if name == "env.py" else remembered(folder, name)  # env.py runs the migration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alembic_util, "load_python_file", loaded)
        yield


@pytest.fixture
def shared_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of all test processes of this session, for what takes long to decode."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    monkeypatch.setenv("STUDY_CACHE", str(folder / "shared-cache"))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres(settings=("full_page_writes=off", "autovacuum=off"))
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without studies of each kind: what is tested with this is a contract for both. PostgreSQL's has the
    tables already.
    """
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database_with_tables()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same without tables, for tests of how these are made."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    harness = Harness(f"sqlite:///{tmp_path_factory.mktemp('undisturbed') / 'study.db'}", config_of())
    harness.work()
    return harness.outcome()
