"""A study in a database and a worker for it in this process, for tests that look inside."""

from __future__ import annotations

import copy
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import optuna
import pytest
import torch
from optuna.pruners import BasePruner, MedianPruner, PercentilePruner

from storage.engine import open_storage
from storage.queries import epoch_rows
from storage.queue import Queue
from study.config.loading import parse_config
from study.config.models import StudyConfig
from study.create import create_study, load_study, prepare
from study.search.pruners import make_pruner
from study.training.data.dataset import cache_dir
from study.training.data.placement import DeviceData
from study.training.device import be_deterministic
from study.training.trainer import Trainer
from study.trial.runner import run_trial
from study.worker.stop_monitor import StopMonitor
from study.worker.worker import load_data

BASE: dict[str, Any] = {
    "data": {"train_images": 200},
    "network": {"width": 0.125},
    "policy": {"alpha": [60, 90], "beta": [0.3, 0.6]},
    "training": {"epochs": 3, "batch_size": 50, "lr": 0.005},
}


def config_of(**sections: Any) -> StudyConfig:
    tree = copy.deepcopy(BASE)
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section if isinstance(section, dict) else section
    return parse_config(tree)


def stock_pruner(config: StudyConfig, train_images: int) -> BasePruner:
    """Optuna's own, where `make_pruner` gives one of ours with the same rule."""
    options = config.pruning.model_dump(exclude={"kind", "step"})
    match config.pruning.kind:
        case "median":
            return MedianPruner(**options)
        case "percentile":
            return PercentilePruner(**options)
        case _:
            return make_pruner(config, train_images)


@contextmanager
def scripted_accuracies(rule: Callable[[Trainer], float]) -> Iterator[None]:
    """Meanwhile every epoch in this process ends with the accuracy that `rule` gives it, whatever was measured: what
    policies, pruners and samplers make of it is then the same on every processor.
    """
    real = Trainer._ended
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trainer,
            "_ended",
            lambda trainer, measured, started: real(trainer, replace(measured, accuracy=rule(trainer)), started),
        )
        yield


def writers_have_ended() -> None:
    """Wait for what a worker in this process has left behind: until then it can renew the lease of its trial."""
    for thread in threading.enumerate():
        if thread.name.startswith("writer-"):
            thread.join(60)
            assert not thread.is_alive()


class _Messages(logging.Handler):
    """Collects what the worker logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Harness:
    """A study in a database, and a worker for it in this process."""

    def __init__(self, url: str, config: StudyConfig, name: str = "s", root: str | None = None) -> None:
        be_deterministic(config.training.deterministic)
        self.storage = open_storage(url)
        data = prepare(config, root)
        create_study(self.storage, name, "test", data.config, data)
        self.study, self.config = load_study(self.storage, name)
        self.data: DeviceData = load_data(self.study, self.config, root, torch.device("cpu"))
        self.study.pruner = make_pruner(self.config, len(self.data.train_labels))
        handler = _Messages()
        logger = logging.getLogger("study")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        self.messages = handler.lines
        """Of all workers of this process since this harness was made."""
        self.fallback = cache_dir() / "unsaved" / uuid.uuid4().hex
        """Made when a checkpoint is written there."""

    def queue(self, **options: Any) -> Queue:
        return Queue(self.storage.engine, self.study._study_id, store=self.config.checkpoint.store, **options)

    def work(self, stopping: Callable[[], bool] = lambda: False, most: int = 1000) -> None:
        stop = stopping if isinstance(stopping, StopMonitor) else StopMonitor(stopping)
        queue = self.queue(max_attempts=self.config.lease.max_attempts)
        for _ in range(most):
            lease = queue.claim()
            if lease is None:
                return
            run_trial(self.study, self.config, self.data, queue, lease, stop, self.fallback)

    def outcome(self) -> list[tuple[Any, ...]]:
        """Everything of every trial that is not a time, a place or a count of attempts."""
        rows = epoch_rows(self.storage.engine, self.study._study_id)
        untimed = {
            number: [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in epochs]
            for number, epochs in rows.items()
        }
        return [
            (
                t.number,
                t.state,
                t.params,
                t.values,
                t.intermediate_values,
                t.user_attrs.get("best_epoch"),
                untimed.get(t.number, []),
            )
            for t in optuna.load_study(study_name=self.study.study_name, storage=self.storage).trials
        ]


class StopAfter:
    """Comes true once, at the given step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0
