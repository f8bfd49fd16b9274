"""Named data sets as uint8 arrays, their fingerprint, and the split into training, validation and test images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from study.training.data.dataset import DataError, Dataset, Images, Labels, Say, _locked, cache_dir
from study.training.data.image_folder import _imagefolder
from study.training.data.split import _stratified


def load(name: str, root: str | None = None, say: Say = lambda _: None) -> Dataset:
    """The data set `name`.

    Args:
        root: the folder of images (`imagefolder`), or where torchvision keeps its downloads (default: the cache).
        say: gets a line when something slow begins.

    Raises:
        DataError: no such data set, a folder that is missing or has no classes, an image that cannot be decoded, a
            download that failed.
    """
    if name == "digits":
        return _digits()
    if name == "imagefolder":
        if root is None:
            raise DataError(
                "imagefolder needs --data-root: a folder with train/ and test/ (or val/), one folder a class"
            )
        return _imagefolder(Path(root).expanduser(), say)
    if name in TORCHVISION:
        return _torchvision(name, Path(root).expanduser() if root else cache_dir() / "torchvision", say)
    raise DataError(f"no data set {name!r}; data sets: digits, imagefolder, {', '.join(TORCHVISION)}")


def _digits() -> Dataset:
    """The 1,797 digits beside this file, 8x8 enlarged to 32x32; a stratified fifth of them is the test split."""
    table = np.loadtxt(Path(__file__).parent / "digits.csv.gz", delimiter=",")
    small = (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(small.repeat(4, axis=1).repeat(4, axis=2)[..., None], 3, axis=3)
    labels = table[:, -1].astype(np.int64)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    test = np.sort(_stratified(labels, order, len(labels) // 5))
    train = np.setdiff1d(order, test)
    return Dataset(images[train], labels[train], images[test], labels[test], tuple("0123456789"))


TORCHVISION = ("cifar10", "cifar100", "svhn", "fashion-mnist")


def _torchvision(name: str, root: Path, say: Say) -> Dataset:
    from torchvision import datasets

    def fetch(make: Callable[..., Any], **which: Any) -> tuple[Images, Labels, tuple[str, ...]]:
        try:
            found = make(root, download=False, **which)
        except RuntimeError:
            say(f"downloading {name} to {root}")
            try:
                found = make(root, download=True, **which)
            except (OSError, RuntimeError) as error:
                raise DataError(f"{name} is not under {root} and could not be downloaded: {error}") from None
        images = np.asarray(found.data)
        labels = np.asarray(found.labels if hasattr(found, "labels") else found.targets, dtype=np.int64)
        if images.ndim == 3:  # fashion-mnist: 28x28 grey
            images = np.repeat(np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=3)
        elif images.shape[1] == 3:  # svhn: channels first
            images = images.transpose(0, 2, 3, 1)
        names = tuple(getattr(found, "classes", [str(label) for label in range(10)]))
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
            f"cannot keep {name} under {root}: {error.strerror}; name another folder with --data-root"
        ) from None
    try:
        with _locked(root / f".{name}.lock"):  # several workers may start at once
            train, test = (fetch(make, **part) for part in parts)
    except PermissionError:  # a folder to read from: it is all there, or the attempt to download says what is not
        train, test = (fetch(make, **part) for part in parts)
    return Dataset(train[0], train[1], test[0], test[1], train[2])
