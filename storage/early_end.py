"""Ends a study before all of its trials have run: when a value is reached, or when no trial gets better any more.

The rules are `search.target` and `search.patience` of the study's config, unless `study resume` was given others, which
are an attribute of the study. They hold for all of its workers, as budgets do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from storage.engine import reader
from storage.errors import UserError
from storage.exclusions import excluded
from storage.schema import TRIAL_VALUES, TRIALS
from storage.study_attributes import read_attributes, set_attribute

EARLY_END = "early_end"
"""Key of the study's user attribute."""


@dataclass(frozen=True)
class Rules:
    """When a study ends early; None: that rule does not."""

    target: float | None = None
    """Once a complete trial has this validation accuracy, in (0, 1]."""
    patience: int | None = None
    """Once this many trials, complete or pruned, have finished after the best one."""

    def __bool__(self) -> bool:
        return self.target is not None or self.patience is not None


def parse_rules(present: Rules, target: str | None, patience: str | None) -> Rules:
    """The present rules with those that are given in their place; `none`: no such rule.

    Raises:
        UserError: not a number in its range.
    """
    new = asdict(present)
    if target is not None:
        new["target"] = _number(target, float, "--target must be a number in (0, 1], or none", 1.0)
    if patience is not None:
        new["patience"] = _number(patience, int, "--patience must be a whole number of at least 1, or none", math.inf)
    return Rules(**new)


def _number(text: str, kind: type[int] | type[float], rule: str, most: float) -> float | None:
    if text.strip().lower() == "none":
        return None
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value <= most:
        raise UserError(f"{rule}; got {text!r}")
    return value


def rules_of(attributes: Mapping[str, Any]) -> Rules:
    """From a study's attributes `early_end` and `config`; what is no rule there is none."""
    stored = attributes.get(EARLY_END)
    if stored is None:
        config = attributes.get("config")
        stored = config.get("search") if isinstance(config, Mapping) else None
    if not isinstance(stored, Mapping):
        return Rules()
    return Rules(_limit(stored.get("target"), int | float), _limit(stored.get("patience"), int))


def _limit(value: Any, kind: Any) -> Any:
    return value if isinstance(value, kind) and not isinstance(value, bool) and value > 0 else None


def read_rules(engine: sa.Engine, study_id: int) -> Rules:
    return rules_of(read_attributes(engine, study_id, [EARLY_END, "config"]))


def set_rules(engine: sa.Engine, study_id: int, rules: Rules) -> None:
    """These from now on, whatever the config has."""
    set_attribute(engine, study_id, EARLY_END, asdict(rules))


def reason_to_end(engine: sa.Engine, study_id: int, rules: Rules) -> str | None:
    """Why the study has ended early, if it has. Excluded trials count for nothing."""
    if not rules:
        return None
    of_study = TRIALS.c.study_id == study_id
    complete = (
        sa.select(TRIAL_VALUES.c.value, TRIALS.c.number, TRIALS.c.datetime_complete)
        .select_from(TRIALS.join(TRIAL_VALUES))
        .where(of_study, TRIALS.c.state == TrialState.COMPLETE, TRIAL_VALUES.c.objective == 0)
        .order_by(TRIAL_VALUES.c.value.desc(), TRIALS.c.datetime_complete, TRIALS.c.number)
    )
    with reader(engine).connect() as connection:
        left_out = excluded(connection, study_id)
        rows = connection.execute(complete.limit(len(left_out) + 1)).all()
        best = next((row for row in rows if row.number not in left_out), None)
        if best is None:
            return None
        if rules.target is not None and best.value >= rules.target:
            return f"the target {rules.target:g} is reached: trial {best.number} has {best.value:.4f}"
        if rules.patience is None:
            return None
        later = sa.select(TRIALS.c.number).where(
            of_study,
            TRIALS.c.state.in_((TrialState.COMPLETE, TrialState.PRUNED)),
            sa.or_(
                TRIALS.c.datetime_complete > best.datetime_complete,
                sa.and_(TRIALS.c.datetime_complete == best.datetime_complete, TRIALS.c.number > best.number),
            ),
        )
        count = len(set(connection.scalars(later)) - left_out.keys())
    if count < rules.patience:
        return None
    return f"no trial was better than trial {best.number} ({best.value:.4f}) for {count} trials"
