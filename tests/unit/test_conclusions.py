"""Every sentence of a report: with data that make it true, and with data that make it false."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dashboards import aggregate
from dashboards.conclusions import Conclusions, conclude
from dashboards.formatting import points
from dashboards.study_data import StudyData
from storage.queries import TestSplitUse
from study.config.models import StudyConfig
from tests.support.harness import config_of
from tests.support.made_studies import made, made_cells

BETAS = (0.2, 0.4, 0.6, 0.8)
LARGE = {"train": 200, "validation": 100_000, "test": 100_000}


def said(data: StudyData) -> Conclusions:
    return conclude(data, aggregate.findings(data))


def grid_of(means: dict[float, float], seeds: int, spread: float = 0.002, **options: Any) -> StudyData:
    """A grid over beta whose settings have these means; seeds of a setting differ by about `spread`."""
    noise = np.random.default_rng(0).normal(0, spread, (len(means), seeds))
    cells = [({"beta": beta}, list(mean + row)) for (beta, mean), row in zip(means.items(), noise, strict=True)]
    sections: dict[str, Any] = {"policy": {"alpha": 60, "beta": list(means)}, "search": {"replicates": seeds}}
    config = config_of(**sections | options.pop("config", {}))
    return made_cells(cells, config, **{"images": LARGE} | options)


def policies(*names: str, seeds: int = 8) -> StudyConfig:
    return config_of(policy={"name": list(names), "alpha": 60, "beta": 0.5}, search={"replicates": seeds})


# The answer


def test_one_setting_that_is_ahead_is_to_be_used() -> None:
    answer = said(grid_of({0.2: 0.90, 0.4: 0.80, 0.6: 0.81}, seeds=8)).answer
    assert answer.startswith("Use beta 0.2: 90.")
    assert "on 8 seeds, the only one of 3 settings that may be the best (family-wise 95 %)" in answer
    assert answer.endswith("as a config file: study model made --toml")
    assert "provisional" not in answer


def test_the_command_names_the_trial_where_the_highest_run_is_of_another_setting() -> None:
    values = {0.2: [0.90, 0.90, 0.91, 0.90, 0.90, 0.91], 0.4: [0.80, 0.81, 0.93, 0.80, 0.81, 0.80]}
    config = config_of(policy={"alpha": 60, "beta": [0.2, 0.4]}, search={"replicates": 6})
    data = made_cells([({"beta": beta}, list(of)) for beta, of in values.items()], config, images=LARGE)
    assert "study model made --trial 2 --toml" in said(data).answer


def test_settings_that_cannot_be_told_apart_are_named() -> None:
    answer = said(grid_of({0.2: 0.90, 0.4: 0.902, 0.6: 0.81}, seeds=8)).answer
    assert answer.startswith("Cannot tell these 2 settings apart (1 of 3 settings is worse, family-wise 95 %)")
    assert "beta 0.2 90." in answer
    assert "beta 0.4 " in answer
    assert "beta 0.6" not in answer
    assert "Use " not in answer


def test_a_long_list_of_settings_is_cut_with_their_number() -> None:
    answer = said(grid_of({beta / 20: 0.9 for beta in range(1, 10)}, seeds=3)).answer
    assert answer.startswith("Cannot tell these 9 settings apart, in validation on 3 seeds, provisional")
    assert answer.count("; ") == 5
    assert "; and 4 more." in answer


@pytest.mark.parametrize(("seeds", "provisional"), [(5, True), (6, False)])
def test_fewer_than_six_seeds_are_provisional(seeds: int, provisional: bool) -> None:
    found = said(grid_of({0.2: 0.90, 0.4: 0.80}, seeds=seeds))
    assert ("provisional with fewer than 6" in found.answer) == provisional
    assert any(warning.startswith("Provisional:") for warning in found.warnings) == provisional


def test_settings_as_high_as_the_highest_single_run_are_counted() -> None:
    answer = said(grid_of({0.2: 0.80, 0.4: 0.90, 0.6: 0.90, 0.8: 0.90}, seeds=1, spread=0.0)).answer
    assert "with beta 0.4 and 2 other settings, is the maximum of 4 runs" in answer


def test_the_maximum_of_single_runs_is_called_that() -> None:
    answer = said(grid_of({0.2: 0.90, 0.4: 0.80, 0.6: 0.81}, seeds=1)).answer
    assert answer.startswith("Cannot tell which of 3 settings is the best: they are single runs.")
    assert "is the maximum of 3 runs; `study confirm made` runs" in answer
    pruned = said(grid_of({0.2: 0.90, 0.4: 0.80, 0.6: 0.81}, seeds=1, states=["complete", "pruned"])).answer
    assert pruned.startswith("Cannot tell which of 3 settings is the best: they are single runs, 1 of them pruned.")
    assert "the maximum of" not in said(grid_of({0.2: 0.90, 0.4: 0.80}, seeds=8)).answer


def test_one_setting_is_no_choice() -> None:
    assert said(grid_of({0.2: 0.9}, seeds=3)).answer.startswith("One setting was run, beta 0.2: 9")
    assert "one run" in said(grid_of({0.2: 0.9}, seeds=1)).answer


def test_guessing_is_told_from_learning() -> None:
    """The issue's study: the best of twelve runs at 12.92 %, where the largest of ten classes has 10.2 %."""
    values = {beta: 0.1292 - 0.01 * i for i, beta in enumerate(BETAS)}
    images = {"train": 200, "validation": 359, "test": 359}
    answer = said(grid_of(values, seeds=1, spread=0, images=images)).answer
    assert answer.startswith("No trial is better than guessing (10 classes, largest class 10.2 %)")
    assert "the best accuracy of 4 runs is 12.92 % on 359 validation images" in answer
    learnt = said(grid_of(dict.fromkeys(BETAS, 0.3), seeds=1, images=images)).answer
    assert "guessing" not in learnt
    unknown = grid_of(values, seeds=1, spread=0, images=images, attributes={"data_facts": {}})
    assert "guessing" not in said(unknown).answer


def test_other_metrics_are_named_and_have_no_binomial_noise() -> None:
    sizes = {"train": 200, "validation": 100, "test": 100}
    config = {"search": {"replicates": 8, "metric": "macro_f1"}}
    other = said(grid_of({0.2: 0.12, 0.4: 0.11}, seeds=8, spread=0.001, images=sizes, config=config))
    assert "(macro-F1) in validation" in other.answer
    assert "guessing" not in other.answer
    assert not any("noise" in warning for warning in other.warnings)
    plain = said(grid_of({0.2: 0.12, 0.4: 0.11}, seeds=8, spread=0.001, images=sizes))
    assert "guessing" in plain.answer
    assert any("noise" in warning for warning in plain.warnings)


def test_an_unfinished_study_says_so() -> None:
    assert said(grid_of({0.2: 0.9, 0.4: 0.8}, seeds=8, waiting=3)).answer.endswith(
        "Not final: 16 of 19 trials have ended."
    )
    assert "Not final" not in said(grid_of({0.2: 0.9, 0.4: 0.8}, seeds=8)).answer
    left = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=8, waiting=3)
    early = said(replace(left, status=replace(left.status, ended_early="the target 0.9 is reached"))).answer
    assert early.endswith("The study ended early, with 16 of 19 trials.")
    assert "Not final" not in early


def test_nothing_complete_is_no_answer() -> None:
    data = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=1, states=["pruned", "failed"])
    assert said(data).answer == "No answer yet: no trial is complete (1 pruned, 1 failed)."


def test_two_objectives_have_a_front() -> None:
    config = config_of(
        policy={"alpha": {"low": 40, "high": 100, "step": 20}, "beta": 0.5},
        search={"sampler": "random", "trials": 2, "objective": "accuracy,images"},
    )
    two = made_cells([({"alpha": 40}, [0.8]), ({"alpha": 100}, [0.9])], config)
    assert said(two).answer.startswith("No single best: accuracy and images trained on are both objectives. 2 single")
    assert "from alpha 40 (80.00 %, 120 images) to alpha 100 (90.00 %, 300 images)" in said(two).answer
    one = made_cells([({"alpha": 40}, [0.9]), ({"alpha": 100}, [0.8])], config)
    assert said(one).answer.startswith("One setting has both the highest accuracy and the fewest images")


# Warnings


@pytest.mark.parametrize(("batch", "warns"), [(512, True), (50, False)])
def test_one_step_an_epoch(batch: int, warns: bool) -> None:
    data = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=2, config={"training": {"batch_size": batch}})
    assert ("alpha 60 at batch 512 is one step an epoch." in said(data).warnings) == warns


def test_undertrained_curves_are_told_from_flat_ones() -> None:
    rising = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=3, epochs=20, curve=lambda top, n: top * n / 20)
    flat = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=3, epochs=20, curve=lambda top, n: top)
    (warning,) = (warning for warning in said(rising).warnings if warning.startswith("Undertrained"))
    assert "by 18" in warning  # 4 of 20 epochs of a rise to 90 %
    assert not any(warning.startswith("Undertrained") for warning in said(flat).warnings)


@pytest.mark.parametrize(("delta", "images", "warns"), [(0.01, 500, True), (0.03, 500, False), (0.01, 100_000, False)])
def test_a_delta_below_the_noise(delta: float, images: int, warns: bool) -> None:
    sizes = {"train": 200, "validation": images, "test": images}
    data = grid_of({0.2: 0.9}, seeds=2, images=sizes, config={"policy": {"alpha": 60, "beta": [0.2], "delta": delta}})
    (warning,) = [w for w in said(data).warnings if w.startswith("delta")] or [""]
    assert bool(warning) == warns
    assert not warns or warning.startswith("delta (1 point) is below the noise of an accuracy on 500 validation images")


def test_pruned_seeds_make_a_mean_too_high() -> None:
    some = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=3, states=["complete", "pruned"])
    assert "Of beta 0.2 some seeds were pruned: the mean of the others is too high." in said(some).warnings
    assert not any("pruned" in warning for warning in said(grid_of({0.2: 0.9, 0.4: 0.8}, seeds=3)).warnings)


@pytest.mark.parametrize("protocol", ["paper", "holdout"])
def test_who_chose_the_best_epoch(protocol: str) -> None:
    data = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=3, config={"data": {"protocol": protocol}})
    warned = any("The test split chose the best epoch" in warning for warning in said(data).warnings)
    assert warned == (protocol == "paper")
    assert ("on the test split, which chose the best epoch," in said(data).answer) == warned


@pytest.mark.parametrize(("images", "warns"), [(1000, True), (1_000_000, False)])
def test_differences_within_the_noise_of_the_images(images: int, warns: bool) -> None:
    sizes = {"train": 200, "validation": images, "test": images}
    values = {"dynamic": [0.900 + 0.0001 * i for i in range(8)], "static": [0.891 + 0.00012 * i for i in range(8)]}
    data = made(values, policies("dynamic", "static"), images=sizes)
    assert aggregate.findings(data).comparisons[0].finding == "better"
    warned = [warning for warning in said(data).warnings if "are within the noise of" in warning]
    assert bool(warned) == warns


# Sentences


def sentences_of(dynamic: float, static: float, fresh: float | None = None, seeds: int = 8) -> str:
    draws = np.random.default_rng(2).normal(0, 0.002, (3, seeds))
    values = {"dynamic": list(dynamic + draws[0]), "static": list(static + draws[1])}
    values |= {} if fresh is None else {"fresh": list(fresh + draws[2])}
    return " ".join(said(made(values, policies(*values, seeds=seeds))).sentences)


def test_better_worse_and_cannot_tell() -> None:
    assert "dynamic is better than static in validation: " in sentences_of(0.8, 0.7)
    assert "dynamic is worse than static in validation: -" in sentences_of(0.7, 0.8)
    text = sentences_of(0.8, 0.8)
    assert "Cannot tell dynamic from static in validation" in text
    assert "Minimum detectable difference at 80 % power:" in text
    assert "Minimum detectable" not in sentences_of(0.8, 0.7)


def test_every_finding_of_few_seeds_is_provisional_whichever_way_it_points() -> None:
    for dynamic, static in ((0.8, 0.7), (0.7, 0.8), (0.8, 0.8)):
        text = sentences_of(dynamic, static, seeds=5)
        assert ", provisional." in text
        assert "Provisional: " in text  # what the controls say together
        assert "rovisional" not in sentences_of(dynamic, static, seeds=6)


@pytest.mark.parametrize(
    ("static", "fresh", "sentence"),
    [
        (0.8, None, "No gain of the rule over training on the same part of the data for ever was shown."),
        (0.9, None, "Training on the same part of the data for ever does better than the rule here."),
        (0.7, None, "Renewing the data helps here; whether the rule does, only a `fresh` control can tell."),
        (0.7, 0.7, "The rule adds something beyond fresh data here."),
        (0.7, 0.9, "Fresh data help here, and drawing anew every epoch does better than the rule."),
        (0.7, 0.8, "Renewing the data helps here, but nothing shows that the rule does better than drawing anew"),
    ],
)
def test_what_the_controls_say_together(static: float, fresh: float | None, sentence: str) -> None:
    assert sentence in sentences_of(0.8, static, fresh)
    other = sentences_of(0.8, 0.7 if static != 0.7 else 0.9, fresh)
    assert sentence not in other


@pytest.mark.parametrize(
    ("seconds", "sentence"),
    [
        (
            [6.0, 6.1, 6.2, 6.0, 6.1, 6.2],
            "takes less time than the full run: 61 (60 to 62) % of its time, n = 6.",
        ),
        ([16.0, 16.1, 16.2, 16.0, 16.1, 16.2], "dynamic takes more time than the full run: 161 ("),
        ([6.0, 18.0, 9.0, 11.0, 7.0, 12.0], "Cannot tell whether dynamic takes less time than the full run:"),
        ([6.0, 6.1], "% of its time, n = 2, provisional."),
    ],
)
def test_time_ratios_can_be_undecided_too(seconds: list[float], sentence: str) -> None:
    times = iter([*seconds, *[10.0] * len(seconds)])
    values = {"dynamic": [0.8] * len(seconds), "full": [0.8] * len(seconds)}
    data = made(values, policies("dynamic", "full", seeds=len(seconds)), seconds=lambda _: next(times))
    assert sentence in " ".join(said(data).sentences)


def test_times_of_two_devices_do_not_compare() -> None:
    data = made({"dynamic": [0.8] * 3, "full": [0.8] * 3}, policies("dynamic", "full", seeds=3))
    rows = tuple(replace(row, attributes={"device": row.policy}) for row in data.rows)
    assert aggregate.findings(replace(data, rows=rows)).ratios.keys() == {"full"}
    assert "of its time" not in " ".join(said(replace(data, rows=rows)).sentences)


def test_main_effects() -> None:
    text = " ".join(said(grid_of({0.2: 0.90, 0.4: 0.85, 0.6: 0.8}, seeds=6)).sentences)
    assert "The choice of beta makes a difference (Friedman's test over its levels, p = " in text
    text = " ".join(said(grid_of({0.2: 0.80, 0.4: 0.80, 0.6: 0.8}, seeds=5)).sentences)
    assert "Cannot tell whether the choice of beta makes a difference" in text
    assert "Holm-corrected, provisional)" in text


def test_regression_to_the_mean_before_confirming() -> None:
    means = {beta / 20: 0.9 for beta in range(1, 10)}
    noisy = " ".join(said(grid_of(means, seeds=3, spread=0.02)).sentences)
    assert "Regression to the mean: the highest of 9 means is expected to be" in noisy
    single = " ".join(said(grid_of(means, seeds=1)).sentences)
    assert "by how much, only replicates can tell" in single
    assert "Regression to the mean" not in " ".join(said(grid_of({0.2: 0.9, 0.4: 0.8}, seeds=3)).sentences)


def confirmed(searched: list[float], fresh: list[float], **options: Any) -> StudyData:
    """Two settings, in the search `searched`, on six fresh seeds around `fresh`."""
    cells = ({"beta": 0.2}, {"beta": 0.4})
    origin = {"confirms": {"study": "tpe", "values": searched}, **options.pop("attributes", {})}
    noise = np.array([-0.002, 0.001, 0.002, -0.001, 0.0005, -0.0005])
    return made_cells(
        [(cell, list(mean + sign * noise)) for cell, mean, sign in zip(cells, fresh, (1, -1), strict=True)],
        config_of(policy={"alpha": 60, "beta": 0.2}, search={"replicates": 6, "cells": cells}),
        images=LARGE, attributes=origin, test=lambda accuracy: accuracy - 0.01, **options,
    )  # fmt: skip


def test_a_confirmation_says_what_became_of_the_search() -> None:
    text = " ".join(said(confirmed([0.95, 0.94], [0.93, 0.90])).lines)
    assert text.startswith("Use beta 0.2: 92.0 % (9")
    assert "on the test split on 6 fresh seeds" in text
    assert "beta 0.2: 95.00 % in the search tpe, 93.00 (" in text
    assert "on 6 fresh seeds in validation (2 points lower, a regression to the mean" in text
    assert "; on the test split, evaluated once a trial, 92.00 (" in text
    assert "The order has changed" not in text
    assert "winner's curse" not in text


def test_a_confirmation_that_does_better_is_no_regression() -> None:
    text = " ".join(said(confirmed([0.92, 0.89], [0.93, 0.90])).sentences)
    assert "(1 point higher)" in text
    assert "egression to the mean" not in text


def test_a_reversed_order_is_said() -> None:
    text = " ".join(said(confirmed([0.95, 0.94], [0.90, 0.93])).sentences)
    assert "The order has changed: beta 0.2 was first in the search, beta 0.4 is first on fresh seeds; " in text
    assert "beta 0.2 is not among those that may be the best." in text
    close = " ".join(said(confirmed([0.95, 0.94], [0.9299, 0.93])).sentences)
    assert "the two cannot be told apart." in close


def test_values_of_a_file_that_somebody_made_are_no_error() -> None:
    for values in (None, "x", [], ["a", None], [0.9]):
        data = confirmed([0.95, 0.94], [0.93, 0.90], attributes={"confirms": {"study": "tpe", "values": values}})
        assert said(data).answer


# The test split


def test_untouched_is_said_only_while_it_is_true() -> None:
    untouched = "The test split is untouched: no study in this database has evaluated it."
    alone = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=2)
    assert untouched in said(alone).sentences
    evaluated = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=2, test=lambda accuracy: accuracy)
    elsewhere = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=2, uses=[TestSplitUse("other", 12, False)])
    validating = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=2, uses=[TestSplitUse("grid", 0, True)])
    here = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=2, config={"data": {"protocol": "paper"}})
    entry = {"study": "gone", "settings": 3, "seeds": 5, "again": False}
    deleted = grid_of({0.2: 0.9, 0.4: 0.8}, seeds=2, attributes={"test_asked": [entry]})
    for data, what in (
        (evaluated, "4 times in this study, once a trial."),
        (elsewhere, "12 times in other."),
        (validating, "in grid it validates every epoch."),
        (here, "in this study it validates every epoch."),
        (deleted, "by gone, a confirmation that was deleted."),
    ):
        text = " ".join(said(data).lines)
        assert "untouched" not in text
        assert f"The test split was evaluated: {what}" in text


def test_asking_again_is_said() -> None:
    again = confirmed([0.95, 0.94], [0.93, 0.90], attributes={"asked_again": True})
    assert "It was asked again with --again." in " ".join(said(again).sentences)
    assert "--again" not in " ".join(said(confirmed([0.95, 0.94], [0.93, 0.90])).sentences)


def test_points_are_written_as_people_write_them() -> None:
    assert [points(value) for value in (0.01, 0.005, 0.0123, 0.1, 0.0)] == [
        "1 point", "0.5 points", "1.23 points", "10 points", "0 points",
    ]  # fmt: skip
