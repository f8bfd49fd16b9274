"""Whether a worker is to stop: because of a signal, the end of its launcher, `study stop`, a spent budget, or a study
that ends early.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from storage import budgets, early_end, stop_requests
from study.exit_codes import BUDGET_SPENT, INTERRUPTED, OK, STOPPED
from study.worker.supervisor import STOP_SIGNALS

CHECK_SECONDS = 2.0
"""Seconds between two checks for a request to stop."""
NEAR_LIMIT_SECONDS = 0.5
"""Seconds between two checks of the budgets when one is nearly spent."""
MOST_SECONDS = 30.0
"""The longest time between two checks of the budgets."""
NEAR_LIMIT_SHARE, SHARE = 1.0, 0.1
"""The largest share of the time that adding up what is spent may take, over all workers; one adds up at a time."""
PART = 0.1
"""The budgets are checked again after this part of the time that they will last at the present pace."""


class StopMonitor:
    """Call it: whether to stop.

    Args:
        asked: a further reason.
    """

    def __init__(self, asked: Callable[[], bool] = lambda: False) -> None:
        self.reason = ""
        """Why, if the database said so: a request or a spent budget."""
        self.exit_code = INTERRUPTED
        """For the worker's process, once this is true."""
        self.near_limit = False
        """Whether a budget is nearly spent: then `check` after every epoch, before the next begins."""
        self._asked, self._stopping = asked, False
        self._study: tuple[sa.Engine, int] | None = None
        self._budgets: dict[str, float] = {}
        self._next_check = self._started = 0.0
        self._spending: budgets.Spending | None = None
        """At the last check of budgets."""

    def __call__(self) -> bool:
        return self._stopping or self._asked()

    def handle_signals(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def watch(self, engine: sa.Engine, study_id: int) -> None:
        """Check now, and from now on in a thread: for a request to stop every CHECK_SECONDS, the budgets as often as
        what is left of them demands.
        """
        self._study = engine, study_id
        self._started = time.monotonic()
        self.check()

        def repeat() -> None:
            while not self():
                time.sleep(NEAR_LIMIT_SECONDS if self.near_limit else CHECK_SECONDS)
                self.check(with_budgets=time.monotonic() >= self._next_check)

        threading.Thread(target=repeat, name="stop-monitor", daemon=True).start()

    def check(self, with_budgets: bool = True) -> None:
        """Ask the database; if it is unavailable, the next check asks again."""
        if self._study is None:
            return
        with suppress(SQLAlchemyError):
            controls = stop_requests.read_controls(*self._study)
            if controls.stop:
                self._stop_because(stop_requests.STOP_REQUESTED, STOPPED)
            elif reason := early_end.reason_to_end(*self._study, controls.early_end):
                self._stop_because(reason, OK)
            elif controls.budgets and (with_budgets or controls.budgets != self._budgets):
                self._check_budgets(*self._study, controls.budgets)
            self.near_limit, self._budgets = self.near_limit and bool(controls.budgets), controls.budgets

    def _check_budgets(self, engine: sa.Engine, study_id: int, limits: dict[str, float]) -> None:
        unsure = self.near_limit or self._spending is None
        spent = budgets.recent_spending(engine, study_id, NEAR_LIMIT_SHARE if unsure else SHARE)
        clock = time.monotonic()
        reason = spent.reason_to_stop(limits)
        if reason is not None:
            self._stop_because(reason, BUDGET_SPENT)
        pause = PART * spent.seconds_left(limits, self._spending)
        # A worker that has just started does not know the pace yet.
        self._next_check = clock + min(pause, MOST_SECONDS, max(CHECK_SECONDS, clock - self._started))
        self.near_limit, self._spending = pause < CHECK_SECONDS, spent

    def _stop_because(self, reason: str, exit_code: int) -> None:
        self.reason, self.exit_code, self._stopping = reason, exit_code, True
