"""A study as read from its database: one row a trial, its epochs, who worked on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from storage import control, progress
from storage.progress import Attempt
from study.config import StudyConfig
from study.plan import PROTOCOLS, load_study
from study.space import relevant, settings

MOST_CURVES = 400
NOTHING = progress.Totals(0, 0.0, 0, 0, 0.0, 0.0, 0.0, None)


@dataclass(frozen=True)
class Row:
    """One trial."""

    number: int
    state: str
    parameters: dict[str, Any]
    """What was chosen for it."""
    settings: dict[str, Any]
    """All of its parameters: what was chosen over what the config fixes."""
    seed: int | None
    value: float | None
    """Best validation accuracy in [0, 1]; of an unfinished trial, the best so far."""
    best_epoch: int | None
    epochs: int
    images: int
    """Trained on (forward and backward), counted with repetition."""
    seen: int
    """Different images trained on."""
    train_seconds: float
    validation_seconds: float
    selection_seconds: float
    joules: float | None
    test: float | None
    """Accuracy of the best epoch's network on the untouched test split, where the study asks for it."""
    error: str | None
    attributes: dict[str, Any]

    @property
    def policy(self) -> str:
        return str(self.settings["policy"])

    @property
    def alpha(self) -> int | None:
        """Images an epoch, for the policies that have a fixed number."""
        return self.settings["alpha"] if relevant(self.policy, "alpha") else None

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.validation_seconds + self.selection_seconds


@dataclass(frozen=True)
class View:
    """A study as read from its database."""

    name: str
    preset: str
    config: StudyConfig
    rows: tuple[Row, ...]
    curves: dict[int, list[dict[str, Any]]]
    """Trial number to its rows of `trial_epochs`; of more than MOST_CURVES trials, the best and a sample."""
    attempts: tuple[Attempt, ...]
    study: optuna.Study
    budgets: dict[str, float]
    spent: dict[str, float]
    """By unit, as in `storage.control`."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """What its trials differ in, in the config's order."""
        if self.config.search.cells is not None:
            found = {name for row in self.rows for name in row.parameters}
            return tuple(name for name in self.config.searchable() if name in found)
        policy = self.config.policy.name
        searched = self.config.searched()
        return tuple(name for name in searched if not isinstance(policy, str) or relevant(policy, name))

    @property
    def protocol(self) -> str:
        return PROTOCOLS[self.config.data.protocol]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Images by split: train, validation, test; empty for studies of the first version."""
        return dict(self.study.user_attrs.get("images", {}))

    @property
    def best(self) -> Row | None:
        done = [row for row in self.rows if row.state == "complete" and row.value is not None]
        return max(done, key=lambda row: (row.value or 0.0, -row.number), default=None)

    def states(self) -> dict[str, int]:
        names = progress.STATE_NAMES.values()
        return {name: sum(row.state == name for row in self.rows) for name in names}


def read(storage: RDBStorage, name: str) -> View:
    """Raises:
    UserError: no such study.
    """
    study, config = load_study(storage, name)
    totals = progress.epoch_totals(storage.engine, study._study_id)
    errors = progress.last_errors(storage.engine, study._study_id)
    curves = progress.epoch_rows(storage.engine, study._study_id, _chosen(totals))
    rows = []
    for trial in study.get_trials(deepcopy=False):
        of = totals.get(trial.number, NOTHING)
        curve = curves.get(trial.number, [])
        top = max(curve, key=lambda epoch: (epoch["accuracy"], -epoch["epoch"]), default=None)
        failed, ran = trial.state == TrialState.FAIL, trial.number in totals
        rows.append(
            Row(
                trial.number,
                progress.STATE_NAMES[trial.state],
                dict(trial.params),
                settings(config, trial.params),
                trial.user_attrs.get("seed"),
                of.accuracy if ran and not failed else None,
                trial.user_attrs.get("best_epoch") if top is None else top["epoch"],
                of.epochs,
                of.images,
                of.seen,
                of.train_seconds,
                of.validation_seconds,
                of.selection_seconds,
                of.joules,
                trial.user_attrs.get("test_accuracy"),
                trial.user_attrs.get("error") or errors.get(trial.number),
                dict(trial.user_attrs),
            )
        )
    attempts = tuple(progress.attempts(storage.engine, study._study_id))
    preset, spent = study.user_attrs.get("preset", ""), control.spent(storage.engine, study._study_id)
    budgets = control.budgets_of(storage.engine, study._study_id)
    return View(name, preset, config, tuple(rows), curves, attempts, study, budgets, spent)


def shown(value: Any) -> str:
    """A parameter as people write it: 0.1, not 0.1000; 15,000."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _chosen(totals: dict[int, progress.Totals]) -> list[int] | None:
    """Whose epochs to read one by one; None: everybody's."""
    if len(totals) <= MOST_CURVES:
        return None
    ranked = sorted(totals, key=lambda number: (-totals[number].accuracy, number))
    best, others = ranked[: MOST_CURVES // 4], ranked[MOST_CURVES // 4 :]
    return best + others[:: -(-len(others) // (MOST_CURVES - len(best)))]


def budget_lines(budgets: dict[str, float], spent: dict[str, float]) -> list[str]:
    return [f"spent {spent[unit]:,.4g} of {limit:,.4g} {unit}" for unit, limit in budgets.items()]


def label(parameters: dict[str, Any]) -> str:
    """`dynamic, alpha 5,000, beta 0.7`: a policy speaks for itself."""
    return ", ".join(
        shown(value) if name == "policy" else f"{name} {shown(value)}" for name, value in parameters.items()
    )


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
