"""The values a parameter may take in a config: one value, a list that is tried, or a range that is sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

LARGEST_NUMBER = 1e15
"""Of any parameter: beyond it a float no longer holds whole numbers exactly."""
MOST_VALUES = 1000
"""Of one list."""
MOST_STEPS = 1_000_000
"""Of one range: Optuna walks them when it rounds a float to the nearest step."""


class Section(BaseModel):
    """A part of a config: frozen, without unknown keys, without infinities and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Range(Section):
    """An interval that a sampler draws from: `{low = 0.001, high = 0.1, log = true}`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @model_validator(mode="after")
    def _is_an_interval(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range starts above 0, got {self.low:g}")
        if self.step is None:
            return self
        if self.log or self.step <= 0:
            raise ValueError("step must be above 0 and does not go with log")
        span = self.high - self.low
        if self.step > span:
            raise ValueError(f"step must be at most high - low ({span:g}), got {self.step:g}")
        if span / self.step > MOST_STEPS:
            raise ValueError(
                f"a range has at most {MOST_STEPS:,} steps, got {span / self.step:,.0f}; use a larger step"
            )
        steps = round(span / self.step)
        if not math.isclose(self.low + steps * self.step, self.high, rel_tol=1e-9):
            nearest = self.low + math.floor(span / self.step) * self.step
            raise ValueError(
                f"step {self.step:g} does not divide the range from {self.low:g} to {self.high:g}; "
                f"the nearest high that fits is {nearest:g}"
            )
        return self


Integer = int | tuple[int, ...] | Range
Real = float | tuple[float, ...] | Range


def searchable(kind: type[int] | type[float] | type[str], rule: str, holds: Callable[[Any], bool]) -> Any:
    """A validator for a field that is one value, a list of values, or a Range.

    Args:
        kind: of every value.
        rule: what `holds` checks, as it stands in the error message.
    """

    def one(value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER
        fits = isinstance(value, str) if kind is str else is_number
        if not fits or (kind is int and value != int(value)) or not holds(value):
            raise ValueError(f"must be {rule}, got {value!r}")
        return kind(value)

    def parse(value: Any) -> Any:
        if value is None:  # for fields that may be left out; the others refuse it by their type
            return None
        if isinstance(value, list | tuple):
            if len(value) > MOST_VALUES:
                raise ValueError(f"a list has at most {MOST_VALUES:,} values, got {len(value):,}; use a range")
            parsed = tuple(one(each) for each in value)
            if not parsed or len(set(parsed)) < len(parsed):
                raise ValueError(f"a list needs at least one value and no value twice, got {list(parsed)}")
            return parsed
        if isinstance(value, Mapping | Range) and kind is not str:
            span = value if isinstance(value, Range) else Range.model_validate(dict(value))
            one(span.low), one(span.high)
            if kind is int and span.step is not None and span.step != int(span.step):
                raise ValueError("a range of whole numbers needs whole low, high and step")
            return span
        return one(value)

    return BeforeValidator(parse)


def is_searched(value: Any) -> bool:
    """Whether a config's value is a list or a range."""
    return isinstance(value, tuple | Range)


def smallest(value: Any) -> Any:
    """The smallest of a value, a list or a range."""
    return value.low if isinstance(value, Range) else min(value) if isinstance(value, tuple) else value


def largest(value: Any) -> Any:
    """The largest of a value, a list or a range."""
    return value.high if isinstance(value, Range) else max(value) if isinstance(value, tuple) else value


def middle(value: Any) -> Any:
    """The middle of a value, a list (by position) or a range."""
    if isinstance(value, Range):
        return (value.low + value.high) / 2
    return value[len(value) // 2] if isinstance(value, tuple) else value


def first(value: Any) -> Any:
    """The value itself, the first of a list, or the low end of a range."""
    return value.low if isinstance(value, Range) else value[0] if isinstance(value, tuple) else value
