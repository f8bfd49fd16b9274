"""What a few seeds can show: means with intervals, paired comparisons, and the difference that they could have seen."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

LEVEL = 0.05
"""Two-sided; intervals cover 1 - LEVEL."""
POWER = 0.8

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Summary:
    """Mean of n values; sd and the 95 % interval (Student's t) from two values on."""

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


def summary(values: Sequence[float]) -> Summary:
    """Raises:
    ValueError: no values.
    """
    from scipy import stats

    if not values:
        raise ValueError("a mean needs at least one value")
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Summary(n, mean)
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


@dataclass(frozen=True)
class Comparison:
    """Two settings on the same seeds: a minus b."""

    a: str
    b: str
    difference: Summary
    p_t: float | None
    """Paired t-test; None below two pairs."""
    p_wilcoxon: float | None
    """Signed-rank test, which needs no normal distribution but, two-sided at 5 %, at least six pairs."""
    p_holm: float | None
    """p_t corrected for the family of comparisons that it was made in."""
    detectable: float | None
    """The smallest true difference that this many pairs with this spread find with a probability of 80 %."""

    @property
    def finding(self) -> str:
        """`better`, `worse` or `cannot tell`."""
        if self.p_holm is None or self.p_holm >= LEVEL:
            return "cannot tell"
        return "better" if self.difference.mean > 0 else "worse"


def compare(a: str, b: str, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison | None:
    """`a` against `b`, values by seed; None without a common seed. Not corrected yet: see `holm`."""
    from scipy import stats

    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    of = summary(differences.tolist())
    if of.n < 2 or of.sd is None:
        return Comparison(a, b, of, None, None, None, None)
    if of.sd <= 1e-12 * max(1.0, abs(of.mean)):  # every pair differs by the same: no spread to test against
        same = abs(of.mean) < 1e-12
        return Comparison(a, b, of, 1.0 if same else 0.0, None, 1.0 if same else 0.0, 0.0)
    p_t = float(stats.ttest_1samp(differences, 0.0).pvalue)
    # Differences are multiples of one image, computed in floats: equal ones must stay equal for the ranks.
    p_w = float(stats.wilcoxon(np.round(differences, 9)).pvalue)
    return Comparison(a, b, of, p_t, p_w, p_t, detectable(of.sd, of.n))


def holm(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons as one family: `p_holm` by Holm's step-down procedure (1979)."""
    corrected = holm_corrected({i: c.p_t for i, c in enumerate(comparisons) if c.p_t is not None})
    return [replace(c, p_holm=corrected.get(i)) for i, c in enumerate(comparisons)]


def holm_corrected(ps: Mapping[Key, float]) -> dict[Key, float]:
    """A family of p-values, each corrected."""
    corrected, floor = {}, 0.0
    for rank, key in enumerate(sorted(ps, key=lambda key: ps[key])):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[key]))
        corrected[key] = floor
    return corrected


def detectable(sd: float, n: int) -> float:
    """The true mean difference at which a two-sided paired t-test on n pairs has power 0.8; sd of the differences.

    Raises:
        ValueError: fewer than two pairs.
    """
    from scipy import optimize, stats

    if n < 2:
        raise ValueError(f"a paired test needs at least two pairs, got {n}")
    critical, df = float(stats.t.ppf(1 - LEVEL / 2, n - 1)), n - 1

    def power(effect: float) -> float:
        shift = effect * math.sqrt(n)
        probability = stats.nct.sf(critical, df, shift) + stats.nct.cdf(-critical, df, shift)
        return float(probability) if math.isfinite(probability) else 1.0

    high = 1.0
    while power(high) < POWER:
        high *= 2
    return sd * float(optimize.brentq(lambda effect: power(effect) - POWER, 0.0, high, xtol=1e-6))


def any_difference(groups: Sequence[Mapping[int, float]]) -> float | None:
    """Friedman's test over settings that share seeds: p of "all are the same"; None below 3 settings or 3 seeds."""
    from scipy import stats

    seeds = sorted(set.intersection(*(set(group) for group in groups))) if groups else []
    if len(groups) < 3 or len(seeds) < 3:
        return None
    table = [[round(group[seed], 9) for seed in seeds] for group in groups]
    if all(len(set(column)) == 1 for column in zip(*table, strict=True)):
        return 1.0
    return float(stats.friedmanchisquare(*table).pvalue)


def binomial_noise(accuracy: float, images: int) -> float:
    """Standard deviation of an accuracy that is measured on so many images."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images)
