"""What runs on a Ray cluster: a task a worker, and an actor that asks Ray for them and outlives its launcher.

A task starts our ordinary `study worker` as a process on its node and passes signals on to it. Ray places the task, and
places it again when its node is lost; the leases in the database decide who works on which trial, as everywhere. The
supervisor is an actor and not the launcher itself, so that a launcher can die, be detached, or come back from another
machine and attach (`docs/guides/machines.md`); `ray job submit` would need the cluster's dashboard and cannot be
resized.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from pydantic import SecretStr
from ray.exceptions import RayError, TaskCancelledError

from study import logs
from study.exit_codes import BAD_INPUT, BUDGET_SPENT, DATABASE_UNAVAILABLE, INTERRUPTED, OK, STOPPED
from study.launchers.local import MOST_DEATHS_IN_A_ROW, WorkerProcess, stop_workers
from study.training.energy import SHARE

POLL_SECONDS = 0.5
LINGER_SECONDS = 30.0
"""How long a supervisor whose work is over still answers its launchers."""
LONG_LIFE_SECONDS = 60.0
"""A worker that died after this long was not broken from the start: its slot is not given up for it."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What each worker is started with. Ray's pages show the names and environments of tasks, not the arguments of
    their functions: the URL, which may hold a password, is such an argument.
    """

    name: str
    storage_url: SecretStr
    data_root: str | None
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class WorkerRequest:
    """How many workers, and what each needs."""

    workers: int | None
    """None: as many as fit, also when the cluster grows."""
    gpus: float
    cpus: float
    device: str
    threads: int | None = None

    def room(self, nodes: list[dict[str, Any]]) -> int:
        """How many such workers these nodes hold when nothing else runs there."""
        needs = {name: need for name, need in (("GPU", self.gpus), ("CPU", self.cpus)) if need}
        return sum(
            min(int(node["Resources"].get(name, 0) / need + 1e-9) for name, need in needs.items())
            for node in nodes
            if node["Alive"]
        )


@dataclass(frozen=True, kw_only=True)
class WorkerExit:
    """How a worker ended."""

    code: int
    seconds: float
    """That it ran."""
    host: str
    reason: str
    node: str = ""
    """Ray's id of the node."""


@dataclass
class Slot:
    """A worker that the supervisor has asked for, running or waiting for resources."""

    task: Any
    deaths: int = 0
    leaving: bool = False
    """It was asked to end, once: another interruption would cut its release short."""


@dataclass(frozen=True)
class SupervisorStatus:
    """What a supervisor reports to its launcher."""

    notes: list[str]
    code: int | None
    """The exit code, once all workers have ended."""
    reason: str = ""


def work(job: WorkerJob, request: WorkerRequest) -> WorkerExit:
    """One worker for as long as it runs, on whichever node Ray chose."""
    logs.configure()  # the worker's lines go into the task's log, which Ray keeps
    started = time.monotonic()
    environment = {**job.environment, SHARE: str(request.gpus or 1.0)}
    if request.threads is not None:
        environment["OMP_NUM_THREADS"] = str(request.threads)
    worker = WorkerProcess(job.name, job.storage_url.get_secret_value(), request.device, job.data_root, environment)
    try:
        while (code := worker.poll()) is None:
            time.sleep(POLL_SECONDS)
    finally:  # a cancelled task is interrupted, one whose node is shut down gets SIGTERM
        stop_workers([worker])
    return WorkerExit(
        code=code,
        seconds=time.monotonic() - started,
        host=socket.gethostname(),
        reason=worker.reason(),
        node=ray.get_runtime_context().get_node_id(),
    )


class RaySupervisor:
    """The workers of one study; an actor."""

    def __init__(self, job: WorkerJob, request: WorkerRequest) -> None:
        self.job, self.request = job, request
        self.slots: list[Slot] = []
        self.notes: list[str] = []
        self.lock = threading.Lock()
        self._reset()
        threading.Thread(target=self._run, daemon=True).start()

    def _reset(self) -> None:
        self.closing, self.retired, self.reason = False, 0, ""
        self.codes: set[int] = set()
        self.unfit: set[str] = set()
        """Nodes on which a worker refused to work."""

    def update(self, job: WorkerJob, request: WorkerRequest) -> None:
        """Change the number of workers, or what those that start from now on need; begin anew if all have ended."""
        with self.lock:
            self.job, self.request = job, request
            self._reset()

    def stop(self) -> None:
        """Ask all workers to release their trials and end."""
        with self.lock:
            self.codes.add(INTERRUPTED)
            self._close()

    def status(self, notes_read: int) -> SupervisorStatus:
        """What is new after the first `notes_read` notes."""
        with self.lock:
            over = not self.slots and (self.closing or self.retired >= self._wanted())
            return SupervisorStatus(self.notes[notes_read:], self._code() if over else None, self.reason)

    def _code(self) -> int:
        for code in (OK, STOPPED, BUDGET_SPENT, INTERRUPTED, DATABASE_UNAVAILABLE):
            if code in self.codes:
                return code
        return BAD_INPUT if self.reason else INTERRUPTED

    def _wanted(self) -> int:
        return self.request.workers or max(1, self.request.room(self._fit_nodes()))

    def _fit_nodes(self) -> list[dict[str, Any]]:
        return [node for node in ray.nodes() if node["NodeID"] not in self.unfit]

    def _run(self) -> None:
        idle = 0.0
        while idle < LINGER_SECONDS:
            time.sleep(POLL_SECONDS)
            with self.lock:
                try:
                    self._poll()
                except Exception as error:  # noqa: BLE001 — a supervisor must not end before its workers
                    lines = str(error).strip().splitlines()
                    note = f"{type(error).__name__}: {lines[0] if lines else ''}"
                    if note not in self.notes:
                        self.notes.append(note)
                idle = 0.0 if self.slots else idle + POLL_SECONDS
        ray.kill(ray.get_runtime_context().current_actor)

    def _poll(self) -> None:
        for slot in list(self.slots):
            if ray.wait([slot.task], timeout=0)[0]:
                self.slots.remove(slot)
                self._handle_exit(slot)
        if self.closing:
            return
        staying = [slot for slot in self.slots if not slot.leaving]
        missing = self._wanted() - self.retired - len(staying)
        self.slots += [Slot(self._start()) for _ in range(missing)]
        if self.request.workers is not None:
            _dismiss(staying[self.request.workers :])

    def _start(self) -> Any:
        # Without a limit on retries: Ray counts lost nodes there, and whether to give up a slot is decided here.
        elsewhere = {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(self.unfit))})"}} if self.unfit else {}
        task = ray.remote(work).options(
            name=f"study worker {self.job.name}",
            num_gpus=self.request.gpus,
            num_cpus=self.request.cpus,
            max_retries=-1,
            **elsewhere,
        )
        return task.remote(self.job, self.request)

    def _handle_exit(self, slot: Slot) -> None:
        """A worker has ended: with the study, alone, or it is replaced wherever there is room."""
        try:
            ended: WorkerExit = ray.get(slot.task)
        except TaskCancelledError:
            return
        except RayError as error:  # our code could not even start there
            reason = str(error).strip().splitlines()[-1]
            ended = WorkerExit(code=1, seconds=0.0, host="the cluster", reason=reason)
        if ended.code == BAD_INPUT:
            self._handle_refusal(ended)
        elif ended.code in (OK, STOPPED, BUDGET_SPENT):
            self._retire(ended)
            self._close()
        elif ended.code == DATABASE_UNAVAILABLE:
            self._retire(ended)
        elif not slot.leaving:
            self._handle_death(slot, ended)

    def _retire(self, ended: WorkerExit) -> None:
        self.codes.add(ended.code)
        self.retired += 1
        if ended.code in (STOPPED, BUDGET_SPENT) and not self.closing:
            self.notes.append(ended.reason)
        elif ended.code == DATABASE_UNAVAILABLE:
            self.notes.append(f"a worker on {ended.host} ended: {ended.reason}")

    def _handle_refusal(self, ended: WorkerExit) -> None:
        """It may be this node's fault: another worker starts elsewhere, if there is such a place."""
        self.unfit.add(ended.node)
        self.reason = ended.reason
        note = f"a worker on {ended.host} refuses: {ended.reason}"
        if note not in self.notes:
            self.notes.append(note)
        if not self.request.room(self._fit_nodes()):
            self._close()

    def _handle_death(self, slot: Slot, ended: WorkerExit) -> None:
        slot.deaths = 1 if ended.seconds > LONG_LIFE_SECONDS else slot.deaths + 1
        if slot.deaths <= MOST_DEATHS_IN_A_ROW:
            why = "it was asked to stop, but not the study" if ended.code == INTERRUPTED else ended.reason
            self.notes.append(f"a worker on {ended.host} ended (exit code {ended.code}): {why}; starting another")
            self.slots.append(Slot(self._start(), slot.deaths))
            return
        self.notes.append(f"{slot.deaths} workers in a row died in one slot, the last on {ended.host}: {ended.reason}")
        self.retired += 1
        self.reason = self.notes[-1]

    def _close(self) -> None:
        self.closing = True
        _dismiss(self.slots)


def _dismiss(slots: list[Slot]) -> None:
    """Those that run get a signal and pass it on; those that wait for resources are gone."""
    for slot in slots:
        if not slot.leaving:
            slot.leaving = True
            ray.cancel(slot.task)
