"""The paper's tables as data: against what can be derived from them by hand."""

from __future__ import annotations

import pytest

from dashboards import paper


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
