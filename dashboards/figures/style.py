"""Colours and layout that all figures share."""

from __future__ import annotations

import plotly.graph_objects as go

# Okabe and Ito's palette without its yellow, which is lost on white. The eighth is grey: everyone else.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8A6FDF")


REST = "#9A9A9A"


INK = "#7A7A7A"  # readable on white and on black


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
