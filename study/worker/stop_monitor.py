"""Whether a worker is to stop: because of a signal, the end of the launcher that started it, or the database."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from storage import budgets, stop_requests

LOOK_SECONDS = 2.0
"""Between two looks at whether somebody asked the study to stop."""
NEAR_SECONDS = 0.5
"""Between two looks at the budgets when one is nearly spent."""
FAR_SECONDS = 30.0
NEAR_PART, FAR_PART = 1.0, 0.1
"""Of the time, for adding up what is spent: one worker of all at a time does it."""
PART = 0.1
"""Of the time that the budgets will last, until they are looked at again."""


class Stop:
    """Call it: whether to stop.

    Args:
        asked: a further reason.
    """

    def __init__(self, asked: Callable[[], bool] = lambda: False) -> None:
        self.reason = ""
        """Why, if it was the database that asked."""
        self.near = False
        """Whether a budget is nearly spent: then `look` after every epoch, before the next begins."""
        self._asked, self._was_asked = asked, False
        self._where: tuple[sa.Engine, int] | None = None
        self._budgets: dict[str, float] = {}
        self._due = self._began = 0.0
        self._spent: budgets.Spending | None = None
        """At the last look at budgets."""

    def __call__(self) -> bool:
        return self._was_asked or self._asked()

    def on_signals(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._was_asked = True

    def watch(self, engine: sa.Engine, study_id: int) -> None:
        """Look at once, and from then on in a thread: at a request to stop every LOOK_SECONDS, at budgets as often as
        what is left of them demands.
        """
        self._where = engine, study_id
        self._began = time.monotonic()
        self.look()

        def go_on_looking() -> None:
            while not self():
                time.sleep(NEAR_SECONDS if self.near else LOOK_SECONDS)
                self.look(at_budgets=time.monotonic() >= self._due)

        threading.Thread(target=go_on_looking, name="stop", daemon=True).start()

    def look(self, at_budgets: bool = True) -> None:
        """Ask the database; if it is away, later."""
        if self._where is None:
            return
        with suppress(SQLAlchemyError):
            orders = stop_requests.read_controls(*self._where)
            reason = stop_requests.STOP_REQUESTED if orders.stop else None
            if orders.budgets and reason is None and (at_budgets or orders.budgets != self._budgets):
                unsure = self.near or self._spent is None
                spent = budgets.recent_spending(*self._where, NEAR_PART if unsure else FAR_PART)
                clock = time.monotonic()
                reason = spent.reason_to_stop(orders.budgets)
                pause = PART * spent.seconds_left(orders.budgets, self._spent)
                # Who has just begun does not know the pace yet.
                self._due = clock + min(pause, FAR_SECONDS, max(LOOK_SECONDS, clock - self._began))
                self.near, self._spent = pause < LOOK_SECONDS, spent
            self.near, self._budgets = self.near and bool(orders.budgets), orders.budgets
            if reason is not None:
                self.reason, self._was_asked = reason, True


def launcher_gone() -> Callable[[], bool]:
    """Whether the launcher that started this process has ended, if it was one."""
    parent = supervisor()
    return lambda: parent != 0 and os.getppid() != parent


def supervisor() -> int:
    """The process id of the launcher that started this process; 0: none did."""
    return int(os.environ.get(SUPERVISOR_VARIABLE, 0))


SUPERVISOR_VARIABLE = "STUDY_SUPERVISED"
"""In the environment of a launcher's workers: its process id. They end when it does."""


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C, and what Slurm and spot instances send."""
