"""`study bench`: its counts are those of real studies, and what it measured is what `launch` shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from study import estimate
from study.cli import run
from study.config.loading import load_config, preset_names
from study.config.models import StudyConfig
from tests.support.command import study
from tests.support.harness import Harness, config_of

PACE = estimate.Pace(train=1000.0, validate=4000.0, device="a device", on="2026-01-01")
SMALL = ("--set", "network.width=0.125", "--set", "training.epochs=1", "--set", "policy.alpha=[50, 60]")


def test_the_papers_grid_is_counted_by_hand() -> None:
    work = estimate.trial_loads(load_config("paper-grid"))
    assert len(work) == 21
    assert sum(load.train for load in work) == 7 * 200 * (15000 + 20000 + 25000)
    assert sum(load.validate for load in work) == 21 * 200 * 10000


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"data": {"test": True}},
        {"training": {"images": 200}},
        {"policy": {"name": ["full", "static"]}},
        {"search": {"sampler": "random", "trials": 3}, "policy": {"alpha": 70, "beta": {"low": 0.1, "high": 0.9}}},
    ],
    ids=["grid", "test", "budget", "policies", "sampler"],
)
def test_the_counts_are_those_of_a_study(sqlite_url: str, sections: dict[str, Any]) -> None:
    config = config_of(**sections)
    studied = Harness(sqlite_url, config)
    studied.work()
    trained = [trial.user_attrs["images"] for trial in studied.study.trials]
    work = estimate.trial_loads(config)
    assert [load.train for load in work] == trained
    validated = [trial.user_attrs["epochs"] * len(studied.data.validation_labels) for trial in studied.study.trials]
    test = len(studied.data.test_labels) if studied.data.test_labels is not None else 0
    assert [load.validate for load in work] == [images + test for images in validated]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_an_estimate(name: str) -> None:
    assert estimate.estimate(load_config(name), PACE, 1).startswith("about ")


def test_devices_share_the_trials_but_not_a_trial() -> None:
    work = [estimate.Load(1000, 4000)] * 4
    assert [estimate.seconds(work, PACE, devices) for devices in (1, 2, 4, 100)] == [8.0, 4.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (50, "50 s"), (660, "11 minutes"), (9000, "2.5 hours"), (864000, "10 days")]
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert estimate.duration(seconds) == text


def test_only_configs_of_one_pace_share_a_measurement() -> None:
    def keyed(**sections: Any) -> tuple[Any, ...]:
        return estimate.key(config_of(**sections))

    assert keyed() == keyed(policy={"beta": 0.2}, search={"replicates": 3})
    others: list[dict[str, Any]] = [
        {"network": {"width": 0.25}},
        {"training": {"precision": "fp32"}},
        {"data": {"augment": True}},
    ]
    assert all(keyed(**other) != keyed() for other in others)


def test_a_pace_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "new"))
    config: StudyConfig = config_of()
    assert estimate.recall(config, "cpu") is None
    pace = estimate.measure(config, "cpu")
    assert pace.train > 0 and pace.validate > 0  # noqa: PT018
    estimate.remember(config, "cpu", pace)
    assert estimate.recall(config, "cpu") == pace
    assert estimate.recall(config, "cuda") is None
    next((tmp_path / "new").iterdir()).write_text("{")
    assert estimate.recall(config, "cpu") is None


def test_launch_shows_what_bench_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    measured = study("bench", "quick", *SMALL, "--device", "cpu", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert re.fullmatch(
        r"quick: (about .+ if nothing is pruned on (?:\d+ x )?cpu .*: 8 trials, 440 training images .*)\n",
        measured.stdout,
    )
    monkeypatch.setattr(run, "_run", lambda *_: None)  # what it shows, it shows before it runs the study
    after = study("launch", "quick", *SMALL, "--device", "cpu", cwd=tmp_path)
    assert measured.stdout.removeprefix("quick: ").strip() in after.stderr


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for arguments in (["nosuch"], ["quick", "--set", "training.epochs=0"]):
        refused = study("bench", *arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.startswith("study: ")
        assert refused.stderr.count("\n") == 1
        assert refused.stdout == ""
