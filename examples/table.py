"""A table of measurements with a multilayer perceptron: `table:load` and `table:make`."""

from __future__ import annotations

import numpy as np
from torch import nn

from study.training.data.dataset import Dataset


def load() -> Dataset:
    """scikit-learn's breast cancer data: 569 rows of 30 numbers, in two classes; every fourth row is the test split."""
    from sklearn.datasets import load_breast_cancer

    stored = load_breast_cancer()
    rows, labels = stored.data.astype(np.float32), stored.target.astype(np.int64)
    test = np.arange(len(rows)) % 4 == 0
    return Dataset(rows[~test], labels[~test], rows[test], labels[test], tuple(map(str, stored.target_names)))


def make(classes: int, channels: int, size: int, *, hidden: int = 32, dropout: float = 0.2) -> nn.Module:
    """`channels` is the number of columns."""
    return nn.Sequential(
        nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, classes),
    )  # fmt: skip
