"""A model on another folder of pictures: accuracy, balanced accuracy, macro F1, confusion."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from study.model import BATCH, TrainedModel
from study.training.data.dataset import DataError, printable
from study.training.data.image_folder import find_splits, list_images

SHOWN_FAULTS = 5
LEVEL = 0.95
"""Of intervals."""


@dataclass(frozen=True)
class Evaluation:
    """What a model said of pictures whose classes are known. A class without any counts in no mean over classes."""

    folder: Path
    """The folder of class folders."""
    classes: tuple[str, ...]
    """The model's."""
    confusion: NDArray[np.int64]
    """Pictures by their class (row) and by what the model said (column), shape [classes, classes]."""

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self.correct / self.images

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, 95 %, by Clopper and Pearson (1934): binomial, exact."""
        from scipy.stats import binomtest

        interval = binomtest(self.correct, self.images).proportion_ci(LEVEL, method="exact")
        return float(interval.low), float(interval.high)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Pictures of each class."""
        counts: NDArray[np.int64] = self.confusion.sum(1)
        return counts

    @property
    def recall(self) -> NDArray[np.float64]:
        """Part of each class's pictures that the model found; NaN: there are none."""
        return _ratio(np.diagonal(self.confusion), self.counts)

    @property
    def precision(self) -> NDArray[np.float64]:
        """Part of what the model called so that is of the class; NaN: it called none so."""
        return _ratio(np.diagonal(self.confusion), self.confusion.sum(0))

    @property
    def f1(self) -> NDArray[np.float64]:
        """Harmonic mean of recall and precision by class; NaN: there are no pictures of it."""
        f1 = _ratio(2 * np.diagonal(self.confusion), self.counts + self.confusion.sum(0))
        return np.where(self.counts > 0, f1, np.nan)

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes, in [0, 1]."""
        return float(np.nanmean(self.recall))

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes, in [0, 1]."""
        return float(np.nanmean(self.f1))


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    ratio = np.full(len(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def evaluate(model: TrainedModel, root: str) -> Evaluation:
    """What `model` says of the pictures below `root`: of `test/` where there is one (or `val/` in its place), else of
    all class folders.

    Raises:
        DataError: no such folder, no pictures, classes that the model does not know, pictures that cannot be used.
        UserError: the model was not trained on pictures.
    """
    if not os.path.isdir(root):
        raise DataError(f"no folder {printable(root)}: --data-root must hold one folder of pictures a class")
    folders, _ = find_splits(Path(root))
    folder = folders.get("test") or folders["all"]
    listing = list_images(folder)
    if not listing.images:
        raise DataError(
            f"no classes with images under {printable(folder)}: it must hold one folder of pictures a class"
        )
    index = {name: label for label, name in enumerate(model.classes)}
    if strangers := sorted(listing.classes.keys() - index.keys()):
        raise DataError(
            f"{printable(folder)} has classes that the model does not know: {_some(strangers)}; it knows "
            f"{_some(model.classes)}: name the folders so"
        )
    labels = np.array([index[name] for name, _, _ in listing.images])
    said = np.concatenate(list(_answers(model, [path for _, path, _ in listing.images])))
    confusion = np.zeros((len(index), len(index)), np.int64)
    np.add.at(confusion, (labels, said), 1)
    return Evaluation(folder, model.classes, confusion)


def _answers(model: TrainedModel, paths: list[str]) -> Iterator[NDArray[np.int64]]:
    faults: list[str] = []
    for start in range(0, len(paths), BATCH):
        pictures = []
        for path in paths[start : start + BATCH]:
            try:
                pictures.append(model.decode(path))
            except DataError as error:
                faults.append(str(error))
        if not faults:
            yield model.probabilities(np.stack(pictures)).argmax(1)
    if faults:
        shown = "; ".join(faults[:SHOWN_FAULTS])
        more = f"; and {len(faults) - SHOWN_FAULTS:,} more" if len(faults) > SHOWN_FAULTS else ""
        raise DataError(f"cannot use {len(faults):,} pictures: {shown}{more}; repair, convert or remove them")


def _some(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(printable(name) for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
