"""Data sets as folders of memory-mapped arrays in the cache: larger than memory if need be, whole or not there at all.

A folder holds one `.npy` file an array and `meta.json`: class names, notes, the fingerprint, and the length and
checksum of each array.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from study.training.data.dataset import DataError, Dataset, Images, cache_dir, cache_lock, printable

logger = logging.getLogger(__name__)

ARRAYS = ("train_images", "train_labels", "validation_images", "validation_labels", "test_images", "test_labels")
CHECKED = 2**30
"""Bytes of a data set up to which every reading compares checksums (about a second); of larger ones, the lengths."""
READ = 2**24
"""Bytes that are read at a time."""

Build = Callable[[Path], tuple[tuple[str, ...], tuple[str, ...]]]
"""Writes the arrays into a folder (`create`); returns the class names and the notes."""


def load_cached(name: str, build: Build) -> Dataset:
    """The data set `name` of the cache, which `build` makes where it is missing or damaged.

    Processes that start together build it once. Images are mapped read-only (`numpy.memmap`), labels are in memory.

    Raises:
        DataError: the cache cannot be written, or what `build` raises.
    """
    folder = cache_dir() / name
    dataset = _read(folder)
    if dataset is not None:
        return dataset
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with cache_lock(folder.with_name(f"{name}.lock")):
            dataset = _read(folder, log=False)  # another process may have built it meanwhile
            if dataset is None:
                _write(folder, build)
                dataset = _read(folder, check=False)
    except OSError as error:
        raise DataError(
            f"cannot cache decoded images in {printable(folder.parent)}: {error.strerror or error}; "
            "set STUDY_CACHE to a folder that you can write to"
        ) from None
    if dataset is None:
        raise DataError(f"{printable(folder)} is removed while it is read; start again")
    return dataset


def create(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Images]:
    """uint8 arrays in `folder`, mapped for writing, with their place on the disk reserved.

    Raises:
        DataError: the disk has no room for them.
        OSError: the files cannot be written.
    """
    needed = sum(int(np.prod(shape, dtype=object)) for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        count = sum(shape[0] for shape in shapes.values())
        size = "x".join(map(str, next(iter(shapes.values()))[1:]))
        raise DataError(
            f"{count:,} images of {size} take {_bytes(needed)} in {printable(folder.parent)}, where {_bytes(free)} are "
            "free: make data.size smaller or set STUDY_CACHE to a folder on a larger disk"
        )
    arrays: dict[str, Images] = {}
    for name, shape in shapes.items():
        path = folder / f"{name}.npy"
        arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(path)
    return arrays


def _reserve(path: Path) -> None:
    """Take the place of a sparse file: a disk that fills up kills the process that writes to the mapping."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
                raise


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _read(folder: Path, *, log: bool = True, check: bool = True) -> Dataset | None:
    """The data set in `folder`, if it is there and whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("crc32") != _text_checksum(meta):
            raise ValueError("meta.json has another checksum")
        arrays: dict[str, Any] = {}
        total = sum(stored["bytes"] for stored in meta["arrays"].values())
        for name, stored in meta["arrays"].items():
            if name not in ARRAYS:
                raise ValueError(f"unknown array {name}")
            path = folder / f"{name}.npy"
            if path.stat().st_size != stored["bytes"]:
                raise ValueError(f"{name}.npy has another length")
            if check and total <= CHECKED and _checksum(path) != stored["crc32"]:
                raise ValueError(f"{name}.npy has another checksum")
            labels = name.endswith("_labels")
            arrays[name] = np.load(path, mmap_mode=None if labels else "r", allow_pickle=False)
        dataset = Dataset(classes=tuple(map(str, meta["classes"])), notes=tuple(map(str, meta["notes"])), **arrays)
        dataset.__dict__["fingerprint"] = str(meta["fingerprint"])
        return dataset
    except Exception as error:  # noqa: BLE001 - damaged files may raise anything
        if log and os.path.lexists(folder):
            reason = printable(str(error)) or type(error).__name__
            logger.warning("the cache folder %s is damaged (%s): decoding again", printable(folder), reason)
        return None


def _write(folder: Path, build: Build) -> None:
    """Build the folder whole or not at all, under the lock of `folder`."""
    for remnant in folder.parent.glob(f"{folder.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(remnant, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    damaged = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()  # of the mode that the umask gives, as its files: other users of the cache read them
    try:
        classes, notes = build(temporary)
        paths = {name: temporary / f"{name}.npy" for name in ARRAYS if (temporary / f"{name}.npy").exists()}
        arrays: dict[str, Any] = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
        meta = {
            "classes": classes,
            "notes": notes,
            "fingerprint": Dataset(classes=classes, **arrays).fingerprint,
            "arrays": {name: {"bytes": path.stat().st_size, "crc32": _checksum(path)} for name, path in paths.items()},
        }
        with open(temporary / "meta.json", "x", encoding="utf-8") as file:
            json.dump(meta | {"crc32": _text_checksum(meta)}, file, indent=1)
        for path in (*paths.values(), temporary / "meta.json", temporary):
            _synchronise(path)  # else a crash of the machine may leave the name without the content
        if os.path.lexists(folder):
            os.rename(folder, damaged)
        os.rename(temporary, folder)
    finally:
        for remnant in (temporary, damaged):
            if remnant.is_dir():
                shutil.rmtree(remnant, ignore_errors=True)
            else:
                remnant.unlink(missing_ok=True)


def _checksum(path: Path) -> int:
    value = 0
    for block in _blocks(path):
        value = zlib.crc32(block, value)
    return value


def _text_checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(READ):
            yield block


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
