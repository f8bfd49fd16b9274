"""The statistics against scipy on known data, and against simulations with a known effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dashboards.statistics import LEVEL, any_difference, binomial_noise, compare, detectable, holm, summary


@pytest.fixture
def rng() -> np.random.Generator:
    """Of each test's own: the draws must not depend on which tests ran before in the same process."""
    return np.random.default_rng(0)


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_summary_equals_scipys(rng: np.random.Generator) -> None:
    values = rng.normal(0.8, 0.02, 7).tolist()
    result = summary(values)
    low, high = stats.t.interval(0.95, 6, loc=np.mean(values), scale=stats.sem(values))
    assert result.n == 7
    assert result.mean == pytest.approx(np.mean(values))
    assert result.sd == pytest.approx(stats.tstd(values))
    assert result.low == pytest.approx(low)
    assert result.high == pytest.approx(high)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert summary([0.5]).sd is summary([0.5]).low is None
    with pytest.raises(ValueError, match="at least one value"):
        summary([])


def test_comparison_equals_scipys_and_pairs_by_seed(rng: np.random.Generator) -> None:
    ours, theirs = rng.normal(0.8, 0.02, 9), rng.normal(0.79, 0.02, 9)
    shuffled = {seed: float(theirs[seed]) for seed in reversed(range(9))} | {77: 0.1}
    comparison = compare("a", "b", by_seed(ours.tolist()), shuffled)
    assert comparison is not None
    assert comparison.p_t == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert comparison.p_wilcoxon == pytest.approx(stats.wilcoxon(ours, theirs).pvalue)
    assert comparison.difference.n == 9


def test_nothing_in_common_is_no_comparison() -> None:
    assert compare("a", "b", {1: 0.5}, {2: 0.5}) is None
    one = compare("a", "b", {1: 0.5}, {1: 0.4})
    assert one is not None
    assert one.finding == "cannot tell"


def test_equal_differences_are_not_taken_for_no_difference() -> None:
    same = compare("a", "b", by_seed([0.5, 0.6]), by_seed([0.5, 0.6]))
    shifted = compare("a", "b", by_seed([0.5, 0.6]), by_seed([0.4, 0.5]))
    assert same is not None
    assert shifted is not None
    assert (same.finding, shifted.finding) == ("cannot tell", "better")


def test_holm_is_the_textbooks() -> None:
    """Four p-values worked by hand: 0.01 x 4, then the running maximum of 0.03 x 3, 0.04 x 2, 0.005 first."""
    comparisons = [compare("a", str(i), by_seed([0.1, 0.2, 0.3]), by_seed([0.0, 0.0, 0.1 * i])) for i in range(4)]
    family = [c for c in comparisons if c is not None]
    ps = [0.01, 0.04, 0.03, 0.005]
    from dataclasses import replace

    corrected = holm([replace(c, p_t=p) for c, p in zip(family, ps, strict=True)])
    assert [c.p_holm for c in corrected] == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("n", [3, 5, 20])
def test_intervals_cover_and_false_alarms_stay_at_their_level(n: int, rng: np.random.Generator) -> None:
    """500 studies without any effect: the interval misses 0, and the test cries, in 5 % of them (within 4 sd)."""
    trials = 500
    alarms = misses = 0
    for draws in rng.normal(0.0, 0.01, (trials, n)):
        comparison = compare("a", "b", by_seed(draws.tolist()), dict.fromkeys(range(n), 0.0))
        assert comparison is not None
        assert comparison.p_t is not None
        assert comparison.difference.low is not None
        assert comparison.difference.high is not None
        alarms += comparison.p_t < LEVEL
        misses += not comparison.difference.low <= 0 <= comparison.difference.high
    tolerance = 4 * math.sqrt(LEVEL * (1 - LEVEL) / trials)
    assert abs(alarms / trials - LEVEL) < tolerance
    assert abs(misses / trials - LEVEL) < tolerance


def test_holm_bounds_the_false_alarms_of_a_family(rng: np.random.Generator) -> None:
    """200 families of four comparisons without effect: at least one finding in at most 5 % of them."""
    alarms = 0
    for draws in rng.normal(0.0, 0.01, (200, 4, 5)):
        comparisons = [compare("a", "b", by_seed(row.tolist()), dict.fromkeys(range(5), 0.0)) for row in draws]
        alarms += any(c.finding != "cannot tell" for c in holm([c for c in comparisons if c is not None]))
    assert alarms / 200 < LEVEL + 4 * math.sqrt(LEVEL * (1 - LEVEL) / 200)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_the_minimum_detectable_difference_has_80_percent_power(n: int, rng: np.random.Generator) -> None:
    effect = detectable(0.01, n)
    draws = rng.normal(effect, 0.01, (4000, n))
    detected = np.asarray(stats.ttest_1samp(draws, 0.0, axis=1).pvalue) < LEVEL
    assert abs(detected.mean() - 0.8) < 4 * math.sqrt(0.16 / 4000)


def test_friedman_is_scipys_and_needs_three(rng: np.random.Generator) -> None:
    groups = [by_seed(rng.normal(0.5, 0.1, 6).tolist()) for _ in range(4)]
    expected = stats.friedmanchisquare(*[list(g.values()) for g in groups]).pvalue
    assert any_difference(groups) == pytest.approx(expected)
    assert any_difference(groups[:2]) is None
    assert any_difference([{0: 0.1, 1: 0.2}] * 3) is None
    assert any_difference([{0: 0.1, 1: 0.2, 2: 0.3}] * 3) == 1.0


def test_binomial_noise_is_what_guessing_gives(rng: np.random.Generator) -> None:
    hits = rng.binomial(500, 0.85, 20000) / 500
    assert binomial_noise(0.85, 500) == pytest.approx(hits.std(), rel=0.03)
