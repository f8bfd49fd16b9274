"""Accuracy as plotly figures: learning curves, settings with intervals, alpha by beta.

Axes have units, colours are told apart by colour-blind readers, and what would be an empty figure is None.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from dashboards.aggregate import Cell, Findings, Grid
from dashboards.beside_paper import papers
from dashboards.comparison import Compared
from dashboards.figures.style import COLOURS, INK, REST, finished, hatch, row_height, wrapped
from dashboards.formatting import label, shown
from dashboards.study_data import StudyData, TrialRow

MARKS = {
    "type1": ("triangle-down", "type I: no gain"),
    "type2": ("diamond", "type II: gain of at most delta"),
}
MOST_LINES = 60
"""Learning curves drawn one by one; of more than these, all but the best become a band."""
MOST_SETTINGS = 40
"""Settings whose intervals are drawn: the best, as the figure says."""


def learning_curves(data: StudyData, findings: Findings) -> go.Figure | None:
    """Validation accuracy by epoch, marks where the active set was resampled. None if no trial has an epoch yet.

    Few settings with several seeds: a colour a setting, its seeds thin, their mean thick. Else the best few trials in
    colour and in the legend, best first, the others grey, or, if they are many, as a band.
    """
    rows = [row for row in data.rows if data.curves.get(row.number)]
    if not rows:
        return None
    figure = go.Figure()
    replicated = any(len(cell.rows) > 1 for cell in findings.cells)
    note = "Marks: the active set was resampled after this epoch. "
    if replicated and 1 < len(findings.cells) <= len(COLOURS):
        drawn, kinds = _curves_by_setting(figure, data, findings)
        note += "Thick: the mean over seeds."
    else:
        drawn, kinds = _curves_by_trial(figure, data, rows)
        note += _shown(data, rows)
    for i, (symbol, meaning) in enumerate(mark for kind, mark in MARKS.items() if kind in kinds):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=meaning, legendrank=100 + i,
            marker={"symbol": symbol, "color": INK, "size": 8},
        )  # fmt: skip
    if any(row.state == "pruned" for row in drawn):
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name="pruned", legendrank=200, line={"dash": "dot", "color": INK}
        )
    figure.update_xaxes(title="epoch", rangemode="tozero")
    figure.update_yaxes(title="validation accuracy (%)")
    return finished(figure, 440, "Learning curves", note if kinds else note.partition(". ")[2])


def _shown(data: StudyData, rows: list[TrialRow]) -> str:
    """Which trials the figure shows in colour, which otherwise, and how many curves were not read."""
    if len(rows) <= len(COLOURS):
        return ""
    having = sum(row.epochs > 0 for row in data.rows)
    text = f"The {len(COLOURS)} best of {having:,} trials in colour"
    if len(rows) <= MOST_LINES:
        return f"{text}, all others grey."
    if having > len(rows):
        return f"{text}, the band from a sample of {len(rows) - len(COLOURS):,} others."
    return f"{text}, all others as a band."


def _curves_by_setting(figure: go.Figure, data: StudyData, findings: Findings) -> tuple[list[TrialRow], set[str]]:
    """The trials drawn, and the kinds of resampling that are marked."""
    kinds: set[str] = set()
    for i, cell in enumerate(sorted(findings.cells, key=lambda cell: -cell.accuracy.mean)):
        for row in (row for row in cell.ended if row.number in data.curves):
            kinds |= _add_curve(figure, data, row, COLOURS[i], width=1, opacity=0.6, size=5)
        curves = [data.curves[row.number] for row in cell.rows if row.number in data.curves]
        y = [100 * float(np.mean([e["accuracy"] for e in epochs])) for epochs in zip(*curves, strict=False)]
        if y:
            figure.add_scatter(
                x=list(range(1, len(y) + 1)), y=y, mode="lines", line={"color": COLOURS[i], "width": 3},
                name=cell.label, legendrank=i,
                hovertemplate=f"{cell.label}, mean<br>epoch %{{x}}: %{{y:.2f}} %<extra></extra>",
            )  # fmt: skip
    return [row for cell in findings.cells for row in cell.ended], kinds


def _curves_by_trial(figure: go.Figure, data: StudyData, rows: list[TrialRow]) -> tuple[list[TrialRow], set[str]]:
    """The trials drawn one by one, and the kinds of resampling that are marked."""
    kinds: set[str] = set()
    ranked = sorted(rows, key=lambda row: (row.state == "failed", -(row.value or 0.0), row.number))
    if len(rows) > MOST_LINES:
        left_out = sum(row.epochs > 0 for row in data.rows) - len(rows)
        _add_band(figure, [data.curves[row.number] for row in ranked[len(COLOURS) :]], sampled=left_out > 0)
        ranked = ranked[: len(COLOURS)]
    for rank, row in reversed(list(enumerate(ranked))):
        if rank < len(COLOURS):
            kinds |= _add_curve(figure, data, row, COLOURS[rank], width=2, opacity=1.0, size=8, rank=rank)
        else:
            _add_curve(figure, data, row, REST, width=1, opacity=1.0, size=0)
    return ranked, kinds


def _add_curve(
    figure: go.Figure,
    data: StudyData,
    row: TrialRow,
    colour: str,
    *,
    width: int,
    opacity: float,
    size: int,
    rank: int | None = None,
) -> set[str]:
    """A trial's curve, and marks of `size` where its active set was resampled; the kinds of resampling marked."""
    curve = data.curves[row.number]
    figure.add_scatter(
        x=[e["epoch"] for e in curve], y=[round(100 * e["accuracy"], 3) for e in curve], name=_label(row),
        mode="lines+markers" if len(curve) == 1 else "lines", opacity=opacity, legendrank=rank,
        line={"color": colour, "width": width, "dash": "dot" if row.state == "pruned" else "solid"},
        showlegend=rank is not None,
        hovertemplate=f"{_label(row)}<br>epoch %{{x}}: %{{y:.2f}} %<extra></extra>",
    )  # fmt: skip
    marks = {kind: [e for e in curve if e["kind"] == kind] for kind in MARKS} if size else {}
    for kind, marked in marks.items():
        if marked:
            figure.add_scatter(
                x=[e["epoch"] for e in marked], y=[100 * e["accuracy"] for e in marked], mode="markers",
                customdata=[e["k"] for e in marked], showlegend=False, opacity=opacity,
                marker={"symbol": MARKS[kind][0], "color": colour, "size": size},
                hovertemplate=f"{_label(row)}<br>after epoch %{{x}}: %{{customdata}} exchanged<extra></extra>",
            )  # fmt: skip
    return {kind for kind, marked in marks.items() if marked}


def _add_band(figure: go.Figure, curves: list[list[dict[str, Any]]], *, sampled: bool) -> None:
    longest = max(len(curve) for curve in curves)
    low: list[float] = []
    middle: list[float] = []
    high: list[float] = []
    for n in range(longest):
        here = [100 * curve[n]["accuracy"] for curve in curves if len(curve) > n]
        for line, q in ((low, 10), (middle, 50), (high, 90)):
            line.append(round(float(np.percentile(here, q)), 3))
    x = list(range(1, longest + 1))
    figure.add_scatter(x=x, y=high, mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip")
    figure.add_scatter(
        x=x, y=low, mode="lines", line={"width": 0}, fill="tonexty", fillcolor="rgba(154,154,154,0.3)",
        name=f"80 % of {'a sample of ' if sampled else 'the other '}{len(curves):,}", legendrank=90, hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=middle, mode="lines", line={"color": REST, "width": 2}, name="their median", legendrank=91
    )


def _label(row: TrialRow) -> str:
    return f"{row.number}: {label(row.parameters)}" if row.parameters else f"trial {row.number}"


def intervals(data: StudyData, findings: Findings) -> go.Figure | None:
    """Every setting's mean accuracy with its 95 % interval and its seeds; None without a setting of two seeds."""
    if not any(len(cell.rows) > 1 for cell in findings.complete):
        return None
    cells = findings.complete[:MOST_SETTINGS][::-1]
    names = {id(cell): wrapped(cell.label) for cell in cells}
    figure = go.Figure()
    seeds = [(100 * value, names[id(cell)]) for cell in cells for value in cell.by_seed(findings.measure).values()]
    figure.add_scatter(
        x=[x for x, _ in seeds], y=[y for _, y in seeds], mode="markers", name="one seed",
        marker={"color": REST, "size": 6}, hovertemplate="%{y}: %{x:.2f} %<extra></extra>",
    )  # fmt: skip
    groups = [("mean, 95 % interval", COLOURS[0], cells)]
    if findings.candidates:
        apart = [cell for cell in cells if cell not in findings.candidates]
        groups = [("may be the best", COLOURS[0], [cell for cell in cells if cell in findings.candidates])]
        groups += [("worse than the best", COLOURS[1], apart)]
    for name, colour, members in groups:
        summaries = [cell.measured(findings.measure) for cell in members]
        figure.add_scatter(
            x=[100 * of.mean for of in summaries], y=[names[id(cell)] for cell in members], mode="markers", name=name,
            marker={"color": colour, "size": 10, "symbol": "diamond"},
            error_x={
                "type": "data", "symmetric": False, "color": colour, "thickness": 2,
                "array": [100 * ((of.high or of.mean) - of.mean) for of in summaries],
                "arrayminus": [100 * (of.mean - (of.low or of.mean)) for of in summaries],
            },
            hovertemplate="%{y}: %{x:.2f} %<extra></extra>", visible=True if members else None,
            showlegend=bool(members),
        )  # fmt: skip
    theirs = [(cell, run) for cell in cells if (run := papers(data, cell)) is not None]
    if theirs:
        figure.add_scatter(
            x=[100 * run.accuracy for _, run in theirs], y=[names[id(cell)] for cell, _ in theirs], mode="markers",
            name="the paper", marker={"color": COLOURS[5], "size": 11, "symbol": "x"},
        )  # fmt: skip
    where = "accuracy on the test split" if findings.measure == "test" else "best validation accuracy"
    figure.update_xaxes(title=f"{where} (%)")
    figure.update_yaxes(
        type="category", showgrid=False, categoryorder="array", categoryarray=[names[id(cell)] for cell in cells]
    )
    left_out = len(findings.complete) - len(cells)
    note = "Diamonds: means with 95 % intervals, by seeds and number of images."
    note += f" The best {len(cells)} of {len(findings.complete)} settings." if left_out else ""
    return finished(figure, 150 + row_height(list(names.values())) * len(cells), "Settings with their seeds", note)


def settings_of_studies(compared: Compared) -> go.Figure | None:
    """Every setting's mean with its simultaneous interval and its seeds, a colour a study; None without a setting."""
    figure, names, left_out = go.Figure(), [], []
    for place, data in enumerate(compared.studies):
        of_study = [setting for setting, _ in compared.settings if setting.study is data]
        most = max(1, MOST_SETTINGS // len(compared.studies))
        left_out += [f"the best {most} of {len(of_study):,} of {data.name}"] if len(of_study) > most else []
        settings = of_study[:most]
        if not settings:
            continue
        rows = [wrapped(f"{data.name}: {setting.label or setting.cell.policy}") for setting in settings]
        names += rows
        colour = COLOURS[place % len(COLOURS)]
        seeds = [(100 * value, row) for row, each in zip(rows, settings, strict=True) for value in each.values.values()]
        figure.add_scatter(
            x=[x for x, _ in seeds], y=[y for _, y in seeds], mode="markers", name=f"{data.name}, one seed",
            marker={"color": colour, "size": 6, "opacity": 0.4}, hovertemplate="%{y}: %{x:.2f} %<extra></extra>",
            showlegend=False,
        )  # fmt: skip
        means = [setting.mean for setting in settings]
        figure.add_scatter(
            x=[100 * of.mean for of in means], y=rows, mode="markers", name=data.name,
            marker={"color": colour, "size": 10, "symbol": "diamond"},
            error_x={
                "type": "data", "symmetric": False, "color": colour, "thickness": 2,
                "array": [100 * ((of.high or of.mean) - of.mean) for of in means],
                "arrayminus": [100 * (of.mean - (of.mean if of.low is None else of.low)) for of in means],
            },
            hovertemplate="%{y}: %{x:.2f} %<extra></extra>",
        )  # fmt: skip
    if not names:
        return None
    where = "accuracy on the test split" if compared.measure == "test" else "best validation accuracy"
    figure.update_xaxes(title=f"{where} (%)")
    figure.update_yaxes(type="category", showgrid=False, categoryorder="array", categoryarray=names[::-1])
    note = "Diamonds: means with intervals that hold together with 95 %, by seeds and number of images."
    note += f" Shown: {', '.join(left_out)}." if left_out else ""
    return finished(figure, 150 + row_height(names) * len(names), "Settings of the studies", note)


def heat_map(data: StudyData, grid: Grid) -> go.Figure | None:
    """Best validation accuracy by alpha and beta, the paper's beneath where it compares; None without a value.

    The colours span the cells with complete trials; of which there are none, hatched, show what pruned trials reached.
    """
    if not grid.values:
        return None
    percents, texts, shapes = [], [], []
    for j, alpha in enumerate(grid.alphas):
        cells = [grid.values.get((alpha, beta)) for beta in grid.betas]
        percents.append([None if cell is None else 100 * cell.accuracy.mean for cell in cells])
        texts.append(["" if cell is None else _hover_text(data, cell) for cell in cells])
        shapes += [line for i, cell in enumerate(cells) if cell is not None and not cell.rows for line in hatch(i, j)]
    complete = [100 * cell.accuracy.mean for cell in grid.values.values() if cell.rows]
    figure = go.Figure(
        go.Heatmap(
            x=[shown(beta) for beta in grid.betas],
            y=[shown(alpha) for alpha in grid.alphas],
            z=percents,
            zmin=min(complete, default=None),
            zmax=max(complete, default=None),
            text=texts,
            texttemplate="%{text}",
            colorscale="Cividis",
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "%"}, "thickness": 12},
            hovertemplate="alpha %{y}, beta %{x}: %{z:.2f} %<extra></extra>",
        )
    )
    figure.update_layout(shapes=shapes)
    figure.update_xaxes(title="beta (fraction of the active set exchanged)", type="category", showgrid=False)
    figure.update_yaxes(title="alpha (images an epoch)", type="category", showgrid=False)
    note = "Hatched: pruned, with what was reached; the colours span complete cells." if shapes else ""
    return finished(figure, 160 + 70 * len(grid.alphas), "Accuracy (%) by alpha and beta", note)


def _hover_text(data: StudyData, cell: Cell) -> str:
    of, theirs = cell.accuracy, papers(data, cell)
    text = f"{100 * of.mean:.1f}" + (" p" if cell.pruned else "")
    text += f"<br>± {100 * (of.high - of.mean):.1f}" if of.high is not None else ""
    return text + (f"<br>paper {100 * theirs.accuracy:.1f}" if theirs else "")
