"""The recipe for pgbouncer in docs/measurements/scale.md: workers share a few connections."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_command import SMALL, outcome, started, study, wait_for, worker_pid
from tests.support.bouncer import Bouncer, usable
from tests.support.postgres import Postgres
from tests.support.served import dashboard

pytestmark = pytest.mark.skipif(not usable(), reason="no pgbouncer of 1.21 or newer here")


@pytest.fixture
def url() -> Iterator[str]:
    """Of an empty database behind a pgbouncer with three connections."""
    server = Postgres()
    try:
        bouncer = Bouncer(server, 3)
        try:
            yield bouncer.through(server.new_database())
        finally:
            bouncer.stop()
    finally:
        server.stop()


def test_more_workers_than_connections_one_killed_and_others_looking_on(url: str, tmp_path: Path) -> None:
    launch = ["launch", "quick", *SMALL, "--set", "training.epochs=12"]
    launcher = started(*launch, "--workers", "4", "--storage", url, cwd=tmp_path)
    try:
        victim = wait_for(lambda: worker_pid(url, "quick"))
        with dashboard(url, tmp_path, "--read-only") as served:
            for _ in range(8):  # each of its transactions may have any of the connections
                with urllib.request.urlopen(f"{served.url}/api/studies", timeout=30) as answer:
                    assert b"quick" in answer.read()
            os.kill(victim, signal.SIGKILL)
            _, err = launcher.communicate(timeout=200)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, err
    assert "died" in err
    quiet = f"sqlite:///{tmp_path / 'study.db'}"
    done = study(*launch, "--storage", quiet, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert outcome(url, "quick") == outcome(quiet, "quick")
