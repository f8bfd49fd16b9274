"""Data sets that own functions return: what they must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from study.training.data.dataset import DataError, Dataset, printable

ROWS = 1000
"""Rows that are looked at at a time: arrays may be memory-mapped files."""


def call(name: str, make: Callable[[], Dataset]) -> Dataset:
    """What an own function returns.

    Raises:
        DataError: it raises, or returns no usable data set.
    """
    try:
        dataset = make()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise DataError(f"{printable(name)} raised {printable(reason)}") from error
    return check(dataset, name)


def check(dataset: Any, name: str) -> Dataset:
    """The data set, with its labels as int64.

    Raises:
        DataError: it breaks a rule; all that it breaks are named.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(f"{printable(name)} must return a study.training.data.dataset.Dataset, got {_type(dataset)}")
    classes = dataset.classes
    faults = _class_faults(classes)
    parts = {"train": (dataset.train_images, dataset.train_labels), "test": (dataset.test_images, dataset.test_labels)}
    if dataset.validation_images is not None and dataset.validation_labels is not None:
        parts["validation"] = dataset.validation_images, dataset.validation_labels
    elif dataset.validation_images is not None or dataset.validation_labels is not None:
        faults.append("validation_images and validation_labels must both be given or both be None")
    faults += _part_faults(parts, 0 if faults else len(classes))
    if faults:
        raise DataError(f"{printable(name)}: {'; '.join(faults)}")
    whole = {f"{split}_labels": labels.astype(np.int64, copy=False) for split, (_, labels) in parts.items()}
    notes = tuple(printable(str(note)) for note in dataset.notes)
    checked = replace(dataset, classes=tuple(classes), notes=notes, **whole)
    if "fingerprint" in dataset.__dict__:
        checked.__dict__["fingerprint"] = dataset.fingerprint
    return checked


def _class_faults(classes: Any) -> list[str]:
    if not isinstance(classes, list | tuple) or not all(isinstance(each, str) for each in classes):
        return ["classes must be a tuple of strings, one a class: use tuple(map(str, names))"]
    if len(classes) < 2:
        return [f"classes must name at least two classes, got {len(classes)}"]
    return []


def _part_faults(parts: dict[str, tuple[Any, Any]], classes: int) -> list[str]:
    """What is wrong with the splits, each by itself and beside the others."""
    faults, usable = [], []
    for split, (images, labels) in parts.items():
        wrong = _image_faults(images) or _label_faults(labels, classes)
        if not wrong and len(images) != len(labels):
            wrong = f"_images and {split}_labels must have one length, got {len(images):,} and {len(labels):,}"
        if wrong:
            faults.append(split + wrong)
        else:
            usable.append((split, f"{images.dtype} {images.shape[1:]}"))
    for split, kind in usable[1:]:
        first, expected = usable[0]
        if kind != expected:
            faults.append(
                f"all splits must have one dtype and one shape after the first axis, got {expected} in {first} and "
                f"{kind} in {split}"
            )
    return faults


def _image_faults(images: Any) -> str:
    """What is wrong with the images of a split, after its name; nothing where they can be used."""
    if not isinstance(images, np.ndarray):
        return f"_images must be a numpy array, got {_type(images)}: use numpy.asarray"
    if images.dtype == np.uint8:
        if images.ndim != 4:
            hint = ": add the channels with images[..., None]" if images.ndim == 3 else ""
            return f"_images of uint8 must have the shape [N, height, width, channels], got {images.shape}{hint}"
    elif images.dtype != np.float32:
        return f"_images must be uint8 or float32, got {images.dtype}: convert them with .astype"
    elif images.ndim < 2:
        return f"_images of float32 must have the shape [N, features...], got {images.shape}: use images[:, None]"
    if not images.size:
        return f"_images must not be empty, got the shape {images.shape}"
    if images.dtype == np.float32:
        for start in range(0, len(images), ROWS):
            finite = np.isfinite(images[start : start + ROWS])
            if not finite.all():
                row = start + int(np.argwhere(~finite)[0][0])
                return f"_images must be finite, got NaN or infinity in row {row}: replace it in the load function"
    return ""


def _label_faults(labels: Any, classes: int) -> str:
    """What is wrong with the labels of a split, after its name; nothing where they can be used."""
    if not isinstance(labels, np.ndarray):
        return f"_labels must be a numpy array, got {_type(labels)}: use numpy.asarray"
    if not np.issubdtype(labels.dtype, np.integer):
        return f"_labels must be integers, got {labels.dtype}: use the index of each class in classes"
    if labels.ndim != 1:
        return f"_labels must have the shape [N], got {labels.shape}: use labels.reshape(-1) or .argmax(1)"
    if classes and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        return (
            f"_labels must be from 0 to {classes - 1}, an index in classes, got {labels.min()} to {labels.max()}: "
            "count from 0, or name all classes"
        )
    return ""


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
