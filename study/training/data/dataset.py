"""A data set in memory, its fingerprint, and where decoded data are cached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def cache_dir() -> Path:
    """Where downloads and decoded images are kept: $STUDY_CACHE, else the user's cache directory."""
    import platformdirs

    return Path(os.environ.get("STUDY_CACHE") or platformdirs.user_cache_dir("dynamic-training-study"))


def _locked(path: Path) -> Any:
    from filelock import FileLock

    return FileLock(path)
