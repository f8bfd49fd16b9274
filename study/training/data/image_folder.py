"""Folders of images, one folder a class, decoded once into cached arrays.

Layouts: `train/` with `test/` (torchvision's ImageFolder layout), with `val/` in the place of `test/`, or with both; or
one folder a class without splits, of which a stratified fifth becomes the test split. `valid/` and `validation/` are
other names of `val/`. Images in subfolders of a class belong to the class. Links are followed.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from study.training.data import decoding
from study.training.data.array_cache import load_cached
from study.training.data.dataset import DataError, Dataset, is_control, printable
from study.training.data.split import TEST_FRACTION, split_off_test

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""Names of folders, in lower case, and the split that each holds."""
SYSTEM_ENTRIES = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
     "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__")
)  # fmt: skip
"""What operating systems, network disks and tools put into folders, in lower case."""
NO_DECODER = frozenset((".avif", ".heic", ".heif", ".hif", ".jp2", ".jxl", ".psd", ".svg", ".tga", ".webp"))
"""Endings of images that are counted as such where they are not among `decoding.accepted_endings()`."""
SHOWN_CLASSES = 10


@dataclass
class Listing:
    """The images below one folder of classes, and what else is there."""

    folder: Path
    images: list[tuple[str, str, tuple[int, int]]] = field(default_factory=list)
    """(class, path, (size in bytes, modification time in ns)), in the order of class, subfolder and file name."""
    empty: list[str] = field(default_factory=list)
    """Class folders without images."""
    hidden: int = 0
    """Hidden and system entries; a folder counts as one."""
    undecodable: Counter[str] = field(default_factory=Counter)
    """Images that this machine has no decoder for, by ending."""
    others: Counter[str] = field(default_factory=Counter)
    """Other files, by ending."""
    outside: int = 0
    """Files beside the class folders."""

    @property
    def classes(self) -> Counter[str]:
        """Number of images by class."""
        return Counter(name for name, _, _ in self.images)


def load_image_folder(root: Path, *, size: int | None = None, channels: int | None = None) -> Dataset:
    """The images below `root`, from the cache if they are as they were when they were decoded.

    The cache is keyed by every file's name, size and modification time and by all that changes decoding.

    Args:
        size: height and width that every image gets. None: the images' own, which must be the same for all.
        channels: 1 or 3. None: 3.

    Raises:
        DataError: a layout, a folder or files that cannot be used, images of different sizes, or a cache that cannot
            be written.
    """
    if not os.path.isdir(root):
        raise DataError(f"no folder {printable(root)}: --data-root must be a folder with train/ and test/ (or val/)")
    folders, beside = find_splits(root)
    listings = {split: list_images(folder) for split, folder in folders.items()}
    classes, warnings = _check_classes(listings)
    notes = (_summary(root, listings, beside), *warnings)

    def build(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
        count = sum(len(listing.images) for listing in listings.values())
        logger.info("decoding %d images under %s (once)", count, printable(root))
        return classes, _decode(folder, listings, classes, size, channels or 3)

    dataset = load_cached(f"imagefolder-{_key(root, listings, size, channels or 3)}", build)
    whole = replace(dataset, notes=(*notes, *dataset.notes))
    whole.__dict__["fingerprint"] = dataset.fingerprint  # hashing the images again would take longer than all the rest
    return whole


def find_splits(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, and the names of other entries beside them; {"all": root} where there are no splits.

    Without `test/` the validation folder holds the test split.

    Raises:
        DataError: splits that are missing, or two folders for one.
    """
    folders: dict[str, Path] = {}
    beside = []
    for entry in _entries(root):
        split = SPLITS.get(entry.name.lower())
        if split is None or not _is_folder(_status(entry)):
            beside.append(entry.name)
        elif split in folders:
            raise DataError(
                f"{printable(root)} has two folders for the {split} split: {folders[split].name}/ and {entry.name}/; "
                "keep one"
            )
        else:
            folders[split] = root / entry.name
    if not folders:
        return {"all": root}, []
    if len(folders) == 1 and "train" in folders:
        raise DataError(
            f"{printable(root)} must hold train/ and test/ (or val/), and holds train/ alone; "
            f"name {printable(folders['train'])} to have a part of it split off for testing"
        )
    if "train" not in folders:
        there = " and ".join(f"{folder.name}/" for folder in folders.values())
        raise DataError(
            f"{printable(root)} must hold train/ and test/ (or val/), and holds {there} without train/; "
            "add it, or name a class otherwise"
        )
    if "test" not in folders:
        folders["test"] = folders.pop("validation")
    return {split: folders[split] for split in ("train", "validation", "test") if split in folders}, beside


def list_images(part: Path) -> Listing:
    """The images of the class folders in `part`.

    Raises:
        DataError: a folder that cannot be read, a link to nothing or to a folder that is listed already, a class
            whose name is no text.
    """
    listing = Listing(part)
    listed: dict[tuple[int, int], str] = {}
    accepted = decoding.accepted_endings()
    for entry in _entries(part):
        if _is_hidden(entry.name):
            listing.hidden += 1
        elif not _is_folder(_status(entry)):
            listing.outside += 1
        else:
            if any(map(is_control, entry.name)):
                raise DataError(
                    f"a class must be named by text without control characters, got {printable(entry.path)}; "
                    "rename the folder"
                )
            before = len(listing.images)
            _list_class(entry, listing, listed, accepted)
            if len(listing.images) == before:
                listing.empty.append(entry.name)
    return listing


def _list_class(
    top: os.DirEntry[str], listing: Listing, listed: dict[tuple[int, int], str], accepted: Iterable[str]
) -> None:
    """Append the images of a class folder to `listing`: those of a folder, then those of its subfolders."""
    folders = [top.path]
    while folders:
        folder = folders.pop()
        status = os.stat(folder)
        # Also ends the walk where a link leads back to a folder above it.
        first = listed.setdefault((status.st_dev, status.st_ino), folder)
        if first is not folder:
            raise DataError(
                f"{printable(folder)} and {printable(first)} are the same folder, by a link; remove one of them"
            )
        below = []
        for entry in _entries(folder):
            if _is_hidden(entry.name):
                listing.hidden += 1
                continue
            status = _status(entry)
            ending = os.path.splitext(entry.name)[1].lower()
            if _is_folder(status):
                below.append(entry.path)
            elif ending in accepted and stat.S_ISREG(status.st_mode):
                listing.images.append((top.name, entry.path, (status.st_size, status.st_mtime_ns)))
            elif ending in NO_DECODER:
                listing.undecodable[ending] += 1
            else:
                listing.others[ending] += 1
        folders += reversed(below)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"cannot read the folder {printable(folder)}: {error.strerror}; make it readable or remove it"
        ) from None


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    """Of what a link leads to."""
    try:
        return entry.stat()
    except OSError as error:
        what = "the link " if entry.is_symlink() else ""
        raise DataError(f"cannot follow {what}{printable(entry.path)}: {error.strerror}; mend or remove it") from None


def _is_folder(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_ENTRIES


def _check_classes(listings: dict[str, Listing]) -> tuple[tuple[str, ...], list[str]]:
    """The classes, sorted by name, and warnings about other splits.

    Raises:
        DataError: no class or only one in a split, a class that is not in train/, an image that cannot be split.
    """
    first = next(iter(listings.values()))
    for split, listing in listings.items():
        if not listing.images:
            rule = "must hold train/ and test/ (or val/), or" if split == "all" else "must hold"
            raise DataError(
                f"no classes with images under {printable(listing.folder)}: it {rule} one folder of images a class"
                f"{_left_out([listing])}"
            )
    warnings = []
    for listing in listings.values():
        strangers = sorted(listing.classes.keys() - first.classes.keys())
        if strangers:
            raise DataError(
                f"{printable(listing.folder)} has classes that {printable(first.folder)} has not: {_some(strangers)}"
            )
        if len(listing.classes) == 1:
            raise DataError(
                f"{printable(listing.folder)} has images of one class alone ({next(iter(listing.classes))}): "
                "at least two are needed to measure an accuracy"
            )
        missing = sorted(first.classes.keys() - listing.classes.keys())
        if missing:
            warnings.append(
                f"{printable(listing.folder)} has no images of {_classes(missing)}: "
                "accuracies measured on it leave them out"
            )
    if "all" in listings:
        single = sorted(name for name, count in first.classes.items() if count == 1)
        if single:
            raise DataError(
                f"{printable(first.folder)} has no train/ and test/, and {_classes(single)} cannot be split with only "
                "one image; add images or make train/ and test/"
            )
    return tuple(sorted(first.classes)), warnings


def _summary(root: Path, listings: dict[str, Listing], beside: list[str]) -> str:
    """What was found and what is left out, on one line."""
    first, *rest = listings.values()
    parts = [f"{len(first.images):,} images of {_counts(first.classes)}"]
    if rest:
        parts[0] = f"{first.folder.name}/ {parts[0]}"
        parts += [
            f"{printable(listing.folder.name)}/ {_number(len(listing.images), 'image', 'images')}{_use(split, listing)}"
            for split, listing in list(listings.items())[1:]
        ]
    else:
        parts.append(f"there is no train/ and test/, so {TEST_FRACTION:.0%} of each class are the test split")
    return f"{printable(root)}: {'; '.join(parts)}{_left_out(listings.values(), beside)}"


def _use(split: str, listing: Listing) -> str:
    return "" if SPLITS[listing.folder.name.lower()] == split else f" (the {split} split)"


def _left_out(listings: Iterable[Listing], beside: Sequence[str] = ()) -> str:
    """`; left out: 2 files that are no images (.txt), 1 empty class (bird)`, or nothing."""
    others, undecodable = Counter[str](), Counter[str]()
    empty: set[str] = set()
    outside, hidden = 0, sum(map(_is_hidden, beside))
    for listing in listings:
        others += listing.others
        undecodable += listing.undecodable
        empty.update(listing.empty)
        outside += listing.outside
        hidden += listing.hidden
    visible = [name for name in beside if not _is_hidden(name)]
    parts: list[str] = []
    if others:
        files = _number(others.total(), "file that is no image", "files that are no images")
        parts.append(f"{files} ({_some(sorted(others))})")
    if undecodable:
        images = _number(undecodable.total(), "image", "images")
        parts.append(f"{images} without a decoder here ({_some(sorted(undecodable))})")
    if empty:
        parts.append(f"{_number(len(empty), 'empty class', 'empty classes')} ({_some(sorted(empty))})")
    if outside:
        parts.append(f"{_number(outside, 'file', 'files')} outside the class folders")
    if visible:
        parts.append(f"{_number(len(visible), 'entry', 'entries')} beside the splits ({_some(visible)})")
    if hidden:
        parts.append(_number(hidden, "hidden or system entry", "hidden or system entries"))
    return f"; left out: {', '.join(parts)}" if parts else ""


def _counts(classes: Counter[str]) -> str:
    """`3 classes: cat 40, dog 40, bird 1`: the largest first, and not all of many."""
    ordered = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    text = f"{len(ordered)} classes: " + ", ".join(f"{name} {count:,}" for name, count in ordered[:SHOWN_CLASSES])
    rest = ordered[SHOWN_CLASSES:]
    return f"{text} and {len(rest)} more of {rest[-1][1]:,} to {rest[0][1]:,} images" if rest else text


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {_some(names)}"


def _some(names: Iterable[str]) -> str:
    ordered = [printable(name) or "no ending" for name in names]
    more = f" and {len(ordered) - SHOWN_CLASSES} more" if len(ordered) > SHOWN_CLASSES else ""
    return ", ".join(ordered[:SHOWN_CLASSES]) + more


def _key(root: Path, listings: dict[str, Listing], size: int | None, channels: int) -> str:
    """Of all that decoded images depend on."""
    files = {split: (str(listing.folder), listing.images) for split, listing in listings.items()}
    return decoding.key(size, channels, os.path.realpath(root), files)


def _decode(
    folder: Path, listings: dict[str, Listing], classes: tuple[str, ...], size: int | None, channels: int
) -> tuple[str, ...]:
    """Write the arrays of all splits into `folder`; the notes."""
    index = {name: i for i, name in enumerate(classes)}
    paths = {split: [path for _, path, _ in listing.images] for split, listing in listings.items()}
    labels = {split: np.array([index[name] for name, _, _ in of.images]) for split, of in listings.items()}
    if "all" in listings:
        test = split_off_test(labels["all"])
        train = np.setdiff1d(np.arange(len(labels["all"])), test)
        rows = {"train": train, "test": test}
        paths = {split: [paths["all"][i] for i in of] for split, of in rows.items()}
        labels = {split: labels["all"][of] for split, of in rows.items()}
    for split, of_split in labels.items():
        np.save(folder / f"{split}_labels.npy", of_split.astype(np.int64))
    form = _form([path for of_split in paths.values() for path in of_split], size, channels)
    return decoding.fill_all(folder, {split: decoding.Files(of) for split, of in paths.items()}, form)


def _form(paths: Sequence[str], size: int | None, channels: int) -> decoding.Form:
    if size is not None:
        return decoding.Form(size, size, channels)
    sizes = decoding.measure(paths)
    if len(sizes) > 1:
        raise decoding.differing_sizes(sizes)
    width, height = next(iter(sizes), (1, 1))  # none where all are damaged
    return decoding.Form(height, width, channels, resize=False)
