"""The values a parameter may take in a config: one value, a list that is tried, or a range that is sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

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

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

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

    @property
    def is_whole(self) -> bool:
        """Whether it was written with whole numbers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 0))


class PartRange(Section):
    """A range of parts of the training images: `{low = "5 %", high = "50 %", log = true}`."""

    low: str
    high: str
    log: bool = False

    @model_validator(mode="after")
    def _are_parts(self) -> PartRange:
        if not part(self.low) < part(self.high):
            raise ValueError(f"low must be below high, got {self.low!r} and {self.high!r}")
        return self


def part(text: str) -> float:
    """The fraction that a text such as `10 %` means.

    Raises:
        ValueError: it is no such text, or not above 0 and at most 100 %.
    """
    number, percent, rest = text.partition("%")
    try:
        fraction = float(number) / 100
    except ValueError:
        fraction = math.nan
    if not percent or rest.strip() or not 0 < fraction <= 1:
        raise ValueError(f"a part is above 0 % and at most 100 %, such as '10 %', got {text!r}")
    return fraction


def counts(value: Any, total: int) -> Any:
    """`value` with each part of `total` as a count of at least 1."""

    def one(each: Any) -> Any:
        return max(1, round(part(each) * total)) if isinstance(each, str) else each

    if isinstance(value, PartRange):
        return Range(low=one(value.low), high=one(value.high), log=value.log)
    return tuple(map(one, value)) if isinstance(value, tuple) else one(value)


Integer = int | tuple[int, ...] | Range
Real = float | tuple[float, ...] | Range
Choice = str | tuple[str, ...]
Flag = bool | tuple[bool, ...]
Count = int | str | tuple[int | str, ...] | Range | PartRange
"""A number of training images, or a part of them."""
Scalar = bool | int | float | str
Argument = Scalar | tuple[Scalar, ...] | Range
"""Of own code or of torchvision's networks."""
MOST_TEXT = 300
"""Characters of one text."""


def searchable(
    kind: type[bool] | type[int] | type[float] | type[str],
    rule: str,
    holds: Callable[[Any], bool] = lambda _: True,
    *,
    parts: bool = False,
) -> Any:
    """A validator for a field that is one value, a list of values, or a Range.

    Args:
        kind: of every value.
        rule: what `holds` checks, as it stands in the error message.
        parts: also a part of the training images, such as `10 %`.
    """

    def one(value: Any) -> Any:
        if parts and isinstance(value, str):
            return _checked_part(value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER
        fits = isinstance(value, kind) if kind in (str, bool) else is_number
        if not fits or (kind is int and value != int(value)) or not holds(value):
            raise ValueError(f"must be {rule}, got {value!r}")
        return kind(value)

    def parse(value: Any) -> Any:
        if value is None or isinstance(value, PartRange):  # None: for fields that may be left out
            return value
        if isinstance(value, list | tuple):
            return _list_of(one, value)
        if isinstance(value, Range):
            value = value.model_dump()
        if isinstance(value, Mapping) and kind not in (str, bool):
            return _interval(kind, one, value, parts=parts)
        return one(value)

    return BeforeValidator(parse)


def _interval(kind: type, one: Callable[[Any], Any], value: Mapping[str, Any], *, parts: bool) -> Range | PartRange:
    if parts and isinstance(value.get("low"), str):
        return PartRange.model_validate(dict(value))
    span = Range.model_validate(dict(value))
    one(span.low), one(span.high)
    if kind is int and span.step is not None and span.step != int(span.step):
        raise ValueError("a range of whole numbers needs whole low, high and step")
    return span


def _checked_part(text: str) -> str:
    part(text)
    return text.strip()


def _list_of(one: Callable[[Any], Any], values: list[Any] | tuple[Any, ...]) -> tuple[Any, ...]:
    if len(values) > MOST_VALUES:
        raise ValueError(f"a list has at most {MOST_VALUES:,} values, got {len(values):,}; use a range")
    parsed = tuple(one(each) for each in values)
    if not parsed or len(set(parsed)) < len(parsed):
        raise ValueError(f"a list needs at least one value and no value twice, got {list(parsed)}")
    return parsed


def _argument(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Range.model_validate(dict(value))
    if isinstance(value, Range):
        return value
    if isinstance(value, list | tuple):
        parsed = tuple(_argument(each) for each in value)
        distinct = {(type(each), each) for each in parsed if not isinstance(each, tuple | Range)}
        if not 0 < len(parsed) <= MOST_VALUES or len(distinct) < len(parsed):
            raise ValueError(f"a list needs 1 to {MOST_VALUES:,} plain values, no value twice, got {list(value)[:10]}")
        return parsed
    too_large = isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER
    if not isinstance(value, Scalar) or too_large or (isinstance(value, str) and len(value) > MOST_TEXT):
        raise ValueError(f"must be a text, a number, true or false, a list of such, or a range, got {value!r}")
    return value


def _arguments(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("must be a table of arguments by name")
    for name in value:
        if not isinstance(name, str) or not name.isidentifier() or len(name) > MOST_TEXT:
            raise ValueError(f"an argument has the name of a Python variable, got {name!r}")
    return {name: _argument(each) for name, each in value.items()}


Arguments = Annotated[dict[str, Argument], BeforeValidator(_arguments)]
"""Of own code or of torchvision's networks: each a value, a list that is tried, or a range that is sampled."""


def is_searched(value: Any) -> bool:
    """Whether a config's value is a list or a range."""
    return isinstance(value, tuple | Range | PartRange)


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
