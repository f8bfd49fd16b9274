"""Runs a person's command at the events of a study: for mail, chats and whatever else a program can reach.

The command gets one event as a line of JSON on its standard input. It is run by the launcher, never by a worker; what
it prints is dropped, and whatever goes wrong with it is one warning in all.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from storage import queries
from storage.errors import UserError
from study.create import OpenStudy
from study.exit_codes import BUDGET_SPENT, OK

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""After which a command is killed."""
MOST_WAITING = 1000
"""Events that wait for the command; further ones are dropped."""
CLOSING_SECONDS = 30.0
"""How long a launcher that ends waits for the events that are left."""


def parse_command(command: str) -> list[str]:
    """The words of a command, as a shell takes them.

    Raises:
        UserError: no words, an open quotation mark, or no such program.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--on-event takes a command as a shell does, got {command!r}: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise UserError(f"--on-event: no program {words[0] if words else ''!r}; give its path, and make it executable")
    return words


class EventHook:
    """Sends the events of one study to a command, in order, from a thread of its own."""

    def __init__(self, words: list[str], study: OpenStudy) -> None:
        self.words, self.study = words, study
        self.best: float | None = None
        self._failed = False
        self._deadline = float("inf")
        self._events: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="event-hook", daemon=True)
        self._thread.start()

    def trial(self, trial: FrozenTrial, now: queries.Progress) -> None:
        """A trial has finished: `trial-finished` and perhaps `new-best`, or `trial-failed`."""
        value = trial.values[0] if trial.values else None
        details = {
            "trial": trial.number,
            "state": queries.STATE_NAMES[trial.state],
            "value": value,
            "parameters": trial.params,
            "seed": trial.user_attrs.get("seed"),
            "error": trial.user_attrs.get("error"),
            "finished": now.finished,
            "total": now.total,
        }
        if trial.state == TrialState.FAIL:
            self._send("trial-failed", details)
            return
        self._send("trial-finished", details)
        if trial.state == TrialState.COMPLETE and value is not None and (self.best is None or value > self.best):
            self.best = value
            self._send("new-best", details)

    def end(self, code: int, reason: str | None = None) -> None:
        """The workers have ended with this exit code: `study-finished` or `budget-spent`, else nothing.

        Args:
            reason: why the study ended early, if it did.
        """
        name = {OK: "study-finished", BUDGET_SPENT: "budget-spent"}.get(code)
        if name is not None:
            now = queries.progress(self.study.engine, self.study.id)
            details = {"best_trial": now.best_trial, "best": now.best, "finished": now.finished, "total": now.total}
            self._send(name, details | {"failed": now.states["failed"], "reason": reason})

    def close(self) -> None:
        """Wait for the command to get the events that are left."""
        self._deadline = time.monotonic() + CLOSING_SECONDS
        with suppress(queue.Full):
            self._events.put(None, timeout=CLOSING_SECONDS)
        self._thread.join(timeout=CLOSING_SECONDS + SECONDS)

    def _send(self, event: str, details: dict[str, Any]) -> None:
        document = {
            "event": event,
            "study": self.study.name,
            "storage": self.study.shown_url,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **details,
        }
        try:
            self._events.put_nowait(f"{json.dumps(document)}\n")
        except queue.Full:
            self._warn(f"it is {MOST_WAITING} events behind; events are dropped")

    def _run(self) -> None:
        while (document := self._events.get()) is not None:
            if time.monotonic() < self._deadline:
                self._call(document)

    def _call(self, document: str) -> None:
        try:
            process = subprocess.Popen(
                self.words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._warn(str(error))
            return
        try:
            process.communicate(document, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):  # with what it has started: it has a session of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._warn(f"it took longer than {SECONDS:.0f} s and was killed")
            return
        if process.returncode != 0:
            self._warn(f"it ended with exit code {process.returncode}")

    def _warn(self, what: str) -> None:
        if not self._failed:
            self._failed = True
            logger.warning("the command of --on-event failed: %s; further failures are not shown", what)
