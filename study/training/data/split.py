"""The split of a data set into training, validation and test images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from study.training.data.dataset import DataError, Dataset, Images, Labels


@dataclass(frozen=True)
class Part:
    """Some images of an array, without a copy of them: the array may be memory-mapped and larger than memory."""

    images: Images
    """The array that holds them."""
    index: NDArray[np.int64] | None
    """Their rows in `images`, ascending, shape [N]. None: all rows."""
    labels: Labels
    """Of this part's images alone, shape [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def in_memory(self) -> Images:
        """The images of this part as an array in memory: a copy, unless they are all of an array in memory."""
        if self.index is not None:
            return self.images[self.index]
        return np.array(self.images) if isinstance(self.images, np.memmap) else self.images


@dataclass(frozen=True)
class Split:
    """The images one study trains on, validates on, and (under `holdout`) leaves alone until the last word."""

    train: Part
    validation: Part
    test: Part
    classes: tuple[str, ...]

    @cached_property
    def train_images(self) -> Images:
        """The training images in memory."""
        return self.train.in_memory()

    @cached_property
    def validation_images(self) -> Images:
        """The validation images in memory."""
        return self.validation.in_memory()

    @cached_property
    def test_images(self) -> Images:
        """The test images in memory."""
        return self.test.in_memory()

    @property
    def train_labels(self) -> Labels:
        return self.train.labels

    @property
    def validation_labels(self) -> Labels:
        return self.validation.labels

    @property
    def test_labels(self) -> Labels:
        return self.test.labels


TEST_FRACTION = 0.2
"""The part of a data set without a published split that becomes its test split."""


def split_dataset(
    dataset: Dataset,
    protocol: Literal["holdout", "paper"],
    *,
    holdout: float = 0.1,
    train_images: int | None = None,
) -> Split:
    """Training, validation and test images under a protocol. No image is copied.

    Which images fall where depends on nothing but the data set and these arguments.

    Args:
        protocol: `holdout`: the data set's own validation split validates, or where it has none a stratified part of
            the training split. `paper`: the test split validates.
        holdout: that part, as a fraction in (0, 1). Not used where the data set has a validation split.
        train_images: keep a stratified part of so many of the images that are left to train on. None: all.

    Raises:
        DataError: train_images is above the number of images there are, or holdout leaves none to train or validate on.
    """
    labels = dataset.train_labels
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    held = np.zeros(0, np.int64)
    test = Part(dataset.test_images, None, dataset.test_labels)
    if protocol == "paper":
        validation = test
    elif dataset.validation_images is not None and dataset.validation_labels is not None:
        validation = Part(dataset.validation_images, None, dataset.validation_labels)
    else:
        held = np.sort(stratified(labels, order, round(holdout * len(labels))))
        if not 0 < len(held) < len(labels):
            raise DataError(
                f"data.holdout leaves {len(labels) - len(held)} images to train on and {len(held)} to validate: "
                f"got {holdout:g}"
            )
        validation = Part(dataset.train_images, held, labels[held])
    left = order[~np.isin(order, held)]
    if train_images is not None:
        if train_images > len(left):
            raise DataError(
                f"data.train_images must be at most the {len(left)} training images there are, got {train_images}"
            )
        left = stratified(labels, left, train_images)
    left = np.sort(left)
    everything = len(left) == len(labels)
    train = Part(dataset.train_images, None if everything else left, labels if everything else labels[left])
    return Split(train, validation, test, dataset.classes)


def split_notes(dataset: Dataset, split: Split, protocol: Literal["holdout", "paper"]) -> list[str]:
    """What to know of a split: which use a validation split finds, and classes that it leaves out. A line each."""
    notes = []
    if dataset.validation_labels is not None:
        count = f"the {len(dataset.validation_labels):,} images of the data set's own validation split"
        if protocol == "holdout":
            notes.append(f"{count} validate; data.holdout is not used")
        else:
            notes.append(f"{count} are not used: under the paper protocol the test split validates")
    for labels, use in ((split.train_labels, "train on"), (split.validation_labels, "validate")):
        missing = [dataset.classes[i] for i in np.setdiff1d(np.arange(len(dataset.classes)), labels)]
        if missing:
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            notes.append(f"there are no images to {use} of {len(missing)} of {len(dataset.classes)} classes: {shown}")
    return notes


def stratified(labels: Labels, order: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """`size` of the indices in `order`, classes in proportion (largest remainder), the first of each class taken.

    Args:
        labels: shape [N].
        order: indices into `labels`, shape [at most N].

    Returns:
        Indices into `labels`, shape [size], class by class.
    """
    kinds, counts = np.unique(labels[order], return_counts=True)
    exact = counts * (size / len(order))
    take = np.floor(exact).astype(np.int64)
    short = size - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:short]] += 1
    return np.concatenate([order[labels[order] == kind][:n] for kind, n in zip(kinds, take, strict=True)])


def split_off_test(labels: Labels) -> NDArray[np.int64]:
    """Indices of a test split: TEST_FRACTION of each class, and at least one image of each, sorted. Always the same."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    parts = []
    for kind in np.unique(labels):
        of_class = order[labels[order] == kind]
        parts.append(of_class[: max(1, round(TEST_FRACTION * len(of_class)))])
    return np.sort(np.concatenate(parts))
