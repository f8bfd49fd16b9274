"""What a study will take on this machine: the pace of its network on random images, times the images it trains on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from storage import queries
from storage.study_attributes import read_attributes
from study.config.models import StudyConfig, means_something
from study.config.values import largest, middle
from study.search import space
from study.training.data import dataset
from study.training.data.split import Part, Split

logger = logging.getLogger(__name__)

SIZES = {
    "digits": (1438, 359),
    "cifar10": (50000, 10000),
    "cifar100": (50000, 10000),
    "svhn": (73257, 26032),
    "fashion-mnist": (60000, 10000),
    "imagefolder": (50000, 10000),  # as CIFAR-10: `bench` looks into no folder
}
"""Images of the training and the test split."""
MEASURE_SECONDS = 1.0


@dataclass(frozen=True)
class Pace:
    """Images/s on one device, and when they were measured."""

    train: float
    validate: float
    device: str
    on: str


@dataclass(frozen=True)
class Load:
    """What one trial goes through if nothing prunes it."""

    train: int
    validate: int


def split_sizes(config: StudyConfig) -> tuple[int, int, int]:
    """Images that train, that validate, and of the test split, as `split_dataset` would have it."""
    train, test = SIZES.get(config.data.name, SIZES["imagefolder"])
    validation = test
    if config.data.protocol == "holdout":
        validation = round(config.data.holdout * train)
        train -= validation
    return min(train, config.data.train_images or train), validation, test


def trial_loads(config: StudyConfig, sizes: tuple[int, int, int] | None = None) -> list[Load]:
    """One for each trial. A range or list that a sampler draws from counts with its middle.

    Args:
        sizes: images that train, that validate, and of the test split; None: of the data set as it is known.
    """
    everything, validation, test = sizes or split_sizes(config)
    loads = []
    config = config.with_counts(everything)
    for trial in space.queued_trials(config):
        chosen = {name: middle(value) for name, value in (config.searchable() | trial.params).items()}
        alpha = everything
        if means_something("alpha", chosen) and chosen["alpha"] is not None:
            alpha = min(everything, int(chosen["alpha"]))
        train = config.training.images or int(chosen["epochs"]) * alpha
        loads.append(Load(train, math.ceil(train / alpha) * validation + (test if config.data.test else 0)))
    return loads


def seconds(work: list[Load], pace: Pace, devices: int) -> float:
    """Training and validation of a whole study, its trials spread over `devices` of one pace."""
    each = [load.train / pace.train + load.validate / pace.validate for load in work]
    return max(max(each), sum(each) / devices)


def measure(config: StudyConfig, device_name: str, threads: int = 1) -> Pace:
    """Train the config's network on random images for a moment: a first epoch to warm up, then at least a second."""
    import torch

    from study.training.data.placement import DeviceData
    from study.training.device import be_deterministic, keep_freed_memory
    from study.training.policies import make_policy
    from study.training.trainer import VALIDATION_BATCH, Trainer
    from study.trial.components import first_parameters, make_network, training_options
    from study.trial.metadata import device_name as called

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    be_deterministic(config.training.deterministic)
    keep_freed_memory()
    device = torch.device(device_name)
    if device.type == "cpu":  # as a worker has
        torch.set_num_threads(threads)
    everything, validation, _ = split_sizes(config)
    config = config.with_counts(everything)
    side = config.data.size or 32
    shape = (side, side, config.data.channels or 3)
    batch = largest(config.training.batch_size)
    size = min(space.largest_alpha(config) or everything, (2 if device.type == "cpu" else 16) * batch)
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (max(size, min(validation, VALIDATION_BATCH)), *shape), dtype=np.uint8)
    labels = draws.integers(0, 10, len(images))
    train, held = (Part(images[:n], None, labels[:n]) for n in (size, min(validation, VALIDATION_BATCH)))
    split = Split(train, held, held, tuple("0123456789"))
    chosen = first_parameters(config, width=largest(config.network.width), epochs=10**6, batch_size=batch)
    trainer = Trainer(
        DeviceData.from_split(split, device),
        make_network(chosen, shape, len(split.classes), 0),
        make_policy("full", size, 0),
        0,
        replace(training_options(config, chosen), images=None),
    )
    epochs = (result for result in trainer.run() if result is not None)
    next(epochs)
    deadline = time.perf_counter() + MEASURE_SECONDS
    measured = [next(epochs)]
    while time.perf_counter() < deadline:
        measured.append(next(epochs))
    return Pace(
        statistics.median(size / (epoch.train_seconds + epoch.selection_seconds) for epoch in measured),
        statistics.median(len(held) / epoch.validation_seconds for epoch in measured),
        called(device),
        date.today().isoformat(),
    )


def estimate(config: StudyConfig, pace: Pace, devices: int, sizes: tuple[int, int, int] | None = None) -> str:
    """`about 11 minutes on 2 x NVIDIA …: 21 trials, …`"""
    work = trial_loads(config, sizes)
    where = f"{devices} x {pace.device}" if devices > 1 else pace.device
    pruned = "" if config.pruning.kind == "none" else " if nothing is pruned"
    return (
        f"about {duration(seconds(work, pace, devices))}{pruned} on {where}: {len(work)} trials, "
        f"{sum(load.train for load in work):,} training images at {pace.train:,.0f}/s, "
        f"{sum(load.validate for load in work):,} validation images at {pace.validate:,.0f}/s"
    )


def parallel(devices: Sequence[str]) -> int:
    """How many workers of these devices train at full pace: one a core, or one a GPU."""
    return len(devices) if devices[0] == "cpu" else len(set(devices))


def recalled(config: StudyConfig, devices: Sequence[str], sizes: tuple[int, int, int]) -> str | None:
    """`estimate` from what `study bench` has measured on this machine; None: it has not."""
    pace = recall(config, devices[0].partition(":")[0])
    if pace is None:
        return None
    days = (date.today() - date.fromisoformat(pace.on)).days
    age = "today" if days <= 0 else "yesterday" if days == 1 else f"{days} days ago"
    return f"{estimate(config, pace, parallel(devices), sizes)} (pace measured by `study bench` {age})"


def time_left(engine: sa.Engine, study_id: int, config: StudyConfig, devices: Sequence[str]) -> str | None:
    """What is left of a study that has begun, at the pace of its own last finished trials on this machine and kind of
    device; None: it has none, or is over.
    """
    kind = devices[0].partition(":")[0]
    measured = queries.measured_pace(engine, study_id, platform.node(), kind)
    counts = read_attributes(engine, study_id, ["images"]).get("images", {})
    now = queries.progress(engine, study_id)
    unfinished = now.total - now.finished
    if measured is None or not unfinished or not {"train", "validation", "test"} <= counts.keys():
        return None
    if not (0 < measured.train_seconds < math.inf and 0 < measured.validation_seconds < math.inf and measured.images):
        return None
    pace = Pace(
        measured.images / measured.train_seconds,
        measured.epochs * counts["validation"] / measured.validation_seconds,
        kind,
        date.today().isoformat(),
    )
    loads = trial_loads(config, (counts["train"], counts["validation"], counts["test"]))
    each = Load(
        round(statistics.mean(load.train for load in loads)), round(statistics.mean(load.validate for load in loads))
    )
    left = max(0.0, 1 - now.images / (unfinished * each.train))
    workers = parallel(devices)
    took = seconds([each] * unfinished, pace, workers) * left
    pruned = "" if config.pruning.kind == "none" else " if nothing is pruned"
    where = f"{workers} workers" if workers > 1 else "1 worker"
    ended = f"the last {measured.trials} trials" if measured.trials > 1 else "the trial"
    return (
        f"about {duration(took)} left{pruned} with {where}: {unfinished} unfinished trials, at the pace of {ended} of "
        f"this study that ended on this machine ({pace.train:,.0f} training images/s a worker)"
    )


def duration(seconds: float) -> str:
    """Two digits at most: nothing here is known better."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            count = seconds / size
            return f"{count:.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"
    return f"{max(1.0, seconds):.0f} s"


def remember(config: StudyConfig, kind: str, pace: Pace) -> None:
    """Keep a pace for `study launch`, which must not wait for a measurement."""
    try:
        file = _file(config, kind)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(pace)))
    except (OSError, dataset.DataError) as error:
        logger.warning("the measurement is not kept for `study launch`: %s", error)


def recall(config: StudyConfig, kind: str) -> Pace | None:
    """What was last measured on this machine for this network on a `kind` of device (`cpu`, `cuda`, `mps`)."""
    try:
        return Pace(**json.loads(_file(config, kind).read_text()))
    except (OSError, ValueError, TypeError, dataset.DataError):
        return None


def key(config: StudyConfig) -> tuple[Any, ...]:
    """All of a config that its pace depends on: configs of one key need one measurement."""
    config = config.with_counts(split_sizes(config)[0])
    size = min(largest(config.training.batch_size), space.largest_alpha(config) or split_sizes(config)[0])
    training = config.training
    network = json.dumps(config.network.model_dump(mode="json"), sort_keys=True)
    return (network, size, training.precision, training.deterministic, training.optimizer, training.ema,
            training.compile, config.data.augment, config.data.size, config.data.channels)  # fmt: skip


def _file(config: StudyConfig, kind: str) -> Path:
    here = (platform.node(), os.cpu_count(), kind, metadata.version("torch"), *key(config))
    return dataset.cache_dir() / f"pace-{hashlib.sha256(repr(here).encode()).hexdigest()[:16]}.json"
