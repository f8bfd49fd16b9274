"""Database URLs: parsed, corrected, and redacted before anyone sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import UserError

# SQLAlchemy is imported by need: a launcher starts its workers first, which takes less than to import it.
if TYPE_CHECKING:
    from sqlalchemy.engine import URL

DEFAULT = "sqlite:///study.db"


def sqlite_url(path: str | Path) -> str:
    """The storage URL of a SQLite file, whatever signs are in its name."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(Path(path).absolute())).render_as_string()


def parse(text: str) -> URL:
    """The URL meant by `text`: `postgres://` and `postgresql://` become `postgresql+psycopg://`, and `~` at the start
    of a SQLite file's path the home folder.

    Raises:
        UserError: a path where a URL is meant, an unreadable URL, or a database that is neither SQLite nor PostgreSQL.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if "://" not in text:
        # What may hold a password is not repeated.
        shown = "another text" if any(sign in text for sign in "@=:") else repr(text)
        path = "study.db" if not text or shown == "another text" else text
        raise UserError(f"a storage is a URL, got {shown}; for a file write sqlite:///{path}")
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # Not even the text is shown: what cannot be parsed cannot be redacted.
        raise UserError(
            "unreadable storage URL; write sqlite:///FILE or postgresql://USER@HOST:PORT/DATABASE"
        ) from None
    backend, _, driver = url.drivername.partition("+")
    if backend == "sqlite" and driver in ("", "pysqlite"):
        if url.host or url.username or url.password:
            path = "/".join(filter(None, (url.host, url.database)))
            raise UserError(f"a SQLite URL has three slashes and no user, got {redact(url)}; write sqlite:///{path}")
        if not url.database or url.database == ":memory:":
            raise UserError(f"a study needs a file that its workers share, got {text!r}; write sqlite:///study.db")
        try:
            file = str(Path(url.database).expanduser())
        except RuntimeError:
            raise UserError(f"no home folder is known for the ~ in {text!r}; write the whole path") from None
        return url.set(drivername="sqlite", database=file)
    if backend in ("postgres", "postgresql") and driver in ("", "psycopg", "psycopg2"):
        if "@" in (url.host or ""):
            raise UserError("the storage URL has two @; write an @ in a user name or password as %40")
        if not url.database:
            raise UserError(f"the storage URL names no database: {redact(url)}; write …/DATABASE")
        return url.set(drivername="postgresql+psycopg")
    raise UserError(f"a storage is sqlite:///FILE or postgresql://…, got {url.drivername}://")


def redact(url: URL) -> str:
    """The URL as it may be shown: no password, neither before the host nor among the options, and no driver."""
    shown = url.difference_update_query([key for key in url.query if "pass" in key.lower()])
    return shown.set(drivername=url.get_backend_name()).render_as_string(hide_password=True)


def tells_password(text: str) -> bool:
    """Whether a URL has a password in it, before the host or among the options."""
    url = parse(text)
    return bool(url.password) or any("pass" in key.lower() for key in url.query)


def file_of(url: URL) -> Path | None:
    """The file behind a SQLite URL."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None
