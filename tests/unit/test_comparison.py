"""Every sentence of a comparison of studies: with studies that make it true, and with studies that make it false."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dashboards.comparison import Compared, compare_studies
from dashboards.reports import console as console_report
from dashboards.study_data import StudyData
from storage.errors import UserError
from tests.support.harness import config_of
from tests.support.made_studies import made_cells

LARGE = {"train": 200, "validation": 100_000, "test": 100_000}
DATA = {"data_fingerprint": "f" * 64}


def study_of(
    name: str,
    cells: Sequence[tuple[dict[str, Any], Sequence[float]]],
    *,
    change: Callable[[StudyData], StudyData] = lambda data: data,
    attributes: Mapping[str, Any] | None = None,
    sections: Mapping[str, Any] | None = None,
    **options: Any,
) -> StudyData:
    """A grid over beta with these settings, values by seed."""
    betas = [parameters["beta"] for parameters, _ in cells]
    base: dict[str, Any] = {
        "policy": {"alpha": 60, "beta": betas if len(betas) > 1 else betas[0]},
        "search": {"replicates": max(len(values) for _, values in cells)},
    }
    for section, keys in (sections or {}).items():
        base[section] = base.get(section, {}) | keys
    chosen = [(parameters if len(betas) > 1 else {}, values) for parameters, values in cells]
    data = made_cells(
        chosen, config_of(**base), **{"images": LARGE} | options, attributes={**DATA, **(attributes or {})}
    )
    return change(replace(data, name=name))


def noisy(mean: float, seeds: int = 8, of: int = 0, spread: float = 0.002) -> list[float]:
    return list(mean + np.random.default_rng(of).normal(0, spread, seeds))


def one(name: str, values: Sequence[float], width: float = 0.125, **options: Any) -> StudyData:
    sections = {"network": {"width": width}} | options.pop("sections", {})
    return study_of(name, [({"beta": 0.5}, values)], sections=sections, **options)


def answer(*studies: StudyData) -> str:
    return compare_studies(studies).said.answer


def warned(*studies: StudyData) -> str:
    return " ".join(compare_studies(studies).said.warnings)


def sentences(*studies: StudyData) -> str:
    return " ".join(compare_studies(studies).said.sentences)


def from_seed(data: StudyData, seed: int) -> StudyData:
    rows = tuple(replace(row, seed=(row.seed or 0) + seed) for row in data.rows)
    return replace(data, rows=rows)


# The answer


def test_better_worse_and_cannot_tell() -> None:
    narrow, wide = one("narrow", noisy(0.80)), one("wide", noisy(0.85, of=1), width=0.25)
    better = answer(narrow, wide)
    assert better.startswith("wide's setting width 0.25 is better than narrow's setting width 0.125 by 4.97 (4.")
    assert better.endswith(" points in validation, paired over 8 seeds.")
    assert " to " in better
    worse = answer(wide, narrow)
    assert worse.startswith("narrow's setting width 0.125 is worse than wide's setting width 0.25 by 4.97 (4.")
    assert "-" not in worse
    alike = answer(narrow, one("wide", noisy(0.80, of=1), width=0.25))
    assert alike.startswith(
        "Cannot tell wide's setting width 0.25 from narrow's setting width 0.125 in validation: a d"
    )
    assert alike.endswith("paired over 8 seeds.")


def test_a_common_shift_of_the_seeds_cancels_only_where_they_pair() -> None:
    shift = np.random.default_rng(5).normal(0, 0.05, 8)
    narrow, wide = one("narrow", list(0.80 + shift)), one("wide", list(0.81 + shift + noisy(0, of=1)), width=0.25)
    assert " is better than narrow's" in answer(narrow, wide)
    unpaired = answer(narrow, from_seed(wide, 100))
    assert unpaired.startswith("Cannot tell wide's")
    assert "not paired, 8 and 8 seeds." in unpaired
    assert "paired over 3 seeds, provisional" in answer(narrow, from_seed(wide, 5))


def test_studies_without_a_difference_are_named_alone() -> None:
    assert answer(one("a", noisy(0.8)), one("b", noisy(0.9, of=1))).startswith("b is better than a by 9.9")


@pytest.mark.parametrize(("seeds", "provisional"), [(5, True), (6, False)])
def test_fewer_than_six_seeds_are_provisional(seeds: int, provisional: bool) -> None:
    for mean in (0.9, 0.8):
        studies = one("a", noisy(0.8, seeds)), one("b", noisy(mean, seeds, of=1), width=0.25)
        assert ("provisional with fewer than 6" in answer(*studies)) == provisional
        assert ("Provisional: below 6 seeds" in warned(*studies)) == provisional


def test_single_runs_are_no_answer() -> None:
    studies = one("a", [0.8]), one("b", [0.9], width=0.25)
    text = answer(*studies)
    assert text.startswith(
        "Cannot tell b's setting width 0.25 from a's setting width 0.125 in validation: a difference"
    )
    assert "of 10.00 points, paired over 1 seed; a setting with a single run cannot be ruled out." in text
    assert "Single runs: their differences cannot be told from chance." in warned(*studies)
    several = one("a", noisy(0.8)), one("b", noisy(0.9), width=0.25)
    assert "single run" not in answer(*several)
    assert "Single runs" not in warned(*several)


def test_the_highest_of_several_settings_has_to_beat_them_all() -> None:
    first = study_of("a", [({"beta": 0.2}, noisy(0.80)), ({"beta": 0.4}, noisy(0.70, of=1))])
    second = study_of("b", [({"beta": 0.2}, noisy(0.79, of=2)), ({"beta": 0.4}, noisy(0.85, of=3))])
    text = answer(first, second)
    assert text.startswith(
        "b's setting beta 0.4 (the highest of 2) is better than a's setting beta 0.2 (the highest of"
    )
    single = study_of("a", [({"beta": 0.2}, noisy(0.80)), ({"beta": 0.4}, [0.70])])
    text = answer(single, second)
    assert text.startswith("Cannot tell b's setting beta 0.4")
    assert "(at most 5." in text
    assert "a setting with a single run cannot be ruled out" in text


def test_every_other_study_stands_against_the_first() -> None:
    studies = (
        one("a", noisy(0.80)), one("b", noisy(0.85, of=1), width=0.25), one("c", noisy(0.80, of=2), width=0.5),
    )  # fmt: skip
    text = answer(*studies)
    assert text.startswith("b's setting width 0.25 is better than a's")
    assert "Cannot tell c's setting width 0.5 from a's" in text


def test_unfinished_studies_are_said_and_finished_ones_are_not() -> None:
    done, left = one("a", noisy(0.8)), one("b", noisy(0.9), width=0.25, waiting=3)
    assert answer(done, left).endswith("Not final: 8 of 11 trials of b have ended.")
    both = answer(one("a", noisy(0.8), waiting=1), left)
    assert both.endswith("Not final: 8 of 9 trials of a and 8 of 11 trials of b have ended.")
    assert "Not final" not in answer(done, one("b", noisy(0.9), width=0.25))
    early = replace(left, status=replace(left.status, ended_early="the target 0.8 is reached"))
    assert answer(done, early).endswith("b ended early, with 8 of 11 trials.")


def test_nothing_complete_is_no_answer() -> None:
    pruned = one("b", [0.9], width=0.25, states=["pruned"])
    text = answer(one("a", noisy(0.8)), pruned)
    assert text == "No answer yet: no trial of b is complete (1 pruned)."
    assert answer(pruned, one("a", noisy(0.8))) == text
    assert compare_studies([pruned, one("a", noisy(0.8))]).settings[0][1] is None


def test_pruned_trials_are_no_values() -> None:
    values = [*noisy(0.8, 7), 0.1]
    mixed = one("b", values, width=0.25, states=["complete"] * 7 + ["pruned"])
    studies = one("a", noisy(0.8)), mixed
    assert "paired over 7 seeds" in answer(*studies)
    assert "Of b's setting width 0.25 some seeds were pruned: the mean of the others is too high." in warned(*studies)
    assert "pruned" not in warned(one("a", noisy(0.8)), one("b", noisy(0.8), width=0.25))
    cells = [({"beta": 0.2}, noisy(0.8, 2)), ({"beta": 0.4}, noisy(0.5, 2))]
    out = study_of("b", cells, states=["complete", "complete", "pruned", "pruned"])
    assert "1 setting of b is left out: all trials were pruned." in sentences(one("a", noisy(0.8)), out)
    assert "left out" not in sentences(one("a", noisy(0.8)), study_of("b", cells))


def test_excluded_trials_are_named() -> None:
    data = one("b", noisy(0.8), width=0.25)
    without = replace(data, rows=data.rows[1:], status=replace(data.status, excluded={0: "a wrong disk"}))
    assert "paired over 7 seeds" in answer(one("a", noisy(0.8)), without)
    assert "Trial 0 of b is excluded: a wrong disk" in sentences(one("a", noisy(0.8)), without)
    assert "excluded" not in sentences(one("a", noisy(0.8)), data)


# Setting by setting


def pairs(compared: Compared) -> list[tuple[str, str, bool]]:
    return [(each.label, of.reference.label, of.matching) for each, of in compared.settings if of is not None]


def test_a_setting_stands_against_the_one_that_matches_it_else_against_the_best() -> None:
    first = study_of("a", [({"beta": 0.2}, noisy(0.80)), ({"beta": 0.4}, noisy(0.70, of=1))])
    cells = [({"beta": 0.2}, noisy(0.79, of=2)), ({"beta": 0.6}, noisy(0.85, of=3))]
    compared = compare_studies([first, study_of("b", cells, sections={"network": {"width": 0.25}})])
    assert pairs(compared) == [
        ("beta 0.6, width 0.25", "beta 0.2, width 0.125", False),
        ("beta 0.2, width 0.25", "beta 0.2, width 0.125", True),
    ]
    fixed = compare_studies([first, study_of("b", [({"beta": 0.4}, noisy(0.9))])])
    assert pairs(fixed) == [("beta 0.4", "beta 0.4", True)]
    searched = compare_studies([study_of("b", [({"beta": 0.4}, noisy(0.9))]), first])
    assert {reference for _, reference, _ in pairs(searched)} == {"beta 0.4"}
    assert ("network.width", ("0.125", "0.25")) in compared.differences
    assert not any(key.startswith("data.") for key, _ in compared.differences)


def test_a_setting_of_the_whole_run_is_one_too() -> None:
    """What no trial can vary, and the training images: they name settings where they differ."""
    smaller = one("b", noisy(0.7, of=1), images={**LARGE, "train": 100}, sections={"data": {"train_images": 100}})
    assert "b's setting train_images 100 is worse than a's setting train_images 200" in answer(
        one("a", noisy(0.8)), smaller
    )
    exact = one("b", noisy(0.7, of=1), sections={"training": {"precision": "fp32"}})
    assert "b's setting precision fp32 is worse than a's setting precision auto" in answer(one("a", noisy(0.8)), exact)


def test_the_intervals_of_the_settings_hold_together() -> None:
    """Of more settings every interval is wider, and a finding needs a larger difference."""
    few = compare_studies([one("a", noisy(0.8)), study_of("b", [({"beta": 0.2}, noisy(0.803, of=1))])])
    cells = [({"beta": beta / 20}, noisy(0.803 if beta == 4 else 0.7, of=1)) for beta in range(1, 20)]
    many = compare_studies([one("a", noisy(0.8)), study_of("b", cells)])
    (alone, one_of_one), (among, one_of_many) = few.settings[1], many.settings[1]
    assert one_of_one is not None
    assert one_of_many is not None
    assert one_of_many.p_adjusted == pytest.approx(min(1.0, 19 * (one_of_one.p_adjusted or 0)))
    assert (one_of_many.high or 0) > (one_of_one.high or 0)
    assert (among.mean.high or 0) > (alone.mean.high or 0)
    assert (one_of_many.detectable or 0) > (one_of_one.detectable or 0)
    assert {one_of_one.finding, one_of_many.finding} == {"better", "cannot tell"}


# Warnings and further sentences


def test_who_chose_the_best_epoch() -> None:
    def studies(protocol: str) -> list[StudyData]:
        return [one(name, noisy(0.8), sections={"data": {"protocol": protocol}}) for name in ("a", "b")]

    assert "The test split chose the best epoch" in warned(*studies("paper"))
    assert "The test split chose" not in warned(*studies("holdout"))


@pytest.mark.parametrize(("images", "warns"), [(100, True), (100_000, False)])
def test_differences_within_the_noise_of_the_images(images: int, warns: bool) -> None:
    sizes = {"train": 200, "validation": images, "test": images}
    studies = [one(name, noisy(mean, of=place), images=sizes) for place, (name, mean) in enumerate(MEANS.items())]
    assert ("within the noise of the 100 validation images" in warned(*studies)) == warns


MEANS = {"a": 0.80, "b": 0.82}


def test_trials_in_common_are_said() -> None:
    source, other = one("a", noisy(0.8)), one("b", noisy(0.8, of=1), width=0.25)
    attributes = {"derived_from": {"study": "a", "taken_over": 3, "finished": 8}}
    derived = one("b", noisy(0.8), attributes=attributes)
    assert "3 trials of b were taken over from a: these compare with themselves." in warned(source, derived)
    assert "taken over" not in warned(source, other)
    assert "taken over" not in warned(one("c", noisy(0.8)), derived)


def test_other_versions_and_other_code_are_said() -> None:
    def with_torch(version: str) -> Callable[[StudyData], StudyData]:
        def change(data: StudyData) -> StudyData:
            rows = [replace(row, attributes={**row.attributes, "versions": {"torch": version}}) for row in data.rows]
            return replace(data, rows=tuple(rows))

        return change

    old, new = one("a", noisy(0.8), change=with_torch("2.8")), one("b", noisy(0.8), change=with_torch("2.9"))
    assert "Trained by other versions of torch: a 2.8; b 2.9." in warned(old, new)
    assert "versions" not in warned(old, one("b", noisy(0.8), change=with_torch("2.8")))
    ours, theirs = one("a", noisy(0.8), attributes={"code_sha256": "a" * 64}), one("b", noisy(0.8))
    assert "Their own code differs (SHA-256): a aaaaaaaaaaaaaaaa; b none." in warned(ours, theirs)
    assert "code" not in warned(theirs, one("c", noisy(0.8)))


def on(data: StudyData, seconds: Sequence[float], device: str = "cpu (1 threads)", host: str = "h") -> StudyData:
    rows = [
        replace(row, train_seconds=each, attributes={**row.attributes, "device": device, "host": host})
        for row, each in zip(data.rows, seconds, strict=True)
    ]
    return replace(data, rows=tuple(rows))


@pytest.mark.parametrize(
    ("seconds", "sentence"),
    [
        (
            [6.0, 6.1, 6.2, 6.0, 6.1, 6.2],
            "b takes less time than a: 61 (60 to 62) % of it, paired over 6 seeds, on cpu",
        ),
        ([16.0, 16.1, 16.2, 16.0, 16.1, 16.2], "b takes more time than a: 161 ("),
        ([6.0, 18.0, 9.0, 11.0, 7.0, 12.0], "Cannot tell whether b takes less time than a: "),
    ],
)
def test_time_on_the_same_device(seconds: list[float], sentence: str) -> None:
    a, b = (one(name, noisy(0.8, 6)) for name in ("a", "b"))
    assert sentence in sentences(on(a, [10.0] * 6), on(b, seconds))


def test_times_of_other_devices_threads_or_machines_do_not_compare() -> None:
    a, b = (one(name, noisy(0.8, 6)) for name in ("a", "b"))
    for device, host in (("cpu (2 threads)", "h"), ("cpu (1 threads)", "other")):
        text = sentences(on(a, [10.0] * 6), on(b, [5.0] * 6, device, host))
        assert text == f"The times of b ({device} of {host}) and a (cpu (1 threads) of h) do not compare."
    assert sentences(a, b) == ""  # nothing is known of where they ran


def test_regression_to_the_mean_where_a_study_has_many_settings() -> None:
    rng = np.random.default_rng(0)
    noise = [({"beta": beta / 20}, list(0.8 + rng.normal(0, 0.02, 4))) for beta in range(1, 13)]
    text = sentences(one("a", noisy(0.8)), study_of("b", noise))
    assert "Regression to the mean: the highest of 12 means of b is expected to be " in text
    assert "means of a" not in text


# What is refused


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"attributes": {"data_fingerprint": "e" * 64}}, "data fingerprint ffffffffffffffff != eeeeeeeeeeeeeeee"),
        ({"sections": {"data": {"protocol": "paper"}}}, "data.protocol holdout != paper"),
        ({"sections": {"data": {"holdout": 0.3}}}, "data.holdout 0.1 != 0.3"),
        ({"images": {**LARGE, "validation": 99}}, "validation images 100000 != 99"),
        ({"sections": {"search": {"metric": "macro_f1", "replicates": 2}}}, "search.metric accuracy != macro_f1"),
    ],
)
def test_values_that_do_not_compare_are_refused_with_what_differs(other: dict[str, Any], what: str) -> None:
    studies = one("a", [0.8, 0.8]), one("c", [0.8, 0.9]), one("b", [0.8, 0.9], **other)
    with pytest.raises(UserError) as refusal:
        compare_studies(studies)
    assert f"'a' and 'b' differ in {what}" in str(refusal.value)
    assert "'c'" not in str(refusal.value)


def test_one_study_or_one_twice_is_refused() -> None:
    with pytest.raises(UserError, match="at least two studies, got a"):
        compare_studies([one("a", [0.8])])
    with pytest.raises(UserError, match="got 'a' twice"):
        compare_studies([one("a", [0.8]), one("a", [0.8])])
    nameless = [one(name, [0.8], attributes={"data_fingerprint": None}) for name in ("a", "b")]
    with pytest.raises(UserError, match="does not say which data"):
        compare_studies(nameless)


def test_the_holdout_means_nothing_to_the_papers_protocol() -> None:
    a, b = (one(n, [0.8], sections={"data": {"protocol": "paper", "holdout": h}}) for n, h in (("a", 0.1), ("b", 0.2)))
    assert compare_studies([a, b]).duels


def test_a_narrow_terminal_shows_whole_numbers() -> None:
    cells = [({"beta": 0.2}, noisy(0.79, of=2)), ({"beta": 0.6}, noisy(0.85, of=3))]
    compared = compare_studies([one("a", noisy(0.8)), study_of("b", cells, sections={"network": {"width": 0.25}})])
    for width in (80, 200):
        console = Console(file=io.StringIO(), width=width)
        console.print(console_report.comparison_text(compared, width))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in text
        assert ("min. detectable" in text) == (width == 200)
        assert "8 paired" in text
        assert "network.width" in text


def test_only_the_best_of_many_settings_are_shown() -> None:
    cells = [({"beta": beta / 40}, [0.8, 0.8 + beta / 1000]) for beta in range(1, 31)]
    compared = compare_studies([one("a", noisy(0.8)), study_of("b", cells)])
    assert len(console_report.compared_table(compared, 20)[1]) == 21
    assert console_report.left_out(compared, 20) == [
        "Shown are the best 20 of 30 settings of b; --json FILE has all of them."
    ]
    assert console_report.left_out(compared, 30) == []
