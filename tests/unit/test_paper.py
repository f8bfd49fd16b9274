"""The paper's tables as data: against what can be derived from them by hand."""

from __future__ import annotations

import pytest

from dashboards import paper


def test_the_grid_is_21_runs_of_9_9_hours() -> None:
    assert len(paper.GRID) == 21
    assert sum(run.seconds for run in paper.GRID) / 3600 == pytest.approx(9.9, abs=0.05)


def test_cells_are_found_by_their_setting() -> None:
    best = paper.printed("dynamic", 25_000, 0.7, augment=False)
    assert best is not None
    assert (best.tables, best.accuracy, best.seconds) == ("Tables 2 and 3", 0.847, 33 * 60 + 52)
    slow = paper.printed("dynamic", 25_000, 0.4, augment=False)
    assert slow is not None
    assert slow.seconds == 38 * 60 + 54
    full = paper.printed("full", None, None, augment=True)
    assert full is not None
    assert full.accuracy == 0.9188
    assert paper.printed("dynamic", 10_000, 0.7, augment=False) is None
    assert paper.printed("fresh", 25_000, None, augment=False) is None


def test_time_ratios_are_those_of_tables_4_and_5() -> None:
    assert paper.time_ratio(augment=False) == pytest.approx(0.605, abs=0.0005)
    assert paper.time_ratio(augment=True) == pytest.approx(0.587, abs=0.0005)
    saved = [f"{100 * (1 - paper.time_ratio(augment=augment)):.1f} %" for augment in (False, True)]
    assert all(text in paper.CAVEATS[0] for text in saved)
    lost = [f"{100 * (rows[0].accuracy - rows[2].accuracy):.2f} points" for rows in (paper.TABLE_4, paper.TABLE_5)]
    assert all(text in paper.CAVEATS[1] for text in lost)
