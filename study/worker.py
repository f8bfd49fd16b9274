"""One process on one device: claim a trial, train it, settle it, until nothing is left."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import optuna
import torch

from storage.connect import open_storage
from storage.errors import UserError
from storage.queue import LeaseLost, Queue
from study.config import StudyConfig
from study.launch import SUPERVISED
from study.objective import run_trial
from study.plan import load_study
from study.search import make_pruner
from study.training import data as datasets
from study.training.trainer import OnDevice, be_deterministic, pick_device

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C, and what Slurm and spot instances send."""
WAIT_SECONDS = 2.0


class Stop:
    """Whether this worker has been asked to stop: by a signal, or by the end of the launcher that started it."""

    def __init__(self) -> None:
        self.asked = False
        self.parent = os.getppid() if os.environ.get(SUPERVISED) else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __call__(self) -> bool:
        return self.asked or (self.parent is not None and os.getppid() != self.parent)


def say(text: str) -> None:
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
    stop = Stop()
    storage = open_storage(storage_url, create=False)
    study, config = load_study(storage, name)
    study.pruner = make_pruner(config)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    be_deterministic(config.training.deterministic)
    try:
        device = pick_device(device_name)
    except ValueError as error:
        raise UserError(str(error)) from None
    data = load_data(study, config, data_root, device)
    queue = Queue(storage.engine, study._study_id, seconds=config.lease.seconds, max_attempts=config.lease.max_attempts)
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
                run_trial(study, config, data, queue, lease, stop, say)
        except LeaseLost as lost:
            say(f"{lost}; this worker drops it")
        except Exception as error:  # noqa: BLE001 — whatever a trial raises, its worker goes on with the next
            reason = f"{type(error).__name__}: {error}"
            say(f"trial {lease.number}: attempt failed: {reason}")
            queue.release(lease, error=reason)
    return queue.unfinished() == 0


def load_data(study: optuna.Study, config: StudyConfig, root: str | None, device: torch.device) -> OnDevice:
    dataset = datasets.load(config.data.name, root, say)
    expected = study.user_attrs["data_fingerprint"]
    if dataset.fingerprint != expected:
        raise UserError(
            f"the data here are not the study's: {config.data.name!r} has fingerprint {dataset.fingerprint[:16]}, "
            f"the study {study.study_name!r} was laid down on {expected[:16]}; use the same images (--data-root)"
        )
    part = config.data
    split = datasets.split(dataset, part.protocol, holdout=part.holdout, train_images=part.train_images)
    return OnDevice.of(split, device)


def _pause(seconds: float, stop: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stop():
        time.sleep(0.1)
