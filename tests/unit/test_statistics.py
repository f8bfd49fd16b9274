"""The statistics against scipy on known data, and against simulations with a known effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dashboards.statistics import (
    LEVEL,
    Comparison,
    any_difference,
    best_against_best,
    binomial_noise,
    compare,
    detectable,
    difference,
    expected_fall,
    holm_corrected,
    maybe_best,
    p_of_guessing,
    rank_correlation,
    ratio,
    simultaneous,
    still_rising,
    summary,
)


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


def test_equal_differences_of_one_image_are_no_finding_of_two_seeds() -> None:
    """Two pairs that both differ by one of 359 images: without the rounding, that is p = 0."""
    one = 1 / 359
    rounded = compare("a", "b", by_seed([0.9 + one, 0.92 + one]), by_seed([0.9, 0.92]), resolution=one)
    assert rounded is not None
    assert rounded.finding == "cannot tell"


def test_wilcoxon_is_left_out_where_it_cannot_reach_5_percent() -> None:
    five = compare("a", "b", by_seed([0.5, 0.6, 0.7, 0.8, 0.9]), by_seed([0.1, 0.2, 0.1, 0.2, 0.1]))
    six = compare("a", "b", by_seed([0.5, 0.6, 0.7, 0.8, 0.9, 0.95]), by_seed([0.1, 0.2, 0.1, 0.2, 0.1, 0.2]))
    assert five is not None
    assert six is not None
    assert (five.p_wilcoxon, five.provisional) == (None, True)
    assert six.p_wilcoxon == pytest.approx(2 / 2**6)
    assert not six.provisional


def test_holm_is_the_textbooks() -> None:
    """Four p-values worked by hand: 0.01 x 4, then the running maximum of 0.03 x 3, 0.04 x 2, 0.005 first."""
    corrected = holm_corrected(dict(enumerate([0.01, 0.04, 0.03, 0.005])))
    assert corrected == pytest.approx({0: 0.03, 1: 0.06, 2: 0.06, 3: 0.02})


def family_of(table: np.ndarray) -> list[Comparison]:
    """The first row against every other."""
    pairs = [compare("a", str(i), by_seed(table[0].tolist()), by_seed(row.tolist())) for i, row in enumerate(table[1:])]
    return simultaneous([pair for pair in pairs if pair is not None])


def test_intervals_and_p_values_of_a_family_agree(rng: np.random.Generator) -> None:
    """In 100 families of four whose effects are around what five seeds detect; there are findings of both kinds."""
    findings = []
    for _ in range(100):
        for c in family_of(rng.normal(0.0, 0.01, (5, 5)) + 0.03 * np.arange(5)[:, None] - 0.05):
            assert c.difference.low is not None
            assert c.difference.high is not None
            assert (c.finding != "cannot tell") == (c.difference.low > 0 or c.difference.high < 0)
            findings.append(c.finding)
    assert set(findings) == {"cannot tell", "worse"}


def test_a_family_of_one_is_the_plain_t_test(rng: np.random.Generator) -> None:
    ours, theirs = rng.normal(0.8, 0.02, (2, 7))
    (one,) = family_of(np.array([ours, theirs]))
    low, high = stats.ttest_rel(ours, theirs).confidence_interval()
    assert (one.p_adjusted, one.difference.low, one.difference.high) == pytest.approx((one.p_t, low, high), abs=1e-7)


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


def test_false_findings_and_missed_intervals_of_a_family_are_bounded(rng: np.random.Generator) -> None:
    """200 families of four comparisons without effect: at least one finding in at most 5 % of them."""
    alarms = sum(any(c.finding != "cannot tell" for c in family_of(rng.normal(0.0, 0.01, (5, 5)))) for _ in range(200))
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


@pytest.mark.parametrize("deviations", ["equal", "unequal"])
@pytest.mark.parametrize(("settings", "seeds"), [(2, 3), (5, 5), (21, 3)])
def test_the_set_of_settings_that_may_be_the_best_holds_the_best(
    settings: int, seeds: int, deviations: str, rng: np.random.Generator
) -> None:
    """300 studies of settings that are all alike, the hardest case; `benchmarks.statistics` has more of them."""
    spread = np.ones(settings) if deviations == "equal" else np.geomspace(0.3, 3, settings)
    held = 0
    for _ in range(300):
        table = spread[:, None] * rng.normal(size=(settings, seeds)) + rng.normal(size=seeds)
        held += maybe_best([by_seed(row.tolist()) for row in table])[0] >= LEVEL
    assert held / 300 > 1 - LEVEL - 4 * math.sqrt(LEVEL * (1 - LEVEL) / 300)


def test_settings_that_are_far_behind_cannot_be_the_best(rng: np.random.Generator) -> None:
    table = rng.normal(0, 0.01, (4, 6)) + np.array([0.9, 0.9, 0.5, 0.5])[:, None]
    assert [p >= LEVEL for p in maybe_best([by_seed(row.tolist()) for row in table])] == [True, True, False, False]
    assert maybe_best([{0: 0.9}, {0: 0.1}]) == [1.0, 1.0]  # single runs leave nothing out
    assert maybe_best([{0: 0.9, 1: 0.91}]) == [1.0]
    assert maybe_best([]) == []


def test_settings_without_common_seeds_are_compared_by_welch(rng: np.random.Generator) -> None:
    ours, theirs = rng.normal(0.8, 0.01, 5), rng.normal(0.78, 0.03, 4)
    apart = [dict(enumerate(ours.tolist())), dict(enumerate(theirs.tolist(), 100))]
    expected = stats.ttest_ind(ours, theirs, equal_var=False, alternative="greater").pvalue
    assert maybe_best(apart) == pytest.approx([min(1, 1 - expected), expected])


def test_an_accuracys_interval_counts_its_images(rng: np.random.Generator) -> None:
    """300 studies of five seeds on 500 images that all seeds share: without the images a half of the intervals miss."""
    covered = {None: 0, 500: 0}
    for _ in range(300):
        values = (rng.binomial(500, 0.85) / 500 + rng.normal(0, 0.005, 5)).tolist()
        for images in covered:
            of = summary(values, images)
            assert of.low is not None
            assert of.high is not None
            covered[images] += of.low <= 0.85 <= of.high
    assert covered[500] / 300 > 0.95 - 4 * math.sqrt(0.95 * 0.05 / 300)
    assert covered[None] / 300 < 0.7


def test_ratios_say_cannot_tell(rng: np.random.Generator) -> None:
    assert ratio([0.6, 0.62, 0.61, 0.6]).finding == "less"
    assert ratio([1.6, 1.62, 1.61]).finding == "more"
    assert ratio([0.9, 1.05, 0.97]).finding == "cannot tell"
    assert ratio([0.6]).finding == "cannot tell"
    assert ratio([0.5, 2.0]).mean == pytest.approx(1.0)
    wide, narrow = ratio([0.6, 0.7, 0.65], family=4), ratio([0.6, 0.7, 0.65])
    assert (wide.high or 0) > (narrow.high or 0)


def test_regression_to_the_mean_is_estimated_as_large_as_it_is(rng: np.random.Generator) -> None:
    """400 searches among 21 settings, three seeds each: the mean estimate is the mean fall on endless fresh seeds."""
    expected, fell = [], []
    for _ in range(400):
        truth = rng.normal(0, 0.5, 21)
        table = truth[:, None] + rng.normal(size=(21, 3)) + rng.normal(size=3)
        fall = expected_fall([by_seed(row.tolist()) for row in table])
        assert fall is not None
        means, top = table.mean(axis=1), int(table.mean(axis=1).argmax())
        expected.append(fall)
        fell.append((means - means.mean() - truth + truth.mean())[top])
    assert np.mean(expected) == pytest.approx(np.mean(fell), abs=0.1)
    assert np.mean(fell) > 0.5
    assert expected_fall([{0: 0.5, 1: 0.6}] * 3) is None
    assert expected_fall([{0: 0.5}] * 5) is None


def test_guessing_and_the_number_of_looks() -> None:
    assert p_of_guessing(0.15, 400, 0.1, 1) == pytest.approx(stats.binom.sf(59, 400, 0.1))
    assert p_of_guessing(0.15, 400, 0.1, 144) > LEVEL
    assert p_of_guessing(0.3, 400, 0.1, 144) < LEVEL


def test_curves_that_still_rise_and_curves_that_do_not(rng: np.random.Generator) -> None:
    rising = [(np.linspace(0.1, 0.9, 20) + rng.normal(0, 0.005, 20)).tolist() for _ in range(4)]
    flat = [(0.9 + rng.normal(0, 0.005, 20)).tolist() for _ in range(4)]
    assert (still_rising(rising) or 0) == pytest.approx(0.8 * 4 / 19, abs=0.02)
    assert (still_rising(rising[:1]) or 0) > 0.1
    assert still_rising(flat) is None
    assert still_rising([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]]) is None
    assert still_rising([[0.1, 0.9]]) is None


def test_rank_correlation_is_spearmans() -> None:
    rho = rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
    assert rho is not None
    assert rho[0] == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_a_difference_is_paired_over_common_seeds_else_welchs(rng: np.random.Generator) -> None:
    a, b = rng.normal(0.8, 0.01, 6), rng.normal(0.7, 0.03, 6)
    paired = difference(by_seed(a.tolist()), by_seed(b.tolist()))
    expected = stats.ttest_rel(a, b)
    assert (paired.paired, paired.n) == (True, (6, 6))
    assert paired.p == pytest.approx(expected.pvalue)
    assert paired.interval() == pytest.approx(tuple(expected.confidence_interval()))
    apart = difference(by_seed(a.tolist()), {100 + seed: value for seed, value in enumerate(b[:5])})
    expected = stats.ttest_ind(a, b[:5], equal_var=False)
    assert (apart.paired, apart.n) == (False, (6, 5))
    assert apart.p == pytest.approx(expected.pvalue)
    assert apart.interval() == pytest.approx(tuple(expected.confidence_interval()))
    assert paired.detectable() == pytest.approx(detectable(float(np.std(a - b, ddof=1)), 6))


def test_differences_of_single_runs_and_of_equal_values() -> None:
    single = difference({0: 0.8}, {0: 0.7})
    assert single.mean == pytest.approx(0.1)
    assert (single.paired, single.p, single.detectable()) == (True, None, None)
    assert single.interval() == (-math.inf, math.inf)
    assert difference({0: 0.8}, {1: 0.7, 2: 0.7}).p is None
    assert difference({0: 0.8, 1: 0.8}, {2: 0.8, 3: 0.8}).p == 1.0
    assert difference({0: 0.8, 1: 0.8}, {0: 0.7, 1: 0.7}).p == 0.0
    assert (difference({0: 0.8, 1: 0.8}, {0: 0.7, 1: 0.7}, resolution=0.01).p or 0) > 0.01
    assert (difference({0: 0.8, 1: 0.8}, {2: 0.7, 3: 0.7}, resolution=0.01).p or 0) > 0.0001
    with pytest.raises(ValueError, match="at least one value"):
        difference({}, {0: 0.5})


def test_best_against_best_of_one_setting_each_is_students(rng: np.random.Generator) -> None:
    a, b = (by_seed(rng.normal(0.8, 0.01, 6).tolist()) for _ in range(2))
    found = best_against_best([a], [b])
    assert (found.low, found.high) == difference(a, b).interval()


@pytest.mark.parametrize("paired", [True, False])
def test_best_against_best_covers_the_true_difference(paired: bool, rng: np.random.Generator) -> None:
    """Groups of four and six settings whose best are 0, 1 or 5 standard deviations apart; the others close behind."""
    for gap in (0.0, 0.01, 0.05):
        means = np.array([0.8 + gap] * 2 + [0.75 + gap] * 2), np.array([0.8] * 3 + [0.795] * 3)
        covered = found = 0
        for _ in range(300):
            draws = [mean[:, None] + rng.normal(0, 0.01, (len(mean), 6)) for mean in means]
            ours = [by_seed(row.tolist()) for row in draws[0]]
            theirs = [{seed + 100 * (not paired): value for seed, value in enumerate(row)} for row in draws[1]]
            best = best_against_best(ours, theirs)
            covered += best.low <= gap <= best.high
            found += best.finding == "better"
        assert covered / 300 > 0.95 - 4 * math.sqrt(0.05 * 0.95 / 300)
        assert (found > 200) if gap == 0.05 else (found < 100)
