"""A dashboard in a process of its own, for tests that send it requests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SECRET = "correct horse battery"
COMMAND = (sys.executable, "-m", "study", "dashboard", "--port", "0")


class Dashboard:
    """Args:
    options: of `study dashboard`.
    command: starts the dashboard and prints its URL on stderr, in the first line.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        *options: str,
        password: str | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        environment = os.environ | {"STUDY_STORAGE": url}
        if password is not None:
            environment["STUDY_DASHBOARD_PASSWORD"] = password
        self.log = folder / f"dashboard-{uuid.uuid4().hex}.log"  # a folder may have several
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], cwd=folder, env=environment, stderr=log)
        self.url, self.port = self._announced()

    def _announced(self) -> tuple[str, int]:
        while self.process.poll() is None:
            match = re.search(r"http://[^ \n]+:(\d+)", self.first_line)
            if match and "\n" in self.log.read_text():
                return match[0], int(match[1])
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    @property
    def first_line(self) -> str:
        return self.log.read_text().partition("\n")[0]

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def dashboard(
    url: str, folder: Path, *options: str, password: str | None = None, command: Sequence[str] = COMMAND
) -> Iterator[Dashboard]:
    served = Dashboard(url, folder, *options, password=password, command=command)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()
