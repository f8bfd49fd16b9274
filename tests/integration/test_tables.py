"""A study's tables as CSV and JSON: what is in them, and that a folder never holds half of them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dashboards import study_data, tables
from dashboards.reports import csv as csv_report
from dashboards.reports import json as json_report
from dashboards.study_data import StudyData
from storage.errors import UserError
from tests.support.harness import Harness, config_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    """Full and static training with two seeds, one epoch each."""
    url = f"sqlite:///{tmp_path_factory.mktemp('tables') / 'study.db'}"
    policy = {"name": ["static", "full"], "alpha": 60, "beta": 0.5}
    harness = Harness(url, config_of(policy=policy, training={"epochs": 2}, search={"replicates": 2}))
    harness.work()
    return study_data.read(harness.storage, "s")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_csv_has_trials_epochs_attempts_and_settings(data: StudyData, tmp_path: Path) -> None:
    files = csv_report.write([data], tmp_path / "tables")
    assert [file.name for file in files] == ["trials.csv", "epochs.csv", "attempts.csv", "settings.csv"]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(file.name for file in files)
    trials, epochs, attempts, settings = map(rows_of, files)
    assert [(row["study"], row["trial"], row["policy"], row["seed"]) for row in trials] == [
        ("s", "0", "static", "0"), ("s", "1", "full", "0"), ("s", "2", "static", "1"), ("s", "3", "full", "1"),
    ]  # fmt: skip
    assert {row["alpha"] for row in trials if row["policy"] == "full"} == {""}  # means nothing to it
    assert len(epochs) == 8
    assert [row["images"] for row in epochs if row["trial"] == "1"] == ["200", "200"]
    best = {row["trial"]: float(row["value"]) for row in trials}
    assert best["1"] == max(float(row["accuracy"]) for row in epochs if row["trial"] == "1")
    assert [row["outcome"] for row in attempts] == ["finished"] * 4
    assert [(row["setting"], row["trials"], row["complete"]) for row in settings] == [
        ("static", "[0, 2]", "2"), ("full", "[1, 3]", "2"),
    ]  # fmt: skip


def test_epochs_are_read_from_every_database(url: str) -> None:
    harness = Harness(url, config_of(policy={"alpha": 60, "beta": 0.5}))
    harness.work()
    epochs = tables.epochs(study_data.read(harness.storage, "s"))
    assert [(row["trial"], row["epoch"]) for row in epochs] == [(0, 1), (0, 2), (0, 3)]


def test_several_studies_share_the_files(data: StudyData, tmp_path: Path) -> None:
    csv_report.write([data, replace(data, name="t")], tmp_path)
    assert [row["study"] for row in rows_of(tmp_path / "epochs.csv")] == ["s"] * 8 + ["t"] * 8


def test_text_of_other_machines_is_no_formula(data: StudyData, tmp_path: Path) -> None:
    bad = replace(data, rows=tuple(replace(row, error="=HYPERLINK(1)\x1b[2J", joules=-1.0) for row in data.rows))
    csv_report.write([bad], tmp_path)
    (row, *_) = rows_of(tmp_path / "trials.csv")
    assert (row["error"], row["joules"]) == ("'=HYPERLINK(1)\\x1b[2J", "-1.0")


def test_a_folder_that_cannot_be_written_is_one_line(data: StudyData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into the folder"):
        csv_report.write([data], tmp_path / "file")


def test_json_has_the_epochs(data: StudyData) -> None:
    document = json.loads(json_report.text([data]))
    assert [row["epoch"] for row in document["epochs"]["1"]] == [1, 2]
    assert document["epochs"]["1"][0]["images"] == 200
