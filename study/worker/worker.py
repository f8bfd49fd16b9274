"""One worker process on one device: claim a trial, run it, repeat until nothing is left."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import optuna
import torch
from optuna.storages import RDBStorage
from sqlalchemy.exc import DBAPIError

from storage import stop_requests
from storage.engine import open_storage
from storage.errors import Unreachable, Unreadable, UserError
from storage.optuna_internals import study_id_of
from storage.queue import LeaseLost, Queue
from storage.retry import PATIENCE_SECONDS, is_transient, retry
from storage.text import one_line
from storage.transfer import COPIED_TO
from storage.url import parse, redact
from study.config import extensions
from study.config.models import StudyConfig
from study.create import check_code, check_fingerprint, load_images, load_study
from study.exit_codes import OK
from study.search.pruners import make_pruner
from study.training.data import dataset
from study.training.data.placement import DeviceData
from study.training.data.split import split_dataset
from study.training.device import be_deterministic, keep_freed_memory, pick_device
from study.training.energy import EnergyMeter, gpu_share
from study.trial.metadata import device_name
from study.trial.runner import DatabaseUnavailable, run_trial
from study.worker.stop_monitor import StopMonitor
from study.worker.supervisor import launcher_ended, supervisor_pid

logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.1, 2.0
"""Between two looks for a trial while others hold all that are left, at least and at most; between them a quarter of
the time waited so far."""
MOST_ERRORS_IN_A_ROW = 2
MOST_SAME_ERRORS = 12
"""Attempts in a row that end with the same error at the same line of own code: as many as it took two workers to end a
launch, by dying six times, before such a worker was kept."""
DATABASE_ERRORS = (DBAPIError, optuna.exceptions.StorageInternalError, DatabaseUnavailable)


class WorkerBroken(Exception):
    """Attempt after attempt failed in this process: it may be the process or its device, so another replaces it."""


def work(name: str, storage_url: str, device_spec: str, data_root: str | None, *, wait: bool = True) -> int:
    """Work on the study `name` until nothing is left to do, or until the worker is to stop.

    Args:
        wait: while others hold the trials that are left, in case they end without finishing them.

    Returns:
        The exit code: OK, STOPPED, BUDGET_SPENT or INTERRUPTED.

    Raises:
        UserError: no such study, a device that is not there, or data other than the study's.
        DataError: the data cannot be used.
        DatabaseUnavailable: for too long.
    """
    stop = StopMonitor(launcher_ended())
    stop.handle_signals()
    try:
        storage, study, config = _join(storage_url, name, stop)
    except DatabaseUnavailable:
        if stop():
            return stop.exit_code
        raise
    if copy := study.user_attrs.get(COPIED_TO):
        raise UserError(f"the study {name!r} was copied (to {copy}); work on the copy, or first: study resume --force")
    preload_trials(study, config)
    device = _prepare_device(device_spec, config)
    data = retry(lambda: load_data(study, config, data_root, device), stopping=stop)
    study.pruner = make_pruner(config, len(data.train_labels))
    queue = Queue(
        storage.engine,
        study_id_of(study),
        seconds=config.lease.seconds,
        max_attempts=config.lease.max_attempts,
        device=device_name(device),
        share=gpu_share(),
        store=config.checkpoint.store,
        stopping=stop,
    )
    if "kWh" in stop_requests.read_controls(storage.engine, study_id_of(study)).budgets:
        check_energy([str(device)])
    stop.watch(storage.engine, study_id_of(study))
    fallback_folder = _fallback_folder(storage_url, study)
    try:
        finished = _work_through(study, config, data, queue, stop, fallback_folder, wait=wait)
    except DATABASE_ERRORS as error:
        if stop():
            return stop.exit_code
        if not isinstance(error, DatabaseUnavailable) and not is_transient(error):
            raise
        raise DatabaseUnavailable(
            f"the database was unavailable for over {PATIENCE_SECONDS:.0f} s; checkpoints that it lacks are in "
            f"{fallback_folder} and are used when this machine works on {name!r} again"
        ) from error
    return OK if finished or not stop() else stop.exit_code


class _Failures:
    """The attempts in a row that failed in this process, and whose fault that is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.forget()

    def forget(self) -> None:
        """An attempt has not failed."""
        self._errors, self._own_error, self._same = 0, "", 0

    def add(self, reason: str, *, in_own_code: bool) -> None:
        """Raises:
        WorkerBroken: it may be this process's: another is to take its place.
        UserError: own code fails at the same line again and again.
        """
        # Own code that raises the same again does so in any process: another would be no better.
        again = reason == self._own_error
        self._errors, self._same = (1, self._same + 1) if again else (self._errors + 1, 1)
        self._own_error = reason if in_own_code else ""
        # A device in error stays so for this process: its next trials must not pay for it.
        if self._errors >= MOST_ERRORS_IN_A_ROW or (self._device.type == "cuda" and "CUDA" in reason):
            raise WorkerBroken(f"this worker gives up after: {reason}")
        if again and self._same >= MOST_SAME_ERRORS:
            raise UserError(
                f"{self._same} attempts in a row failed at the same line of own code: {reason}; correct it, then resume"
            )


def _work_through(
    study: optuna.Study,
    config: StudyConfig,
    data: DeviceData,
    queue: Queue,
    stop: StopMonitor,
    fallback_folder: Path,
    *,
    wait: bool,
) -> bool:
    """Claim and run trials; whether all of the study's have finished.

    Raises:
        WorkerBroken: errors that may be this process's fault.
        UserError: own code that fails again and again, or a stored value that cannot be read.
    """
    failures, waited = _Failures(data.device), 0.0
    while not stop():
        lease = queue.claim()
        if lease is None:
            left = queue.unfinished()
            if left == 0 or not wait:
                return left == 0
            pause = min(max(waited / 4, WAIT_SECONDS[0]), WAIT_SECONDS[1])
            _pause(pause, stop)
            waited += pause
            continue
        waited = 0.0
        try:
            with queue.renewing(lease):
                run_trial(study, config, data, queue, lease, stop, fallback_folder)
            failures.forget()
            stop.check(with_budgets=False)  # of a study that ends with this trial no other is begun
        except LeaseLost as lost:
            logger.warning("%s; this worker drops it", lost)
        except DATABASE_ERRORS:
            raise
        except Unreadable:  # another trial's, for the sampler: not this one's fault, nor this process's
            queue.release(lease)
            raise
        except Exception as error:
            place = extensions.place_of(error)
            reason = f"{type(error).__name__}: {error}{place}"
            logger.warning("trial %d: attempt failed: %s", lease.number, reason)
            logger.debug("the traceback of trial %d", lease.number, exc_info=True)
            queue.release(lease, error=reason)
            failures.add(reason, in_own_code=bool(place))
    if stop.reason:
        logger.info(stop.reason)
    return queue.unfinished() == 0


def _join(storage_url: str, name: str, stop: StopMonitor) -> tuple[RDBStorage, optuna.Study, StudyConfig]:
    """The study. A launcher's worker waits for a database that is unavailable when it starts: the launcher had it open.
    A person's worker fails at once, because the URL may be wrong.

    Raises:
        UserError: no such database or study; a person's worker cannot connect.
        DatabaseUnavailable: a launcher's worker could not connect for too long, or is to stop.
    """
    supervised = supervisor_pid() != 0
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            storage = open_storage(storage_url, create=False)
            return storage, *load_study(storage, name, lean=True)
        except (Unreachable, *DATABASE_ERRORS) as error:
            if not supervised or not (isinstance(error, Unreachable) or is_transient(error)):
                raise
            if stop() or time.monotonic() >= deadline:
                waited = f"the database was unavailable for over {PATIENCE_SECONDS:.0f} s"
                raise DatabaseUnavailable(f"{waited}: {one_line(str(error))}") from error
            _pause(1.0, stop)


def _prepare_device(spec: str, config: StudyConfig) -> torch.device:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    be_deterministic(config.training.deterministic)
    keep_freed_memory()
    try:
        device = pick_device(spec)
    except ValueError as error:
        raise UserError(str(error)) from None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # else a part of the first GPU's memory goes to each worker of the others
    return device


def preload_trials(study: optuna.Study, config: StudyConfig) -> None:
    """Read the study's past trials for the sampler in a thread, while the data load."""
    if config.search.sampler.kind in ("grid", "random"):
        return

    def read() -> None:
        with suppress(*DATABASE_ERRORS, Unreadable):  # then the sampler reads them
            study.get_trials(deepcopy=False)

    threading.Thread(target=read, name="preload-trials", daemon=True).start()


def _fallback_folder(storage_url: str, study: optuna.Study) -> Path:
    """The folder on this machine for checkpoints of this very study that its database could not take."""
    url = redact(parse(storage_url)).replace("postgresql://", "postgresql+psycopg://", 1)  # as in earlier versions
    identity = f"{url} {study.study_name} {study.user_attrs.get('uid')}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return dataset.cache_dir() / "unsaved" / key


def load_data(study: optuna.Study, config: StudyConfig, root: str | None, device: torch.device) -> DeviceData:
    """The study's images on the device.

    Raises:
        UserError, DataError: they are not here, or not the study's.
    """
    check_code(study, config)
    images = load_images(config, root)
    check_fingerprint(study, images)
    options = config.data
    split = split_dataset(images, options.protocol, holdout=options.holdout, train_images=options.train_images)
    return DeviceData.from_split(split, device, test=options.test, placement=options.placement)


def check_energy(devices: Iterable[str]) -> None:
    """Raises:
    UserError: a device that does not report the energy it consumes.
    """
    for device in set(devices):
        if EnergyMeter(torch.device(device)).joules() is None:
            raise UserError(
                f"a budget in kWh needs devices that report their energy; {device} does not: use another unit"
            )


def _pause(seconds: float, stop: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stop():
        time.sleep(0.1)
