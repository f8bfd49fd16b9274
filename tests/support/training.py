"""Trainers for tests: the paper's network and options by keyword, as a trial would make them."""

from __future__ import annotations

from typing import Any

from study.training.augment import make_augmentation
from study.training.data.placement import DeviceData
from study.training.networks import make_network
from study.training.optimizers import OptimizerOptions
from study.training.policies import Policy
from study.training.trainer import Trainer, TrainingOptions


def make_trainer(
    data: DeviceData,
    policy: Policy,
    seed: int,
    *,
    width: float = 1.0,
    norm: str = "batch",
    augment: bool = False,
    lr: float = 0.001,
    weight_decay: float = 0.0,
    **options: Any,
) -> Trainer:
    """A trainer of the paper's network with Adam."""
    shape = data.shape
    network = make_network(
        "paper", {"width": width, "norm": norm}, classes=data.classes, channels=shape[-1], size=shape[0], seed=seed
    )
    options.setdefault("optimizer", OptimizerOptions(lr=lr, weight_decay=weight_decay))
    options["augmentation"] = make_augmentation([("flip", {}), ("crop", {})] if augment else [])
    return Trainer(data, network, policy, seed, TrainingOptions(**options))
