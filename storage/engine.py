"""Opens a study database: engine settings, tables created once however many processes start together, versions.

Who opens it for writing gets the present schema: missing tables are created (`create`), older ones migrated. Who opens
it for reading changes nothing in it, down to the file's bytes.
"""

from __future__ import annotations

import atexit
import importlib
import os
import shlex
import sqlite3
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import sqlalchemy as sa
from filelock import FileLock
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, OperationalError

from storage import migrations
from storage.errors import Unreachable, UserError
from storage.older_schema import read_as_current
from storage.optuna_internals import models, schema_revisions
from storage.schema import BASELINE, LEASES, METADATA, SCHEMA_VERSION, STUDIES, STUDY_ATTRS, VERSION
from storage.url import file_of, parse, redact

BUSY_SECONDS = 30
IDLE_SECONDS = 30
"""After these, PostgreSQL ends a transaction that asks it nothing more. Its worker was frozen or cut off in the middle
of it, and the row locks would keep the trial from all others for as long as that lasts."""
CLOSE_SECONDS = 1.0
"""How long the end of a process waits for others that read SQLite's log at that moment."""
CLOCK_SLACK_SECONDS = 5.0
"""By how much the database's clock may be put back before live leases count as expired."""
MOST_LEASE_SECONDS = 86_400.0
"""Length of a lease of version 0.1.0, which did not store it, at most."""
_TABLES_LOCK = 0x64796E74  # any number that every process of ours takes
_WRITERS: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
"""SQLite engines that may have written, to be closed at the end of the process."""


def open_storage(text: str, *, create: bool = True, reading: bool = False, may_write: bool = False) -> RDBStorage:
    """Optuna's storage on the database at the URL `text`, with our tables beside its own.

    Opened for writing, a database of an older schema version of ours is migrated, whoever comes first: it takes a
    moment, happens as a whole under a lock, and is refused while a worker holds a lease, because a worker of the older
    version would continue to write the older form. Optuna's own older schema is migrated by `upgrade` only.

    Args:
        create: make the file and the tables where they are missing.
        reading: for programs that only look (status, report, the source of a copy). Nothing is created, migrated or
            switched on, and on SQLite nothing can be written and no writer is held up.
        may_write: with `reading`, for a dashboard: opening changes nothing, but its visitors may write notes.

    Raises:
        UserError: the URL is wrong; the database is missing, unreachable, not writable, not a study database, or of a
            schema version that this program does not know.
    """
    url, path = _located(text, create and not reading)
    with _as_one_line(url):
        return _open_to_read(url, path, may_write) if reading else _open_to_write(url, path, create)


def open_engine(text: str) -> sa.Engine:
    """An existing study database to be read with our own queries: quicker than `open_storage`, which loads
    Optuna's storage and Alembic.

    Raises:
        UserError: as of `open_storage`.
    """
    url, path = _located(text, create=False)
    with _as_one_line(url):
        settings = _engine_settings(url, path, reading=True)
        engine = sa.create_engine(_secret(url), **settings)
        _configure(engine, reading=True)
        if _readable(url, engine).ours != SCHEMA_VERSION:
            read_as_current(engine)
    return engine


def upgrade(text: str) -> list[str]:
    """Migrate an existing database to the present schema: Optuna's tables, then ours.

    Returns:
        What was done, a sentence each; empty if both were up to date.

    Raises:
        UserError: as of `open_storage`, or workers hold leases.
    """
    url, path = _located(text, create=False)
    done = []
    with _as_one_line(url):
        engine = _plain_engine(url, path)
        versions = _versions(engine)
        _refuse_newer(url, versions)
        if versions.ours is None or versions.optuna is None:
            raise _no_studies(url, engine)
        if versions == _Versions(schema_revisions()[-1], SCHEMA_VERSION):
            return []
        _refuse_live(url, engine)
        with _only_one(_writing_engine(url), path):
            if versions.optuna != schema_revisions()[-1]:
                options: dict[str, Any] = {"skip_compatibility_check": True, "skip_table_creation": True}
                RDBStorage(_secret(url), engine_kwargs=_engine_settings(url, path, reading=False), **options).upgrade()
                done.append(f"Optuna's tables: {versions.optuna} to {schema_revisions()[-1]}")
            if versions.ours != SCHEMA_VERSION:
                _make_current(url, _writing_engine(url))
                done.append(f"this program's tables: {versions.ours} to {SCHEMA_VERSION}")
    return done


def close(engine: sa.Engine) -> None:
    """End the use of a database. On SQLite what this and other processes wrote is then in the file itself.

    Whatever `open_storage` opened for writing is closed at the end of the process; call this where the file must be
    complete before that, as after an export.
    """
    if engine in _WRITERS:
        _WRITERS.discard(engine)
        with suppress(sa.exc.SQLAlchemyError, sqlite3.Error):  # a reader or a full disk: the log stays beside the file
            connection = engine.raw_connection()
            try:
                connection.cursor().execute(f"PRAGMA busy_timeout = {round(CLOSE_SECONDS * 1000)}")
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                connection.close()
    engine.dispose()


@atexit.register
def _close_all() -> None:
    for engine in list(_WRITERS):
        close(engine)


def _located(text: str, create: bool) -> tuple[URL, Path | None]:
    """The URL, and the file if it is SQLite's."""
    url = parse(text)
    path = file_of(url)
    if path is not None and not path.exists():
        if not create:
            raise UserError(f"no database file {path}; check --storage, or start a study with: study launch")
        if not path.parent.is_dir():
            raise UserError(f"no folder {path.parent} for the database {path.name}; create it or name another")
    if path is not None and path.is_dir():
        raise UserError(f"{path} is a folder, where a database file is meant; name a file: sqlite:///{path}/study.db")
    if path is not None and (kind := network_filesystem(path)):
        raise UserError(
            f"the folder of {path.name} is on a network file system ({kind}), where SQLite's locks do not hold; "
            "use a local disk, or PostgreSQL for several machines: --storage postgresql://…"
        )
    return url, path


@contextmanager
def _as_one_line(url: URL) -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.logging.disable_default_handler()  # added when it is imported: `study.logs` shows its warnings once
    try:
        yield
    except (DatabaseError, optuna.exceptions.StorageInternalError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error.__cause__ or error).strip().splitlines()[0]
        unavailable = isinstance(error, OperationalError | optuna.exceptions.StorageInternalError)
        raise (Unreachable if unavailable else UserError)(f"cannot use the database {redact(url)}: {reason}") from None
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
    mounted, filesystem = "", ""
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= len(mounted):
            mounted, filesystem = point, kind
    return filesystem if filesystem.startswith(NETWORK_FILESYSTEMS) else None


def _open_to_read(url: URL, path: Path | None, may_write: bool) -> RDBStorage:
    settings = _engine_settings(url, path, reading=True, may_write=may_write)
    versions = _readable(url, _plain_engine(url, path))
    storage = RDBStorage(_secret(url), engine_kwargs=settings, skip_table_creation=True)
    storage.engine.dispose()  # connections made before the settings were
    _configure(storage.engine, reading=True)
    if versions.ours != SCHEMA_VERSION:
        read_as_current(storage.engine)
    return storage


def _open_to_write(url: URL, path: Path | None, create: bool) -> RDBStorage:
    def optunas() -> RDBStorage:
        settings = _engine_settings(url, path, reading=False)
        return RDBStorage(_secret(url), engine_kwargs=settings, skip_table_creation=True)

    there = path is None or path.exists()
    versions = _versions(_plain_engine(url, path)) if there else _Versions(None, None)
    _refuse_newer(url, versions)
    if versions == _Versions(schema_revisions()[-1], SCHEMA_VERSION):
        if path is not None and create:
            connection = _writing_engine(url).raw_connection()
            try:  # to learn now whether we may write
                connection.cursor().execute("BEGIN IMMEDIATE")
                connection.rollback()
            except sqlite3.Error as error:
                raise OSError(str(error)) from None
            finally:
                connection.close()
        storage = optunas()
    else:
        if not create and versions.ours is None:
            raise _no_studies(url, _plain_engine(url, path))
        if versions.optuna is not None:
            _refuse_older_optuna(url, versions.optuna)
        if versions.ours not in (None, SCHEMA_VERSION):
            _refuse_live(url, _plain_engine(url, path))
        engine = _writing_engine(url)
        with _only_one(engine, path):
            models.BaseModel.metadata.create_all(engine)
            _make_current(url, engine)
            storage = optunas()  # writes Optuna's schema version, so still under the lock
    storage.engine.dispose()  # connections made before the settings were
    _configure(storage.engine, reading=False)
    if path is not None:
        _WRITERS.add(storage.engine)
    return storage


MOST_VERSION = 32
"""Characters of a schema version, in either table."""


@dataclass(frozen=True)
class _Versions:
    """Of the schemas that a database has; None: the tables are not there, or not complete."""

    optuna: str | None
    ours: str | None


def _versions(engine: sa.Engine) -> _Versions:
    tables = set(sa.inspect(engine).get_table_names())
    with engine.connect() as connection:

        def number(table: str) -> str | None:
            if table not in tables:
                return None
            stored = connection.scalar(sa.select(sa.column("version_num")).select_from(sa.table(table)))
            return stored if stored is None else str(stored)[:MOST_VERSION]  # SQLite has a value of any type there

        stamped = "version_info" in tables and connection.scalar(sa.select(models.VersionInfoModel.version_info_id))
        ours = number(VERSION.name) or (BASELINE if LEASES.name in tables else None)
        return _Versions(number("alembic_version") if stamped else None, ours)


def _readable(url: URL, engine: sa.Engine) -> _Versions:
    """The versions of a database that is to be read, if it can be."""
    versions = _versions(engine)
    _refuse_newer(url, versions)
    if versions.optuna is None or versions.ours is None:
        raise _no_studies(url, engine)
    _refuse_older_optuna(url, versions.optuna)
    return versions


def _refuse_newer(url: URL, versions: _Versions) -> None:
    known = schema_revisions()
    if versions.optuna is not None and versions.optuna not in known:
        raise UserError(
            f"the database {redact(url)} has schema version {versions.optuna!r} of a newer Optuna; Optuna "
            f"{optuna.__version__} here knows up to {known[-1]!r}: upgrade Optuna"
        )
    if versions.ours is not None and not (versions.ours.isdecimal() and int(versions.ours) <= int(SCHEMA_VERSION)):
        raise UserError(
            f"the database {redact(url)} has schema version {versions.ours!r} of a newer version of this program, "
            f"which knows up to {SCHEMA_VERSION!r}: upgrade this program"
        )


def _refuse_older_optuna(url: URL, revision: str) -> None:
    newest = schema_revisions()[-1]
    if revision != newest:
        raise UserError(
            f"the database {redact(url)} has Optuna's schema version {revision!r}, and Optuna {optuna.__version__} "
            f"here needs {newest!r}; migrate it with: study upgrade --storage {shlex.quote(redact(url))}"
        )


def _no_studies(url: URL, engine: sa.Engine) -> UserError:
    """Why a database without our tables cannot be used; a study of ours may be in it without them."""
    copied: list[str] = []
    if sa.inspect(engine).has_table(STUDY_ATTRS.name):
        keys = sa.and_(STUDY_ATTRS.c.study_id == STUDIES.c.study_id, STUDY_ATTRS.c.key == "data_fingerprint")
        with engine.connect() as connection:
            copied = list(connection.scalars(sa.select(STUDIES.c.study_name).where(keys)))
    if copied:
        return UserError(incomplete_copy(copied[0], f"the database {redact(url)}"))
    return UserError(f"the database {redact(url)} holds no studies; check --storage")


def incomplete_copy(name: str, where: str) -> str:
    """What to say of a study that another program copied."""
    return (
        f"the study {name!r} in {where} was copied by another program (such as optuna.copy_study), without its epochs, "
        f"attempts and checkpoints; copy it with: study copy {shlex.quote(name)} --from URL --to URL"
    )


def _make_current(url: URL, engine: sa.Engine) -> None:
    """Our tables of the present version, in one transaction, under the lock."""
    version = _versions(engine).ours
    if version == SCHEMA_VERSION:
        return
    if version is not None:
        _refuse_live(url, engine)
    with engine.begin() as connection:
        VERSION.create(connection, checkfirst=True)
        if version is None:
            METADATA.create_all(connection)
            connection.execute(sa.insert(VERSION).values(version_num=SCHEMA_VERSION))
            return
        if connection.scalar(sa.select(VERSION.c.version_num)) is None:
            connection.execute(sa.insert(VERSION).values(version_num=BASELINE))
        migrations.migrate(connection)


def _refuse_live(url: URL, engine: sa.Engine) -> None:
    """A migration waits for workers of the older version: they would continue to write the older form."""
    held = LEASES.c.expires_at.between(database_time(engine), database_time(engine) + MOST_LEASE_SECONDS)
    with engine.connect() as connection:
        count = connection.scalar(sa.select(sa.func.count()).select_from(LEASES).where(held))
    if count:
        raise UserError(
            f"the database {redact(url)} has an older schema and is in use: workers hold {count} "
            f"trial{'s' if count > 1 else ''}; stop them, or wait until their leases expire, then try again"
        )


@contextmanager
def _only_one(engine: sa.Engine, path: Path | None) -> Iterator[None]:
    if path is None:
        while True:
            with engine.begin() as connection:
                # Who waits for it keeps no connection: behind a pgbouncer, who has it may need that one.
                if connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_TABLES_LOCK))):
                    # A migration may take long, and holding the lock is all that this connection does.
                    connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
                    yield
                    return
            time.sleep(0.1)
    lock = path.with_name(path.name + ".lock")
    existed = path.exists()
    try:
        lock.touch()  # FileLock would wait for ever where no file can be made
        with FileLock(lock):
            yield
        # Whoever still waits for this lock, or makes a new one, finds the tables complete.
        lock.unlink(missing_ok=True)
    except BaseException:
        if not existed and path.exists() and path.stat().st_size == 0:
            path.unlink()
        raise


def _secret(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _plain_engine(url: URL, path: Path | None) -> sa.Engine:
    """For a look at the database before it is opened; changes nothing."""
    settings = _engine_settings(url, path, reading=True)
    options = {key: settings[key] for key in ("connect_args", "creator") if key in settings}
    engine = sa.create_engine(_secret(url), poolclass=sa.NullPool, **options)
    _configure(engine, reading=True)
    return engine


def _writing_engine(url: URL) -> sa.Engine:
    """For the tables."""
    connect_args = _engine_settings(url, file_of(url), reading=False)["connect_args"]
    engine = sa.create_engine(_secret(url), poolclass=sa.NullPool, connect_args=connect_args)
    _configure(engine, reading=False)
    return engine


def _engine_settings(url: URL, path: Path | None, *, reading: bool, may_write: bool = False) -> dict[str, Any]:
    if path is not None and reading and (not may_write or _is_immutable(path)):
        settings: dict[str, Any] = {"creator": lambda: _connect_read_only(path)}
        # Without locks nothing tells a connection that a writer has begun: each query then looks again.
        return settings | ({"poolclass": sa.NullPool} if _is_immutable(path) else {})
    if path is not None:
        return {"connect_args": {"timeout": BUSY_SECONDS, "uri": True}}  # for `ATTACH`; SQLAlchemy passes a plain path
    # Who reads locks nothing, and Optuna may take long over what it has read. UTC, because Optuna writes naive times.
    ours = "-c timezone=UTC" + (f" -c idle_in_transaction_session_timeout={IDLE_SECONDS}s" if not reading else "")
    theirs = url.query.get("options", os.environ.get("PGOPTIONS", ""))
    theirs = theirs if isinstance(theirs, str) else " ".join(theirs)
    # Keep-alives find a dead server in a minute instead of hours.
    defaults: dict[str, Any] = {
        "connect_timeout": 10,
        "application_name": "study",
        "keepalives_idle": 20,
        "keepalives_interval": 10,
        "keepalives_count": 4,
        "tcp_user_timeout": 30_000,  # ms; for what was sent into a cut cable
    }
    variables = {"connect_timeout": "PGCONNECT_TIMEOUT", "application_name": "PGAPPNAME"}
    given = url.query.keys() | {name for name, variable in variables.items() if os.environ.get(variable)}
    # As many connections as a worker has threads (training, writer, lease, stop monitor; the one that reads ahead is
    # soon over): who finds none free waits 30 s and fails. With 32 workers 433 reports/s against 152 without a pool.
    return {
        "pool_size": 1,
        "max_overflow": 3,
        "pool_pre_ping": True,
        "connect_args": {"options": f"{theirs} {ours}".strip()}
        | {name: value for name, value in defaults.items() if name not in given},
    }


def _connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection that does not write. Where the folder does not take the log's files, the file is read without locks,
    which is safe only while nobody has a log there, and therefore looked at with each connection.
    """
    return _connect(path, "mode=ro&immutable=1" if _is_immutable(path) else _mode(path))


def read_only_address(path: Path) -> str:
    """The file for SQLite's `ATTACH`, only to be read, so that a transaction does not lock it against writers. Where
    there was no log it leaves an empty one, unless another connection is closed after it.
    """
    return f"file:{quote(str(path))}?mode=ro{'&immutable=1' * _is_immutable(path)}"


def _mode(path: Path) -> str:
    """The last connection to close moves the log's content into the file. One with mode=ro does not, but leaves an
    empty log behind if there was none.
    """
    return "mode=ro" if _log_of(path) is not None else "mode=rw"


def _log_of(path: Path) -> Path | None:
    """The log beside a SQLite file, if there is anything in it."""
    log = path.with_name(path.name + "-wal")
    try:
        return log if log.stat().st_size else None
    except FileNotFoundError:
        return None


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    address = f"file:{quote(str(path))}?{mode}"
    connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA query_only = ON")
    return connection


def _is_immutable(path: Path) -> bool:
    """Whether a SQLite file can only be read without locks: its log is empty, and the folder takes no new one."""
    connection = _connect(path, _mode(path))
    try:
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
    except sqlite3.OperationalError as error:
        if "unable to open" not in str(error) and "readonly" not in str(error):
            return False  # the caller meets it again, where it is reported
        if (log := _log_of(path)) is not None:
            raise UserError(
                f"{path} has a log of its last writes ({log.name}) that cannot be read in this folder; copy both to a "
                "folder that can be written"
            ) from None
        return True
    except sqlite3.DatabaseError:
        return False
    finally:
        connection.close()
    return False


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
        if not reading and cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.close()

    # IMMEDIATE takes the write lock before anything is read, so that what was read still holds when it is written.
    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        only_reads = reading or connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")


def reader(engine: sa.Engine) -> sa.Engine:
    """The database for queries that change nothing. On SQLite they keep no writer out. On PostgreSQL each is a
    transaction of its own: one round trip instead of three, and psycopg keeps its prepared statements, all of which it
    drops at a ROLLBACK.
    """
    options: dict[str, Any] = {"reading": True}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "AUTOCOMMIT"
    return engine.execution_options(**options)


def upsert(engine: sa.Engine, table: sa.Table) -> Any:
    """INSERT for this database, with `on_conflict_do_*`."""
    # Imported by need: PostgreSQL's brings asyncio along, a tenth of what `study status` takes to start.
    return importlib.import_module(f"sqlalchemy.dialects.{engine.dialect.name}").insert(table)


def database_time(engine: sa.Engine) -> sa.ColumnElement[float]:
    """The database's clock, seconds since 1970: the only clock that leases go by."""
    if engine.dialect.name == "sqlite":
        return (sa.func.julianday("now") - 2440587.5) * 86400.0
    return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)


def live_lease(engine: sa.Engine) -> sa.ColumnElement[bool]:
    """Whether a row of `trial_leases` is a lease that a worker holds.

    One that ends later than now + its own length was made by a clock that was ahead, and counts as expired.
    """
    clock = database_time(engine)
    longest = sa.func.coalesce(LEASES.c.seconds, MOST_LEASE_SECONDS) + CLOCK_SLACK_SECONDS
    return sa.and_(LEASES.c.expires_at > clock, LEASES.c.expires_at <= clock + longest)
