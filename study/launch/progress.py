"""The progress of a study on a terminal: bars, and a line for each finished trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sqlalchemy.exc import DBAPIError

from storage import queries, retry, schema
from storage.optuna_internals import study_id_of
from study.config.models import StudyConfig
from study.search import space

REFRESH_SECONDS = 30.0


@contextmanager
def tolerate_outage() -> Iterator[None]:
    """Watching waits for the database like everybody else; only it has nothing to keep."""
    try:
        yield
    except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
        if not retry.is_transient(error):
            raise


class ProgressDisplay:
    """How far a study is: progress bars on a terminal, and everywhere a line for each trial that is settled."""

    def __init__(
        self,
        console: Console,
        storage: RDBStorage,
        study: optuna.Study,
        config: StudyConfig,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage, self.study = storage, study
        self.refresh, self.due = refresh, time.monotonic() + REFRESH_SECONDS
        self.by_images = config.training.images is not None
        self.whole = config.training.images or space.most_epochs(config)
        """A trial's length, in images or epochs."""
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            # Work is uneven (pruned trials end early), so the estimate looks far back.
            speed_estimate_period=600,
        )
        self.console = console
        now = queries.progress(storage.engine, study_id_of(study))
        self.told = {trial.number for trial in self._finished()}
        self.settled = now.settled == now.total
        total = now.total * self.whole
        self.total = self.bars.add_task(study.study_name, total=total, completed=self._done(now), note="")
        self.trials: dict[int, TaskID] = {}
        self.changed = True
        """Whether there is anything new since somebody last said False."""
        self._last = now

    def _done(self, now: queries.Progress) -> int:
        return now.settled * self.whole + (now.images if self.by_images else now.epochs)

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=schema.FINISHED)

    def refresh_when_due(self) -> None:
        if self.changed and time.monotonic() >= self.due:
            started = time.monotonic()
            self.refresh()
            took = time.monotonic() - started
            self.due, self.changed = started + max(REFRESH_SECONDS, 100 * took), False

    def update(self) -> bool:
        """Show what is new; whether a trial was completed or pruned since the last call."""
        now = queries.progress(self.storage.engine, study_id_of(self.study))
        self.changed = self.changed or (now.settled, now.epochs) != (self._last.settled, self._last.epochs)
        self._last = now
        best = f", best {now.best:.4f}" if now.best is not None else ""
        note = f"{now.settled}/{now.total} trials{best}"
        self.bars.update(self.total, completed=self._done(now), note=note)
        running = {trial.number: trial for trial in now.running}
        for number in self.trials.keys() - running.keys():
            self.bars.remove_task(self.trials.pop(number))
        for number, trial in running.items():
            if number not in self.trials:
                self.trials[number] = self.bars.add_task(f"  trial {number}", total=self.whole, note="")
            note = f"epoch {trial.epoch}" + (f", best {trial.accuracy:.4f}" if trial.accuracy is not None else "")
            self.bars.update(self.trials[number], completed=trial.images if self.by_images else trial.epoch, note=note)
        if now.settled == len(self.told):
            return False
        good = False
        for done in self._finished():
            if done.number not in self.told:
                self.told.add(done.number)
                good = good or done.state != TrialState.FAIL
                self.console.print(_line(done, now.total), highlight=False, markup=False, soft_wrap=True)
        return good


def _line(trial: FrozenTrial, total: int) -> str:
    state = queries.STATE_NAMES[trial.state]
    chosen = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in trial.params.items()
    ]
    what = ", ".join(chosen) or f"seed {trial.user_attrs.get('seed')}"
    start = f"trial {trial.number:>{len(str(total - 1))}} {state:<8} {what}"
    if trial.value is None:
        return f"{start}: {trial.user_attrs.get('error', 'no value')}"
    attributes = trial.user_attrs
    return (
        f"{start}: accuracy {trial.value:.4f} (epoch {attributes['best_epoch']} of {attributes['epochs']}, "
        f"{attributes['train_seconds'] + attributes['validation_seconds']:.1f} s)"
    )
