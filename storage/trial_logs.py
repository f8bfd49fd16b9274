"""What workers log about their trials: collected in memory, bounded, stored under the lease, read by `study logs`.

An attempt stores at most MOST_LINES lines: the first ones as they come, and the last KEPT_LAST when it ends. A network
that logs at every step therefore fills neither the database nor the memory, and the lines before an error are there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from storage.engine import database_time, upsert
from storage.retry import is_transient
from storage.schema import ATTEMPTS, MOST_CHARACTERS, TRIAL_LOGS, TRIALS
from storage.text import printable, without_passwords

MOST_LINES = 200
"""Of an attempt."""
KEPT_LAST = 50
"""Of those, the lines before its end."""
_FIRST = MOST_LINES - KEPT_LAST - 2
"""Of those, the lines from its beginning; two more say what is left out."""
_MOST_LOOKED_AT = 4 * MOST_CHARACTERS
"""Characters of a line before it is cleaned and cut."""
LEVELS = ("debug", "info", "warning", "error", "critical")
_FETCHED = 1000


@dataclass(frozen=True)
class Line:
    position: int
    created: float
    """Seconds since 1970 on this machine's clock."""
    level: str
    message: str


class TrialLog:
    """The lines of one attempt that are to be stored. Any thread may add some."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first: list[Line] = []
        """Not stored yet, of the first lines and the one that says that there are more."""
        self._last: deque[Line] = deque(maxlen=KEPT_LAST)
        self._added = 0

    def add(self, level: int, text: str, created: float | None = None) -> None:
        """Add a record: a line for each line of its text, without passwords and control characters.

        Args:
            level: as of `logging`.
            created: seconds since 1970; None: now.
        """
        at = time.time() if created is None else created
        with self._lock:
            for line in text.splitlines():
                if line.strip():
                    self._add(Line(self._added, at, level_name(level), line[:_MOST_LOOKED_AT]))

    def _add(self, line: Line) -> None:
        if self._added < _FIRST:
            self._first.append(_cleaned(line))
        else:
            if self._added == _FIRST:
                more = f"more is logged: of what follows, the last {KEPT_LAST} lines are stored when the attempt ends"
                self._first.append(Line(_FIRST, line.created, "info", more))
            self._last.append(line)
        self._added += 1

    def unstored(self, ended: bool = False) -> list[Line]:
        """The lines that are to be stored now.

        Args:
            ended: whether this is the attempt's end, with which its last lines are stored.
        """
        with self._lock:
            lines = list(self._first)
            if ended and self._last:
                left_out = self._added - _FIRST - len(self._last)
                if left_out:
                    line = f"{left_out:,} line{'s' if left_out > 1 else ''} before this one were not stored"
                    lines.append(Line(_FIRST + 1, self._last[0].created, "info", line))
                lines += [replace(_cleaned(line), position=_FIRST + 2 + i) for i, line in enumerate(self._last)]
            return lines

    def forget(self, lines: Sequence[Line]) -> None:
        """These of `unstored` are stored."""
        with self._lock:
            done = {line.position for line in lines}
            self._first = [line for line in self._first if line.position not in done]


def level_name(level: int) -> str:
    """The name that is stored for a level of `logging`."""
    return LEVELS[min(max(level // 10 - 1, 0), len(LEVELS) - 1)]


def _cleaned(line: Line) -> Line:
    text = printable(without_passwords(line.message.rstrip().replace("\t", "    ")))
    if len(text) > MOST_CHARACTERS:
        text = text[: MOST_CHARACTERS - 1] + "…"
    return replace(line, message=text)


def write(connection: sa.Connection, trial_id: int, token: int, lines: Sequence[Line]) -> None:
    """Store lines in a transaction in which the token has been checked. Doing it twice is harmless.

    A database that does not take them, such as one whose encoding lacks a character, does not end the transaction:
    they are lost, and a trial does not fail by its log.
    """
    if not lines:
        return
    insert = upsert(connection.engine, TRIAL_LOGS)
    values = {name: insert.excluded[name] for name in ("at", "level", "message")}
    stored = insert.on_conflict_do_update(index_elements=["trial_id", "token", "position"], set_=values)
    clock, here = float(connection.scalar(sa.select(database_time(connection.engine))) or 0.0), time.time()
    rows = [
        {
            "trial_id": trial_id,
            "token": token,
            "position": line.position,
            "at": clock - max(0.0, here - line.created),
            "level": line.level,
            "message": line.message,
        }
        for line in lines
    ]
    try:
        with connection.begin_nested():
            connection.execute(stored, rows)
    except (DBAPIError, UnicodeError) as error:
        if is_transient(error):
            raise
        logging.getLogger(__name__).debug("lines of a trial were not stored: %s", error)


@dataclass(frozen=True)
class LogLine:
    """A stored line."""

    trial: int
    """Its number."""
    attempt: int
    """From 1, in the order of the trial's attempts."""
    owner: str
    """host:pid of the worker, and a random part."""
    at: float
    """Seconds since 1970 on the database's clock."""
    level: str
    message: str
    token: int
    position: int
    """Within the attempt, growing."""


def read(
    engine: sa.Engine, study_id: int, number: int | None = None, ended_after: float | None = None
) -> Iterator[LogLine]:
    """The lines of a study by time, or of one trial by attempt.

    Args:
        number: the trial's; None: of all.
        ended_after: only lines of attempts that run, or have ended after this (seconds since 1970 on the database's
            clock).
    """
    of_study = TRIALS.c.study_id == study_id
    attempts = (
        sa.select(
            TRIALS.c.number,
            ATTEMPTS.c.trial_id,
            ATTEMPTS.c.token,
            ATTEMPTS.c.owner,
            ATTEMPTS.c.ended_at,
            sa.func.row_number().over(partition_by=ATTEMPTS.c.trial_id, order_by=ATTEMPTS.c.token).label("attempt"),
        )
        .select_from(TRIALS.join(ATTEMPTS, TRIALS.c.trial_id == ATTEMPTS.c.trial_id))
        .where(of_study if number is None else sa.and_(of_study, TRIALS.c.number == number))
        .subquery()
    )
    this = sa.and_(TRIAL_LOGS.c.trial_id == attempts.c.trial_id, TRIAL_LOGS.c.token == attempts.c.token)
    query = sa.select(
        attempts.c.number, attempts.c.attempt, attempts.c.owner, TRIAL_LOGS.c.at, TRIAL_LOGS.c.level,
        TRIAL_LOGS.c.message, TRIAL_LOGS.c.token, TRIAL_LOGS.c.position,
    ).select_from(attempts.join(TRIAL_LOGS, this))  # fmt: skip
    if ended_after is not None:
        query = query.where(sa.or_(attempts.c.ended_at.is_(None), attempts.c.ended_at >= ended_after))
    place = (attempts.c.number, TRIAL_LOGS.c.token, TRIAL_LOGS.c.position)
    query = query.order_by(*([] if number is not None else [TRIAL_LOGS.c.at]), *place)
    with engine.execution_options(reading=True).connect() as connection:
        for row in connection.execution_options(yield_per=_FETCHED).execute(query):
            yield LogLine(*row)
