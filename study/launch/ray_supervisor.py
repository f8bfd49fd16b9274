"""What runs on a Ray cluster: a task a worker, and the crew, an actor that asks Ray for them and outlives its launcher.

A task starts our ordinary `study worker` as a process on its node and passes signals on to it. Ray places the task, and
places it again when its node is lost; who works on which trial is the database's business, as everywhere.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from pydantic import SecretStr
from ray.exceptions import RayError, TaskCancelledError
from sqlalchemy.exc import DBAPIError

from storage.engine import open_storage
from storage.errors import UserError
from storage.optuna_internals import study_id_of
from storage.stop_requests import reason_to_stop
from study.create import load_study
from study.exit_codes import BAD_INPUT, DATABASE_UNAVAILABLE, INTERRUPTED
from study.launch.local import MOST_DEATHS_IN_A_ROW, Worker, end
from study.training.energy import SHARE

POLL_SECONDS = 0.5
LINGER_SECONDS = 30.0
"""How long a crew whose work is over tells so to those who ask."""
LONG_LIFE_SECONDS = 60.0
"""A worker that died after this long was not broken from the start: its place is not given up for it."""


@dataclass(frozen=True)
class Job:
    """What each worker is told. The URL may hold a password: Ray shows names and environments, but no arguments."""

    name: str
    storage_url: SecretStr
    data_root: str | None
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Order:
    """How many workers, and what each needs."""

    workers: int | None
    """None: as many as fit, also when the cluster grows."""
    gpus: float
    cpus: float
    device: str

    def room(self, nodes: list[dict[str, Any]]) -> int:
        """How many such workers these nodes hold when nothing else runs there."""
        needs = {name: need for name, need in (("GPU", self.gpus), ("CPU", self.cpus)) if need}
        return sum(
            min(int(node["Resources"].get(name, 0) / need + 1e-9) for name, need in needs.items())
            for node in nodes
            if node["Alive"]
        )


@dataclass(frozen=True)
class Ended:
    """How a worker ended."""

    code: int
    seconds: float
    host: str
    why: str
    node: str = ""
    """Ray's id of it."""


@dataclass
class Place:
    """A worker that the crew has asked for, running or waiting for resources."""

    task: Any
    deaths: int = 0
    leaving: bool = False
    """It was asked to end, once: another interruption would cut its last words short."""


@dataclass(frozen=True)
class News:
    """What a crew tells its launcher."""

    notes: list[str]
    code: int | None
    """The exit code, once all workers have ended."""
    why: str = ""


def work(job: Job, device: str, gpus: float) -> Ended:
    """One worker for as long as it lives, on whichever node Ray chose."""
    started = time.monotonic()
    more = {**job.environment, SHARE: str(gpus or 1.0)}
    worker = Worker(job.name, job.storage_url.get_secret_value(), device, job.data_root, _log, more)
    try:
        while (code := worker.poll()) is None:
            time.sleep(POLL_SECONDS)
    finally:  # a cancelled task is interrupted, one whose node is shut down gets SIGTERM
        end([worker])
    why = _reason_to_stop(job) if code == INTERRUPTED else worker.why()
    node = ray.get_runtime_context().get_node_id()
    return Ended(code, time.monotonic() - started, socket.gethostname(), why, node)


def _reason_to_stop(job: Job) -> str:
    """Of the whole study; empty: only this worker was asked to stop, as when its node is to be shut down."""
    try:
        storage = open_storage(job.storage_url.get_secret_value(), create=False)
        return reason_to_stop(storage.engine, study_id_of(load_study(storage, job.name)[0])) or ""
    except (UserError, DBAPIError):
        return ""


def _log(line: str) -> None:
    """Into the task's log, which Ray keeps."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class RaySupervisor:
    """The workers of one study."""

    def __init__(self, job: Job, order: Order) -> None:
        self.job, self.order = job, order
        self.places: list[Place] = []
        self.notes: list[str] = []
        self.lock = threading.Lock()
        self._open()
        threading.Thread(target=self._run, daemon=True).start()

    def _open(self) -> None:
        self.closing, self.retired, self.why = False, 0, ""
        self.codes: set[int] = set()
        self.unfit: set[str] = set()
        """Nodes on which a worker refused to work."""

    def take(self, job: Job, order: Order) -> None:
        """Change the number of workers, or what those need and are told that start from now on; begin anew if all have
        ended.
        """
        with self.lock:
            self.job, self.order = job, order
            self._open()

    def stop(self) -> None:
        """Ask all workers to give their trials back and end."""
        with self.lock:
            self.codes.add(INTERRUPTED)
            self._close()

    def news(self, after: int) -> News:
        """Args: after: how many notes were told already."""
        with self.lock:
            over = not self.places and (self.closing or self.retired >= self._wanted())
            return News(self.notes[after:], self._code() if over else None, self.why)

    def _code(self) -> int:
        for code in (0, INTERRUPTED, DATABASE_UNAVAILABLE):
            if code in self.codes:
                return code
        return BAD_INPUT if self.why else INTERRUPTED

    def _wanted(self) -> int:
        return self.order.workers or max(1, self.order.room(self._fit()))

    def _fit(self) -> list[dict[str, Any]]:
        return [node for node in ray.nodes() if node["NodeID"] not in self.unfit]

    def _run(self) -> None:
        idle = 0.0
        while idle < LINGER_SECONDS:
            time.sleep(POLL_SECONDS)
            with self.lock:
                try:
                    self._tend()
                except Exception as error:  # noqa: BLE001 — who watches over workers must not end before them
                    told = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                    if told not in self.notes:
                        self.notes.append(told)
                idle = 0.0 if self.places else idle + POLL_SECONDS
        ray.kill(ray.get_runtime_context().current_actor)

    def _tend(self) -> None:
        for place in list(self.places):
            if ray.wait([place.task], timeout=0)[0]:
                self.places.remove(place)
                self._hear(place)
        if self.closing:
            return
        staying = [place for place in self.places if not place.leaving]
        missing = self._wanted() - self.retired - len(staying)
        self.places += [Place(self._start()) for _ in range(missing)]
        if self.order.workers is not None:
            _dismiss(staying[self.order.workers :])

    def _start(self) -> Any:
        # Without end: Ray counts lost nodes here, and a place that is given up is our decision.
        elsewhere = {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(self.unfit))})"}} if self.unfit else {}
        task = ray.remote(work).options(
            name=f"study worker {self.job.name}",
            num_gpus=self.order.gpus,
            num_cpus=self.order.cpus,
            max_retries=-1,
            **elsewhere,
        )
        return task.remote(self.job, self.order.device, self.order.gpus)

    def _hear(self, place: Place) -> None:
        """A worker has ended: the study's end, this worker's alone, or one to start again wherever there is room."""
        try:
            ended: Ended = ray.get(place.task)
        except TaskCancelledError:
            return
        except RayError as error:  # our code could not even start there
            ended = Ended(1, 0.0, "the cluster", str(error).strip().splitlines()[-1])
        if ended.code == INTERRUPTED and not ended.why:
            ended = replace(ended, why="it was asked to stop, but not the study")
        elif (
            ended.code == BAD_INPUT
        ):  # it may be this node's fault: another goes on elsewhere, if there is such a place
            self.unfit.add(ended.node)
            self.why, note = ended.why, f"a worker on {ended.host} refuses: {ended.why}"
            if note not in self.notes:
                self.notes.append(note)
            if not self.order.room(self._fit()):
                self._close()
            return
        elif ended.code in (0, INTERRUPTED, DATABASE_UNAVAILABLE):
            self.codes.add(ended.code)
            self.retired += 1
            if ended.code == INTERRUPTED and not self.closing:
                self.notes.append(ended.why)
            if ended.code != DATABASE_UNAVAILABLE:
                self._close()
            return
        if place.leaving:
            return
        place.deaths = 1 if ended.seconds > LONG_LIFE_SECONDS else place.deaths + 1
        if place.deaths <= MOST_DEATHS_IN_A_ROW:
            self.notes.append(f"a worker on {ended.host} ended (exit code {ended.code}): {ended.why}; starting another")
            self.places.append(Place(self._start(), place.deaths))
            return
        self.notes.append(f"{place.deaths} workers in a row died in one place, the last on {ended.host}: {ended.why}")
        self.retired += 1
        self.why = self.notes[-1]

    def _close(self) -> None:
        self.closing = True
        _dismiss(self.places)


def _dismiss(places: list[Place]) -> None:
    """Those that run get a signal and pass it on; those that wait for resources are gone."""
    for place in places:
        if not place.leaving:
            place.leaving = True
            ray.cancel(place.task)
