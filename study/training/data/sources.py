"""Named data sets as uint8 arrays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from study.training.data.dataset import DataError, Dataset, Images, Labels, cache_dir, cache_lock, printable
from study.training.data.image_folder import load_image_folder
from study.training.data.split import stratified

logger = logging.getLogger(__name__)

TORCHVISION = ("cifar10", "cifar100", "svhn", "fashion-mnist")
"""Data sets that torchvision downloads."""


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
        root: the folder of images (`imagefolder`), or where torchvision keeps its downloads (default: the cache).
        size: height and width that every image gets. None: that of the source.
        channels: 1 (grey) or 3 (red, green, blue). None: those of the source.
        make: the function that an import path `name` stands for.

    Raises:
        DataError: no such data set, a folder that is missing or has no classes, an image that cannot be decoded, a
            download that failed, a cache that cannot be written.
    """
    if size is not None or channels is not None or make is not None:
        raise DataError("data.size, data.channels and own load functions are not supported yet; leave them out")
    if name == "digits":
        return _digits()
    if name == "imagefolder":
        if root is None:
            raise DataError(
                "imagefolder needs --data-root: a folder with train/ and test/ (or val/), one folder a class"
            )
        return load_image_folder(_expanded(root))
    if name in TORCHVISION:
        return _torchvision(name, _expanded(root) if root else cache_dir() / "torchvision")
    raise DataError(f"no data set {printable(name)!r}; data sets: digits, imagefolder, {', '.join(TORCHVISION)}")


def _expanded(root: str) -> Path:
    try:
        return Path(root).expanduser()
    except RuntimeError as error:
        raise DataError(f"--data-root {printable(root)}: {error}; give the whole path") from None


def _digits() -> Dataset:
    """The 1,797 digits beside this file, 8x8 enlarged to 32x32; a stratified fifth of them is the test split."""
    table = np.loadtxt(Path(__file__).parent / "digits.csv.gz", delimiter=",")
    small = (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(small.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    labels = table[:, -1].astype(np.int64)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    test = np.sort(stratified(labels, order, len(labels) // 5))
    train = np.setdiff1d(order, test)
    return Dataset(images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _torchvision(name: str, root: Path) -> Dataset:
    from torchvision import datasets

    def fetch(make: Callable[..., Any], **which: Any) -> tuple[Images, Labels, tuple[str, ...]]:
        try:
            archive = make(root, download=False, **which)
        except RuntimeError:
            logger.info("downloading %s to %s", name, printable(root))
            try:
                archive = make(root, download=True, **which)
            except (OSError, RuntimeError) as error:
                where = f"{name} is not under {printable(root)}"
                raise DataError(f"{where} and could not be downloaded: {printable(str(error))}") from None
        except OSError as error:
            raise DataError(f"cannot read {name} under {printable(root)}: {error.strerror or error}") from None
        images = np.asarray(archive.data)
        labels = np.asarray(archive.labels if hasattr(archive, "labels") else archive.targets, dtype=np.int64)
        if images.ndim == 3:  # fashion-mnist: 28x28 grey
            images = np.repeat(np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=3)
        elif images.shape[1] == 3:  # svhn: channels first
            images = images.transpose(0, 2, 3, 1)
        names = tuple(getattr(archive, "classes", [str(label) for label in range(10)]))
        return np.ascontiguousarray(images, dtype=np.uint8), labels, names

    parts: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    make = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "fashion-mnist": datasets.FashionMNIST,
    }.get(name)
    if make is None:
        make, parts = datasets.SVHN, [{"split": "train"}, {"split": "test"}]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot keep {name} under {printable(root)}: {error.strerror}; name another folder with --data-root"
        ) from None
    try:
        with cache_lock(root / f".{name}.lock"):  # several workers may start at once
            train, test = (fetch(make, **part) for part in parts)
    except OSError:  # a folder to read from: it is all there, or the attempt to download says what is not
        train, test = (fetch(make, **part) for part in parts)
    return Dataset(train[0], train[1], test[0], test[1], train[2])
