"""The paper's tables as data: against what can be derived from them by hand, and beside a study's."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dashboards import aggregate, paper
from dashboards.beside_paper import beside_paper, scale_differences
from dashboards.reports import html
from dashboards.reports import json as json_report
from dashboards.reports.console import paper_sentences
from dashboards.study_data import StudyData
from tests.support.harness import config_of
from tests.support.made_studies import made_cells


def test_the_grid_is_21_runs_of_9_9_hours() -> None:
    assert len(paper.GRID) == 21
    assert sum(run.seconds for run in paper.GRID) / 3600 == pytest.approx(9.9, abs=0.05)


def test_cells_are_as_printed() -> None:
    by = {(run.alpha, run.beta): run for run in paper.GRID}
    assert (by[25_000, 0.7].accuracy, by[25_000, 0.7].seconds) == (0.847, 33 * 60 + 52)
    assert by[25_000, 0.4].seconds == 38 * 60 + 54
    assert by[15_000, 0.1].accuracy == pytest.approx(0.803)
    assert [run.accuracy for run in paper.TABLE_5] == [0.9188, 0.8714, 0.9013]


def test_time_ratios_are_those_of_tables_4_and_5() -> None:
    assert paper.time_ratio(augment=False) == pytest.approx(0.605, abs=0.0005)
    assert paper.time_ratio(augment=True) == pytest.approx(0.587, abs=0.0005)
    saved = [f"{100 * (1 - paper.time_ratio(augment=augment)):.1f} %" for augment in (False, True)]
    assert all(text in paper.CAVEATS[0] for text in saved)
    lost = [f"{100 * (rows[0].accuracy - rows[2].accuracy):.2f} points" for rows in (paper.TABLE_4, paper.TABLE_5)]
    assert all(text in paper.CAVEATS[1] for text in lost)


PAPERS = {"train": 50_000, "validation": 10_000, "test": 10_000}


def as_the_paper(policy: dict[str, Any], **options: Any) -> Any:
    """A config at the paper's scale."""
    return config_of(
        data={"name": "cifar10", "protocol": "paper", "train_images": None, **options.pop("data", {})},
        network={"width": 1.0}, policy=policy,
        training={"epochs": 200, "batch_size": 512, "lr": 0.001, **options.pop("training", {})}, **options,
    )  # fmt: skip


def grid_study(config: Any, **options: Any) -> StudyData:
    """Every cell of Table 2 with two seeds whose mean is 1 point above the paper's."""
    cells = [
        ({"alpha": run.alpha, "beta": run.beta}, [run.accuracy + 0.012, run.accuracy + 0.008]) for run in paper.GRID
    ]
    return made_cells(cells, config, **{"images": PAPERS, "epochs": 2, **options})


def baselines(config: Any, gain: float = 0.05, **options: Any) -> StudyData:
    cells = [({"policy": "full"}, 0.9), ({"policy": "static"}, 0.8), ({"policy": "dynamic"}, 0.8 + gain)]
    seconds = {"full": 100.0, "static": 60.0, "dynamic": 62.0}
    return made_cells(
        [(cell, [mean - 0.001, mean + 0.001]) for cell, mean in cells], config,
        **{"images": PAPERS, "epochs": 2, "seconds": lambda chosen: seconds[chosen["policy"]], **options},
    )  # fmt: skip


GRID = {"alpha": [15_000, 20_000, 25_000], "beta": list(paper.BETAS)}
POLICIES = {"name": ["full", "static", "dynamic"], "alpha": 25_000, "beta": 0.7}


def test_tables_2_and_3_stand_beside_ours_at_the_papers_scale() -> None:
    data = grid_study(as_the_paper(GRID), seconds=lambda chosen: 0.5 * (33 * 60 + 52))
    beside = beside_paper(data, aggregate.findings(data))
    assert beside is not None
    (title, (heads, lines)), (times, (_, clock)) = beside.tables()
    assert title.startswith("Table 2")
    assert times.startswith("Table 3")
    assert heads == ["alpha \\ beta", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]
    assert [line[0] for line in lines[:3]] == ["25,000 ours", "paper", "difference"]
    assert lines[0][-1].startswith("85.7 (")
    assert lines[0][-1].endswith("), n 2")
    assert [line[-1] for line in lines[1:3]] == ["84.7", "+1.0"]
    assert [line[-1] for line in clock[:3]] == ["16:56", "33:52", "0.500"]
    page, document = html.page([data]), json.loads(json_report.text([data]))["paper"]
    assert "Table 3 of the paper" in page
    assert document["same_scale"]
    assert len(document["cells"]) == 21
    assert document["cells"][-1]["difference"] == pytest.approx(0.01)
    assert "39.5 %" in " ".join(document["caveats"])


@pytest.mark.parametrize("augment", [False, True])
def test_tables_4_and_5_stand_beside_ours(augment: bool) -> None:
    data = baselines(as_the_paper(POLICIES, data={"augment": augment}))
    beside = beside_paper(data, aggregate.findings(data))
    assert beside is not None
    ((title, (_, lines)),) = beside.tables()
    assert title.startswith("Table 5" if augment else "Table 4")
    printed = paper.TABLE_5 if augment else paper.TABLE_4
    assert [line[:2] for line in lines] == [["100 %", "no"], ["50 %", "no"], ["50 %", "yes"]]
    assert [line[3] for line in lines] == [f"{100 * run.accuracy:.1f}" for run in printed]
    assert lines[2][-2:] == ["62.0 %", "58.7 %" if augment else "60.5 %"]
    text = " ".join(paper_sentences(beside))
    assert f"Dynamic against static: +5 points here (2 seeds), {'+2.99' if augment else '+1.54'} points" in text
    assert "The paper's own numbers: " in text


def test_another_scale_compares_shapes_only() -> None:
    data = grid_study(as_the_paper(GRID, training={"epochs": 15}))
    beside = beside_paper(data, aggregate.findings(data))
    assert beside is not None
    assert beside.differs == ["epochs 15"]
    assert beside.tables() == []
    assert beside.rank_correlation is not None
    assert beside.rank_correlation["rho"] == pytest.approx(1.0)
    assert "over 21 cells: 1.00" in " ".join(beside.sentences)
    assert "difference" not in beside.document()["cells"][0]
    shuffled = np.random.default_rng(0).permutation([row.value or 0.0 for row in data.rows])
    other = replace(data, rows=tuple(replace(r, value=float(v)) for r, v in zip(data.rows, shuffled, strict=True)))
    unlike = beside_paper(other, aggregate.findings(other))
    assert unlike is not None
    assert unlike.rank_correlation is not None
    assert unlike.rank_correlation["rho"] < 0.9


def test_a_part_of_other_data_counts_as_the_same_part() -> None:
    sizes = {"train": 1000, "validation": 500, "test": 500}
    data = baselines(config_of(policy=POLICIES | {"alpha": 500}), gain=-0.02, images=sizes)
    beside = beside_paper(data, aggregate.findings(data))
    assert beside is not None
    assert "Dynamic against static: -2 points here (2 seeds), +1.54 points in the paper (Table 4)." in beside.sentences
    assert "Time of dynamic training over the full run: 62.0 % here, 60.5 % in the paper." in beside.sentences
    assert "1,000 training images" in beside.sentences[0]


def test_what_has_no_counterpart_is_not_compared() -> None:
    config = config_of(policy={"alpha": [10, 20], "beta": 0.5})
    data = made_cells([({"alpha": 10}, [0.5]), ({"alpha": 20}, [0.6])], config)
    assert beside_paper(data, aggregate.findings(data)) is None
    assert json.loads(json_report.text([data]))["paper"] is None
    assert "Beside the paper" not in html.page([data])


def test_what_differs_from_the_paper_is_named() -> None:
    assert scale_differences(grid_study(as_the_paper(GRID))) == []
    small = grid_study(config_of(policy=GRID, data={"train_images": 50_000}), images=PAPERS | {"train": 60})
    assert scale_differences(small) == [
        "data digits", "a holdout of the training split validates", "60 training images", "epochs 3", "batch_size 50",
        "lr 0.005", "width 0.125",
    ]  # fmt: skip
