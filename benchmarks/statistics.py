"""Whether the report's statistics keep what they promise: coverage, family-wise error and power on simulated studies.

    python -m benchmarks.statistics [--studies 2000] [--seed 0]

Every simulated value is a setting's mean, plus what all settings of a seed share, plus noise of the setting: normal,
or with heavy tails (Student's t with 3 degrees of freedom). Noise is in units of its standard deviation; "unequal"
settings have standard deviations from 0.3 to 3. The functions are those that the report calls.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from dashboards.statistics import (
    LEVEL,
    Comparison,
    any_difference,
    compare,
    expected_fall,
    maybe_best,
    p_of_guessing,
    ratio,
    simultaneous,
    summary,
)

SEEDS = (3, 5, 10)
SETTINGS = (2, 5, 21)
SHARED = 1.5
"""Standard deviation of what all settings of a seed share."""
Values = NDArray[np.float64]


def noise(rng: np.random.Generator, tails: str, shape: tuple[int, ...]) -> Values:
    """Of standard deviation 1."""
    return np.asarray(rng.normal(size=shape) if tails == "normal" else rng.standard_t(3, size=shape) / math.sqrt(3))


def study(rng: np.random.Generator, tails: str, deviations: Values, seeds: int, means: Values | float = 0.0) -> Values:
    """Shape [settings, seeds]."""
    own = noise(rng, tails, (len(deviations), seeds)) * deviations[:, None]
    shared = SHARED * rng.normal(size=seeds)
    return np.asarray(own + shared + np.broadcast_to(means, len(deviations))[:, None])


def deviations_of(kind: str, settings: int) -> Values:
    return np.ones(settings) if kind == "equal" else np.geomspace(0.3, 3, settings)


def by_seed(table: Values) -> list[dict[int, float]]:
    return [dict(enumerate(row.tolist())) for row in table]


def family(table: Values) -> list[Comparison]:
    """The first setting against every other."""
    ours, *others = by_seed(table)
    pairs = [compare("a", str(i), ours, theirs) for i, theirs in enumerate(others)]
    return simultaneous([pair for pair in pairs if pair is not None])


def shares(of: Callable[[], tuple[bool | float, ...]], studies: int) -> tuple[float, ...]:
    """Mean of every number that `of` gives, over the studies."""
    return tuple(float(mean) for mean in np.mean([of() for _ in range(studies)], axis=0))


def means_and_ratios(rng: np.random.Generator, studies: int) -> Iterator[list[str]]:
    images, truth, spread = 1000, 0.85, 0.01
    for tails in ("normal", "heavy"):
        for seeds in SEEDS:

            def once(tails: str = tails, seeds: int = seeds) -> tuple[bool, bool, bool]:
                # All seeds are measured on the same images: what these are lucky in, they share.
                sample = rng.binomial(images, truth) / images
                values = np.clip(sample + spread * noise(rng, tails, (seeds,)), 0, 1).tolist()
                plain, whole = summary(values), summary(values, images)
                of = ratio(np.exp(0.1 * noise(rng, tails, (seeds,))).tolist())
                assert plain.low is not None
                assert plain.high is not None
                assert whole.low is not None
                assert whole.high is not None
                return (
                    plain.low <= truth <= plain.high, whole.low <= truth <= whole.high, of.finding == "cannot tell",
                )  # fmt: skip

            yield [tails, str(seeds), *(f"{100 * share:.1f}" for share in shares(once, studies))]


def families(rng: np.random.Generator, studies: int) -> Iterator[list[str]]:
    for tails in ("normal", "heavy"):
        for kind in ("equal", "unequal"):
            for settings in SETTINGS:
                for seeds in SEEDS:
                    deviations = deviations_of(kind, settings)

                    def once(
                        tails: str = tails, seeds: int = seeds, deviations: Values = deviations
                    ) -> tuple[bool, bool]:
                        found = [c.finding != "cannot tell" for c in family(study(rng, tails, deviations, seeds))]
                        effect = np.zeros(len(deviations))
                        effect[0] = 3.0
                        seen = family(study(rng, tails, deviations, seeds, effect))
                        return any(found), seen[-1].finding == "better"

                    error, power = shares(once, studies)
                    yield [tails, kind, str(settings), str(seeds), f"{100 * error:.1f}", f"{100 * power:.0f}"]


def best_sets(rng: np.random.Generator, studies: int) -> Iterator[list[str]]:
    for tails in ("normal", "heavy"):
        for kind in ("equal", "unequal"):
            for settings in SETTINGS:
                for seeds in SEEDS:
                    deviations = deviations_of(kind, settings)

                    def once(
                        tails: str = tails, seeds: int = seeds, deviations: Values = deviations
                    ) -> tuple[bool, bool, float]:
                        # All equally good is the hardest case for the one that counts as the best: here the first.
                        alike = maybe_best(by_seed(study(rng, tails, deviations, seeds)))
                        ahead = np.zeros(len(deviations))
                        ahead[0] = 3.0
                        apart = maybe_best(by_seed(study(rng, tails, deviations, seeds, ahead)))
                        kept = [p >= LEVEL for p in apart]
                        return alike[0] >= LEVEL, kept[0] and sum(kept) == 1, float(sum(kept))

                    held, alone, size = shares(once, studies)
                    numbers = [f"{100 * held:.1f}", f"{100 * alone:.0f}", f"{size:.1f}"]
                    yield [tails, kind, str(settings), str(seeds), *numbers]


def others(rng: np.random.Generator, studies: int) -> Iterator[list[str]]:
    for tails in ("normal", "heavy"):
        for seeds in SEEDS:

            def once(tails: str = tails, seeds: int = seeds) -> tuple[float, float, float, float]:
                truth = 0.5 * rng.normal(size=21)
                table = study(rng, tails, np.ones(21), seeds, truth)
                fall = expected_fall(by_seed(table)) or 0.0
                top = int(table.mean(axis=1).argmax())
                fell = float((table.mean(axis=1) - table.mean())[top] - (truth - truth.mean())[top])
                friedman = any_difference(by_seed(study(rng, tails, np.ones(5), seeds)))
                guesses = rng.binomial(1000, 0.1, 12).max() / 1000
                guessing = p_of_guessing(float(guesses), 1000, 0.1, 12)
                return fall, fell, (friedman or 1.0) < LEVEL, guessing < LEVEL

            fall, fell, friedman, guessing = shares(once, studies)
            yield [tails, str(seeds), f"{fall:.2f}", f"{fell:.2f}", f"{100 * friedman:.1f}", f"{100 * guessing:.1f}"]


def table(title: str, heads: list[str], lines: Iterator[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    table(
        "Intervals of means and ratios: % that cover the truth (95 promised)",
        ["tails", "seeds", "mean, between seeds only", "accuracy, images included", "ratio of times"],
        means_and_ratios(rng, options.studies),
    )
    table(
        "Families of comparisons: % with any false finding (at most 5 promised), and % that find 3 sd in the last",
        ["tails", "deviations", "settings", "seeds", "family-wise error", "power at 3 sd"],
        families(rng, options.studies),
    )
    table(
        "Settings that may be the best: % that hold the best (at least 95 promised); one ahead by 3 sd",
        ["tails", "deviations", "settings", "seeds", "held when all are alike", "found alone", "mean size of the set"],
        best_sets(rng, options.studies),
    )
    table(
        "Regression to the mean of the best of 21 (in sd), and % of false findings",
        ["tails", "seeds", "expected fall", "true fall", "Friedman, 5 settings", "12 guessing trials"],
        others(rng, options.studies),
    )


if __name__ == "__main__":
    main()
