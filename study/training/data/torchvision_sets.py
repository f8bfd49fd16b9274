"""The data sets of torchvision: four by names of their own, and any of its classification sets."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from study.training.data import decoding
from study.training.data.array_cache import create, load_cached
from study.training.data.dataset import DataError, Dataset, Images, Labels, cache_lock, printable
from study.training.data.decoding import Form, Report
from study.training.data.own_data import check
from study.training.data.split import TEST_FRACTION, split_off_test

logger = logging.getLogger(__name__)

NAMED = ("cifar10", "cifar100", "svhn", "fashion-mnist")
"""Data sets with names of their own, as images of 32x32 pixels in three channels."""
PREFIX = "torchvision:"
SAMPLED = 200
"""Images of a torchvision data set that are looked at to find their size and channels."""

Options = dict[str, Any]
_FLAG: dict[str, Options] = {"train": {"train": True}, "test": {"train": False}}
_SPLIT: dict[str, Options] = {"train": {"split": "train"}, "test": {"split": "test"}}
_VAL: dict[str, Options] = {"train": {"split": "train"}, "test": {"split": "val"}}
_THREE: dict[str, Options] = {**_SPLIT, "validation": {"split": "val"}}
_ONE: dict[str, Options] = {"all": {}}
SETS: dict[str, dict[str, Options]] = {
    "Caltech101": _ONE, "Caltech256": _ONE, "CIFAR10": _FLAG, "CIFAR100": _FLAG, "CLEVRClassification": _VAL,
    "Country211": {**_SPLIT, "validation": {"split": "valid"}}, "DTD": _THREE,
    "EMNIST": {split: {"split": "balanced", **options} for split, options in _FLAG.items()},
    "EuroSAT": _ONE, "FashionMNIST": _FLAG, "FER2013": _SPLIT, "FGVCAircraft": _THREE, "Flowers102": _THREE,
    "Food101": _SPLIT, "GTSRB": _SPLIT, "Imagenette": _VAL, "ImageNet": _VAL,
    "INaturalist": {"train": {"version": "2021_train_mini"}, "test": {"version": "2021_valid"}},
    "KMNIST": _FLAG, "LFWPeople": _SPLIT, "MNIST": _FLAG, "Omniglot": _ONE,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}}, "PCAM": _THREE,
    "Places365": {"train": {"split": "train-standard", "small": True}, "test": {"split": "val", "small": True}},
    "QMNIST": _FLAG, "RenderedSST2": _THREE, "SEMEION": _ONE, "StanfordCars": _SPLIT, "STL10": _SPLIT,
    "SUN397": _ONE, "SVHN": _SPLIT, "USPS": _FLAG,
}  # fmt: skip
"""The classification sets of torchvision.datasets, and the arguments that give each of their splits."""


def load_named(name: str, root: Path, *, padded: bool = True) -> Dataset:
    """One of `NAMED`.

    Args:
        padded: the 28x28 pixels of fashion-mnist in a frame of zeros, 32x32.
    """
    from torchvision import datasets

    make, parts = {
        "cifar10": (datasets.CIFAR10, _FLAG),
        "cifar100": (datasets.CIFAR100, _FLAG),
        "svhn": (datasets.SVHN, _SPLIT),
        "fashion-mnist": (datasets.FashionMNIST, _FLAG),
    }[name]

    def arrays(archive: Any) -> tuple[Images, Labels]:
        images = np.asarray(archive.data)
        labels = np.asarray(archive.labels if hasattr(archive, "labels") else archive.targets, dtype=np.int64)
        if images.ndim == 3:  # fashion-mnist: 28x28 grey
            images = np.pad(images, ((0, 0), (2, 2), (2, 2))) if padded else images
            images = np.repeat(images[..., None], 3, axis=3)
        elif images.shape[1] == 3:  # svhn: channels first
            images = images.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images, dtype=np.uint8), labels

    train, test = _fetched(name, make, root, parts).values()
    classes = tuple(getattr(train, "classes", [str(label) for label in range(10)]))
    return Dataset(*arrays(train), *arrays(test), classes)


def _fetched(name: str, make: type[Any], root: Path, parts: dict[str, Options]) -> dict[str, Any]:
    """torchvision's data sets, by split; downloaded where they are missing.

    Raises:
        DataError: a download that failed, a folder that cannot be used, a package that is missing.
    """

    def fetch(options: Options) -> Any:
        try:
            try:
                return make(root, **options, **offline)
            except (RuntimeError, FileNotFoundError):
                if not offline:
                    raise
            logger.info("downloading %s to %s", name, printable(root))
            try:
                return make(root, **options, download=True)
            except (OSError, RuntimeError, ValueError) as error:
                where = f"{name} is not under {printable(root)}"
                reason = printable(" ".join(str(error).split()))
                raise DataError(f"{where} and could not be downloaded: {reason}") from None
        except ImportError as error:
            raise DataError(f"{name} needs a package that is missing here: {printable(str(error))}") from None
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever damaged files make torchvision raise
            reason = (isinstance(error, OSError) and error.strerror) or printable(str(error)) or type(error).__name__
            raise DataError(f"cannot read {name} under {printable(root)}: {reason}") from None

    can_download = any("download" in inspect.signature(of).parameters for of in make.__mro__)
    offline = {"download": False} if can_download else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot keep {name} under {printable(root)}: {error.strerror}; name another folder with --data-root"
        ) from None
    try:
        with cache_lock(root / f".{name.removeprefix(PREFIX)}.lock"):  # several workers may start at once
            return {split: fetch(options) for split, options in parts.items()}
    except OSError:  # a folder to read from: it is all there, or the attempt to download says what is not
        return {split: fetch(options) for split, options in parts.items()}


@dataclass(frozen=True)
class Items:
    """The pictures of a torchvision data set, with their labels."""

    name: str
    dataset: Any
    grey: bool = False
    """All are said to be grey: one in colours is refused."""

    def __len__(self) -> int:
        return len(self.dataset)

    def called(self, i: int) -> str:
        return f"{self.name}, image {i}"

    def item(self, i: int) -> tuple[Any, int]:
        """A PIL image and its label."""
        from PIL import Image

        with decoding.photographs_only():
            image, label = self.dataset[i]
            if not isinstance(image, Image.Image):
                image = Image.fromarray(np.asarray(image))
            image.load()
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise DataError(f"its label is no class but of type {type(label).__name__}")
        return image, int(label)

    def convert(self, i: int, form: Form, report: Report) -> Images:
        image, label = self.item(i)
        if self.grey and not _is_grey(image):
            raise DataError("it has colours, and those looked at first have none; set data.channels to 1 or 3")
        changes: list[str] = []
        array = decoding.fit(decoding.to_rgb(image, changes), form, report)
        report.changes.update(changes)
        report.labels.append(label)
        return array


def _is_grey(image: Any) -> bool:
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def load_torchvision(name: str, root: Path, size: int | None, channels: int | None) -> Dataset:
    """`torchvision:NAME`: its images converted once into cached arrays."""
    import torchvision

    known = name.removeprefix(PREFIX)
    if known not in SETS:
        names = {each.lower(): each for each in SETS}
        close = difflib.get_close_matches(known.lower(), names, n=1)
        there = f"did you mean {PREFIX}{names[close[0]]}?" if close else f"there are: {', '.join(SETS)}"
        raise DataError(f"no classification set {known!r} of torchvision; {there}")
    archives = _fetched(name, getattr(torchvision.datasets, known), root, SETS[known])

    def build(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
        logger.info("decoding %d images of %s (once)", sum(map(len, archives.values())), name)
        form, grey = _torchvision_form(name, archives, size, channels)
        items = {split: Items(name, archive, grey) for split, archive in archives.items()}
        notes = decoding.fill_all(folder, items, form)
        if "all" in archives:
            _split_off_test(folder)
        count = 1 + max(int(np.load(path).max()) for path in folder.glob("*_labels.npy"))
        return _class_names(next(iter(archives.values())), count), notes

    lengths = {split: len(archive) for split, archive in archives.items()}
    key = decoding.key(name, str(root.resolve()), torchvision.__version__, lengths, size, channels)
    dataset = load_cached(f"{known.lower()}-{key}", build)
    used = []
    if "all" in archives:
        used.append(f"{name} has no test split, so {TEST_FRACTION:.0%} of each class are the test split")
    test = SETS[known].get("test", {})
    if test.get("split") == "val" or test.get("version") == "2021_valid":
        used.append(f"{name}: its validation split is the test split")
    whole = replace(dataset, notes=(*used, *dataset.notes))
    whole.__dict__["fingerprint"] = dataset.fingerprint
    return check(whole, name)


def _torchvision_form(name: str, archives: dict[str, Any], size: int | None, channels: int | None) -> tuple[Form, bool]:
    """What the pictures become, by a look at some of each split; and whether all must be grey."""
    sizes: Counter[tuple[int, int]] = Counter()
    grey = channels is None
    for split, archive in archives.items():
        items = Items(name, archive)
        if not len(items):
            raise DataError(f"{name} has no images in its {split} split")
        for i in np.linspace(0, len(items) - 1, min(SAMPLED, len(items)), dtype=np.int64):
            try:
                image, _ = items.item(int(i))
            except Exception as error:  # noqa: BLE001 - as in decoding
                raise DataError(f"cannot use {items.called(int(i))}: {decoding.reason(error)}") from None
            sizes[image.size] += 1
            grey = grey and _is_grey(image)
    if size is None and len(sizes) > 1:
        raise decoding.differing_sizes(sizes)
    width, height = (size, size) if size is not None else next(iter(sizes))
    return Form(height, width, channels or (1 if grey else 3), resize=size is not None), grey


def _split_off_test(folder: Path) -> None:
    """Two splits in the place of the arrays of `all` images."""
    images, labels = np.load(folder / "all_images.npy", mmap_mode="r"), np.load(folder / "all_labels.npy")
    test = split_off_test(labels)
    rows = {"train": np.setdiff1d(np.arange(len(labels)), test), "test": test}
    arrays = create(folder, {f"{split}_images": (len(of), *images.shape[1:]) for split, of in rows.items()})
    for split, of in rows.items():
        np.save(folder / f"{split}_labels.npy", labels[of])
        for start in range(0, len(of), decoding.CHUNK):
            chunk = of[start : start + decoding.CHUNK]
            arrays[f"{split}_images"][start : start + len(chunk)] = images[chunk]
    (folder / "all_images.npy").unlink()
    (folder / "all_labels.npy").unlink()


def _class_names(archive: Any, count: int) -> tuple[str, ...]:
    """The data set's own names of its classes, else their numbers."""
    for attribute in ("classes", "categories"):
        names = getattr(archive, attribute, None)
        if isinstance(names, list | tuple) and len(names) >= count:
            # ImageNet has several names a class.
            return tuple(printable(each[0] if isinstance(each, tuple) else str(each)) for each in names)
    return tuple(map(str, range(count)))
