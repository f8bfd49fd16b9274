"""Named data sets as uint8 arrays, their fingerprint, and the split into training, validation and test images."""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SIDE = 32
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")

Images = NDArray[np.uint8]
"""uint8, shape [N, 32, 32, 3], red, green, blue."""
Labels = NDArray[np.int64]
"""int64, shape [N]."""
Say = Callable[[str], None]


class DataError(Exception):
    """The data cannot be used: a sentence with the rule, the value and the fix."""


@dataclass(frozen=True)
class Dataset:
    """A whole data set, as published: its two splits and its class names."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images and labels: two machines with the same fingerprint train on the same data."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


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


def cache_dir() -> Path:
    """Where downloads and decoded images are kept: $STUDY_CACHE, else the user's cache directory."""
    import platformdirs

    return Path(os.environ.get("STUDY_CACHE") or platformdirs.user_cache_dir("dynamic-training-study"))


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


def split(
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


def _digits() -> Dataset:
    """scikit-learn's 1,797 digits, 8x8 enlarged to 32x32; a stratified fifth of them is the test split."""
    # The file itself: importing scikit-learn's loader costs every worker 2.4 s, reading this 0.1 s.
    package = importlib.util.find_spec("sklearn")
    folders = list(package.submodule_search_locations or ()) if package else []
    if not folders:
        raise DataError("digits come with scikit-learn, which is not installed; pip install scikit-learn")
    table = np.loadtxt(Path(folders[0]) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
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


def _imagefolder(root: Path, say: Say) -> Dataset:
    """torchvision's ImageFolder layout; decoded once, then one array file in the cache.

    The cache is keyed by every file's name, size and modification time: a changed folder is decoded again.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}: --data-root must be a folder with train/ and test/ (or val/)")
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise DataError(f"{root} must hold train/ and test/ (or val/), one folder a class in each")
    listings = [_listing(part) for part in (root / "train", tests[0])]
    classes = sorted({label for label, _, _ in listings[0]})
    strangers = sorted({label for label, _, _ in listings[1]} - set(classes))
    if strangers:
        raise DataError(f"{tests[0]} has classes that {root / 'train'} has not: {', '.join(strangers)}")

    key = hashlib.sha256(repr([str(root.resolve()), listings]).encode()).hexdigest()[:24]
    cached = cache_dir() / f"imagefolder-{key}.npz"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cached.with_suffix(".lock")):
            if not cached.exists():
                say(f"decoding {sum(map(len, listings))} images under {root} (once)")
                images = [_decode([path for _, path, _ in listing]) for listing in listings]
                labels = [np.array([classes.index(label) for label, _, _ in listing]) for listing in listings]
                decoded = Dataset(images[0], labels[0], images[1], labels[1], tuple(classes))
                _write_atomically(cached, decoded)
    except OSError as error:
        raise DataError(f"cannot cache decoded images in {cached.parent}: {error.strerror}; set STUDY_CACHE") from None
    with np.load(cached) as stored:
        parts = (stored[part] for part in ARRAYS)
        dataset = Dataset(*parts, tuple(str(name) for name in stored["classes"]))  # type: ignore[call-arg]
        # Hashing 180 MB again would cost more than reading them.
        dataset.__dict__["fingerprint"] = str(stored["fingerprint"])
    return dataset


def _listing(part: Path) -> list[tuple[str, str, tuple[int, int]]]:
    """(class, path, (size, mtime)) of every image of a split, in the order of class and file name."""
    found = []
    for folder in sorted(entry.name for entry in os.scandir(part) if entry.is_dir()):
        with os.scandir(part / folder) as entries:
            files = [e for e in entries if e.name.lower().endswith(IMAGE_ENDINGS) and e.is_file()]
        for entry in sorted(files, key=lambda e: e.name):
            status = entry.stat()
            found.append((folder, entry.path, (status.st_size, status.st_mtime_ns)))
    if not found:
        raise DataError(f"no classes with images under {part}: it must hold one folder of images a class")
    return found


def _decode(paths: list[str]) -> Images:
    # Processes, not threads: Pillow's share of the interpreter lock leaves threads no gain (20,000 JPEGs of 32x32 on
    # 2 cores: 3.1 s alone, 3.4 s with threads, 1.6 s with processes). Spawned, because torch's threads may be running.
    chunks = [paths[i : i + 500] for i in range(0, len(paths), 500)]
    if len(chunks) == 1:
        return _decode_chunk(paths)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return np.concatenate(list(pool.map(_decode_chunk, chunks)))


def _decode_chunk(paths: list[str]) -> Images:
    from PIL import Image

    images = np.empty((len(paths), SIDE, SIDE, 3), np.uint8)
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                colour = image.convert("RGB")
                if colour.size != (SIDE, SIDE):
                    colour = colour.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                images[i] = np.asarray(colour)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot decode the image {path}: {error}; mend or remove it") from None
    return images


def _write_atomically(path: Path, dataset: Dataset) -> None:
    arrays = {part: getattr(dataset, part) for part in ARRAYS}
    names, fingerprint = np.array(dataset.classes), np.array(dataset.fingerprint)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, allow_pickle=False, classes=names, fingerprint=fingerprint, **arrays)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _locked(path: Path) -> Any:
    from filelock import FileLock

    return FileLock(path)
