"""The workers of this machine: one process a device, watched, replaced when they die, ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from storage.engine import open_storage
from storage.errors import UserError
from study.create import load_study
from study.exit_codes import BAD_INPUT, DATABASE_UNAVAILABLE, INTERRUPTED
from study.launch.progress import ProgressDisplay, tolerate_outage
from study.training.energy import SHARE
from study.worker.stop_monitor import STOP_SIGNALS, SUPERVISOR_VARIABLE

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
MOST_DEATHS_IN_A_ROW = 5


class Worker:
    """A worker process on a device of this machine; what it says goes to `say`, its end is for others to see."""

    def __init__(
        self,
        name: str,
        storage_url: str,
        device: str,
        data_root: str | None,
        say: Callable[[str], None],
        more: Mapping[str, str] | None = None,
    ) -> None:
        """`more`: further environment variables."""
        self.device, self.say = device, say
        self.last_words: deque[str] = deque(maxlen=20)
        # The URL, which may hold a password, goes by the environment: arguments are for all to see.
        environment = os.environ | {"STUDY_STORAGE": storage_url, SUPERVISOR_VARIABLE: str(os.getpid()), **(more or {})}
        command = [sys.executable, "-m", "study", "worker", name, "--device", device]
        if data_root is not None:
            command += ["--data-root", data_root]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
        )
        self._relaying = threading.Thread(target=self._relay, daemon=True)
        self._relaying.start()

    def _relay(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last_words.append(line.rstrip())
            self.say(line.rstrip())

    def poll(self) -> int | None:
        """The exit code, once it has ended and its last words are here."""
        code = self.process.poll()
        if code is not None:
            self._relaying.join(timeout=1.0)
        return code

    def why(self) -> str:
        """The last line that it said."""
        return (self.last_words[-1] if self.last_words else "a worker refused to start").removeprefix("study: ")


def end(workers: Sequence[Worker]) -> None:
    """Ask workers to give their trials back and end; kill those that have not after a while."""
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


class LocalSupervisor:
    """The worker processes of this machine and what they say."""

    def __init__(
        self, name: str, storage_url: str, devices: Sequence[str], data_root: str | None, console: Console
    ) -> None:
        self.name, self.storage_url, self.data_root, self.console = name, storage_url, data_root, console
        self.devices, self.threads = list(devices), max(1, (os.cpu_count() or 1) // len(devices))
        self.deaths = 0
        self.ended: set[int] = set()
        self.workers = [self._start(device) for device in devices]

    def _start(self, device: str) -> Worker:
        if device == "cpu":
            more = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.threads))}
        else:
            more = {SHARE: str(1 / self.devices.count(device))}
        return Worker(self.name, self.storage_url, device, self.data_root, self._say, more)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True, style="dim")

    def tend(self) -> bool:
        """Replace the workers that died; whether any is left.

        Raises:
            UserError: a worker refused to work (its line says why), or workers die as fast as they start.
        """
        for worker in list(self.workers):
            code = worker.poll()
            if code is None:
                continue
            self.workers.remove(worker)
            if code == BAD_INPUT:
                raise UserError(worker.why())
            if code in (0, INTERRUPTED, DATABASE_UNAVAILABLE):
                self.ended.add(code)
                continue
            self.deaths += 1
            self.console.print(f"a worker on {worker.device} died (exit code {code}); starting another", style="yellow")
            if self.deaths > MOST_DEATHS_IN_A_ROW:
                raise UserError(
                    f"{self.deaths} workers in a row died before they settled a trial, the last with exit code {code}: "
                    f"{' | '.join(list(worker.last_words)[-3:])}"
                )
            self.workers.append(self._start(worker.device))
        return bool(self.workers)

    def stop(self) -> None:
        end(self.workers)
        self.workers.clear()


def run(
    name: str,
    storage_url: str,
    devices: Sequence[str],
    data_root: str | None,
    console: Console,
    refresh: Callable[[], None] = lambda: None,
) -> int:
    """Run a study on the devices of this machine until it is finished (0) or its database unavailable too long (75).

    Args:
        refresh: called when something has changed, at most every REFRESH_SECONDS and for at most 1 % of the time.

    Raises:
        UserError: the study or the data are not to be had.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the workers have given their trials back.
    """
    storage = open_storage(storage_url, create=False, reading=True)
    study, config = load_study(storage, name)
    display = ProgressDisplay(console, storage, study, config, refresh)
    if display.settled:
        return 0
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    fleet = LocalSupervisor(name, storage_url, devices, data_root, console)
    try:
        with display.bars:
            while fleet.tend():
                with tolerate_outage():
                    if display.update():
                        fleet.deaths = 0
                    display.refresh_when_due()
                time.sleep(POLL_SECONDS)
            if DATABASE_UNAVAILABLE in fleet.ended:
                return DATABASE_UNAVAILABLE
            with tolerate_outage():
                display.update()
            if INTERRUPTED in fleet.ended:  # by somebody who signalled the workers, not us
                raise KeyboardInterrupt
            return 0
    finally:
        fleet.stop()
