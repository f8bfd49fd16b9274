"""Own code as a user would write it, for tests: a network with dropout, a policy that goes by losses, a data set."""

from __future__ import annotations

import logging
import os
import time
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from study.training.data.dataset import Dataset
from study.training.policies import Resampling, Static


def make(classes: int, channels: int, size: int, *, hidden: int = 16, dropout: float = 0.5) -> nn.Module:
    """A network that draws random numbers."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=4, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, hidden),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )


class Talkative(nn.Module):
    """Logs and warns at every step, as a library might; and takes as long as $STEP_SECONDS says."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, 10)

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        logging.warning("\x1b[2J<b>%d images</b> from postgresql://me:hunter2@db/x", len(images))
        warnings.warn("the weights are large", stacklevel=1)
        logits: Tensor = self.head(images.flatten(1))
        return logits


def talkative(classes: int, channels: int, size: int) -> nn.Module:
    return Talkative(channels * size * size)


class Broken(nn.Module):
    """Fails in training, at its second step."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, 10)
        self.steps = 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        if self.steps > 1:
            raise KeyError("oops")
        logits: Tensor = self.head(images.flatten(1))
        return logits


class Unsteady(Broken):
    """As Broken, with another message each time."""

    def forward(self, images: Tensor) -> Tensor:
        try:
            return super().forward(images)
        except KeyError as error:
            raise ValueError(f"after {time.monotonic_ns()} ns") from error


def unsteady(classes: int, channels: int, size: int) -> nn.Module:
    return Unsteady(channels * size * size)


def broken(classes: int, channels: int, size: int) -> nn.Module:
    return Broken(channels * size * size)


def never_made(classes: int, channels: int, size: int) -> nn.Module:
    raise RuntimeError("my bug")


def mlp(classes: int, channels: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, 16), nn.ReLU(), nn.Linear(16, classes))


def not_logits(classes: int, channels: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes + 1))


class Hardest(Static):
    """Trains on the images whose last loss was largest, and keeps a part of them."""

    def __init__(self, total: int, seed: int, *, alpha: int, keep: float = 0.5) -> None:
        super().__init__(total, seed, alpha=alpha)
        self.keep = keep
        self.weights = torch.ones(alpha)
        self.losses = torch.full((total,), 10.0)

    def observe(self, index: Tensor, values: Tensor) -> None:
        self.losses[index.cpu()] = values.detach().float().cpu()

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        order = torch.argsort(self.losses + torch.rand(self.total, generator=self.draws), descending=True)
        self.active = order[: len(self.active)]
        return Resampling("own", int(len(self.active) * (1 - self.keep)), 0.0)

    def state_dict(self) -> dict[str, object]:
        return super().state_dict() | {"losses": self.losses}

    def load_state_dict(self, state: dict[str, object]) -> None:
        super().load_state_dict(state)
        assert isinstance(state["losses"], Tensor)
        self.losses = state["losses"].clone()


class InNumpy(Hardest):
    """Its state has an array that `torch.load(weights_only=True)` refuses."""

    def state_dict(self) -> dict[str, object]:
        return super().state_dict() | {"losses": self.losses.numpy()}


class Forgetful(Hardest):
    """Its update has no return statement."""

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        return None  # type: ignore[return-value]


def table() -> Dataset:
    """120 rows of 5 numbers, in two classes."""
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 2, 120)
    rows = draws.normal(size=(120, 5)).astype(np.float32)
    rows[:, 0] += 3 * labels
    return Dataset(rows[:90], labels[:90], rows[90:], labels[90:], ("low", "high"))
