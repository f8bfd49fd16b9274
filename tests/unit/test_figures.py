"""Figures: their titles, colours and what they leave out, on studies made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dashboards import aggregate
from dashboards.figures import accuracy, effort, search
from dashboards.figures.style import COLOURS, INK, REST
from dashboards.reports import html
from dashboards.study_data import StudyData
from storage.queries import Attempt
from tests.support.harness import config_of
from tests.support.made_studies import made, made_cells

ALPHAS, BETAS = (30, 60, 90), (0.1, 0.3, 0.5, 0.7)


def grid_study(seeds: int = 1, **options: Any) -> StudyData:
    config = config_of(policy={"alpha": list(ALPHAS), "beta": list(BETAS)}, search={"replicates": seeds})
    noise = np.random.default_rng(0).normal(0, 0.01, (len(ALPHAS), len(BETAS), seeds))
    cells = [
        ({"alpha": alpha, "beta": beta}, list(0.5 + 0.1 * i + 0.05 * j + noise[i, j]))
        for i, alpha in enumerate(ALPHAS)
        for j, beta in enumerate(BETAS)
    ]
    return made_cells(cells, config, **options)


def search_study(trials: int, pruned: int = 0) -> StudyData:
    config = config_of(
        policy={"alpha": {"low": 30, "high": 90, "step": 10}, "beta": {"low": 0.1, "high": 0.9}},
        training={"lr": {"low": 0.001, "high": 0.1, "log": True}},
        search={"sampler": "random", "trials": trials},
    )
    rng = np.random.default_rng(1)
    cells = [
        (
            {"alpha": 30 + 10 * (i % 7), "beta": 0.1 + 0.8 * i / trials, "lr": 10 ** rng.uniform(-3, -1)},
            [0.5 + i / 5000],
        )
        for i in range(trials)
    ]
    return made_cells(cells, config, states=["pruned"] * pruned)


def figures_of(data: StudyData) -> list[Any]:
    findings, table = aggregate.findings(data), aggregate.grid(data)
    drawn = [
        accuracy.intervals(data, findings), accuracy.learning_curves(data, findings),
        accuracy.heat_map(data, table) if table is not None else None, search.cost([data]), search.history(data),
        search.parallel(data), search.slices(data), effort.exchange(data, findings), effort.coverage(data, findings),
        effort.times(data, findings),
    ]  # fmt: skip
    return [figure for figure in drawn if figure is not None]


def title_of(figure: Any) -> str:
    return re.sub("<[^>]+>", " ", figure.layout.title.text)


def test_every_figure_has_a_title_and_its_legend_below() -> None:
    config = config_of(policy={"name": ["dynamic", "full"], "alpha": 60, "beta": 0.5}, search={"replicates": 3})
    policies = made({"dynamic": [0.8, 0.81, 0.8], "full": [0.8, 0.82, 0.81]}, config)
    figures = [*figures_of(policies), *figures_of(grid_study(3)), *figures_of(search_study(30))]
    assert len(figures) == 7 + 9 + 7
    for figure in figures:
        assert title_of(figure).strip()
        assert figure.layout.legend.orientation == "h"
        assert figure.layout.legend.y < 0
        assert max(map(len, figure.layout.title.text.split("<br>"))) < 120


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """As WCAG 2 defines it, from 1 to 21."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrasts_are_wcag_aa_on_light_and_dark() -> None:
    pages = re.findall(r"--ink: (#\w+); --quiet: (#\w+); --page: (#\w+)", html.STYLE)
    assert len(pages) == 2
    for shades in pages:
        ink, quiet, page = (shade if len(shade) == 7 else "#" + "".join(2 * c for c in shade[1:]) for shade in shades)
        assert contrast(ink, page) >= 4.5
        assert contrast(quiet, page) >= 4.5
        assert all(contrast(colour, page) >= 3 for colour in (*COLOURS, REST))
    assert contrast(INK, "#ffffff") >= 4.5  # where a figure stands without the page's style
    assert contrast("#444444", "#ffffff") >= 4.5


def blended(colour: str, opacity: float, page: str) -> str:
    """What is seen of a colour on a page."""
    parts = [(int(colour[i : i + 2], 16), int(page[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(opacity * over + (1 - opacity) * under):02x}" for over, under in parts)


def test_thin_lines_are_seen_on_light_and_dark() -> None:
    """Opacity takes a colour's contrast away: the lines of the trials that are not the best were at 1.4 to 2.1."""
    few = grid_study(3)
    seeds = replace(few, rows=few.rows[:9])
    for figure, least in (
        (search.parallel(search_study(30)), 3),
        (accuracy.learning_curves(search_study(30), aggregate.findings(search_study(30))), 3),
        (accuracy.learning_curves(seeds, aggregate.findings(seeds)), 2),  # of a seed, beside the mean's thick line
    ):
        assert figure is not None
        lines = [trace for trace in figure.data if trace.mode == "lines"]
        assert len(lines) >= 3
        for page in ("#ffffff", "#121212"):
            seen = [blended(trace.line.color, trace.opacity or 1.0, page) for trace in lines]
            assert min(contrast(colour, page) for colour in seen) >= least


def test_the_heat_map_is_scaled_on_complete_cells_and_hatches_pruned_ones() -> None:
    data = grid_study(states=["pruned"] * 4)
    table = aggregate.grid(data)
    assert table is not None
    figure = accuracy.heat_map(data, table)
    assert figure is not None
    complete = [100 * row.value for row in data.rows if row.state == "complete" and row.value is not None]
    assert (figure.data[0].zmin, figure.data[0].zmax) == pytest.approx((min(complete), max(complete)))
    assert len(figure.layout.shapes) == 3 * 4
    assert "Hatched: pruned" in title_of(figure)
    whole = grid_study()
    table = aggregate.grid(whole)
    assert table is not None
    figure = accuracy.heat_map(whole, table)
    assert figure is not None
    assert not figure.layout.shapes
    assert "Hatched" not in title_of(figure)


def test_the_front_says_whose_it_is_and_takes_what_pruned_trials_reached() -> None:
    data = grid_study(states=["pruned"] * 4)
    figure = search.cost([data])
    assert figure is not None
    (front,) = (trace for trace in figure.data if trace.mode == "lines")
    assert front.name == "Pareto front of made"
    pruned = max((row for row in data.rows if row.state == "pruned"), key=lambda row: row.value or 0.0)
    assert (pruned.images, 100 * (pruned.value or 0.0)) in list(zip(front.x, front.y, strict=True))


def test_studies_on_other_images_have_no_common_front() -> None:
    one, two = grid_study(), grid_study(images={"train": 200, "validation": 500, "test": 1000})
    same = search.cost([one, replace(one, name="again")])
    other = search.cost([one, replace(two, name="other")])
    assert same is not None
    assert other is not None
    assert any(trace.name == "Pareto front of made, again" for trace in same.data)
    assert not any("Pareto" in trace.name for trace in other.data)
    page = html.page([one, replace(two, name="other")])
    assert "their accuracies do not compare" in page
    assert "Pareto front of made, " not in page
    assert "Pareto front of made, again" in html.page([one, replace(one, name="again")])


def test_a_study_has_one_colour_on_a_page_that_compares() -> None:
    """Whatever its name: figures go by its place among the studies."""
    studies = [replace(grid_study(), name=name) for name in ("quick", "wider", "tpe")]
    figure = search.cost(studies)
    assert figure is not None
    colours = {trace.name.split(",")[0]: trace.marker.color for trace in figure.data if trace.mode == "markers"}
    assert colours == dict(zip(("quick", "wider", "tpe"), COLOURS, strict=False))


@pytest.mark.parametrize(("trials", "says"), [(5, ""), (40, "all others grey"), (200, "all others as a band")])
def test_curves_that_are_not_in_colour_are_counted(trials: int, says: str) -> None:
    data = search_study(trials)
    figure = accuracy.learning_curves(data, aggregate.findings(data))
    assert figure is not None
    assert says in title_of(figure)
    assert (f"best of {trials} trials" in title_of(figure)) == bool(says)


def test_figures_of_settings_say_how_many_they_leave_out() -> None:
    data = search_study(60)
    findings = aggregate.findings(data)
    for figure in (effort.exchange(data, findings), effort.coverage(data, findings)):
        assert figure is not None
        assert "The best 7 of 60 settings." in title_of(figure)
    few = grid_study(3)
    intervals = accuracy.intervals(few, aggregate.findings(few))
    assert intervals is not None
    assert "of 12 settings" not in title_of(intervals)


def test_importances_give_a_reason_where_there_are_none() -> None:
    assert search.importance(search_study(5)) == "0 complete trials; importances need at least 10"
    config = config_of(policy={"alpha": [30, 60], "beta": 0.5})
    one = made_cells([({"alpha": 30}, [0.5]), ({"alpha": 60}, [0.6])], config)
    assert search.importance(one) == "1 parameter searched; importances compare at least 2"
    assert "No importances: 1 parameter searched" in html.page([one])


def test_the_history_rises_and_parallel_lines_end_at_the_accuracy() -> None:
    data = search_study(30, pruned=3)
    history, parallel = search.history(data), search.parallel(data)
    assert history is not None
    assert parallel is not None
    (highest,) = (trace for trace in history.data if trace.mode == "lines")
    assert list(highest.y) == sorted(highest.y)
    assert len(highest.x) == 27
    (best,) = (trace for trace in parallel.data if trace.name.startswith("best"))
    assert best.y[3] == 1.0  # the best trial's last axis: the highest accuracy
    assert [text.partition("<br>")[2] for text in parallel.layout.xaxis.ticktext] == [
        "alpha", "beta", "lr", "accuracy (%)",
    ]  # fmt: skip
    assert sum(trace.x.count(0.0) for trace in parallel.data) == 27


def note_of(figure: Any) -> str:
    return re.sub("<[^>]*>", "", figure.layout.title.text.replace("<br>", " "))


def test_of_many_trials_the_best_and_a_sample_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said below the figure; what is computed from trials is computed from all of them."""
    monkeypatch.setattr(search, "MOST_POINTS", 40)
    data = search_study(200)
    best = max(row.value or 0 for row in data.rows)
    for figure in (search.history(data), search.cost([data]), search.slices(data)):
        assert figure is not None
        marked = [trace for trace in figure.data if trace.mode == "markers"]
        drawn = len(marked[0].x)
        assert 30 <= drawn <= 40
        assert f"Shown are {drawn} of 200 trials: the best 10 and an even sample." in note_of(figure)
        assert 100 * best in list(marked[0].y)
    lines = search.parallel(data)
    assert lines is not None
    assert sum(trace.x.count(None) for trace in lines.data) <= 43
    assert "Of each colour an even sample, 40 in all at most." in note_of(lines)
    assert "Shown are" not in note_of(search.history(search_study(40)))


def test_the_line_of_the_best_so_far_has_every_rise() -> None:
    data = search_study(50)
    figure = search.history(data)
    assert figure is not None
    (line,) = (trace for trace in figure.data if trace.mode == "lines")
    assert list(line.y) == sorted(100 * (row.value or 0) for row in data.rows)
    falling = replace(data, rows=tuple(replace(row, value=1 - 0.01 * row.number) for row in data.rows))
    (line,) = (trace for trace in search.history(falling).data if trace.mode == "lines")  # type: ignore[union-attr]
    assert (list(line.x), list(line.y)) == ([0, 49], [100, 100])


def test_of_many_attempts_the_last_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "MOST_BARS", 10)
    attempts = tuple(
        Attempt(number=i, owner="a:1:x", device="cpu", started_at=float(i), ended_at=i + 1.0, outcome="finished",
                error=None)
        for i in range(25)
    )  # fmt: skip
    figure = effort.timeline(replace(search_study(3), attempts=attempts))
    assert figure is not None
    assert [row[0] for row in figure.data[0].customdata] == list(range(15, 25))
    assert "Shown are the last 10 of 25 attempts." in note_of(figure)
