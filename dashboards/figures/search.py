"""The search as plotly figures: its history, accuracy against cost, by parameter, importance of parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards import aggregate
from dashboards.figures.accuracy import _label
from dashboards.figures.style import COLOURS, INK, REST, finished
from dashboards.formatting import count, shown
from dashboards.study_data import StudyData, TrialRow, best_and_sample

MOST_POINTS = 2000
"""Trials in one figure: with all of 10,000 a page has 10 MB, and every poll of the dashboard carries the figures."""
FEWEST = 10
"""Complete trials below which importances say nothing."""
NUMBER = (int, float)


def history(data: StudyData) -> go.Figure | None:
    """Accuracy by trial, and the highest so far; None below two complete trials."""
    done = sorted((row for row in data.rows if row.state == "complete" and row.value), key=lambda row: row.number)
    if len(done) < 2:
        return None
    figure = go.Figure()
    ended = [row for row in data.rows if row.state in ("complete", "pruned") and row.value]
    drawn, note = _drawn(ended)
    for state, colour, symbol in (("complete", COLOURS[0], "circle"), ("pruned", REST, "circle-open")):
        rows = [row for row in drawn if row.state == state]
        if rows:
            figure.add_scatter(
                x=[row.number for row in rows], y=[100 * (row.value or 0) for row in rows], mode="markers", name=state,
                marker={"color": colour, "symbol": symbol, "size": 7}, text=[_label(row) for row in rows],
                hovertemplate="%{text}<br>%{y:.2f} %<extra></extra>",
            )  # fmt: skip
    highest = np.maximum.accumulate([100 * (row.value or 0) for row in done])
    steps = [i for i in range(len(done)) if i in (0, len(done) - 1) or highest[i] > highest[i - 1]]
    figure.add_scatter(
        x=[done[i].number for i in steps], y=highest[steps].tolist(), mode="lines", name="highest complete so far",
        line={"color": COLOURS[1], "width": 2, "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    figure.update_xaxes(title="trial")
    figure.update_yaxes(title="best validation accuracy (%)")
    return finished(figure, 380, "Optimisation history", note)


def cost(studies: Sequence[StudyData]) -> go.Figure | None:
    """Accuracy against images trained on, with the Pareto front; None below two trials that ended.

    Of one study by policy, of several by study. Where all trained on equally many images, against seconds. Pruned
    trials are part of the front with what they had reached. No front over several validation sets.
    """
    ended = [(data, row) for data in studies for row in data.rows if row.state in ("complete", "pruned") and row.value]
    if len(ended) < 2:
        return None
    by = "seconds" if len({row.images for _, row in ended if row.state == "complete"}) == 1 else "images"
    figure = go.Figure()
    one_set = all(data.validation_set == studies[0].validation_set for data in studies)
    front = aggregate.pareto((row for _, row in ended), by) if one_set else []
    whose = ", ".join(data.name for data in studies) if len(studies) < 4 else f"these {len(studies)} studies"
    if len(front) > 1:
        figure.add_scatter(
            x=[getattr(row, by) for row in front], y=[100 * (row.value or 0) for row in front], mode="lines",
            line={"color": INK, "width": 2, "shape": "hv"}, name=f"Pareto front of {whose}", hoverinfo="skip",
        )  # fmt: skip
    drawn, sampled = _drawn([row for _, row in ended])
    shown_rows = set(map(id, drawn))
    groups: dict[tuple[str, str], list[TrialRow]] = {}
    for data, row in ended:
        if id(row) not in shown_rows:
            continue
        groups.setdefault((row.policy if len(studies) == 1 else data.name, row.state), []).append(row)
    # Several studies have the colours that they have in `settings_of_studies`, by their place.
    names = sorted({name for name, _ in groups}) if len(studies) == 1 else [data.name for data in studies]
    for (name, state), rows in sorted(groups.items(), key=lambda group: (names.index(group[0][0]), group[0][1])):
        figure.add_scatter(
            x=[getattr(row, by) for row in rows], y=[100 * (row.value or 0) for row in rows], mode="markers",
            marker={
                "color": COLOURS[names.index(name) % len(COLOURS)],
                "symbol": "circle" if state == "complete" else "circle-open",
                "size": 8,
            },
            name=f"{name}, {state}", text=[_label(row) for row in rows],
            hovertemplate="%{text}<br>%{x:,.0f} " + by + ": %{y:.2f} %<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        title="images trained on" if by == "images" else "seconds of training and validation", rangemode="tozero"
    )
    figure.update_yaxes(title="best validation accuracy (%)")
    note = "Single runs; the front takes pruned trials with what they reached."
    if not one_set:
        note = "No common front: the studies validate on different images, so their accuracies do not compare."
    return finished(figure, 400, "Accuracy against cost", f"{note} {sampled}".strip())


def slices(data: StudyData) -> go.Figure | None:
    """Accuracy by each numeric parameter that varies; None if none does, or below two complete trials."""
    rows = _complete(data)
    names = [
        name
        for name in data.parameters
        if len({row.parameters.get(name) for row in rows if isinstance(row.parameters.get(name), NUMBER)}) > 1
    ]
    if not names:
        return None
    drawn, sampled = _drawn(rows)
    columns = min(2, len(names))  # more are not readable on a narrow screen
    lines = math.ceil(len(names) / columns)
    figure = make_subplots(lines, columns, shared_yaxes=True, horizontal_spacing=0.05, vertical_spacing=0.28 / lines)
    for i, name in enumerate(names):
        at = {"row": i // columns + 1, "col": i % columns + 1}
        having = [row for row in drawn if name in row.parameters]
        figure.add_scatter(
            x=[row.parameters[name] for row in having], y=[100 * (row.value or 0) for row in having], mode="markers",
            marker={"color": COLOURS[0], "size": 6, "opacity": 0.6}, showlegend=False,
            text=[_label(row) for row in having], hovertemplate="%{text}<br>%{y:.2f} %<extra></extra>", **at,
        )  # fmt: skip
        figure.update_xaxes(title=name, type="log" if _is_log(data, name) else "linear", nticks=5, **at)
    figure.update_yaxes(title="accuracy (%)", col=1)
    note = f"{count(len(rows), 'complete trial')}, best validation accuracy; pruned trials are left out."
    return finished(figure, 110 + 220 * lines, "Accuracy by parameter", f"{note} {sampled}".strip())


def parallel(data: StudyData) -> go.Figure | None:
    """Every trial as a line over its parameters to its accuracy; None below two parameters or two complete trials.

    Drawn as lines and not as plotly's parallel coordinates, which need WebGL and `eval`.
    """
    rows = sorted(_complete(data), key=lambda row: (-(row.value or 0.0), row.number))
    names = [name for name in data.parameters if len({row.parameters.get(name) for row in rows}) > 1]
    if len(rows) < 2 or len(names) < 2:
        return None
    places = [_places([row.parameters.get(name) for row in rows], _is_log(data, name)) for name in names]
    values = [100 * (row.value or 0.0) for row in rows]
    places.append(_places(values, log=False))
    names = [*names, "accuracy (%)"]
    ends = [_ends([row.parameters.get(name) for row in rows]) for name in names[:-1]]
    ends.append((f"{min(values):.1f}", f"{max(values):.1f}"))
    first, second = max(1, round(0.1 * len(rows))), max(2, round(0.5 * len(rows)))
    groups = [
        (f"best {count(first, 'trial')}", 0, first, COLOURS[1], 2.0),
        (f"next {count(second - first, 'trial')}", first, second, COLOURS[0], 1.5),
        (f"other {count(len(rows) - second, 'trial')}", second, len(rows), REST, 1.0),
    ]
    figure = go.Figure()
    for rank, (name, start, end, colour, width) in reversed(list(enumerate(groups))):
        x: list[float | None] = []
        y: list[float | None] = []
        step = max(1, math.ceil((end - start) * len(groups) / MOST_POINTS))
        for i in range(start, end, step):
            points = [(float(axis), place[i]) for axis, place in enumerate(places) if place[i] is not None]
            x += [*(axis for axis, _ in points), None]
            y += [*(place for _, place in points), None]
        if x:
            figure.add_scatter(
                x=x, y=y, mode="lines", name=name, line={"color": colour, "width": width}, legendrank=rank,
                hoverinfo="skip",
            )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(range(len(names))),
        ticktext=[f"{low}<br>{name}" for name, (low, _) in zip(names, ends, strict=True)],
        range=[-0.35, len(names) - 0.65],
        tickangle=0,
    )
    figure.update_yaxes(showticklabels=False, showgrid=False, range=[-0.03, 1.12])
    for axis, (_, high) in enumerate(ends):
        figure.add_annotation(x=axis, y=1.03, text=high, showarrow=False, yanchor="bottom", font={"size": 12})
    note = f"{count(len(rows), 'complete trial')}; each axis from its lowest value below to its highest above."
    if len(rows) > MOST_POINTS:
        note += f" Of each colour an even sample, {MOST_POINTS:,} in all at most."
    return finished(figure, 420, "Parameters of each trial", note)


def importance(data: StudyData) -> go.Figure | str:
    """How much of the variance of accuracy each parameter explains (PED-ANOVA), or why that cannot be said."""
    complete = [trial for trial in data.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    pruned = sum(row.state == "pruned" for row in data.rows)
    if len(data.parameters) < 2:
        return f"{count(len(data.parameters), 'parameter')} searched; importances compare at least 2"
    if len(complete) < FEWEST:
        return f"{count(len(complete), 'complete trial')}; importances need at least {FEWEST}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            findings = optuna.importance.get_param_importances(
                data.study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=lambda trial: trial.values[0],
            )
        except (ValueError, RuntimeError) as error:
            return f"PED-ANOVA cannot be computed ({error})"
    if len(findings) < 2:
        return "fewer than 2 parameters that all complete trials have"
    if not all(np.isfinite(list(findings.values()))):
        return "the best trials do not differ from the others"
    names = sorted(findings, key=lambda name: findings[name])
    figure = go.Figure(
        go.Bar(
            x=[findings[name] for name in names],
            y=names,
            orientation="h",
            marker={"color": COLOURS[0]},
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="share (sums to 1)")
    figure.update_yaxes(type="category", showgrid=False)
    note = f"PED-ANOVA on {count(len(complete), 'complete trial')}."
    if pruned:
        note += (
            f" {count(pruned, 'pruned trial')} left out: a parameter whose bad values were pruned looks less important."
        )
    return finished(figure, 150 + 34 * len(names), "Importance of parameters for accuracy", note)


def _drawn(rows: list[TrialRow]) -> tuple[list[TrialRow], str]:
    """What a figure shows of them, and the sentence that says so if it is not all."""
    drawn = best_and_sample(rows, lambda row: row.value or 0.0, MOST_POINTS)
    if len(drawn) == len(rows):
        return drawn, ""
    return drawn, f"Shown are {len(drawn):,} of {len(rows):,} trials: the best {MOST_POINTS // 4:,} and an even sample."


def _complete(data: StudyData) -> list[TrialRow]:
    return [row for row in data.rows if row.state == "complete" and row.value is not None]


def _is_log(data: StudyData, name: str) -> bool:
    return bool(getattr(data.config.searchable().get(name), "log", False))


def _places(values: Sequence[Any], log: bool) -> list[float | None]:
    """In [0, 1]; choices in equal steps, None where a trial has no value."""
    present = [value for value in values if value is not None]
    if not all(isinstance(value, NUMBER) for value in present):
        order = {value: float(i) for i, value in enumerate(sorted(set(map(str, present))))}
        numbers = [None if value is None else order[str(value)] for value in values]
    else:
        numbers = [None if value is None else math.log(value) if log else float(value) for value in values]
    known = [number for number in numbers if number is not None]
    low, span = min(known), (max(known) - min(known)) or 1.0
    return [None if number is None else (number - low) / span for number in numbers]


def _ends(values: Sequence[Any]) -> tuple[str, str]:
    present = [value for value in values if value is not None]
    if not all(isinstance(value, NUMBER) for value in present):
        present = sorted(map(str, present))
        return present[0], present[-1]
    return shown(min(present)), shown(max(present))
