"""A `study dashboard` of its own process, for tests that talk to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECRET = "correct horse battery"


class Dashboard:
    def __init__(self, url: str, folder: Path, *options: str, password: str | None = None) -> None:
        environment = os.environ | {"STUDY_STORAGE": url}
        if password is not None:
            environment["STUDY_DASHBOARD_PASSWORD"] = password
        command = [sys.executable, "-m", "study", "dashboard", "--port", "0", *options]
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()
        found = re.search(r"http://[^ ]+:(\d+)", self.said)
        assert found, self.said + self.process.stderr.read()
        self.url, self.port = found[0], int(found[1])

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def dashboard(url: str, folder: Path, *options: str, password: str | None = None) -> Iterator[Dashboard]:
    served = Dashboard(url, folder, *options, password=password)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()
        assert served.process.stderr is not None
        served.process.stderr.close()
