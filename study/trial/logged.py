"""Collects what is logged in a worker's process while it has a trial: by this program, by libraries, by own code.

The lines are on the trial's lease (`storage/trial_logs.py`), whose writes take them along: training waits for none.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from storage.queue import Lease, LeaseLost
from storage.trial_logs import TrialLog
from study.config import extensions

NOT_ON_CONSOLE = {"console": False}
"""`extra` of a record about a trial that a terminal need not show."""
FINISHED = {"console": "finished"}
"""`extra` of a record that a trial has finished: a launcher has a line of its own for it."""
MOST_OF_A_TRACEBACK = 40
"""Its last lines."""


class _Collector(logging.Handler):
    def __init__(self, log: TrialLog) -> None:
        super().__init__(logging.INFO)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.log.add(record.levelno, self.format(record), record.created)
        except Exception:  # noqa: BLE001 — arguments that do not fit the message: as `logging` does
            self.handleError(record)


@contextmanager
def collect(lease: Lease) -> Iterator[None]:
    """Meanwhile records of this process from INFO on go to the lease's log, as far as their loggers let them through;
    warnings of Python are records where `study.logs` is configured. An error that ends the trial is added with its
    traceback.

    A worker's process has one trial at a time, so whichever thread logs, it is about this one.
    """
    collector = _Collector(lease.log)
    with warnings.catch_warnings():
        pass  # leaving it makes Python forget which warnings it has shown: each trial gets its own
    # Our own and some libraries' do not pass their records on to the root.
    known = [each for each in list(logging.Logger.manager.loggerDict.values()) if isinstance(each, logging.Logger)]
    loggers = [logging.getLogger(), *(each for each in known if not each.propagate)]
    for each in loggers:
        each.addHandler(collector)
    try:
        yield
    except LeaseLost:
        raise
    except Exception as error:
        lines = "".join(traceback.format_exception(error)).splitlines()[-MOST_OF_A_TRACEBACK:]
        summary = f"trial {lease.number}: attempt failed: {type(error).__name__}: {error}{extensions.place_of(error)}"
        lease.log.add(logging.ERROR, "\n".join([*lines, summary]))
        raise
    finally:
        for each in loggers:
            each.removeHandler(collector)
