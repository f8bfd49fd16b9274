"""Workers as copies of one process that has imported torch and the rest: 1.7 s and 330 MB once, not once each.

    python -m study.launchers.fork_server SOCKET SECONDS

For workers on a CPU on Linux only: a process that uses a GPU, or Apple's libraries, must not be copied. The server
imports, forks a process for each message on its socket, and reports how each one ended. It ends when its launcher does,
and after so many seconds without a process; what Slurm or systemd send to all processes is for the workers.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress

from storage.garbage import no_garbage_search
from study.worker.supervisor import STOP_SIGNALS, SUPERVISOR_VARIABLE, launcher_ended

IMPORTED = ("study.worker.worker", "study.cli.run")
MOST_BYTES = 2**18
"""Of a message: the arguments and environment variables of a process; Linux passes no more at once."""
NUMBER = struct.Struct("=i")
IDLE_SECONDS = 60.0
UNKNOWN = 255
"""The exit code of a process whose server ended first."""
CHECK_SECONDS = 1.0
"""Between two looks whether the launcher is still there, in case another process has inherited its socket."""


class ForkServer:
    """Starts `study` commands as children of a process that has imported what workers need.

    Args:
        variables: further environment variables, of the server and so of all that it starts.
        idle_seconds: after which a server without a process ends; the next process gets a new one.
    """

    works_here = sys.platform == "linux"

    def __init__(self, variables: Mapping[str, str], idle_seconds: float = IDLE_SECONDS) -> None:
        self._variables, self._idle_seconds = variables, idle_seconds
        self._begin()

    def _begin(self) -> None:
        self._environment = {**os.environ, **self._variables, SUPERVISOR_VARIABLE: str(os.getpid())}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                # -P: a study.py or storage.py in the current folder must not run in the place of ours.
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(self._idle_seconds)],
                env=self._environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what fails here fails again in the processes, which say so
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._server, self._socket)

    def start(self, arguments: Sequence[str], variables: Mapping[str, str]) -> ForkedProcess:
        """Start `study ARGUMENTS`.

        Args:
            variables: further environment variables of this process.
        """
        new = {name: value for name, value in os.environ.items() if self._environment.get(name) != value}
        message = json.dumps([list(arguments), {**new, **self._variables, **variables}]).encode()
        stderr, stderr_end = os.pipe()
        status, status_end = os.pipe()
        try:
            try:
                socket.send_fds(self._socket, [message], [stderr_end, status_end])
            except OSError:  # it has ended: it had nothing to do, or was killed
                self._begin()
                socket.send_fds(self._socket, [message], [stderr_end, status_end])
        finally:
            os.close(stderr_end)
            os.close(status_end)
        return ForkedProcess(stderr, status)


def _end(server: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    server.kill()
    server.wait()


class ForkedProcess:
    """A process of a `ForkServer`, with what is used of `subprocess.Popen`.

    Args:
        stderr: the end to read of a pipe.
        status: the same, of one that gets the process id, and in the end the exit code.
    """

    def __init__(self, stderr: int, status: int) -> None:
        self.stderr = os.fdopen(stderr, encoding="utf-8", errors="backslashreplace")
        self._status, self._lock = status, threading.Lock()
        self.pid: int | None = None
        """None until it is forked."""
        self.returncode: int | None = None
        weakref.finalize(self, os.close, status)

    def poll(self) -> int | None:
        with self._lock:
            while self.returncode is None and _readable(self._status, 0.0):
                data = os.read(self._status, NUMBER.size)
                (number,) = NUMBER.unpack(data) if data else (UNKNOWN,)
                if data and self.pid is None:
                    self.pid = number
                else:
                    self.returncode = number
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired("study worker", timeout)
            _readable(self._status, min(left, CHECK_SECONDS))
        return code

    def send_signal(self, number: int) -> None:
        while self.poll() is None:
            if self.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(self.pid, number)
                return
            _readable(self._status, CHECK_SECONDS)  # the server is importing

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def serve(requests: socket.socket, idle_seconds: float) -> list[str] | None:
    """Fork a process for each message, until the launcher ends or `idle_seconds` have passed without a process.

    Returns:
        In such a process: the arguments of its command. In the server: None.
    """
    is_over, server = launcher_ended(), os.getpid()
    child_ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    poll.register(child_ended, select.POLLIN)
    last_busy = time.monotonic()
    while not is_over():
        if statuses:
            last_busy = time.monotonic()
        elif time.monotonic() > last_busy + idle_seconds:
            return None
        ready = {descriptor for descriptor, _ in poll.poll(1000 * CHECK_SECONDS)}
        if child_ended in ready:
            os.read(child_ended, 4096)
            _report_ended(statuses)
        if requests.fileno() in ready:
            message, descriptors, *_ = socket.recv_fds(requests, MOST_BYTES, 2)
            if not message:
                return None
            arguments, variables = json.loads(message)
            stderr, status = descriptors
            try:
                process = os.fork()
            except OSError:  # no room for another process: the launcher learns that it has ended
                os.close(stderr)
                os.close(status)
                continue
            if process == 0:
                # Else the launcher would not notice that the server has ended.
                for descriptor in (requests.detach(), child_ended, wakeup, status, *statuses.values()):
                    os.close(descriptor)
                _become(stderr, {**variables, SUPERVISOR_VARIABLE: str(server)})
                return list(arguments)
            os.close(stderr)
            statuses[process] = status
            _write(status, process)
    return None


def _become(stderr: int, variables: Mapping[str, str]) -> None:
    """Make this copy of the server what a new process would be."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(stderr, 2)
    os.close(stderr)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # not /dev/null's
    os.environ.update(variables)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # as `random` does after a fork: else own code draws the same in all of them


def _report_ended(statuses: dict[int, int]) -> None:
    while statuses:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        if (descriptor := statuses.pop(process, None)) is not None:  # None: an import has started it
            _write(descriptor, os.waitstatus_to_exitcode(status))
            os.close(descriptor)


def _write(descriptor: int, number: int) -> None:
    with suppress(BrokenPipeError):  # the launcher has ended
        os.write(descriptor, NUMBER.pack(number))


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with no_garbage_search():
        for name in IMPORTED:
            with suppress(Exception):  # the processes fail at the same, and say why
                importlib.import_module(name)
        gc.freeze()  # else the first search in each process would write to, and so copy, all of this memory
    arguments = serve(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]))
    if arguments is None:
        os._exit(0)  # the interpreter's own end takes 0.3 s, in which workers would not notice
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # what has come since the fork comes now
    sys.argv, code = ["study", *arguments], 1
    try:
        runpy.run_module("study", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = int(ended.code or 0)
    _exit(code)


def _exit(code: int) -> None:
    """As the interpreter ends, but without taking its modules apart: with torch that takes 0.25 s."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
