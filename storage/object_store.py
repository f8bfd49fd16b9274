"""Files wherever fsspec reaches: a shared folder, S3, …; for checkpoints that are kept outside the database."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import fsspec

from storage.errors import UserError


def check(folder: str) -> None:
    """Raises:
    UserError: fsspec does not know the kind of URL, or lacks what it needs for it.
    """
    if "://" not in folder and not Path(folder).is_absolute():
        raise UserError(
            f"checkpoint.store must be the same folder wherever a worker starts, got {folder!r}; write its whole path"
        )
    try:
        fsspec.core.url_to_fs(folder)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"checkpoint.store must be 'database', a folder or an fsspec URL, got {folder!r}: {error}"
        ) from None


def write(path: str, content: bytes) -> None:
    fs, place = fsspec.core.url_to_fs(path)
    fs.makedirs(fs._parent(place), exist_ok=True)
    fs.pipe_file(place, content)


def read(path: str) -> bytes | None:
    """The content; None if there is no such file."""
    fs, place = fsspec.core.url_to_fs(path)
    try:
        content: bytes = fs.cat_file(place)
    except FileNotFoundError:
        return None
    return content


def remove(path: str) -> None:
    """Remove the file, if it is there."""
    fs, place = fsspec.core.url_to_fs(path)
    with suppress(FileNotFoundError):
        fs.rm_file(place)
