"""The split of a data set into training, validation and test images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from study.training.data.dataset import DataError, Dataset, Images, Labels


@dataclass(frozen=True)
class Split:
    """The images one study trains on, validates on, and (under `holdout`) leaves alone until the last word."""

    train_images: Images
    train_labels: Labels
    validation_images: Images
    validation_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]


def split_dataset(
    dataset: Dataset,
    protocol: Literal["holdout", "paper"],
    *,
    holdout: float = 0.1,
    train_images: int | None = None,
) -> Split:
    """Training, validation and test images under a protocol.

    `holdout`: a stratified `holdout` of the training split validates. `paper`: the test split does. `train_images`
    keeps a stratified part of what is left to train on. Which images fall where depends on nothing but the data set and
    these arguments.

    Raises:
        DataError: train_images is above the number of images there are.
    """
    labels = dataset.train_labels
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    held = _stratified(labels, order, round(holdout * len(labels))) if protocol == "holdout" else np.zeros(0, np.int64)
    left = order[~np.isin(order, held)]
    if protocol == "holdout" and not (len(held) and len(left)):
        raise DataError(
            f"data.holdout leaves {len(left)} images to train on and {len(held)} to validate: got {holdout:g}"
        )
    if train_images is not None:
        if train_images > len(left):
            raise DataError(
                f"data.train_images must be at most the {len(left)} training images there are, got {train_images}"
            )
        left = _stratified(labels, left, train_images)
    left, held = np.sort(left), np.sort(held)
    everything = len(left) == len(labels)  # no copy of the largest array where none is needed
    train = (dataset.train_images, labels) if everything else (dataset.train_images[left], labels[left])
    test = dataset.test_images, dataset.test_labels
    validation = test if protocol == "paper" else (dataset.train_images[held], labels[held])
    return Split(*train, *validation, *test, dataset.classes)


def _stratified(labels: Labels, order: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """`size` of the indices in `order`, classes in proportion (largest remainder), the first of each class taken."""
    kinds, counts = np.unique(labels[order], return_counts=True)
    exact = counts * (size / len(order))
    take = np.floor(exact).astype(np.int64)
    short = size - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:short]] += 1
    return np.concatenate([order[labels[order] == kind][:n] for kind, n in zip(kinds, take, strict=True)])
