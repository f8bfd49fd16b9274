"""Files of checkpoints and models in a study's store: a folder, or an object store that fsspec reaches.

A study's config says where its store is, and the database holds file names only. A name must have the form that this
program gives its files, so whoever can write to the database can make nobody read, write or delete any other file.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from storage.errors import UserError

logger = logging.getLogger(__name__)

DATABASE = "database"
"""The value of `checkpoint.store` and `artifacts.store` that means: no files, the database itself."""
LOCAL = ("file", "local")
PROTOCOLS = (*LOCAL, "s3", "s3a", "gs", "gcs", "az", "abfs", "sftp", "ssh")
"""Stores that only hold what was put there. Others that fsspec knows run code, follow references, unpack archives,
fetch web pages, or are gone with the process."""
CHECKPOINT, MODEL = "checkpoint", "safetensors"
"""Endings of the files."""
NAME = re.compile(
    r"(?:(?P<key>[0-9a-f]{16})-)?trial-(?P<trial>\d{1,19})-(?P<token>\d{1,19})-[0-9a-f]{8}"
    rf"\.(?P<ending>{CHECKPOINT}|{MODEL})"
)
"""Of a file: the key of its study in its database (none in version 0.1.0), the ids of trial and lease."""
MOST_BYTES = 2**30
"""Of a file; PostgreSQL takes no more in one value either."""


def file_name(key: str, trial_id: int, token: int, ending: str = CHECKPOINT) -> str:
    """A new name for a file."""
    return f"{key}-trial-{trial_id}-{token}-{secrets.token_hex(4)}.{ending}"


def check(folder: str, setting: str = "checkpoint.store") -> None:
    """Raises:
    UserError: not a whole path and not a URL of an object store, or what fsspec needs for it is missing.
    """
    protocol, scheme, rest = folder.partition("://")
    rule = (
        f"{setting} must be 'database', the whole path of a folder, or a URL such as s3://BUCKET/FOLDER "
        f"({', '.join(PROTOCOLS[2:])}), got {folder!r}"
    )
    if not scheme and not Path(folder).is_absolute():
        raise UserError(f"{rule}: it must be the same folder wherever a worker starts")
    if "::" in folder or "\0" in folder or (scheme and protocol not in PROTOCOLS):
        raise UserError(f"{rule}: this kind of store is not allowed")
    if scheme and (not rest.strip("/") or (protocol in LOCAL and not rest.startswith("/"))):
        raise UserError(f"{rule}: it names no {'whole path' if protocol in LOCAL else 'bucket or host'}")
    if scheme and protocol not in LOCAL:
        import fsspec

        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise UserError(f"{rule}: {error}") from None


def probe(folder: str, setting: str = "checkpoint.store") -> None:
    """Write, read and delete a small file, so that a store that cannot take files is known before the launch.

    Raises:
        UserError: it cannot, and why.
    """
    check(folder, setting)
    name = file_name(secrets.token_hex(8), 0, 0)
    content = secrets.token_bytes(32)
    try:
        write(folder, name, content)
        if read(folder, name) != content:
            raise OSError("what was written does not come back")
        remove(folder, name)
    except OSError as error:
        with suppress(OSError):
            remove(folder, name)
        raise UserError(
            f"{setting} must be a store in which this machine can write, read and delete, got {folder!r}: "
            f"{error}; name another, or leave it out to use the database"
        ) from None


def write(folder: str, name: str, content: bytes) -> None:
    """Raises:
    OSError: the store did not take it, for whatever reason; or more than MOST_BYTES.
    """
    if len(content) > MOST_BYTES:
        raise OSError(f"the file has {len(content):,} bytes, more than {MOST_BYTES:,}")
    if (path := _local(folder, name)) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return
    with _remote(folder, name) as (fs, path_in_store):
        fs.makedirs(path_in_store.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(path_in_store, content)


def read(folder: str, name: str) -> bytes | None:
    """The content; None if there is no such file, or it is no regular file of at most MOST_BYTES.

    Raises:
        OSError: the store does not answer.
    """
    if NAME.fullmatch(name) is None:
        return None
    if (path := _local(folder, name)) is not None:
        return _read_regular(path)
    with _remote(folder, name) as (fs, path_in_store):
        try:
            details = fs.info(path_in_store)
            if details.get("type") != "file" or (details.get("size") or 0) > MOST_BYTES:
                return None
            content: bytes = fs.cat_file(path_in_store)
        except FileNotFoundError:
            return None
    return content


def remove(folder: str, name: str) -> None:
    """Remove the file, if it is there.

    Raises:
        OSError: the store does not allow it.
    """
    if (path := _local(folder, name)) is not None:
        path.unlink(missing_ok=True)
        return
    with _remote(folder, name) as (fs, path_in_store), suppress(FileNotFoundError):
        fs.rm_file(path_in_store)


def remove_files(folder: str, files: Iterable[str]) -> list[str]:
    """Remove files that no committed row names any more; those that were removed.

    A store that refuses costs a warning: a trial's result does not depend on it.
    """
    removed: list[str] = []
    for name in files if folder != DATABASE else ():
        try:
            remove(folder, name)
            removed.append(name)
        except (OSError, UserError) as error:
            logger.warning("the file %r was not removed (%s); `study gc` removes it later", name, error)
    return removed


def names(folder: str, ending: str = CHECKPOINT) -> list[str]:
    """The files with this ending that are there.

    Raises:
        OSError: the store cannot be listed.
    """
    check(folder)
    if (path := _local(folder)) is not None:
        entries = [entry.name for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)]
    else:
        with _remote(folder) as (fs, path_in_store):
            entries = [str(entry).rpartition("/")[2] for entry in fs.ls(path_in_store, detail=False)]
    return sorted(name for name in entries if (match := NAME.fullmatch(name)) and match["ending"] == ending)


def _local(folder: str, name: str | None = None) -> Path | None:
    """The path of a file in a folder of this machine; None: the store is elsewhere."""
    protocol, scheme, rest = folder.partition("://")
    if scheme and protocol not in LOCAL:
        return None
    path = Path(rest if scheme else folder)
    return path if name is None else path / _checked(name)


@contextmanager
def _remote(folder: str, name: str | None = None) -> Iterator[tuple[Any, str]]:
    """The file system and the path in it. Every error of it becomes an OSError: each has others of its own."""
    import fsspec

    check(folder)
    url = folder if name is None else f"{folder.rstrip('/')}/{_checked(name)}"
    try:
        yield fsspec.core.url_to_fs(url)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _checked(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise OSError(f"{name!r} is not the name of a checkpoint's or a model's file")
    return name


def _read_regular(path: Path) -> bytes | None:
    try:
        # A pipe or a device is opened without waiting for it, a link not at all.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        if path.is_symlink():
            return None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
        os.close(descriptor)
        return None
    with open(descriptor, "rb") as file:
        return file.read(MOST_BYTES)
