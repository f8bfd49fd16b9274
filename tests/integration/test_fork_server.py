"""Workers that are forked: what a launcher learns of them, and who ends when another is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from study import exit_codes
from study.launchers.fork_server import UNKNOWN, ForkedProcess, ForkServer

pytestmark = pytest.mark.skipif(not ForkServer.works_here, reason="workers are forked on Linux only")


@pytest.fixture(scope="module")
def server() -> ForkServer:
    return ForkServer({"OMP_NUM_THREADS": "1"})


@pytest.fixture
def waiting(server: ForkServer) -> Iterator[ForkedProcess]:
    """A worker that waits for its database: nothing answers at that address."""
    nowhere = {"STUDY_STORAGE": "postgresql://nobody@127.0.0.1:1/nothing"}
    process = server.start(["worker", "--device", "cpu", "--", "quick"], nowhere)
    yield process
    process.kill()


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def id_of(process: ForkedProcess) -> int:
    deadline = time.monotonic() + 60
    while process.poll() is None and process.pid is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    return process.pid


def test_exit_codes_and_lines_arrive(server: ForkServer) -> None:
    fine = server.start(["--help"], {})
    refused = server.start(["worker", "--device", "gpu7", "--", "nothing"], {"STUDY_STORAGE": "sqlite:///none/such.db"})
    assert fine.wait(60) == exit_codes.OK
    assert fine.stderr.read() == ""
    assert refused.wait(60) == exit_codes.BAD_INPUT
    assert re.fullmatch(r"study: .*none/such\.db.*\n", refused.stderr.read())


def test_a_message_of_any_length_arrives(server: ForkServer) -> None:
    name = "é" * 30_000
    refused = server.start(["worker", "--", name], {"STUDY_STORAGE": "sqlite:///none/such.db"})
    assert refused.wait(60) == exit_codes.BAD_INPUT


def test_signals_reach_the_process(waiting: ForkedProcess) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.2)
    assert waiting.poll() is None
    waiting.kill()
    assert waiting.wait(60) == -signal.SIGKILL
    waiting.send_signal(signal.SIGTERM)  # too late, as for subprocess.Popen


def test_a_signal_to_all_processes_ends_the_workers_alone(waiting: ForkedProcess) -> None:
    """So a launcher learns how they ended, and waits for them."""
    process = id_of(waiting)
    for each in (parent_of(process), process):
        os.kill(each, signal.SIGTERM)
    assert waiting.wait(60) in (exit_codes.INTERRUPTED, -signal.SIGTERM)  # the latter before it has its own handlers


def test_the_password_is_in_no_command_line(server: ForkServer, waiting: ForkedProcess) -> None:
    process = id_of(waiting)
    assert b"postgresql" not in Path(f"/proc/{process}/cmdline").read_bytes()
    assert b"postgresql" not in Path(f"/proc/{process}/environ").read_bytes()


def test_a_killed_server_takes_its_processes_along_and_is_replaced(server: ForkServer, waiting: ForkedProcess) -> None:
    process = id_of(waiting)
    first = parent_of(process)
    os.kill(first, signal.SIGKILL)
    assert waiting.wait(60) == UNKNOWN
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.start(["--help"], {}).wait(60) == exit_codes.OK


def test_a_server_without_work_ends_and_is_replaced() -> None:
    server = ForkServer({}, idle_seconds=0.1)
    assert server.start(["--help"], {}).wait(60) == exit_codes.OK
    server._server.wait(30)
    assert server.start(["--help"], {}).wait(60) == exit_codes.OK


def test_the_environment_is_that_of_the_start(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own code that a launcher loads may set variables."""
    monkeypatch.setenv("STUDY_STORAGE", "sqlite:///set/since.db")
    refused = server.start(["worker", "--", "quick"], {})
    assert refused.wait(60) == exit_codes.BAD_INPUT
    assert "set/since.db" in refused.stderr.read()


def test_a_server_ends_with_its_launcher() -> None:
    code = (
        "import os, time\n"
        "from study.launchers.fork_server import ForkServer\n"
        "server = ForkServer({})\n"
        "if os.fork() == 0:\n"  # it inherits the socket and outlives the launcher
        "    os.closerange(0, 3)\n"
        "    time.sleep(10)\n"
        "    os._exit(0)\n"
        "process = server.start(['--help'], {})\n"
        "process.wait()\n"
        "print(server._server.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    process = int(ended.stdout)
    deadline = time.monotonic() + 8
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
