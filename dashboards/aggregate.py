"""Trials of one setting taken together over their seeds: means with intervals, costs, comparisons, and the verdict."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from dashboards.formatting import label
from dashboards.statistics import (
    LEVEL,
    Comparison,
    Ratio,
    Summary,
    any_difference,
    binomial_noise,
    compare,
    expected_fall,
    holm_corrected,
    maybe_best,
    ratio,
    simultaneous,
    summary,
)
from dashboards.study_data import StudyData, TrialRow
from study.config.models import POLICY_SPECIFIC
from study.search import space


@dataclass(frozen=True)
class Cell:
    """The trials of one setting that are complete, by seed, and all others that ended."""

    parameters: dict[str, Any]
    rows: tuple[TrialRow, ...]
    ended: tuple[TrialRow, ...]
    """Complete and pruned."""
    images: Mapping[str, int] = field(default_factory=dict)
    """How many there are to measure on, by split: the noise that they bring into an accuracy. Empty: not known."""

    @property
    def label(self) -> str:
        return label(self.parameters) or self.ended[0].policy

    @property
    def policy(self) -> str:
        return self.ended[0].policy

    @property
    def pruned(self) -> bool:
        return len(self.rows) < len(self.ended)

    @cached_property
    def accuracy(self) -> Summary:
        """In validation, over the complete trials; where there are none, over the pruned ones, which is no estimate of
        anything.
        """
        return summary([row.value or 0.0 for row in self.rows or self.ended], self.images.get("validation"))

    @cached_property
    def test(self) -> Summary | None:
        values = [row.test for row in self.rows if row.test is not None]
        return summary(values, self.images.get("test")) if values else None

    def measured(self, measure: str) -> Summary:
        """`accuracy` or, where `measure` is `test`, `test`."""
        return (self.test if measure == "test" else None) or self.accuracy

    def mean(self, name: str) -> float:
        return statistics.fmean(getattr(row, name) for row in self.rows or self.ended)

    def by_seed(self, measure: str) -> dict[int, float]:
        """`value` or `test` of the complete trials."""
        values = {row.seed: getattr(row, measure) for row in self.rows if row.seed is not None}
        return {seed: value for seed, value in values.items() if value is not None}


def cells_of(data: StudyData) -> list[Cell]:
    """In the order of their first trial; settings of which no trial has ended are left out."""
    by_setting: dict[tuple[tuple[str, Any], ...], list[TrialRow]] = {}
    for row in data.rows:
        chosen = {name: row.parameters[name] for name in data.parameters if name in row.parameters}
        by_setting.setdefault(tuple(chosen.items()), [])
        if row.state in ("complete", "pruned") and row.value is not None:
            by_setting[tuple(chosen.items())].append(row)
    return [
        Cell(dict(key), tuple(row for row in rows if row.state == "complete"), tuple(rows), data.measured_on)
        for key, rows in by_setting.items()
        if rows
    ]


@dataclass(frozen=True)
class Findings:
    """Everything that is said of a study's cells."""

    cells: list[Cell]
    measure: str
    """`test` if every complete trial has been evaluated on the test split, else `value` (validation)."""
    comparisons: list[Comparison]
    """One family: their intervals hold together."""
    effects: dict[str, float]
    """For a grid of alpha and beta: p of "alpha makes no difference", "beta makes none" (Friedman, Holm-corrected)."""
    ratios: dict[str, Ratio] = field(default_factory=dict)
    """Cell label to its seconds over those of the full run of the same seed and device."""
    candidates: list[Cell] = field(default_factory=list)
    """The settings that may be the best (95 %), the highest mean first; empty where settings are single runs."""
    fall: float | None = None
    """By how much the highest mean is expected to be lower on fresh seeds; None where that cannot be estimated."""

    @cached_property
    def complete(self) -> list[Cell]:
        """Cells with complete trials, the highest mean first."""
        having = [cell for cell in self.cells if cell.rows]
        return sorted(having, key=lambda cell: -cell.measured(self.measure).mean)

    @cached_property
    def ranked(self) -> list[Cell]:
        """All cells as people read them: the highest mean first, those without a complete trial last."""
        return [*self.complete, *sorted((c for c in self.cells if not c.rows), key=lambda cell: -cell.accuracy.mean)]

    @cached_property
    def single(self) -> bool:
        """Whether every cell is one trial."""
        return all(len(cell.ended) == 1 for cell in self.cells)


_known: WeakKeyDictionary[StudyData, Findings] = WeakKeyDictionary()


def findings(data: StudyData) -> Findings:
    """Computed once: the console, a page and its figures ask for the same, of up to a hundred thousand trials."""
    if data not in _known:
        _known[data] = _findings(data)
    return _known[data]


def _findings(data: StudyData) -> Findings:
    cells = cells_of(data)
    done = [row for cell in cells for row in cell.rows]
    measure = "test" if done and all(row.test is not None for row in done) else "value"
    images = data.measured_on.get("test" if measure == "test" else "validation")
    resolution = 1 / images if images else 0.0
    pairs = [
        compare(a.label, b.label, a.by_seed(measure), b.by_seed(measure), resolution) for a, b in _opponents(cells)
    ]
    found = Findings(
        cells, measure, simultaneous([c for c in pairs if c is not None]), _effects(cells, data, measure),
        _ratios(cells),
    )  # fmt: skip
    complete = found.complete
    if not complete or (data.config.search.replicates < 2 and any(len(cell.rows) < 2 for cell in complete)):
        return found
    values = [cell.by_seed(measure) for cell in complete]
    candidates = [cell for cell, p in zip(complete, maybe_best(values, resolution), strict=True) if p >= LEVEL]
    return replace(found, candidates=candidates, fall=expected_fall(values))


def _opponents(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Dynamic training against every other policy in otherwise equal settings."""
    policies = [cell.policy for cell in cells]
    first = "dynamic" if "dynamic" in policies else policies[0] if policies else ""
    controls = [cell for cell in cells if cell.policy != first]
    return [(a, b) for b in controls for a in cells if a.policy == first and _else_equal(a, b)]


def _else_equal(a: Cell, b: Cell) -> bool:
    """Whether two cells agree in what both have a meaning for, but the policy itself."""
    common = (a.parameters.keys() & b.parameters.keys()) - {"policy"}
    alone = (a.parameters.keys() ^ b.parameters.keys()) - {"policy"}
    return all(a.parameters[name] == b.parameters[name] for name in common) and alone <= POLICY_SPECIFIC


def _ratios(cells: Sequence[Cell]) -> dict[str, Ratio]:
    """Of each cell that has a full run to stand against, as one family; times of two kinds of device do not compare."""
    pairs: dict[str, list[float]] = {}
    for full in (cell for cell in cells if cell.policy == "full"):
        theirs = {(row.seed, *_machine(row)): row.seconds for row in full.rows}
        for cell in (cell for cell in cells if _else_equal(cell, full) or cell is full):
            keyed = [(row.seconds, theirs.get((row.seed, *_machine(row)))) for row in cell.rows]
            own = [ours / other for ours, other in keyed if other and ours]
            if own:
                pairs[cell.label] = own
    tested = sum(len(own) > 1 and set(own) != {1.0} for own in pairs.values())
    return {name: ratio(own, max(1, tested)) for name, own in pairs.items()}


def _machine(row: TrialRow) -> tuple[Any, Any]:
    return row.attributes.get("device"), row.attributes.get("host")


def _effects(cells: Sequence[Cell], data: StudyData, measure: str) -> dict[str, float]:
    """Of each parameter of a grid: its levels, each the mean over all that was crossed with it, compared by seed.

    Only of whole grids: of half a one, a level's mean is over other cells than its neighbour's.
    """
    if data.config.search.sampler.kind != "grid" or data.config.search.cells or "policy" in data.parameters:
        return {}
    if len(cells) < len(space.cells(data.config)):
        return {}
    raw: dict[str, float] = {}
    for name in data.parameters:
        levels: dict[Any, list[dict[int, float]]] = {}
        for cell in cells:
            levels.setdefault(cell.parameters[name], []).append(cell.by_seed(measure))
        groups = [_mean_by_seed(group) for group in levels.values()]
        p = any_difference(groups)
        if p is not None:
            raw[name] = p
    return holm_corrected(raw)


def _mean_by_seed(group: Iterable[dict[int, float]]) -> dict[int, float]:
    members = list(group)
    seeds = set.intersection(*(set(member) for member in members))
    return {seed: statistics.fmean(member[seed] for member in members) for seed in seeds}


@dataclass(frozen=True)
class Grid:
    """The alpha x beta table of a study: mean value over all trials of a cell that ended, in [0, 1]."""

    alphas: tuple[int, ...]
    betas: tuple[float, ...]
    values: dict[tuple[int, float], Cell]


def grid(data: StudyData) -> Grid | None:
    """The table, if the study is a grid over alpha and beta and nothing else."""
    searched = data.config.searched()
    crossed = data.config.search.sampler.kind == "grid" and data.config.search.cells is None
    if set(data.parameters) != {"alpha", "beta"} or not crossed:
        return None
    return Grid(
        tuple(sorted(searched["alpha"])),
        tuple(sorted(searched["beta"])),
        {(cell.parameters["alpha"], cell.parameters["beta"]): cell for cell in cells_of(data)},
    )


def noise(data: StudyData) -> float | None:
    """Standard deviation of the best trial's validation accuracy by the number of images alone."""
    best, images = data.best, data.measured_on.get("validation")
    return binomial_noise(best.value or 0.0, images) if best is not None and images else None


def pareto(rows: Iterable[TrialRow], cost: str = "images") -> list[TrialRow]:
    """The trials that no other beats in both accuracy and `cost` (`images` or `seconds`), by rising cost."""
    front: list[TrialRow] = []
    for row in sorted(rows, key=lambda row: (getattr(row, cost), -(row.value or 0.0), row.number)):
        if not front or (row.value or 0.0) > (front[-1].value or 0.0):
            front.append(row)
    return front
