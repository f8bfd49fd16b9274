"""A pgbouncer in transaction mode before a PostgreSQL, where the program is installed (1.21 or newer)."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psycopg

from tests.support.postgres import Postgres, free_port

PROGRAM = shutil.which("pgbouncer")
DOC = (Path(__file__).parents[2] / "docs" / "measurements" / "scale.md").read_text()
SETTINGS, ROLE = (re.findall(rf"```{kind}\n(.*?)```", DOC, re.DOTALL)[0] for kind in ("ini", "sql"))
"""The recipe, as it stands there."""


def usable() -> bool:
    """Whether there is one that keeps track of prepared statements."""
    if PROGRAM is None:
        return False
    version = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"\d+", version)[:2])) >= (1, 21)


class Bouncer:
    """On loopback, with as many connections to the server as it is given, set up as in docs/measurements/scale.md."""

    def __init__(self, server: Postgres, connections: int) -> None:
        assert PROGRAM is not None
        self.port = free_port()
        self.log = server.folder / "pgbouncer.log"
        file = server.folder / "pgbouncer.ini"
        file.write_text(
            f"[databases]\n* = host=127.0.0.1 port={server.port} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"max_client_conn = 1000\ndefault_pool_size = {connections}\n{SETTINGS}"
        )
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(ROLE.replace("ROLE study", "ROLE postgres").encode())
        nobody = ["-u", "nobody"] if os.getuid() == 0 else []  # it refuses to be root
        with self.log.open("w") as log:
            command = [PROGRAM, "-q", *nobody, str(file)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not self._listens():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def through(self, url: str) -> str:
        """The URL of a database of the server, by way of this."""
        return re.sub(r":\d+/", f":{self.port}/", url)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
