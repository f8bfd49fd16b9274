"""What trackers get of a study: each trial's parameters, epochs and result, read from the database.

Publishing again adds what is new and doubles nothing: each tracker looks at its own side for what is there already.
Times are the database's, so that a repeated call sends the same values.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from dashboards.study_data import StudyData, TrialRow
from storage import queries
from storage.errors import UserError
from study.config.models import means_something

MEASURES = (
    "accuracy", "balanced_accuracy", "macro_f1", "loss", "validation_loss", "images", "k", "train_seconds",
    "validation_seconds", "selection_seconds", "joules",
)  # fmt: skip
"""Columns of `trial_epochs` that trackers get, a value an epoch."""
FINISHED = ("complete", "pruned", "failed")


@dataclass(frozen=True)
class Epoch:
    number: int
    at: float
    """Seconds since 1970 at its end: the trial's start and the seconds of its epochs."""
    values: dict[str, float]


@dataclass(frozen=True)
class Trial:
    """A trial that has begun."""

    study: str
    uid: str
    """Of the study; its copies have the same."""
    number: int
    state: str
    parameters: dict[str, Any]
    """All that mean something to its policy, and its seed."""
    started_at: float
    epochs: tuple[Epoch, ...]
    results: dict[str, float]
    """`value` and `test` of a trial that has finished."""

    @property
    def finished(self) -> bool:
        return self.state in FINISHED

    @property
    def ended_at(self) -> float:
        return self.epochs[-1].at if self.epochs else self.started_at


class Tracker(Protocol):
    """Where trials are published."""

    def publish(self, trial: Trial) -> int:
        """Add what is not there yet; how many epochs were added."""


def make_tracker(kind: str, at: str | None, study: str) -> Tracker:
    """The tracker `tensorboard`, `mlflow` or `wandb`.

    Args:
        at: TensorBoard's folder, MLflow's tracking URI, or the W&B project; None: the tracker's own default.

    Raises:
        UserError: its package is not installed, or it cannot be reached.
    """
    try:
        module = importlib.import_module(f"dashboards.trackers.{kind}")
    except ImportError as error:
        extra = f"dynamic-training-study[{kind}]"
        raise UserError(f"--to {kind} needs its package ({error}); install it: pip install '{extra}'") from None
    tracker: Tracker = module.connect(at, study)
    return tracker


def publish(data: StudyData, tracker: Tracker) -> int:
    """Publish every trial that has begun; how many epochs were added."""
    return sum(tracker.publish(trial) for trial in trials(data))


def trials(data: StudyData) -> Iterator[Trial]:
    starts: dict[int, float] = {}
    for attempt in data.attempts:
        starts.setdefault(attempt.number, attempt.started_at)
    epochs = queries.epoch_rows(data.engine, data.id, [row.number for row in data.rows])
    for row in data.rows:
        if row.number in starts:
            yield _trial(data, row, starts[row.number], epochs.get(row.number, []))


def _trial(data: StudyData, row: TrialRow, started_at: float, rows: list[dict[str, Any]]) -> Trial:
    at, epochs = started_at, []
    for cells in rows:
        at += sum(cells[f"{what}_seconds"] or 0.0 for what in ("train", "validation", "selection"))
        values = {name: float(cells[name]) for name in MEASURES if cells[name] is not None}
        epochs.append(Epoch(cells["epoch"], at, values))
    parameters = {key: value for key, value in row.settings.items() if means_something(key, row.settings)}
    results = {"value": row.value, "test": row.test} if row.state in FINISHED else {}
    return Trial(
        study=data.name,
        uid=str(data.study.user_attrs.get("uid", data.name)),
        number=row.number,
        state=row.state,
        parameters=parameters | {"seed": row.seed},
        started_at=started_at,
        epochs=tuple(epochs),
        results={key: value for key, value in results.items() if value is not None},
    )
