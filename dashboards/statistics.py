"""What a few seeds can show: means with intervals, paired comparisons, the settings that may be the best.

Distributions are taken from scipy.special and scipy.stats is imported where a test needs it: it takes half a second.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Two-sided, of a whole family of statements; intervals cover 1 - LEVEL."""
POWER = 0.8
FEW = 6
"""Seeds below which a finding is provisional: a signed-rank test of five pairs cannot reach 5 %, so it rests on the
normal distribution alone."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Summary:
    """Mean of n values; sd and the 95 % interval from two values on."""

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


def summary(values: Sequence[float], images: int | None = None, level: float = LEVEL) -> Summary:
    """The mean with its interval by Student's t.

    Args:
        images: the values are accuracies in [0, 1] on the same so many images. The interval is then also for other
            images of the kind: the binomial noise of the mean, which all seeds share, is added in quadrature. That is
            an upper bound, as a part of it is in the spread between seeds already.
        level: 1 - coverage.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Summary(n, mean)
    from scipy import special

    sd = float(np.std(values, ddof=1))
    half = float(special.stdtrit(n - 1, 1 - level / 2)) * sd / math.sqrt(n)
    if not images:
        return Summary(n, mean, sd, mean - half, mean + half)
    half = math.hypot(half, float(special.ndtri(1 - level / 2)) * binomial_noise(mean, images))
    return Summary(n, mean, sd, max(0.0, mean - half), min(1.0, mean + half))


@dataclass(frozen=True)
class Comparison:
    """Two settings on the same seeds: a minus b, as one of a family of comparisons."""

    a: str
    b: str
    difference: Summary
    """Its interval is simultaneous: all intervals of the family hold together with 95 %."""
    p_t: float | None
    """Paired t-test; None below two pairs."""
    p_wilcoxon: float | None
    """Signed-rank test, which needs no normal distribution; None below six pairs, where it cannot reach 5 %."""
    p_adjusted: float | None
    """p_t times the size of the family (Bonferroni): below 5 % exactly where the interval leaves out 0."""
    detectable: float | None
    """The true difference that this many pairs with this spread find, in this family, with a probability of 80 %."""

    @property
    def finding(self) -> str:
        """`better`, `worse` or `cannot tell`."""
        if self.p_adjusted is None or self.p_adjusted >= LEVEL:
            return "cannot tell"
        return "better" if self.difference.mean > 0 else "worse"

    @property
    def provisional(self) -> bool:
        return self.difference.n < FEW


def compare(
    a: str, b: str, ours: Mapping[int, float], theirs: Mapping[int, float], resolution: float = 0.0
) -> Comparison | None:
    """`a` against `b`, values by seed, as a family of one; None without a common seed.

    Args:
        resolution: the step of the values, as one image of all validation images. Differences that are all equal are
            taken for as uncertain as their rounding.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    # Differences are multiples of one image, computed in floats: equal ones must stay equal for the ranks.
    differences = np.round([ours[seed] - theirs[seed] for seed in seeds], 9)
    n, mean = len(seeds), float(differences.mean())
    if n < 2:
        return Comparison(a, b, Summary(n, mean), None, None, None, None)
    sd = max(float(differences.std(ddof=1)), _rounding(resolution))
    p_t = _p_two_sided(mean, sd, n)
    p_w = None
    if n >= FEW and differences.any():
        from scipy import stats

        p_w = float(stats.wilcoxon(differences).pvalue)
    return simultaneous([Comparison(a, b, Summary(n, mean, sd), p_t, p_w, None, None)])[0]


def simultaneous(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons as one family: intervals, p-values and minimum detectable differences by Bonferroni."""
    size = sum(c.p_t is not None for c in comparisons)
    if not size:
        return list(comparisons)
    from scipy import special

    family = []
    for c in comparisons:
        n, mean, sd = c.difference.n, c.difference.mean, c.difference.sd
        if c.p_t is None or sd is None:
            family.append(c)
            continue
        half = float(special.stdtrit(n - 1, 1 - LEVEL / size / 2)) * sd / math.sqrt(n)
        difference = Summary(n, mean, sd, mean - half, mean + half)
        least = detectable(sd, n, LEVEL / size)
        family.append(replace(c, difference=difference, p_adjusted=min(1.0, size * c.p_t), detectable=least))
    return family


def holm_corrected(ps: Mapping[Key, float]) -> dict[Key, float]:
    """A family of p-values without intervals, each corrected by Holm's step-down procedure (1979)."""
    corrected, floor = {}, 0.0
    for rank, key in enumerate(sorted(ps, key=lambda key: ps[key])):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[key]))
        corrected[key] = floor
    return corrected


def detectable(sd: float, n: int, level: float = LEVEL) -> float:
    """The true mean difference at which a two-sided paired t-test on n pairs has power 0.8; sd of the differences.

    Raises:
        ValueError: fewer than two pairs.
    """
    if n < 2:
        raise ValueError(f"a paired test needs at least two pairs, got {n}")
    return sd / math.sqrt(n) * _detectable_effect(n - 1, level)


@functools.cache
def _detectable_effect(df: float, level: float) -> float:
    """In standard errors of the difference."""
    from scipy import optimize, special

    critical = float(special.stdtrit(df, 1 - level / 2))

    def power(effect: float) -> float:
        probability = 1 - special.nctdtr(df, effect, critical) + special.nctdtr(df, effect, -critical)
        return float(probability) if math.isfinite(probability) else 1.0

    high = 1.0
    while power(high) < POWER:
        high *= 2
    return float(optimize.brentq(lambda effect: power(effect) - POWER, 0.0, high, xtol=1e-6))


@dataclass(frozen=True)
class Difference:
    """The mean of one setting minus that of another: over common seeds where there are two at least, else by Welch."""

    mean: float
    n: tuple[int, int]
    """Seeds of the one and of the other."""
    paired: bool
    error: float | None = None
    """Standard error; None where it cannot be estimated, from a single run."""
    df: float = 0.0
    """Degrees of freedom of the error."""

    @property
    def p(self) -> float | None:
        """Two-sided, of this difference alone."""
        return None if self.error is None else 2 * self._p_beyond()

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Covers the true difference with 1 - `level`; infinite where the error is not known."""
        from scipy import stats

        if self.error is None:
            return -math.inf, math.inf
        half = float(stats.t.ppf(1 - level / 2, self.df)) * self.error
        return self.mean - half, self.mean + half

    def detectable(self, level: float = LEVEL) -> float | None:
        """The true difference that so many seeds with this spread find with a probability of 80 %."""
        return None if self.error is None else self.error * _detectable_effect(self.df, level)

    def _p_beyond(self) -> float:
        from scipy import stats

        if self.error == 0:
            return 0.0 if self.mean else 0.5
        return float(stats.t.sf(abs(self.mean) / (self.error or 1.0), self.df))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float], resolution: float = 0.0) -> Difference:
    """`ours` minus `theirs`, values by seed.

    Args:
        resolution: as in `compare`.

    Raises:
        ValueError: no values.
    """
    if not ours or not theirs:
        raise ValueError("a difference needs at least one value on each side")
    common = sorted(ours.keys() & theirs.keys())
    if len(common) > 1 or (common and min(len(ours), len(theirs)) < 2):
        differences = np.round([ours[seed] - theirs[seed] for seed in common], 9)
        n, mean = len(common), float(differences.mean())
        if n < 2:
            return Difference(mean, (n, n), True)
        sd = max(float(differences.std(ddof=1)), _rounding(resolution))
        return Difference(mean, (n, n), True, sd / math.sqrt(n), n - 1)
    a, b = np.array(list(ours.values())), np.array(list(theirs.values()))
    mean, n_a, n_b = round(float(a.mean() - b.mean()), 9), len(a), len(b)
    if min(n_a, n_b) < 2:
        return Difference(mean, (n_a, n_b), False)
    least = resolution**2 / 12
    of_a, of_b = max(float(a.var(ddof=1)), least) / n_a, max(float(b.var(ddof=1)), least) / n_b
    if of_a + of_b == 0:
        return Difference(mean, (n_a, n_b), False, 0.0, n_a + n_b - 2)
    df = (of_a + of_b) ** 2 / (of_a**2 / (n_a - 1) + of_b**2 / (n_b - 1))
    return Difference(mean, (n_a, n_b), False, math.sqrt(of_a + of_b), df)


@dataclass(frozen=True)
class BestAgainstBest:
    """The best setting of one group minus the best of another."""

    ours: int
    """Place of the highest mean among the one group's settings."""
    theirs: int
    difference: Difference
    """Of these two."""
    low: float
    """Infinite where a single run stands against it: such a setting cannot be ruled out."""
    high: float

    @property
    def finding(self) -> str:
        """`better`, `worse` or `cannot tell`."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "cannot tell"

    @property
    def provisional(self) -> bool:
        return min(self.difference.n) < FEW


def best_against_best(
    ours: Sequence[Mapping[int, float]],
    theirs: Sequence[Mapping[int, float]],
    resolution: float = 0.0,
    level: float = LEVEL,
) -> BestAgainstBest:
    """The highest true mean of `ours` minus the highest of `theirs`, settings as values by seed, with its interval.

    The settings with the highest means were chosen from the data. So the interval's lower end is that of our setting
    against every one of theirs, one-sided, Bonferroni over ours, of which any could have been chosen; the upper end is
    the same with the two groups exchanged. Of one setting each it is Student's interval.

    Raises:
        ValueError: a group without a setting, or a setting without values.
    """
    if not ours or not theirs:
        raise ValueError("a group needs at least one setting")
    first, second = (
        max(range(len(group)), key=lambda i: statistics.fmean(group[i].values())) for group in (ours, theirs)
    )
    lows = [difference(ours[first], other, resolution).interval(level / len(ours))[0] for other in theirs]
    highs = [difference(other, theirs[second], resolution).interval(level / len(theirs))[1] for other in ours]
    between = difference(ours[first], theirs[second], resolution)
    return BestAgainstBest(first, second, between, min(lows), max(highs))


def maybe_best(groups: Sequence[Mapping[int, float]], resolution: float = 0.0) -> list[float]:
    """Of each setting, values by seed, the p-value of "it is the best": those from 5 % on may be the best.

    Multiple comparisons with the best (Hsu 1981): one-sided t-tests of a setting against every other, Bonferroni over
    the others. Paired where the two share at least two seeds, which holds for unequal variances and correlated seeds;
    by Welch otherwise. The set of settings that may be the best then holds the best one with at least 95 %. A setting
    of a single run cannot be left out.

    Args:
        resolution: as in `compare`.
    """
    seeds = sorted({seed for group in groups for seed in group})
    table = np.array([[group.get(seed, math.nan) for seed in seeds] for group in groups])
    ps = []
    for i in range(len(groups)):
        others = np.delete(table, i, axis=0)
        tests = _p_others_better(table[i], others, resolution)
        ps.append(min(1.0, max(1, len(others)) * float(tests.min(initial=1.0))))
    return ps


def _p_others_better(own: NDArray[np.float64], others: NDArray[np.float64], resolution: float) -> NDArray[np.float64]:
    """One-sided p of "this other one is not better", 1 where it cannot be tested.

    Args:
        own: shape [seeds], NaN where missing.
        others: shape [settings, seeds].
    """
    from scipy import special

    differences = np.round(others - own, 9)
    paired = np.isfinite(differences).sum(axis=1)
    ps = np.ones(len(others))
    both = paired >= 2
    if both.any():
        these, n = differences[both], paired[both]
        sd = np.maximum(np.nanstd(these, axis=1, ddof=1), _rounding(resolution))
        mean = np.nanmean(these, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(mean == 0, 0.0, mean / (sd / np.sqrt(n)))
        ps[both] = special.stdtr(n - 1, -t)
    ours = own[np.isfinite(own)]
    for j in np.flatnonzero(~both):
        theirs = others[j][np.isfinite(others[j])]
        if len(ours) > 1 and len(theirs) > 1 and (np.std(ours) or np.std(theirs)):
            from scipy import stats

            ps[j] = float(stats.ttest_ind(theirs, ours, equal_var=False, alternative="greater").pvalue)
    return ps


def _rounding(resolution: float) -> float:
    """Standard deviation of a difference by the rounding of both values to multiples of `resolution`."""
    return resolution / math.sqrt(6)


def _p_two_sided(mean: float, sd: float, n: int) -> float:
    from scipy import special

    if mean == 0:
        return 1.0
    return float(2 * special.stdtr(n - 1, -abs(mean) / (sd / math.sqrt(n)))) if sd > 0 else 0.0


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of paired ratios with its interval, as one of a family."""

    n: int
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def finding(self) -> str:
        """`less`, `more` or `cannot tell`, against 1."""
        if self.low is None or self.high is None or self.low <= 1 <= self.high:
            return "cannot tell"
        return "less" if self.mean < 1 else "more"

    @property
    def provisional(self) -> bool:
        return self.n < FEW


def ratio(values: Sequence[float], family: int = 1) -> Ratio:
    """Ratios above 0, by Student's t on their logarithms, Bonferroni over `family` of them.

    Raises:
        ValueError: no values.
    """
    of = summary([math.log(value) for value in values], level=LEVEL / family)
    if of.low is None or of.high is None:
        return Ratio(of.n, math.exp(of.mean))
    return Ratio(of.n, math.exp(of.mean), math.exp(of.low), math.exp(of.high))


def expected_fall(groups: Sequence[Mapping[int, float]]) -> float | None:
    """Regression to the mean: how much lower the highest of these means is expected to be on fresh seeds.

    The empirical Bayes estimate of Efron and Morris (1975): a mean stands above the mean of all means partly by chance,
    and that part is the noise of a mean over the variance of the means. The noise is estimated from the replicates,
    without what all settings of a seed share. None below four settings or two common seeds.

    Args:
        groups: values by seed.
    """
    seeds = sorted(set.intersection(*(set(group) for group in groups))) if groups else []
    if len(groups) < 4 or len(seeds) < 2:
        return None
    table = np.array([[group[seed] for seed in seeds] for group in groups])
    k, n = table.shape
    means = table.mean(axis=1)
    residuals = table - means[:, None] - table.mean(axis=0) + table.mean()
    noise = float((residuals**2).sum()) / ((k - 1) * (n - 1)) / n
    spread = float(((means - means.mean()) ** 2).sum())
    if spread == 0:
        return 0.0
    return float(min(1.0, (k - 3) * noise / spread) * (means.max() - means.mean()))


def any_difference(groups: Sequence[Mapping[int, float]]) -> float | None:
    """Friedman's test over settings that share seeds: p of "all are the same"; None below 3 settings or 3 seeds."""
    seeds = sorted(set.intersection(*(set(group) for group in groups))) if groups else []
    if len(groups) < 3 or len(seeds) < 3:
        return None
    table = [[round(group[seed], 9) for seed in seeds] for group in groups]
    if all(len(set(column)) == 1 for column in zip(*table, strict=True)):
        return 1.0
    from scipy import stats

    return float(stats.friedmanchisquare(*table).pvalue)


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """Spearman's rho and its p-value; None below four values, or where one side is constant."""
    from scipy import stats

    if len(ours) < 4 or len(set(ours)) < 2 or len(set(theirs)) < 2:
        return None
    result = stats.spearmanr(ours, theirs)
    return float(result.statistic), float(result.pvalue)


def binomial_noise(accuracy: float, images: int) -> float:
    """Standard deviation of an accuracy that is measured on so many images."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images)


def p_of_guessing(accuracy: float, images: int, guess: float, looks: int) -> float:
    """p of "an accuracy as high, as the highest of `looks`, comes from guessing right with probability `guess`".

    A binomial tail, Bonferroni over the looks.
    """
    from scipy import special

    right = round(accuracy * images)
    return min(1.0, looks * float(special.bdtrc(right - 1, images, guess))) if right else 1.0


def still_rising(curves: Sequence[Sequence[float]], share: float = 0.2) -> float | None:
    """What the last `share` of the epochs gained over as many before them, if that is more than noise; else None.

    Args:
        curves: accuracies by epoch, of trials that ran to their end. At least five epochs each; shorter ones are left
            out. Over the curves the gain is tested by Student's t; of a single one by Welch's over its epochs.
    """
    pairs = []
    for curve in curves:
        width = max(2, round(share * len(curve)))
        if len(curve) >= 5:
            pairs.append((np.array(curve[-width:]), np.array(curve[-2 * width : -width])))
    if not pairs:
        return None
    gains = [float(last.mean()) - float(before.mean()) for last, before in pairs]
    gain = statistics.fmean(gains)
    if gain <= 0:
        return None
    if len(pairs) > 2:
        sd = float(np.std(gains, ddof=1))
        p = _p_two_sided(gain, sd, len(gains)) / 2
    else:
        last, before = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        if last.std() == before.std() == 0:
            return gain
        from scipy import stats

        p = float(stats.ttest_ind(last, before, equal_var=False, alternative="greater").pvalue)
    return gain if bool(p < LEVEL) else None
