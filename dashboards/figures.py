"""Accuracy as plotly figures: learning curves, settings with intervals, alpha by beta, cost, importance.

Axes have units, colours are told apart by colour-blind readers, and what would be an empty figure is None.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards import cells as celling
from dashboards.cells import Cell, Findings, Grid
from dashboards.view import Row, View
from dashboards.words import label, shown

# Okabe and Ito's palette without its yellow, which is lost on white. The eighth is grey: everyone else.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8A6FDF")
REST = "#9A9A9A"
MARKS = {
    "type1": ("triangle-down", "type I: no gain"),
    "type2": ("diamond", "type II: gain of at most delta"),
}
MOST_LINES = 60
"""Learning curves drawn one by one; of more than these, all but the best become a band."""
INK = "#7A7A7A"  # readable on white and on black


def learning_curves(view: View, found: Findings) -> go.Figure | None:
    """Validation accuracy by epoch, marks where the active set was resampled. None if no trial has an epoch yet.

    Few settings with several seeds: a colour a setting, its seeds thin, their mean thick. Else the best few trials in
    colour and in the legend, best first, the others grey, or, if they are many, as a band.
    """
    rows = [row for row in view.rows if view.curves.get(row.number)]
    if not rows:
        return None
    figure, used = go.Figure(), set()
    if 1 < len(found.cells) <= len(COLOURS) and any(len(cell.rows) > 1 for cell in found.cells):
        ranked = [row for cell in found.cells for row in cell.ended]
        for i, cell in enumerate(sorted(found.cells, key=lambda cell: -cell.accuracy.mean)):
            for row in (row for row in cell.ended if row.number in view.curves):
                used |= _add_curve(figure, view, row, COLOURS[i], width=1, opacity=0.35, size=5)
            curves = [view.curves[row.number] for row in cell.rows if row.number in view.curves]
            y = [100 * float(np.mean([e["accuracy"] for e in epochs])) for epochs in zip(*curves, strict=False)]
            if y:
                figure.add_scatter(
                    x=list(range(1, len(y) + 1)), y=y, mode="lines", line={"color": COLOURS[i], "width": 3},
                    name=cell.label, legendrank=i,
                    hovertemplate=f"{cell.label}, mean<br>epoch %{{x}}: %{{y:.2f}} %<extra></extra>",
                )  # fmt: skip
    else:
        ranked = sorted(rows, key=lambda row: (row.state == "failed", -(row.value or 0.0), row.number))
        if len(rows) > MOST_LINES:
            left_out = sum(row.epochs > 0 for row in view.rows) - len(rows)
            _add_band(figure, [view.curves[row.number] for row in ranked[len(COLOURS) :]], sampled=left_out > 0)
            ranked = ranked[: len(COLOURS)]
        for rank, row in reversed(list(enumerate(ranked))):
            if rank < len(COLOURS):
                used |= _add_curve(figure, view, row, COLOURS[rank], width=2, opacity=1.0, size=8, rank=rank)
            else:
                _add_curve(figure, view, row, REST, width=1, opacity=0.5, size=0)
    for i, (symbol, meaning) in enumerate(mark for kind, mark in MARKS.items() if kind in used):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=meaning, legendrank=100 + i,
            marker={"symbol": symbol, "color": INK, "size": 8},
        )  # fmt: skip
    if any(row.state == "pruned" for row in ranked):
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name="pruned", legendrank=200, line={"dash": "dot", "color": INK}
        )
    figure.update_xaxes(title="epoch", rangemode="tozero")
    figure.update_yaxes(title="validation accuracy (%)")
    return finished(figure, 480)


def _add_curve(
    figure: go.Figure,
    view: View,
    row: Row,
    colour: str,
    *,
    width: int,
    opacity: float,
    size: int,
    rank: int | None = None,
) -> set[str]:
    """A trial's curve, and marks of `size` where its active set was resampled; the kinds of resampling marked."""
    curve = view.curves[row.number]
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


def _label(row: Row) -> str:
    return f"{row.number}: {label(row.parameters)}" if row.parameters else f"trial {row.number}"


def intervals(view: View, found: Findings) -> go.Figure | None:
    """Every setting's mean accuracy with its 95 % interval and its seeds; None without a setting of two seeds."""
    cells = [cell for cell in found.cells if cell.rows]
    if not any(len(cell.rows) > 1 for cell in cells):
        return None
    cells = sorted(cells, key=lambda cell: cell.accuracy.mean)[-40:]
    figure = go.Figure()
    seeds = [(100 * value, cell.label) for cell in cells for value in cell.by_seed(found.measure).values()]
    figure.add_scatter(
        x=[x for x, _ in seeds], y=[y for _, y in seeds], mode="markers", name="one seed",
        marker={"color": REST, "size": 6}, hovertemplate="%{y}: %{x:.2f} %<extra></extra>",
    )  # fmt: skip
    summaries = [(cell.test if found.measure == "test" else None) or cell.accuracy for cell in cells]
    means = [100 * of.mean for of in summaries]
    halves = [100 * ((of.high or of.mean) - of.mean) for of in summaries]
    figure.add_scatter(
        x=means, y=[cell.label for cell in cells], mode="markers", name="mean, 95 % interval",
        marker={"color": COLOURS[0], "size": 10, "symbol": "diamond"},
        error_x={"type": "data", "array": halves, "color": COLOURS[0], "thickness": 2},
        hovertemplate="%{y}: %{x:.2f} %<extra></extra>",
    )  # fmt: skip
    for cell in cells:
        theirs = celling.papers(view, cell)
        if theirs:
            figure.add_scatter(
                x=[100 * theirs.accuracy], y=[cell.label], mode="markers", name="the paper",
                marker={"color": COLOURS[1], "size": 11, "symbol": "x"},
            )  # fmt: skip
    where = "accuracy on the test split" if found.measure == "test" else "best validation accuracy"
    figure.update_xaxes(title=f"{where} (%)")
    figure.update_yaxes(type="category", showgrid=False)
    return finished(figure, 150 + 32 * len(cells))


def heat_map(view: View, grid: Grid) -> go.Figure | None:
    """Best validation accuracy by alpha and beta, the paper's beneath where it is held; None without a value."""
    if not grid.values:
        return None
    percents, texts = [], []
    for alpha in grid.alphas:
        cells = [grid.values.get((alpha, beta)) for beta in grid.betas]
        percents.append([None if cell is None else 100 * cell.accuracy.mean for cell in cells])
        texts.append(["" if cell is None else _told(view, cell) for cell in cells])
    figure = go.Figure(
        go.Heatmap(
            x=[shown(beta) for beta in grid.betas],
            y=[shown(alpha) for alpha in grid.alphas],
            z=percents,
            text=texts,
            texttemplate="%{text}",
            colorscale="Cividis",
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "%"}},
            hovertemplate="alpha %{y}, beta %{x}: %{z:.2f} %<extra></extra>",
        )
    )
    figure.update_xaxes(title="beta (fraction of the active set exchanged)", type="category", showgrid=False)
    figure.update_yaxes(title="alpha (images an epoch)", type="category", showgrid=False)
    return finished(figure, 160 + 70 * len(grid.alphas))


def _told(view: View, cell: Cell) -> str:
    of, theirs = cell.accuracy, celling.papers(view, cell)
    text = f"{100 * of.mean:.1f}" + (" p" if cell.pruned else "")
    text += f"<br>± {100 * (of.high - of.mean):.1f}" if of.high is not None else ""
    return text + (f"<br>paper {100 * theirs.accuracy:.1f}" if theirs else "")


def cost(views: Sequence[View]) -> go.Figure | None:
    """Accuracy against images trained on, with the Pareto front; None below two trials that ended.

    Of one study by policy, of several by study. Where all trained on equally many images, against seconds.
    """
    ended = [(view, row) for view in views for row in view.rows if row.state in ("complete", "pruned") and row.value]
    if len(ended) < 2:
        return None
    complete = [row for _, row in ended if row.state == "complete"]
    by = "seconds" if len({row.images for row in complete}) == 1 else "images"
    figure = go.Figure()
    front = celling.pareto(complete, by)
    if len(front) > 1:
        figure.add_scatter(
            x=[getattr(row, by) for row in front], y=[100 * (row.value or 0) for row in front], mode="lines",
            line={"color": INK, "width": 2, "shape": "hv"}, name="Pareto front", hoverinfo="skip",
        )  # fmt: skip
    groups: dict[tuple[str, str], list[Row]] = {}
    for view, row in ended:
        groups.setdefault((row.policy if len(views) == 1 else view.name, row.state), []).append(row)
    names = sorted({name for name, _ in groups})
    for (name, state), rows in sorted(groups.items()):
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
    return finished(figure, 420)


def slices(view: View) -> go.Figure | None:
    """Accuracy by each numeric parameter that varies; None if none does, or below two complete trials."""
    rows = [row for row in view.rows if row.state == "complete" and row.value is not None]
    numeric = (int, float)
    names = [
        name
        for name in view.parameters
        if len({row.parameters.get(name) for row in rows if isinstance(row.parameters.get(name), numeric)}) > 1
    ]
    if not names:
        return None
    figure = make_subplots(1, len(names), shared_yaxes=True, horizontal_spacing=0.03)
    for i, name in enumerate(names, 1):
        having = [row for row in rows if name in row.parameters]
        figure.add_scatter(
            x=[row.parameters[name] for row in having], y=[100 * (row.value or 0) for row in having], mode="markers",
            marker={"color": COLOURS[0], "size": 6, "opacity": 0.6}, row=1, col=i, showlegend=False,
            text=[_label(row) for row in having], hovertemplate="%{text}<br>%{y:.2f} %<extra></extra>",
        )  # fmt: skip
        span = view.config.searchable().get(name)
        figure.update_xaxes(title=name, row=1, col=i, type="log" if getattr(span, "log", False) else "linear")
    figure.update_yaxes(title="best validation accuracy (%)", row=1, col=1)
    return finished(figure, 360)


def importance(view: View) -> go.Figure | None:
    """How much of the variance of accuracy each parameter explains (PED-ANOVA); None if nothing can be said."""
    complete = [trial for trial in view.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(complete) < 10 or len(view.parameters) < 2:
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(
                view.study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=lambda trial: trial.values[0],
            )
        except (ValueError, RuntimeError):  # no parameter that all trials have, or no variance
            return None
    if len(found) < 2 or not all(np.isfinite(list(found.values()))):
        return None
    names = sorted(found, key=lambda name: found[name])
    figure = go.Figure(
        go.Bar(
            x=[found[name] for name in names],
            y=names,
            orientation="h",
            marker={"color": COLOURS[0]},
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="importance for accuracy (PED-ANOVA, sums to 1)")
    figure.update_yaxes(type="category", showgrid=False)
    return finished(figure, 140 + 40 * len(names))


def finished(figure: go.Figure, height: int) -> go.Figure:
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "linecolor": INK, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK},
        height=height, margin={"l": 60, "r": 20, "t": 30, "b": 50}, font={"color": INK, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", template="none", hovermode="closest",
        legend={"traceorder": "normal"},
    )  # fmt: skip
    return figure
