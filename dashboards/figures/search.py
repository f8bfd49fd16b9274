"""The search as plotly figures: accuracy against cost, by parameter, importance of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import optuna
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards import aggregate
from dashboards.figures.accuracy import _label
from dashboards.figures.style import COLOURS, INK, finished
from dashboards.study_data import StudyData, TrialRow


def cost(studies: Sequence[StudyData]) -> go.Figure | None:
    """Accuracy against images trained on, with the Pareto front; None below two trials that ended.

    Of one study by policy, of several by study. Where all trained on equally many images, against seconds.
    """
    ended = [(data, row) for data in studies for row in data.rows if row.state in ("complete", "pruned") and row.value]
    if len(ended) < 2:
        return None
    complete = [row for _, row in ended if row.state == "complete"]
    by = "seconds" if len({row.images for row in complete}) == 1 else "images"
    figure = go.Figure()
    front = aggregate.pareto(complete, by)
    if len(front) > 1:
        figure.add_scatter(
            x=[getattr(row, by) for row in front], y=[100 * (row.value or 0) for row in front], mode="lines",
            line={"color": INK, "width": 2, "shape": "hv"}, name="Pareto front", hoverinfo="skip",
        )  # fmt: skip
    groups: dict[tuple[str, str], list[TrialRow]] = {}
    for data, row in ended:
        groups.setdefault((row.policy if len(studies) == 1 else data.name, row.state), []).append(row)
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


def slices(data: StudyData) -> go.Figure | None:
    """Accuracy by each numeric parameter that varies; None if none does, or below two complete trials."""
    rows = [row for row in data.rows if row.state == "complete" and row.value is not None]
    numeric = (int, float)
    names = [
        name
        for name in data.parameters
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
        span = data.config.searchable().get(name)
        figure.update_xaxes(title=name, row=1, col=i, type="log" if getattr(span, "log", False) else "linear")
    figure.update_yaxes(title="best validation accuracy (%)", row=1, col=1)
    return finished(figure, 360)


def importance(data: StudyData) -> go.Figure | None:
    """How much of the variance of accuracy each parameter explains (PED-ANOVA); None if nothing can be said."""
    complete = [trial for trial in data.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(complete) < 10 or len(data.parameters) < 2:
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            findings = optuna.importance.get_param_importances(
                data.study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=lambda trial: trial.values[0],
            )
        except (ValueError, RuntimeError):  # no parameter that all trials have, or no variance
            return None
    if len(findings) < 2 or not all(np.isfinite(list(findings.values()))):
        return None
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
    figure.update_xaxes(title="importance for accuracy (PED-ANOVA, sums to 1)")
    figure.update_yaxes(type="category", showgrid=False)
    return finished(figure, 140 + 40 * len(names))
