"""Waiting for a database that is unavailable: which errors pass, and how long to retry."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

import optuna
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

PATIENCE_SECONDS = float(os.environ.get("STUDY_PATIENCE_SECONDS", "300"))
"""How long a database may be unavailable before that is an error."""


T = TypeVar("T")


def is_transient(error: BaseException) -> bool:
    """Whether an error is of a kind that ends when the database is back: a restart, a network cut, a full disk."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if isinstance(error, OperationalError) and isinstance(error.orig, sqlite3.OperationalError):
        # Of a statement or of what it reads, which stay: no such column, a sum too large, text that is no UTF-8.
        return getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_ERROR) != sqlite3.SQLITE_ERROR
    return isinstance(error, OperationalError | InterfaceError | optuna.exceptions.StorageInternalError)


def retry(action: Callable[[], T], patience: float | None = None, stopping: Callable[[], bool] = lambda: False) -> T:
    """`action`, repeated while the database is unavailable; it must be harmless to do twice."""
    deadline, pause = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience), 0.1
    while True:
        try:
            return action()
        except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
            if not is_transient(error) or stopping() or time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
