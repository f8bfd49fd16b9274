"""`study compare` and `Study.compare` on studies in a database: tables, page, JSON, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest

import study as api
from storage import exclusions
from storage.errors import UserError
from storage.optuna_internals import study_id_of
from study import exit_codes
from study.training.trainer import Trainer
from tests.support.command import study
from tests.support.harness import Harness, config_of, scripted_accuracies


def run(url: str, name: str, width: float, accuracy: float, **sections: object) -> Harness:
    """Two settings on three seeds."""
    config = config_of(
        **{
            "network": {"width": width},
            "policy": {"alpha": 60, "beta": [0.3, 0.6]},
            "training": {"epochs": 1},
            "search": {"replicates": 3},
            **sections,
        }
    )
    harness = Harness(url, config, name)

    def reached(trainer: Trainer) -> float:
        return accuracy + 0.01 * (getattr(trainer.policy, "beta", 0.3) == 0.6)

    with scripted_accuracies(reached):
        harness.work()
    return harness


def test_two_studies_in_tables_json_and_on_a_page(url: str, tmp_path: Path) -> None:
    narrow = run(url, "narrow", 0.125, 0.5)
    run(url, "wide", 0.25, 0.6)
    command = ("compare", "narrow", "wide", "--storage", url)
    shown = study(*command, cwd=tmp_path)
    assert shown.returncode == exit_codes.OK, shown.stderr
    first = shown.stdout.splitlines()[0]
    assert first.startswith("wide's setting ")
    assert "width 0.25 (the highest of 2) is better than narrow's setting " in first
    assert "paired over 3 seeds, provisional with fewer than 6." in first
    assert "network.width" in shown.stdout
    written = study(*command, "--json", "-", "--html", "page.html", cwd=tmp_path)
    assert written.returncode == exit_codes.OK, written.stderr
    document = json.loads(written.stdout)
    assert document["answer"] == first
    assert [each["against"] is None for each in document["settings"]] == [True, True, False, False]
    assert all(each["against"]["matching"] and each["against"]["paired"] for each in document["settings"][2:])
    assert document["best"][0]["finding"] == "better"
    assert document["differences"] == {"network.width": ["0.125", "0.25"]}
    page = (tmp_path / "page.html").read_text()
    assert "is better than narrow&#x27;s setting" in page
    assert "Settings of the studies" in page
    exclusions.exclude(narrow.storage.engine, study_id_of(narrow.study), [0], "a wrong disk")
    after = study(*command, cwd=tmp_path)
    assert "Trial 0 of narrow is excluded: a wrong disk" in after.stdout


def test_from_python(sqlite_url: str, tmp_path: Path) -> None:
    run(sqlite_url, "narrow", 0.125, 0.5)
    run(sqlite_url, "wide", 0.25, 0.6)
    result = api.open_study("narrow", sqlite_url).compare("wide")
    assert result.answer.startswith("wide's setting ")
    assert result.warnings[0].startswith("Provisional")
    assert repr(result).startswith(result.answer)
    table = result.settings()
    assert isinstance(table, pandas.DataFrame)
    assert list(table["study"]) == ["narrow", "narrow", "wide", "wide"]
    assert set(table["width"]) == {0.125, 0.25}
    assert result.figure is not None
    for name in ("compared.html", "compared.json"):
        assert result.report(tmp_path / name) == [tmp_path / name]
    assert json.loads((tmp_path / "compared.json").read_text()) == json.loads(json.dumps(result.findings()))
    with pytest.raises(UserError, match=r"FILE\.html or FILE\.json"):
        result.report(tmp_path / "compared.csv")
    same = api.open_study("wide", sqlite_url)
    assert api.open_study("narrow", sqlite_url).compare(same).answer == result.answer


def test_studies_that_do_not_compare_are_refused_in_one_line(sqlite_url: str, tmp_path: Path) -> None:
    run(sqlite_url, "a", 0.125, 0.5)
    run(sqlite_url, "b", 0.125, 0.5, data={"train_images": 200, "holdout": 0.3}, search={"metric": "macro_f1"})
    for names, message in (
        (("a", "b"), "'a' and 'b' differ in data.holdout 0.1 != 0.3, "),
        (("a",), "at least two studies, got a"),
        (("a", "a"), "names each study once, got 'a' twice"),
        (("a", "c"), "no study 'c' in this storage; studies there: a, b"),
    ):
        refused = study("compare", *names, "--storage", sqlite_url, "--html", "page.html", cwd=tmp_path)
        assert refused.returncode == exit_codes.BAD_INPUT
        assert message in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert not (tmp_path / "page.html").exists()
