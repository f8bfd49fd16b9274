"""Opens a study database: the right engine settings, and tables made once however many processes start together."""

from __future__ import annotations

import importlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from filelock import FileLock
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, OperationalError

from storage.errors import Unreachable, UserError
from storage.optuna_internals import models
from storage.schema import (
    ATTEMPTS,
    EPOCHS,
    LEASES,
    METADATA,
)
from storage.url import file_of, parse, redact

BUSY_SECONDS = 30
IDLE_SECONDS = 30
"""After these, PostgreSQL ends a transaction that asks it nothing more. Its worker was frozen or cut off in the middle
of it, and the row locks would keep the trial from all others for as long as that lasts."""
_TABLES_LOCK = 0x64796E74  # any number that every process of ours takes


def open_storage(text: str, *, create: bool = True, reading: bool = False) -> RDBStorage:
    """Optuna's storage on the database at the URL `text`, with our tables beside its own.

    Args:
        create: make the file and the tables where they are missing.
        reading: for programs that mostly look (status, report, dashboard): on SQLite their transactions then do not
            hold up the workers' writes.

    Raises:
        UserError: the URL is wrong, or the database is missing, unreachable, not writable or not a study database.
    """
    url, path = _located(text, create)
    with _as_one_line(url):
        storage = _open(url, path, create, reading)
    _configure(storage.engine, reading)
    storage.engine.dispose()  # connections made before the settings were
    return storage


def open_engine(text: str) -> sa.Engine:
    """An existing study database for those who look with our own queries: quicker than `open_storage`, which loads
    Optuna's storage and Alembic.

    Raises:
        UserError: as of `open_storage`.
    """
    url, path = _located(text, create=False)
    settings = _engine_settings(path is not None, reading=True)
    engine = sa.create_engine(url.render_as_string(hide_password=False), **settings)
    _configure(engine, reading=True)
    with _as_one_line(url):
        if not _complete(engine):  # to be refused, or older than this program, which then adds what is missing
            return open_storage(text, create=False, reading=True).engine
        with engine.connect() as connection:
            version = connection.scalar(sa.select(models.VersionInfoModel.schema_version))
    if version != models.SCHEMA_VERSION:
        return open_storage(text, create=False, reading=True).engine  # Optuna knows what to say
    return engine


def _located(text: str, create: bool) -> tuple[URL, Path | None]:
    """The URL, and the file if it is SQLite's."""
    url = parse(text)
    path = file_of(url)
    if path is not None and not path.exists():
        if not create:
            raise UserError(f"no database file {path}; check --storage, or start a study with: study launch")
        if not path.parent.is_dir():
            raise UserError(f"no folder {path.parent} for the database {path.name}; create it or name another")
    if path is not None and (kind := network_filesystem(path)):
        raise UserError(
            f"the folder of {path.name} is on a network file system ({kind}), where SQLite's locks do not hold; "
            "use a local disk, or PostgreSQL for several machines: --storage postgresql://…"
        )
    return url, path


@contextmanager
def _as_one_line(url: URL) -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except (DatabaseError, optuna.exceptions.StorageInternalError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error.__cause__ or error).strip().splitlines()[0]
        away = isinstance(error, OperationalError | optuna.exceptions.StorageInternalError)
        raise (Unreachable if away else UserError)(f"cannot use the database {redact(url)}: {reason}") from None
    except RuntimeError as error:  # Optuna's schema check
        raise UserError(f"cannot use the database {redact(url)}: {error}") from None


NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "fuse.sshfs")


def network_filesystem(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """The kind of network file system that `path` lies on, where the system tells (Linux)."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    folder = path.resolve().parent
    found = ("", "")
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1] if found[1].startswith(NETWORK_FILESYSTEMS) else None


def _open(url: URL, path: Path | None, create: bool, reading: bool) -> RDBStorage:
    secret = url.render_as_string(hide_password=False)
    settings = _engine_settings(path is not None, reading)

    def optunas() -> RDBStorage:
        return RDBStorage(secret, engine_kwargs=settings, skip_table_creation=True)

    engine = sa.create_engine(secret, poolclass=sa.NullPool, connect_args=settings["connect_args"])
    _configure(engine, reading=True)
    if _complete(engine):
        if path is not None and create:
            connection = engine.raw_connection()
            try:  # to learn now whether we may write
                connection.cursor().execute("BEGIN IMMEDIATE")
                connection.rollback()
            except sqlite3.Error as error:
                raise OSError(str(error)) from None
            finally:
                connection.close()
        return optunas()
    if not create and not sa.inspect(engine).has_table(LEASES.name):
        raise UserError(f"the database {redact(url)} holds no studies; check --storage")
    with _only_one(engine, path):
        models.BaseModel.metadata.create_all(engine)
        METADATA.create_all(engine)
        _add_columns(engine)
        return optunas()  # writes the schema version, so still under the lock


def _complete(engine: sa.Engine) -> bool:
    """Whether all tables are there and stamped; the stamp comes last."""
    names = set(sa.inspect(engine).get_table_names())
    if not {*models.BaseModel.metadata.tables, *METADATA.tables, "alembic_version"} <= names:
        return False
    with engine.connect() as connection:
        stamped = connection.exec_driver_sql("SELECT count(*) FROM alembic_version").scalar() == 1
    return stamped and not _missing_columns(engine)


def _missing_columns(engine: sa.Engine) -> list[sa.Column[Any]]:
    """Columns of our tables that an older version did not make."""
    inspector, missing = sa.inspect(engine), []
    for table in (EPOCHS, ATTEMPTS):
        there = {column["name"] for column in inspector.get_columns(table.name)}
        missing += [column for column in table.c if column.name not in there]
    return missing


def _add_columns(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        for column in _missing_columns(engine):
            kind = column.type.compile(engine.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {column.table.name} ADD COLUMN {column.name} {kind}")


@contextmanager
def _only_one(engine: sa.Engine, path: Path | None) -> Iterator[None]:
    if path is None:
        while True:
            with engine.begin() as connection:
                # Who waits for it keeps no connection: behind a pgbouncer, who has it may need that one.
                if connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_TABLES_LOCK))):
                    yield
                    return
            time.sleep(0.1)
    lock = path.with_name(path.name + ".lock")
    existed = path.exists()
    try:
        with FileLock(lock):
            yield
        # Whoever still waits for this lock, or makes a new one, finds the tables complete.
        lock.unlink(missing_ok=True)
    except BaseException:
        if not existed and path.exists() and path.stat().st_size == 0:
            path.unlink()
        raise


def _engine_settings(sqlite: bool, reading: bool) -> dict[str, Any]:
    if sqlite:
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    # As many connections as a worker has threads (training, scribe, lease, stop watch; the one that reads ahead is soon
    # over): who finds none free waits 30 s and fails. With 32 workers 433 reports/s against 152 without a pool. UTC,
    # because Optuna writes naive times. Keep-alives find a dead server in a minute instead of hours. Who reads locks
    # nothing, and Optuna may take long over what it has read.
    idle = "" if reading else f" -c idle_in_transaction_session_timeout={IDLE_SECONDS}s"
    return {
        "pool_size": 1,
        "max_overflow": 3,
        "pool_pre_ping": True,
        "connect_args": {
            "options": f"-c timezone=UTC{idle}",
            "connect_timeout": 10,
            "application_name": "study",
            "keepalives_idle": 20,
            "keepalives_interval": 10,
            "keepalives_count": 4,
            "tcp_user_timeout": 30_000,  # ms; for what was sent into a cut cable
        },
    }


def _configure(engine: sa.Engine, reading: bool) -> None:
    """SQLite's settings on every connection: 641 reports/s from 32 processes instead of 220, no locked database."""
    if engine.dialect.name != "sqlite":
        return

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
        # WAL stays with the file; setting it needs the file for oneself, so only the first process does.
        if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.close()

    # IMMEDIATE takes the write lock before anything is read, so that what was read still holds when it is written.
    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        only_reads = reading or connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")


def upsert(engine: sa.Engine, table: sa.Table) -> Any:
    """INSERT for this database, with `on_conflict_do_*`."""
    # Imported by need: PostgreSQL's brings asyncio along, a tenth of what `study status` takes to start.
    return importlib.import_module(f"sqlalchemy.dialects.{engine.dialect.name}").insert(table)


def database_time(engine: sa.Engine) -> sa.ColumnElement[float]:
    """The database's clock, seconds since 1970: the only clock that leases go by."""
    if engine.dialect.name == "sqlite":
        return (sa.func.julianday("now") - 2440587.5) * 86400.0
    return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)
