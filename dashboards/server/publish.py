"""Writes figures and a note into the study itself, for its visitors in optuna-dashboard."""

from __future__ import annotations

import warnings

import optuna
import plotly.graph_objects as go
from optuna.storages import RDBStorage
from optuna_dashboard import save_note, save_plotly_graph_object

from dashboards import aggregate
from dashboards.conclusions import verdict
from dashboards.figures import accuracy, effort, search
from dashboards.study_data import StudyData
from storage.text import command

MAX_POINTS = 5_000
"""Figures are sent with every poll of the dashboard, so larger ones are on the report page only."""


def publish(data: StudyData, storage: RDBStorage) -> None:
    """Write the study's note and figures, replacing those of an earlier call.

    Args:
        storage: where to write; not one opened with `reading=True`, whose transactions cannot become writing ones.
    """
    study = optuna.load_study(study_name=data.name, storage=storage)
    findings = aggregate.findings(data)
    table = aggregate.grid(data)
    figures = {
        "settings": accuracy.intervals(data, findings),
        "heat-map": accuracy.heat_map(data, table) if table is not None else None,
        "learning-curves": accuracy.learning_curves(data, findings),
        "cost": search.cost([data]),
        "workers": effort.timeline(data),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for name, figure in figures.items():
            if figure is not None and _points(figure) <= MAX_POINTS:
                save_plotly_graph_object(study, figure, graph_object_id=f"study-{name}")
        save_note(study, note(data, findings))


def note(data: StudyData, findings: aggregate.Findings) -> str:
    """Markdown: what the study is, its progress, its conclusions, how to resume it."""
    states = ", ".join(f"{count} {name}" for name, count in data.status.states.items() if count)
    lines = [
        f"# {data.name}",
        data.config.description,
        f"Preset `{data.preset}`; {len(data.rows)} trials: {states}. Protocol {data.status.protocol}.",
        f"Resume it with: `{command('resume', data.name)}`. "
        f"All tables and figures: `{command('report', data.name)} --html FILE`.",
        *verdict(data, findings),
    ]
    failures = [f"- trial {row.number}: `{row.error}`" for row in data.rows if row.state == "failed"]
    if failures:
        lines += ["## Failed", "\n".join(failures[:20])]
    return "\n\n".join(line for line in lines if line)


def _points(figure: go.Figure) -> int:
    return sum(len(trace.x) if getattr(trace, "x", None) is not None else 0 for trace in figure.data)
