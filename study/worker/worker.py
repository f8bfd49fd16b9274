"""One process on one device: claim a trial, train it, settle it, until nothing is left."""

from __future__ import annotations

import hashlib
import os
import sys
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
from storage.errors import Unreachable, UserError
from storage.optuna_internals import study_id_of
from storage.queue import LeaseLost, Queue
from storage.retry import PATIENCE_SECONDS, is_transient, retry
from storage.url import parse, redact
from study.config.models import StudyConfig
from study.create import check_fingerprint, load_study
from study.search.pruners import make_pruner
from study.training.data import dataset, sources
from study.training.data.placement import DeviceData
from study.training.data.split import split_dataset
from study.training.device import be_deterministic, keep_freed_memory, pick_device
from study.training.energy import EnergyMeter, gpu_share
from study.trial import metadata
from study.trial.runner import DatabaseUnavailable, run_trial
from study.worker.stop_monitor import Stop, launcher_gone, supervisor

WAIT_SECONDS = 2.0
MOST_ERRORS_IN_A_ROW = 2
DATABASE_ERRORS = (DBAPIError, optuna.exceptions.StorageInternalError, DatabaseUnavailable)


class WorkerBroken(Exception):
    """Attempt after attempt failed in this process: it may be the process or its device, so another goes on."""


def say(text: str) -> None:
    with suppress(OSError):  # whoever listened may be gone; the trial must still be given back
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def work(name: str, storage_url: str, device_name: str, data_root: str | None, *, wait: bool = True) -> bool:
    """Work on the study `name` until nothing is left to do, or a signal asks to stop.

    Returns:
        Whether the study is settled.

    Raises:
        UserError: no such study, a device that is not there, or data other than the study's.
        DataError: the data cannot be used.
    """
    stop = Stop(launcher_gone())
    stop.on_signals()
    storage, study, config = _join(storage_url, name, stop)
    read_ahead(study, config)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    be_deterministic(config.training.deterministic)
    keep_freed_memory()
    try:
        device = pick_device(device_name)
    except ValueError as error:
        raise UserError(str(error)) from None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # else a part of the first GPU's memory goes to each worker of the others
    data = retry(lambda: load_data(study, config, data_root, device), stopping=stop)
    study.pruner = make_pruner(config, len(data.train_labels))
    queue = Queue(
        storage.engine,
        study_id_of(study),
        seconds=config.lease.seconds,
        max_attempts=config.lease.max_attempts,
        device=metadata.device_name(device),
        share=gpu_share(),
        stopping=stop,
    )
    if "kWh" in stop_requests.read_controls(storage.engine, study_id_of(study)).budgets:
        check_energy([str(device)])
    stop.watch(storage.engine, study_id_of(study))
    aside = _aside(storage_url, study)
    errors = 0
    try:
        while not stop():
            lease = queue.claim()
            if lease is None:
                left = queue.unfinished()
                if left == 0 or not wait:
                    return left == 0
                _pause(WAIT_SECONDS, stop)  # others are at work; one of them may die
                continue
            try:
                with queue.renewing(lease):
                    run_trial(study, config, data, queue, lease, stop, say, aside)
                errors = 0
            except LeaseLost as lost:
                say(f"{lost}; this worker drops it")
            except DATABASE_ERRORS:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                say(f"trial {lease.number}: attempt failed: {reason}")
                errors += 1
                # A device in error stays so for this process: its next trials must not pay for it.
                broken = device.type == "cuda" and "CUDA" in reason
                queue.release(lease, error=reason)
                if broken or errors >= MOST_ERRORS_IN_A_ROW:
                    raise WorkerBroken(f"this worker gives up after: {reason}") from error
        if stop.reason:
            say(f"{stop.reason}; {stop_requests.how_to_resume(name, stop.reason)}")
        return queue.unfinished() == 0
    except DATABASE_ERRORS as error:
        if stop():
            return False
        if not isinstance(error, DatabaseUnavailable) and not is_transient(error):
            raise
        raise DatabaseUnavailable(
            f"the database was away for over {PATIENCE_SECONDS:.0f} s; unsaved checkpoints are kept in {aside} "
            f"and taken up when this machine works on {name!r} again"
        ) from error


def _join(storage_url: str, name: str, stop: Stop) -> tuple[RDBStorage, optuna.Study, StudyConfig]:
    """The study. A launcher's worker waits for a database that is away when it starts; a person is told at once."""
    deadline = time.monotonic() + (PATIENCE_SECONDS if supervisor() else 0.0)
    while True:
        try:
            storage = open_storage(storage_url, create=False)
            return storage, *load_study(storage, name)
        except (Unreachable, *DATABASE_ERRORS):
            if stop() or time.monotonic() >= deadline:
                raise
            _pause(1.0, stop)


def read_ahead(study: optuna.Study, config: StudyConfig) -> None:
    """Read what the sampler will ask of the study's past, in a thread: the data load meanwhile."""
    if config.search.sampler.kind in ("grid", "random"):
        return

    def read() -> None:
        with suppress(*DATABASE_ERRORS):  # then who asks first reads it
            study.get_trials(deepcopy=False)

    threading.Thread(target=read, name="ahead", daemon=True).start()


def _aside(storage_url: str, study: optuna.Study) -> Path:
    """The folder on this machine for what the database could not take of this study, and of no other of its name."""
    what = f"{redact(parse(storage_url))} {study.study_name} {study.user_attrs['config']}"
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    return dataset.cache_dir() / "unsaved" / key


def load_data(study: optuna.Study, config: StudyConfig, root: str | None, device: torch.device) -> DeviceData:
    dataset = sources.load(config.data.name, root, say)
    check_fingerprint(study, dataset)
    part = config.data
    split = split_dataset(dataset, part.protocol, holdout=part.holdout, train_images=part.train_images)
    return DeviceData.of(split, device, test=part.test)


def _pause(seconds: float, stop: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stop():
        time.sleep(0.1)


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
