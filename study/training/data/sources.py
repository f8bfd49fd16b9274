"""Data sets by name: named ones, torchvision's, folders of images, and what own functions return."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from study.training.data import decoding
from study.training.data.array_cache import load_cached
from study.training.data.dataset import DataError, Dataset, cache_dir, printable
from study.training.data.decoding import Form, Rows
from study.training.data.image_folder import load_image_folder
from study.training.data.own_data import call
from study.training.data.split import stratified
from study.training.data.torchvision_sets import NAMED, PREFIX, load_named, load_torchvision

logger = logging.getLogger(__name__)

SIDE = 32
"""Height and width of the named data sets, in pixels."""
MOST = math.isqrt(decoding.MAX_PIXELS)
"""The largest height and width."""


def load(
    name: str,
    root: str | None = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    make: Callable[[], Dataset] | None = None,
) -> Dataset:
    """The data set `name`.

    Args:
        name: `digits`, `imagefolder`, one of `NAMED`, `torchvision:` and one of `SETS`, or an import path that
            `make` stands for.
        root: the folder of images (`imagefolder`), or where torchvision keeps its downloads (default: the cache).
        size: height and width that every image gets: its centre square, resized. None: 32 for the named sets, else the
            images' own size.
        channels: 1 (grey) or 3 (red, green, blue). None: those of the source; 3 for `imagefolder` and the named sets.
        make: the function at the import path `name`; it returns the data set.

    Raises:
        DataError: no such data set, a folder that is missing or has no classes, an image that cannot be decoded, images
            of different sizes, a download that failed, a cache that cannot be written, an own data set that breaks a
            rule.
    """
    if size is not None and not 1 <= size <= MOST:
        raise DataError(f"data.size must be from 1 to {MOST} pixels, got {size}")
    if make is not None and (channels is None or channels > 0):
        return _converted(call(name, make), size, channels)
    if channels not in (None, 1, 3):
        raise DataError(f"data.channels of images must be 1 (grey) or 3 (red, green, blue), got {channels}")
    if name == "digits":
        return _converted(_digits(enlarged=size in (None, SIDE)), size, channels)
    if name == "imagefolder":
        if root is None:
            raise DataError(
                "imagefolder needs --data-root: a folder with train/ and test/ (or val/), one folder a class"
            )
        return load_image_folder(_expanded(root), size=size, channels=channels)
    folder = _expanded(root) if root else cache_dir() / "torchvision"
    if name in NAMED:
        return _converted(load_named(name, folder, padded=size in (None, SIDE)), size, channels)
    if name.startswith(PREFIX):
        return load_torchvision(name, folder, size, channels)
    raise DataError(
        f"no data set {printable(name)!r}; data sets: digits, imagefolder, {', '.join(NAMED)}, {PREFIX}NAME"
    )


def _expanded(root: str) -> Path:
    try:
        return Path(root).expanduser()
    except RuntimeError as error:
        raise DataError(f"--data-root {printable(root)}: {error}; give the whole path") from None


@functools.cache
def _digits_table() -> np.ndarray:
    table = np.loadtxt(Path(__file__).parent / "digits.csv.gz", delimiter=",")
    table.setflags(write=False)
    return table


def _digits(*, enlarged: bool = True) -> Dataset:
    """The 1,797 digits beside this file; a stratified fifth of them is the test split.

    Args:
        enlarged: their 8x8 pixels four times as high and wide.
    """
    table = _digits_table()
    images = (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    if enlarged:
        images = images.repeat(4, axis=1).repeat(4, axis=2)
    images = np.repeat(images[..., None], 3, axis=3)
    labels = table[:, -1].astype(np.int64)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    test = np.sort(stratified(labels, order, len(labels) // 5))
    train = np.setdiff1d(order, test)
    return Dataset(images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _converted(dataset: Dataset, size: int | None, channels: int | None) -> Dataset:
    """The data set in another size or with other channels, by way of the cache; itself where it has them already."""
    images = dataset.train_images
    if size is None and channels is None:
        return dataset
    if images.dtype != np.uint8:
        raise DataError(
            "data.size and data.channels are for uint8 images, and the data set is float32: leave them out, or convert "
            "the data in its load function"
        )
    height, width, found = images.shape[1:]
    form = Form(size or height, size or width, channels or found)
    if form.shape == images.shape[1:]:
        return dataset
    if form.channels != found and {form.channels, found} != {1, 3}:
        raise DataError(f"{found} channels cannot become {channels}: leave data.channels out, or set it to {found}")

    def build(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
        labels = {"train": dataset.train_labels, "test": dataset.test_labels}
        rows = {"train": Rows(dataset.train_images), "test": Rows(dataset.test_images)}
        if dataset.validation_images is not None and dataset.validation_labels is not None:
            labels["validation"], rows["validation"] = dataset.validation_labels, Rows(dataset.validation_images)
        logger.info("converting %d images to %dx%d (once)", sum(map(len, labels.values())), form.width, form.height)
        for split, of_split in labels.items():
            np.save(folder / f"{split}_labels.npy", of_split)
        return dataset.classes, decoding.fill_all(folder, rows, form, processes=False)

    converted = load_cached(f"converted-{decoding.key(dataset.fingerprint, dataset.classes, form)}", build)
    whole = replace(converted, notes=(*dataset.notes, *converted.notes))
    whole.__dict__["fingerprint"] = converted.fingerprint
    return whole
