"""Colours and layout that all figures share."""

from __future__ import annotations

import textwrap
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito's palette without its yellow, its light blue and orange darker: each has a contrast of at least 3 to
# white and to the dark page (WCAG AA for graphics). REST is for everyone else.
COLOURS = ("#0077BB", "#D55E00", "#009068", "#C2609A", "#3D92C4", "#B07A00", "#8A6FDF")
REST = "#8A8A8A"
INK = "#767676"
"""Text with a contrast of 4.5 to white (WCAG AA); the page gives it another colour in dark mode, see `html.STYLE`."""
DASHBOARD_HEIGHT = 450
"""Pixels that optuna-dashboard gives a figure (0.21)."""
LABEL_WIDTH = 24
LINE_HEIGHT = 22
"""Pixels of an entry of a legend."""


def finished(figure: go.Figure, height: int, title: str, note: str = "") -> go.Figure:
    """The figure with its title, a note below that, its legend below the plot, and our colours.

    Args:
        height: of the plot with its axes, in pixels; the legend comes on top.
        note: how to read it, or what is left out.
    """
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "linecolor": INK, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    notes = textwrap.wrap(note, 62)
    text = "<br>".join([f"<b>{title}</b>", *(f"<span style='font-size:12px'>{line}</span>" for line in notes)])
    entries = sum(trace.showlegend is not False and trace.name is not None for trace in figure.data)
    entries = entries if entries > 1 else 0
    top = 54 + 18 * len(notes)
    figure.update_layout(
        title={"text": text, "x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 20, "l": 8},
               "font": {"size": 15}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK},
        height=height + LINE_HEIGHT * entries + 18 * len(notes) + 10,
        margin={"l": 50, "r": 16, "t": top, "b": 50}, font={"color": INK, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", template="none", hovermode="closest",
        showlegend=entries > 1,
        legend={"traceorder": "normal", "orientation": "h", "x": 0, "xanchor": "left", "y": -60 / (height - 94),
                "yanchor": "top"},
    )  # fmt: skip
    return figure


def wrapped(label: str) -> str:
    """A label of an axis on lines short enough for a narrow screen."""
    return "<br>".join(textwrap.wrap(label, LABEL_WIDTH))


def for_dashboard(figure: go.Figure) -> go.Figure:
    """The figure with a background of its own and no higher than optuna-dashboard shows, which cuts off the rest."""
    figure.update_layout(paper_bgcolor="#FFFFFF", plot_bgcolor="#FFFFFF", font={"color": "#444444"})
    if figure.layout.height and figure.layout.height > DASHBOARD_HEIGHT:
        legend = {"yref": "container", "y": 0, "yanchor": "bottom", "font": {"size": 11}}
        figure.update_layout(height=DASHBOARD_HEIGHT, legend=legend)
    return figure


def row_height(labels: list[str]) -> int:
    """Pixels of the highest of these labels on a category axis."""
    return max(32, 18 * max((label.count("<br>") + 1 for label in labels), default=1) + 8)


def hatch(i: int, j: int) -> list[dict[str, Any]]:
    """Lines across the cell in column i, row j of a heat map, as shapes."""
    line = {"color": "rgba(128,128,128,0.9)", "width": 1.5}
    ends = [((-0.5, -0.5), (0.5, 0.5)), ((-0.5, 0.0), (0.0, 0.5)), ((0.0, -0.5), (0.5, 0.0))]
    return [
        {"type": "line", "x0": i + a, "y0": j + b, "x1": i + c, "y1": j + d, "line": line, "layer": "above"}
        for (a, b), (c, d) in ends
    ]
