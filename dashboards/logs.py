"""What workers logged about the trials of a study, as lines: all there is, or as more comes (`study logs --follow`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import sqlalchemy as sa
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from dashboards import status
from dashboards.formatting import moment, process_of
from storage import queries, trial_logs
from storage.retry import is_transient
from storage.schema import FINISHED
from storage.text import one_line
from storage.trial_logs import LogLine

logger = logging.getLogger(__name__)

SECONDS = 1.0
"""Between two looks of `--follow`."""
_LATE_SECONDS = 60.0
"""How long after an attempt's end its lines are looked for: an attempt that vanished ended when it was last seen."""
STYLES = {"warning": "yellow", "error": "red", "critical": "red"}


def read(engine: sa.Engine, name: str, trial: int | None = None) -> Iterator[LogLine]:
    """The stored lines of a study by time, or of one trial.

    Raises:
        UserError: no such study or trial.
    """
    study_id, _ = queries.find(engine, name)
    if trial is not None:
        queries.trial_state(engine, study_id, trial)
    return trial_logs.read(engine, study_id, trial)


def follow(engine: sa.Engine, name: str, trial: int | None = None) -> Iterator[LogLine]:
    """The same, and what workers log from now on, until the study (or the trial) has finished.

    Raises:
        UserError: no such study or trial.
    """
    study_id, _ = queries.find(engine, name)
    shown: dict[tuple[int, int], int] = {}
    """Trial and token of an attempt to its last position."""
    ended_after: float | None = None
    waiting = False
    while True:
        try:
            over = _is_over(engine, name, study_id, trial)  # first: what is logged until then is read after it
            clock = queries.clock(engine)
            new = [
                line
                for line in trial_logs.read(engine, study_id, trial, ended_after)
                if line.position > shown.get((line.trial, line.token), -1)
            ]
        except DBAPIError as error:
            if not is_transient(error):
                raise
            if not waiting:
                logger.warning("the database does not answer; waiting")
            waiting = True
        else:
            yield from new
            shown |= {(line.trial, line.token): line.position for line in sorted(new, key=lambda line: line.position)}
            ended_after, waiting = clock - _LATE_SECONDS, False
            if over:
                return
        time.sleep(SECONDS)


def _is_over(engine: sa.Engine, name: str, study_id: int, trial: int | None) -> bool:
    """Whether nothing more will be logged: every trial has finished, or the study has ended early."""
    if trial is not None:
        return queries.trial_state(engine, study_id, trial) in FINISHED
    now = status.read(engine, name)
    return now.progress.finished == now.progress.total or (bool(now.ended_early) and not now.progress.running)


def text(line: LogLine) -> Text:
    """A line as the terminal shows it, whatever is in it. Its indentation stays: a traceback's lines are lines here."""
    indent = " " * (len(line.message) - len(line.message.lstrip(" ")))
    worker, level = one_line(process_of(line.owner)), f"{one_line(line.level):<7}"
    start = f"{moment(line.at, '%Y-%m-%d %H:%M:%S UTC')} trial {line.trial} attempt {line.attempt} {worker} {level}"
    return Text(f"{start} {indent}{one_line(line.message)}", STYLES.get(line.level, ""))
