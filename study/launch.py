"""The workers of this machine: one process a device, watched, replaced when they die, ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sqlalchemy.exc import DBAPIError

from storage import progress, queue
from storage.connect import open_storage
from storage.errors import UserError
from study import space
from study.config import StudyConfig
from study.plan import load_study
from study.training.energy import SHARE, EnergyMeter

SUPERVISED = "STUDY_SUPERVISED"
"""In the environment of a launcher's workers: its process id. They end when it does."""
REFUSED = 2
"""A worker's exit code when the input is bad, as its last line says."""
STOPPED = 130
"""A worker's exit code when it was asked to stop."""
AWAY = 75
"""A worker's exit code when the database was away for too long."""
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C, and what Slurm and spot instances send."""
POLL_SECONDS = 0.5
REFRESH_SECONDS = 30.0
GRACE_SECONDS = 10.0
MOST_DEATHS_IN_A_ROW = 5
MOST_WORKERS_A_CORE = 16


def devices_here(wanted: str, workers: int | None) -> list[str]:
    """One device a worker: all CUDA devices for `auto` and `cuda` (CUDA_VISIBLE_DEVICES counts), else the one there is.

    Raises:
        UserError: a device that this machine does not have.
    """
    most = MOST_WORKERS_A_CORE * (os.cpu_count() or 1)
    if (workers or 1) > most:
        raise UserError(f"--workers must be at most {most} here ({MOST_WORKERS_A_CORE} a core), got {workers}")
    if wanted == "cpu":
        return ["cpu"] * (workers or 1)
    from study.training.device import pick_device  # 3 s, so only where torch is asked

    try:
        device = pick_device(wanted)
    except ValueError as error:
        raise UserError(str(error)) from None
    if device.type == "cuda" and device.index is None:
        import torch

        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    else:
        found = [str(device)]
    return [found[i % len(found)] for i in range(workers or len(found))]


def check_energy(devices: Iterable[str]) -> None:
    """Raises:
    UserError: a device that does not tell what energy it consumes.
    """
    import torch

    for device in set(devices):
        if EnergyMeter(torch.device(device)).joules() is None:
            raise UserError(
                f"a budget in kWh needs devices that tell their energy; {device} does not: use another unit"
            )


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
        environment = os.environ | {"STUDY_STORAGE": storage_url, SUPERVISED: str(os.getpid()), **(more or {})}
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


class Fleet:
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
            if code == REFUSED:
                raise UserError(worker.why())
            if code in (0, STOPPED, AWAY):
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
    """Work on a study with this machine's devices until it is settled (0), or its database was away too long (AWAY).

    Args:
        refresh: called when something has changed, at most every REFRESH_SECONDS and for at most 1 % of the time.

    Raises:
        UserError: the study or the data are not to be had.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the workers have given their trials back.
    """
    storage = open_storage(storage_url, create=False, reading=True)
    study, config = load_study(storage, name)
    display = Display(console, storage, study, config, refresh)
    if display.settled:
        return 0
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    fleet = Fleet(name, storage_url, devices, data_root, console)
    try:
        with display.bars:
            while fleet.tend():
                with unless_away():
                    if display.update():
                        fleet.deaths = 0
                    display.refresh_when_due()
                time.sleep(POLL_SECONDS)
            if AWAY in fleet.ended:
                return AWAY
            with unless_away():
                display.update()
            if STOPPED in fleet.ended:  # by somebody who signalled the workers, not us
                raise KeyboardInterrupt
            return 0
    finally:
        fleet.stop()


@contextmanager
def unless_away() -> Iterator[None]:
    """Watching waits for the database like everybody else; only it has nothing to keep."""
    try:
        yield
    except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
        if not queue.passing(error):
            raise


class Display:
    """How far a study is: progress bars on a terminal, and everywhere a line for each trial that is settled."""

    def __init__(
        self,
        console: Console,
        storage: RDBStorage,
        study: optuna.Study,
        config: StudyConfig,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage, self.study = storage, study
        self.refresh, self.due = refresh, time.monotonic() + REFRESH_SECONDS
        self.by_images = config.training.images is not None
        self.whole = config.training.images or space.most_epochs(config)
        """A trial's length, in images or epochs."""
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            # Work is uneven (pruned trials end early), so the estimate looks far back.
            speed_estimate_period=600,
        )
        self.console = console
        now = progress.progress(storage.engine, study._study_id)
        self.told = {trial.number for trial in self._finished()}
        self.settled = now.settled == now.total
        total = now.total * self.whole
        self.total = self.bars.add_task(study.study_name, total=total, completed=self._done(now), note="")
        self.trials: dict[int, TaskID] = {}
        self.changed = True
        """Whether there is anything new since somebody last said False."""
        self._last = now

    def _done(self, now: progress.Progress) -> int:
        return now.settled * self.whole + (now.images if self.by_images else now.epochs)

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=queue.FINISHED)

    def refresh_when_due(self) -> None:
        if self.changed and time.monotonic() >= self.due:
            started = time.monotonic()
            self.refresh()
            took = time.monotonic() - started
            self.due, self.changed = started + max(REFRESH_SECONDS, 100 * took), False

    def update(self) -> bool:
        """Show what is new; whether a trial was completed or pruned since the last call."""
        now = progress.progress(self.storage.engine, self.study._study_id)
        self.changed = self.changed or (now.settled, now.epochs) != (self._last.settled, self._last.epochs)
        self._last = now
        best = f", best {now.best:.4f}" if now.best is not None else ""
        note = f"{now.settled}/{now.total} trials{best}"
        self.bars.update(self.total, completed=self._done(now), note=note)
        running = {trial.number: trial for trial in now.running}
        for number in self.trials.keys() - running.keys():
            self.bars.remove_task(self.trials.pop(number))
        for number, trial in running.items():
            if number not in self.trials:
                self.trials[number] = self.bars.add_task(f"  trial {number}", total=self.whole, note="")
            note = f"epoch {trial.epoch}" + (f", best {trial.accuracy:.4f}" if trial.accuracy is not None else "")
            self.bars.update(self.trials[number], completed=trial.images if self.by_images else trial.epoch, note=note)
        if now.settled == len(self.told):
            return False
        good = False
        for done in self._finished():
            if done.number not in self.told:
                self.told.add(done.number)
                good = good or done.state != TrialState.FAIL
                self.console.print(_line(done, now.total), highlight=False, markup=False, soft_wrap=True)
        return good


def _line(trial: FrozenTrial, total: int) -> str:
    state = progress.STATE_NAMES[trial.state]
    chosen = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in trial.params.items()
    ]
    what = ", ".join(chosen) or f"seed {trial.user_attrs.get('seed')}"
    start = f"trial {trial.number:>{len(str(total - 1))}} {state:<8} {what}"
    if trial.value is None:
        return f"{start}: {trial.user_attrs.get('error', 'no value')}"
    attributes = trial.user_attrs
    return (
        f"{start}: accuracy {trial.value:.4f} (epoch {attributes['best_epoch']} of {attributes['epochs']}, "
        f"{attributes['train_seconds'] + attributes['validation_seconds']:.1f} s)"
    )
