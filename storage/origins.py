"""Where a study comes from: the study that it was derived from, and the one whose trials inform its sampler.

Both are user attributes of the study, so a copy and an export keep them. Whoever can write to the database or made a
file to import can write them: what does not have this form is left out when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

DERIVED_FROM = "derived_from"
"""Key of the study's user attribute: `study`, the name of the other, `taken_over` and `finished`, numbers of trials."""
AFTER = "after"
"""Key of the study's user attribute: `study`, the name of the other, and its `trials`."""
ORIGIN_TRIAL = "origin_trial"
"""Key of a trial's user attribute: its number in the study that it was taken over from."""
MOST_INFORMING = 500
"""Trials that inform a sampler: attributes are sent with every poll of optuna-dashboard."""
MOST_PARAMETERS = 1000
MOST_NUMBER = 2**31 - 1
"""PostgreSQL's INTEGER."""
MOST_TEXT = 1000
"""Characters of a name or of a parameter's value."""


@dataclass(frozen=True)
class Derived:
    """What a study took over from another."""

    study: str
    taken_over: int
    """Trials."""
    finished: int
    """Trials of the other study that had finished, with a result or without."""

    def attribute(self) -> dict[str, Any]:
        """The study's user attribute."""
        return asdict(self)

    def __str__(self) -> str:
        return f"derived from {self.study!r}: {self.taken_over:,} of its {self.finished:,} finished trials taken over"


@dataclass(frozen=True)
class Informed:
    """The trials of another study that a study's sampler learns from; they count nowhere else."""

    study: str
    trials: tuple[dict[str, Any], ...]
    """`number`, `state` (complete or pruned), `params`, `values` (one an objective), `step` (of the last report, or
    None)."""

    def attribute(self) -> dict[str, Any]:
        """The study's user attribute."""
        return {"study": self.study, "trials": list(self.trials)}

    def __str__(self) -> str:
        count = len(self.trials)
        return f"informed by {count:,} trial{'s' if count != 1 else ''} of {self.study!r}"


def derived_from(attributes: Mapping[str, Any]) -> Derived | None:
    """From a study's user attributes; None: it was not derived, or the attribute has another form."""
    stored = attributes.get(DERIVED_FROM)
    if not isinstance(stored, dict) or not _is_text(stored.get("study")):
        return None
    taken_over, finished = stored.get("taken_over"), stored.get("finished")
    if not (_is_count(taken_over) and _is_count(finished)):
        return None
    return Derived(stored["study"], taken_over, finished)


def informed_by(attributes: Mapping[str, Any]) -> Informed | None:
    """From a study's user attributes; None: no other study informs it, or the attribute has another form.

    Trials of another form are left out.
    """
    stored = attributes.get(AFTER)
    if not isinstance(stored, dict) or not _is_text(stored.get("study")) or not isinstance(stored.get("trials"), list):
        return None
    return Informed(stored["study"], tuple(each for each in stored["trials"][:MOST_INFORMING] if _is_trial(each)))


def is_whole(attributes: Mapping[str, Any]) -> bool:
    """Whether both attributes, as far as they are there, have the form that this program writes."""
    informed = informed_by(attributes)
    if AFTER in attributes and (informed is None or len(informed.trials) < len(attributes[AFTER]["trials"])):
        return False
    return DERIVED_FROM not in attributes or derived_from(attributes) is not None


def _is_trial(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"number", "state", "params", "values", "step"}:
        return False
    params, values, step = value["params"], value["values"], value["step"]
    return (
        _is_count(value["number"])
        and value["state"] in ("complete", "pruned")
        and (step is None or _is_count(step))
        and isinstance(values, list)
        and 1 <= len(values) <= 2
        and all(is_finite(each) for each in values)
        and isinstance(params, dict)
        and len(params) <= MOST_PARAMETERS
        and all(_is_text(name) and (_is_text(each) or is_finite(each) or each is True or each is False)
                for name, each in params.items())
    )  # fmt: skip


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MOST_TEXT and "\0" not in value


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_NUMBER


def is_finite(value: object) -> bool:
    """Whether it is a number as JSON has them, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
