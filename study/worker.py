"""One process on one device: claim a trial, train it, settle it, until nothing is left."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import optuna
import torch
from optuna.storages import RDBStorage
from sqlalchemy.exc import DBAPIError

from storage import control
from storage.connect import open_storage
from storage.errors import Unreachable, UserError
from storage.queue import PATIENCE_SECONDS, LeaseLost, Queue, passing, retrying
from storage.url import parse, redact
from study import objective
from study.config import StudyConfig
from study.launch import check_energy
from study.objective import DatabaseAway, run_trial
from study.plan import check_fingerprint, load_study
from study.search import make_pruner
from study.stopping import Stop, launcher_gone, supervisor
from study.training import data as datasets
from study.training.device import be_deterministic, pick_device
from study.training.energy import gpu_share
from study.training.memory import keep_freed_memory
from study.training.trainer import OnDevice

WAIT_SECONDS = 2.0
MOST_ERRORS_IN_A_ROW = 2
AWAY = (DBAPIError, optuna.exceptions.StorageInternalError, DatabaseAway)


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
    data = retrying(lambda: load_data(study, config, data_root, device), stopping=stop)
    study.pruner = make_pruner(config, len(data.train_labels))
    queue = Queue(
        storage.engine,
        study._study_id,
        seconds=config.lease.seconds,
        max_attempts=config.lease.max_attempts,
        device=objective.device_name(device),
        share=gpu_share(),
        stopping=stop,
    )
    if "kWh" in control.orders(storage.engine, study._study_id).budgets:
        check_energy([str(device)])
    stop.watch(storage.engine, study._study_id)
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
            except AWAY:
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
            say(f"{stop.reason}; {control.how_to_go_on(name, stop.reason)}")
        return queue.unfinished() == 0
    except AWAY as error:
        if stop():
            return False
        if not isinstance(error, DatabaseAway) and not passing(error):
            raise
        raise DatabaseAway(
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
        except (Unreachable, *AWAY):
            if stop() or time.monotonic() >= deadline:
                raise
            _pause(1.0, stop)


def read_ahead(study: optuna.Study, config: StudyConfig) -> None:
    """Read what the sampler will ask of the study's past, in a thread: the data load meanwhile."""
    if config.search.sampler.kind in ("grid", "random"):
        return

    def read() -> None:
        with suppress(*AWAY):  # then who asks first reads it
            study.get_trials(deepcopy=False)

    threading.Thread(target=read, name="ahead", daemon=True).start()


def _aside(storage_url: str, study: optuna.Study) -> Path:
    """The folder on this machine for what the database could not take of this study, and of no other of its name."""
    what = f"{redact(parse(storage_url))} {study.study_name} {study.user_attrs['config']}"
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    return datasets.cache_dir() / "unsaved" / key


def load_data(study: optuna.Study, config: StudyConfig, root: str | None, device: torch.device) -> OnDevice:
    dataset = datasets.load(config.data.name, root, say)
    check_fingerprint(study, dataset)
    part = config.data
    split = datasets.split(dataset, part.protocol, holdout=part.holdout, train_images=part.train_images)
    return OnDevice.of(split, device, test=part.test)


def _pause(seconds: float, stop: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stop():
        time.sleep(0.1)
