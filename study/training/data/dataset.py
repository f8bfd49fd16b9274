"""A data set in memory, its fingerprint, and the folder that caches downloads and decoded images."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from filelock import BaseFileLock

Images = NDArray[Any]
"""uint8 in [0, 255], shape [N, height, width, channels]; or, of own data alone, float32, shape [N, features...].
The array may be a read-only memory-mapped file."""


Labels = NDArray[np.int64]
"""int64, shape [N]: the index of each image's class in `Dataset.classes`."""


HASHED = 1000
"""Rows that are hashed at a time."""


class DataError(Exception):
    """The data cannot be used: a sentence with the rule, the value and the fix."""


@dataclass(frozen=True)
class Dataset:
    """A whole data set, as published: its splits and its class names."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]
    validation_images: Images | None = None
    """The data set's own validation split, where it has one beside its test split."""
    validation_labels: Labels | None = None
    notes: tuple[str, ...] = ()
    """What was found, left out and converted, a line each; for people, without influence on anything."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images and labels: two machines with the same fingerprint train on the same data."""
        digest = hashlib.sha256()
        parts: list[Images | Labels] = [self.train_images, self.train_labels, self.test_images, self.test_labels]
        if self.validation_images is not None and self.validation_labels is not None:
            parts += [self.validation_images, self.validation_labels]
        for array in parts:
            digest.update(f"{array.dtype}{array.shape}".encode())
            for start in range(0, len(array), HASHED):  # mapped files need not fit into memory
                digest.update(np.ascontiguousarray(array[start : start + HASHED]).data)
        return digest.hexdigest()


def cache_dir() -> Path:
    """The folder of downloads and decoded images: $STUDY_CACHE, else the user's cache directory. It may not exist yet.

    Raises:
        DataError: $STUDY_CACHE is not set and the user has no home folder.
    """
    import platformdirs

    try:
        folder = Path(os.environ.get("STUDY_CACHE") or platformdirs.user_cache_dir("dynamic-training-study"))
        folder = folder.expanduser()
    except RuntimeError:
        folder = Path("~")
    if folder.parts[:1] == ("~",):  # platformdirs before 4.4 returns the path as it is
        raise DataError("there is no home folder for the cache: set STUDY_CACHE to a folder that you can write to")
    return folder


def cache_lock(path: Path) -> BaseFileLock:
    """A lock between processes, also between those of several users who share a cache."""
    from filelock import FileLock

    return FileLock(path, mode=0o666)


def printable(text: str | os.PathLike[str]) -> str:
    """`text` on one line of a terminal: control characters and bytes that are not UTF-8 as escapes such as \\x1b."""
    return "".join(_escaped(c) if is_control(c) else c for c in os.fspath(text))


def is_control(character: str) -> bool:
    """Control and formatting characters, line separators, and bytes that are not UTF-8 (surrogates)."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", errors="surrogatepass").decode("ascii")
