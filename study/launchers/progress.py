"""The progress of a study on a terminal: bars, and a line for each finished trial."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sqlalchemy.exc import DBAPIError

from storage import queries, schema
from storage.optuna_internals import storage_of
from storage.retry import is_transient
from study.create import OpenStudy
from study.logs import stderr_console
from study.search import space

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 30.0
"""Between two renewals of the dashboard's figures, at least."""
REFRESH_SHARE = 0.01
"""The part of the time that those may take."""


@contextmanager
def tolerate_outage() -> Iterator[None]:
    """Watching waits for a database that is unavailable, as workers do; it has nothing to lose."""
    try:
        yield
    except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
        if not is_transient(error):
            raise


def _in_notebook(console: Console) -> bool:
    """Whether bars can move there: without ipywidgets rich only warns."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


class ProgressDisplay:
    """Progress bars on a terminal, and everywhere a line for each trial that has finished."""

    def __init__(
        self,
        study: OpenStudy,
        refresh: Callable[[], None] = lambda: None,
        finished: Callable[[FrozenTrial, queries.Progress], None] = lambda *_: None,
    ) -> None:
        """Args:
        refresh: called when something has changed, not too often.
        finished: called with each trial that has finished, and how far the study is.
        """
        self.study, self._on_finished = study, finished
        self.refresh, self._next_refresh = refresh, time.monotonic() + REFRESH_SECONDS
        self._by_images = study.config.training.images is not None
        self._trial_length = study.config.training.images or space.most_epochs(study.config)
        """In images or epochs."""
        console = stderr_console()
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal or _in_notebook(console)),
            # Work is uneven (pruned trials end early), so the estimate goes far back.
            speed_estimate_period=600,
        )
        self._last = queries.progress(study.engine, study.id)
        self._shown = {trial.number for trial in self._finished_trials()}
        total = self._last.total * self._trial_length
        self._total = self.bars.add_task(study.name, total=total, completed=self._done(), note="")
        self._running: dict[int, TaskID] = {}
        self._drained = False
        self._changed = True

    @property
    def finished(self) -> bool:
        """Whether every trial had finished at the last update."""
        return self._last.finished == self._last.total

    @property
    def best(self) -> float | None:
        """At the last update."""
        return self._last.best

    @property
    def unfinished(self) -> int:
        return self._last.total - self._last.finished

    def _done(self) -> int:
        now = self._last
        return now.finished * self._trial_length + (now.images if self._by_images else now.epochs)

    def _finished_trials(self) -> list[FrozenTrial]:
        storage: Any = storage_of(self.study.study)
        trials: list[FrozenTrial] = storage.all_trials(self.study.id, schema.FINISHED)
        return trials

    def refresh_when_due(self) -> None:
        """Every REFRESH_SECONDS, and once when no trial waits any more: a worker is then without work, and the last
        refresh, for which everybody waits, finds its modules loaded.
        """
        was_drained, self._drained = self._drained, self._last.states["waiting"] == 0
        is_due = time.monotonic() >= self._next_refresh or (self._drained and not was_drained)
        if self._changed and is_due:
            started = time.monotonic()
            self.refresh()
            pause = max(REFRESH_SECONDS, (time.monotonic() - started) / REFRESH_SHARE)
            self._next_refresh, self._changed = started + pause, False

    def update(self) -> bool:
        """Show what is new; whether a trial was completed or pruned since the last call."""
        before, self._last = self._last, queries.progress(self.study.engine, self.study.id)
        now = self._last
        self._changed = self._changed or (now.finished, now.epochs) != (before.finished, before.epochs)
        best = f", best {now.best:.4f}" if now.best is not None else ""
        note = f"{now.finished}/{now.total} trials{best}"
        self.bars.update(self._total, completed=self._done(), note=note, total=now.total * self._trial_length)
        self._update_running()
        if now.finished == len(self._shown):
            return False
        succeeded = False
        for trial in self._finished_trials():
            if trial.number not in self._shown:
                self._shown.add(trial.number)
                succeeded = succeeded or trial.state != TrialState.FAIL
                logger.info(trial_line(trial, now.total))
                self._on_finished(trial, now)
        return succeeded

    def _update_running(self) -> None:
        running = {trial.number: trial for trial in self._last.running}
        for number in self._running.keys() - running.keys():
            self.bars.remove_task(self._running.pop(number))
        for number, trial in running.items():
            if number not in self._running:
                self._running[number] = self.bars.add_task(f"  trial {number}", total=self._trial_length, note="")
            note = f"epoch {trial.epoch}" + (f", best {trial.accuracy:.4f}" if trial.accuracy is not None else "")
            done = trial.images if self._by_images else trial.epoch
            self.bars.update(self._running[number], completed=done, note=note)


def trial_line(trial: FrozenTrial, total: int) -> str:
    """One line about a finished trial; also about one that somebody else added or finished, without our attributes."""
    state = queries.STATE_NAMES[trial.state]
    what = ", ".join(space.labels(trial.params)) or f"seed {trial.user_attrs.get('seed')}"
    start = f"trial {trial.number:>{len(str(total - 1))}} {state:<8} {what}"
    if not trial.values:
        return f"{start}: {trial.user_attrs.get('error', 'no value')}"
    attributes: dict[str, Any] = trial.user_attrs
    if not {"best_epoch", "epochs", "train_seconds", "validation_seconds"} <= attributes.keys():
        return f"{start}: value {trial.values[0]:.4f} (not from a worker of this study)"
    seconds = attributes["train_seconds"] + attributes["validation_seconds"]
    return (
        f"{start}: accuracy {trial.values[0]:.4f} (epoch {attributes['best_epoch']} of {attributes['epochs']}, "
        f"{seconds:.1f} s)"
    )
