"""Numbers to plotly figures: axes with units, colours that colour-blind readers can tell apart."""

from __future__ import annotations

import plotly.graph_objects as go

from dashboards.tables import Grid, Row, View, shown

# Okabe and Ito's palette without its yellow, which is lost on white. The eighth is grey: everyone else.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8A6FDF")
REST = "#9A9A9A"
MARKS = {
    "type1": ("triangle-down", "type I: no gain"),
    "type2": ("diamond", "type II: gain of at most delta"),
}
INK = "#7A7A7A"  # readable on white and on black


def learning_curves(view: View) -> go.Figure | None:
    """Validation accuracy by epoch, one line a trial, marks where the active set was resampled.

    The best few in colour and in the legend, best first; the others grey. None if no trial has an epoch yet.
    """
    rows = [row for row in view.rows if view.curves.get(row.number)]
    if not rows:
        return None
    ranked = sorted(rows, key=lambda row: (row.state == "failed", -(row.value or 0.0), row.number))
    figure = go.Figure()
    for rank, row in reversed(list(enumerate(ranked))):
        top = rank < len(COLOURS)
        curve = view.curves[row.number]
        colour = COLOURS[rank] if top else REST
        epochs, accuracies = [e["epoch"] for e in curve], [100 * e["accuracy"] for e in curve]
        figure.add_scatter(
            x=epochs, y=accuracies, name=_label(row), mode="lines+markers" if len(curve) == 1 else "lines",
            line={"color": colour, "width": 2 if top else 1, "dash": "dot" if row.state == "pruned" else "solid"},
            opacity=1.0 if top else 0.5, legendrank=rank, showlegend=top,
            hovertemplate=f"{_label(row)}<br>epoch %{{x}}: %{{y:.2f}} %<extra></extra>",
        )  # fmt: skip
        if not top:
            continue
        for kind, (symbol, _) in MARKS.items():
            marked = [(e["epoch"], 100 * e["accuracy"], e["k"]) for e in curve if e["kind"] == kind]
            if marked:
                x, y, k = zip(*marked, strict=True)
                figure.add_scatter(
                    x=x, y=y, customdata=k, mode="markers", showlegend=False,
                    marker={"symbol": symbol, "color": colour, "size": 8},
                    hovertemplate=f"{_label(row)}<br>after epoch %{{x}}: %{{customdata}} exchanged<extra></extra>",
                )  # fmt: skip
    for i, (symbol, meaning) in enumerate(MARKS.values()):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=meaning, legendrank=100 + i,
            marker={"symbol": symbol, "color": INK, "size": 8},
        )  # fmt: skip
    if any(row.state == "pruned" for row in rows):
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="lines",
            name="pruned",
            legendrank=200,
            line={"dash": "dot", "color": INK},
        )
    figure.update_xaxes(title="epoch", rangemode="tozero")
    figure.update_yaxes(title="validation accuracy (%)")
    return _finished(figure, 480)


def _label(row: Row) -> str:
    chosen = ", ".join(f"{name} {shown(value)}" for name, value in row.parameters.items())
    return f"{row.number}: {chosen}" if chosen else f"trial {row.number}"


def heat_map(grid: Grid) -> go.Figure | None:
    """Best validation accuracy by alpha and beta; None if no cell has a value yet."""
    if not grid.values:
        return None
    values = [[grid.values.get((alpha, beta)) for beta in grid.betas] for alpha in grid.alphas]
    percents = [[None if value is None else 100 * value for value in line] for line in values]
    texts = [
        [
            "" if value is None else f"{100 * value:.1f}" + ("" if (alpha, beta) in grid.complete else " p")
            for beta, value in zip(grid.betas, line, strict=True)
        ]
        for alpha, line in zip(grid.alphas, values, strict=True)
    ]
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
    return _finished(figure, 160 + 70 * len(grid.alphas))


def _finished(figure: go.Figure, height: int) -> go.Figure:
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "linecolor": INK, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK},
        height=height, margin={"l": 60, "r": 20, "t": 30, "b": 50}, font={"color": INK, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", template="none", hovermode="closest",
    )  # fmt: skip
    return figure
