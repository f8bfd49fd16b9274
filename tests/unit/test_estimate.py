"""`study bench`: its counts are those of real studies, and what it measured is what `launch` shows."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from storage.optuna_internals import study_id_of
from study import estimate
from study.cli import run
from study.config.loading import load_config, preset_names
from study.config.models import StudyConfig
from study.launchers.worker_count import load_warning, usable_cores
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


def test_what_is_left_is_estimated_from_the_studys_own_trials(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(url, config_of(search={"replicates": 2}))
    of_study = harness.storage.engine, study_id_of(harness.study), harness.config
    assert estimate.time_left(*of_study, ["cpu"]) is None  # nothing has finished
    harness.work(most=6)
    with harness.storage.engine.begin() as connection:  # 60 images/s, whatever this machine did
        connection.exec_driver_sql(
            "UPDATE trial_epochs SET train_seconds = images / 60.0, selection_seconds = 0.0, validation_seconds = 1.0"
        )
    text = estimate.time_left(*of_study, ["cpu", "cpu"])
    # Two trials, of 3 epochs of 60 or 90 images and of one second of validation each.
    assert text is not None
    assert re.match(r"about (6|7) s left with 2 workers: 2 unfinished trials, at the pace of the last 6 trials", text)
    assert "(60 training images/s a worker)" in text
    assert estimate.time_left(*of_study, ["cuda:0"]) is None
    monkeypatch.setattr(platform, "node", lambda: "another")
    assert estimate.time_left(*of_study, ["cpu"]) is None


def test_the_age_of_a_measurement_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (1000, 100, 100)
    for days, text in ((0, "today"), (1, "yesterday"), (9, "9 days ago")):
        on = (date.today() - timedelta(days=days)).isoformat()
        monkeypatch.setattr(estimate, "recall", lambda *_, on=on: replace(PACE, on=on))
        said = estimate.recalled(config_of(), ["cpu"], sizes)
        assert said is not None
        assert said.endswith(f"(pace measured by `study bench` {text})")


@pytest.mark.parametrize(
    ("load", "workers", "said"), [(0.2, 4, False), (0.9, 4, False), (1.4, 4, True), (1.4, 2, False), (3.5, 2, True)]
)
def test_busy_cores_are_mentioned(load: float, workers: int, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    text = load_warning(["cpu"] * workers, 1)
    assert (text is not None) is said
    assert load_warning(["cuda:0"] * workers, 1) is None
    if text is not None:
        assert f"is {load} on 4 cores" in text


def test_a_containers_limit_of_processor_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    read = Path.read_text
    for text, cores in (("300000 100000\n", 3), ("50000 100000\n", 1), ("max 100000\n", 8), ("nonsense", 8)):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text if path.name == "cpu.max" else read(path))
        assert usable_cores() == cores


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for arguments in (["nosuch"], ["quick", "--set", "training.epochs=0"]):
        refused = study("bench", *arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.startswith("study: ")
        assert refused.stderr.count("\n") == 1
        assert refused.stdout == ""
