"""Our figures and notes into the study itself, for whoever watches it in optuna-dashboard."""

from __future__ import annotations

import warnings

import optuna
import plotly.graph_objects as go
from optuna.storages import RDBStorage
from optuna_dashboard import save_note, save_plotly_graph_object

from dashboards import aggregate
from dashboards.conclusions import verdict
from dashboards.figures import accuracy, effort, search
from dashboards.study_data import View

MOST_POINTS = 5_000
"""Figures travel with every poll of the dashboard, so larger ones stay on the report page."""


def publish(view: View, storage: RDBStorage) -> None:
    """Write the study's note and figures, replacing those of an earlier call.

    Args:
        storage: where to write; not one opened for reading, whose transactions may not turn into writing ones.
    """
    study = optuna.load_study(study_name=view.name, storage=storage)
    found = aggregate.findings(view)
    table = aggregate.grid(view)
    drawn = {
        "settings": accuracy.intervals(view, found),
        "heat-map": accuracy.heat_map(view, table) if table is not None else None,
        "learning-curves": accuracy.learning_curves(view, found),
        "cost": search.cost([view]),
        "workers": effort.timeline(view),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for name, figure in drawn.items():
            if figure is not None and _points(figure) <= MOST_POINTS:
                save_plotly_graph_object(study, figure, graph_object_id=f"study-{name}")
        save_note(study, note(view, found))


def note(view: View, found: aggregate.Findings) -> str:
    """Markdown: what the study is, how far, what it shows, how to go on with it."""
    states = ", ".join(f"{count} {name}" for name, count in view.status.states.items() if count)
    lines = [
        f"# {view.name}",
        view.config.description,
        f"Preset `{view.preset}`; {len(view.rows)} trials: {states}. Protocol {view.status.protocol}.",
        f"Go on with it: `study resume {view.name}`. All tables and figures: `study report {view.name} --html FILE`.",
        *verdict(view, found),
    ]
    failures = [f"- trial {row.number}: `{row.error}`" for row in view.rows if row.state == "failed"]
    if failures:
        lines += ["## Failed", "\n".join(failures[:20])]
    return "\n\n".join(line for line in lines if line)


def _points(figure: go.Figure) -> int:
    return sum(len(trace.x) if getattr(trace, "x", None) is not None else 0 for trace in figure.data)
