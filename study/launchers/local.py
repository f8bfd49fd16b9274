"""Workers on this machine: one process a device, watched, replaced when they die, ended together."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from storage.errors import UserError
from study.exit_codes import BAD_INPUT, BUDGET_SPENT, DATABASE_UNAVAILABLE, INTERRUPTED, OK, STOPPED
from study.launchers.fork_server import ForkServer
from study.launchers.worker_count import local_devices, worker_threads
from study.logs import PREFIXES
from study.training.energy import SHARE
from study.worker.supervisor import SUPERVISOR_VARIABLE

if TYPE_CHECKING:
    from study.create import OpenStudy

logger = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
MOST_DEATHS_IN_A_ROW = 5
ORDERLY = (DATABASE_UNAVAILABLE, STOPPED, BUDGET_SPENT, INTERRUPTED, OK)
"""Exit codes after which a worker is not replaced, the most important for the study first."""


class WorkerProcess:
    """A `study worker` process on a device of this machine; its log lines become ours."""

    def __init__(
        self,
        name: str,
        storage_url: str,
        device: str,
        data_root: str | None,
        environment: Mapping[str, str] | None = None,
        ended: Callable[[], None] = lambda: None,
        server: ForkServer | None = None,
    ) -> None:
        """Args:
        environment: further variables.
        ended: called by a thread when the process has ended.
        server: forks the process; None: it is a new one, which imports everything itself.
        """
        self.device = device
        self.last_lines: deque[str] = deque(maxlen=20)
        # The URL, which may hold a password, goes by the environment: arguments are visible to everybody.
        variables = {"STUDY_STORAGE": storage_url, SUPERVISOR_VARIABLE: str(os.getpid()), **(environment or {})}
        arguments = ["worker", "--device", device]
        if data_root is not None:
            arguments += ["--data-root", data_root]
        arguments += ["--", name]
        self.process = _spawn(arguments, variables) if server is None else server.start(arguments, variables)
        self._ended = ended
        self._relay = threading.Thread(target=self._relay_lines, daemon=True)
        self._relay.start()

    def _relay_lines(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            text = line.rstrip()
            self.last_lines.append(text)
            level = next((level for level, prefix in PREFIXES.items() if text.startswith(prefix)), logging.INFO)
            logger.log(level, "%s", text.removeprefix(PREFIXES.get(level, "")))
        self.process.wait()
        self._ended()

    def poll(self) -> int | None:
        """The exit code, once it has ended and its last lines are here."""
        code = self.process.poll()
        if code is not None:
            self._relay.join(timeout=1.0)
        return code

    def reason(self) -> str:
        """The last line that it logged."""
        return (self.last_lines[-1] if self.last_lines else "a worker refused to start").removeprefix("study: ")


def _spawn(arguments: list[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # -P: a study.py or storage.py in the current folder must not run in the place of ours.
        [sys.executable, "-P", "-m", "study", *arguments],
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
    )


def stop_workers(workers: Sequence[WorkerProcess]) -> None:
    """Ask workers to release their trials and end; kill those that have not after GRACE_SECONDS."""
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        try:
            worker.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


class LocalLauncher:
    """The worker processes of a study on this machine.

    Args:
        workers: None: one a GPU, or one a core.
        threads: of each worker on a CPU; None: $OMP_NUM_THREADS, else 1.

    Raises:
        UserError: a device that this machine does not have.
    """

    detached = False

    def __init__(self, device: str, workers: int | None, threads: int | None = None) -> None:
        self.devices = local_devices(device, workers)
        self.threads = str(worker_threads(threads))
        forks = ForkServer.works_here and self.devices[0] == "cpu"
        self.server = ForkServer({"OMP_NUM_THREADS": self.threads}) if forks else None
        self.workers: list[WorkerProcess] = []
        self.deaths = 0
        self.codes: set[int] = set()
        self._one_ended = threading.Event()

    def check_budgets(self, units: Iterable[str]) -> None:
        if "kWh" in units:
            from study.worker.worker import check_energy

            check_energy(self.devices)

    def start(self, study: OpenStudy, data_root: str | None, unfinished: int) -> None:
        self.study, self.data_root = study, data_root
        self.devices = self.devices[: max(1, unfinished)]
        self.workers = [self._start(device) for device in self.devices]

    def _start(self, device: str) -> WorkerProcess:
        variables = {"OMP_NUM_THREADS": self.threads}
        if device != "cpu":
            variables = {SHARE: str(1 / self.devices.count(device))}
        return WorkerProcess(
            self.study.name, self.study.url, device, self.data_root, variables, self._one_ended.set, self.server
        )

    def poll(self) -> int | None:
        for worker in list(self.workers):
            code = worker.poll()
            if code is None:
                continue
            self.workers.remove(worker)
            if code == BAD_INPUT:
                raise UserError(worker.reason())
            if code in ORDERLY:
                self.codes.add(code)
                continue
            self.deaths += 1
            logger.warning("a worker on %s died (exit code %d); starting another", worker.device, code)
            if self.deaths > MOST_DEATHS_IN_A_ROW:
                raise UserError(
                    f"{self.deaths} workers in a row died before a trial finished, the last with exit code {code}: "
                    f"{' | '.join(list(worker.last_lines)[-3:])}"
                )
            self.workers.append(self._start(worker.device))
        return None if self.workers else next(code for code in ORDERLY if code in self.codes)

    def wait(self, seconds: float) -> None:
        self._one_ended.wait(seconds)
        self._one_ended.clear()

    def progressed(self) -> None:
        self.deaths = 0

    def stop(self) -> None:
        stop_workers(self.workers)
        self.workers.clear()
