"""Writes figures and notes into the study itself, for its visitors in optuna-dashboard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from optuna.storages import RDBStorage

from dashboards import aggregate
from dashboards.conclusions import conclude
from dashboards.description import describe
from dashboards.figures import accuracy, effort, search
from dashboards.figures.style import for_dashboard
from dashboards.formatting import label, percent
from dashboards.study_data import StudyData, TrialRow
from storage.optuna_internals import DASHBOARD, FIGURE, PART_LENGTH, STUDY_NOTE, parts, study_id_of, trial_note_keys
from storage.study_attributes import read_system_attributes, set_system_attributes
from storage.text import command, one_line

MAX_POINTS = 5_000
"""Figures are sent with every poll of the dashboard, so larger ones are on the report page only."""
MOST_FAILURES = 20
MOST_NOTES = 1_000
"""Trials with a note: notes, too, are sent with every poll."""
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40
"""Bars of a curve."""
MARKS = re.compile(r"([\\`*_{}\[\]()<>#+\-!|~$:])")
"""What can begin or end markup in the dashboard's Markdown, links and formulas included."""


def publish(data: StudyData, storage: RDBStorage) -> None:
    """Write the study's note and figures, replacing those of an earlier call, and the notes of its trials, in one
    transaction.

    Args:
        storage: where to write; not one opened with `reading=True`, whose transactions cannot become writing ones.
    """
    engine, study_id = storage.engine, study_id_of(data.study)
    stored = read_system_attributes(engine, study_id, f"{DASHBOARD}%")
    findings = aggregate.findings(data)
    table, importance = aggregate.grid(data), search.importance(data)
    figures = {
        "settings": accuracy.intervals(data, findings),
        "heat-map": accuracy.heat_map(data, table) if table is not None else None,
        "learning-curves": accuracy.learning_curves(data, findings),
        "cost": search.cost([data]),
        "history": search.history(data),
        "parallel": search.parallel(data),
        "importance": None if isinstance(importance, str) else importance,
        "workers": effort.timeline(data),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    large = [name for name, figure in drawn.items() if _points(figure) > MAX_POINTS]
    changed: dict[str, str | int] = {}
    for name, figure in drawn.items():
        if name not in large:
            changed |= parts(f"{FIGURE}study-{name}:", str(for_dashboard(figure).to_json()), stored)
    version, text = STUDY_NOTE
    changed |= parts(text, note(data, findings, large), stored) | {version: _next(stored.get(version))}
    changed |= _trial_notes(data, stored)
    set_system_attributes(engine, study_id, {key: value for key, value in changed.items() if stored.get(key) != value})


def _trial_notes(data: StudyData, stored: Mapping[str, Any]) -> dict[str, str | int]:
    """Of the trials that have ended, the best first; what a visitor has written instead stays."""
    ids = {trial.number: trial._trial_id for trial in data.study.get_trials(deepcopy=False)}
    ended = [row for row in data.rows if row.state in ("complete", "pruned", "failed")]
    changed: dict[str, str | int] = {}
    for row in sorted(ended, key=lambda row: (row.value is None, -(row.value or 0.0), row.number))[:MOST_NOTES]:
        text, (version, body) = trial_note(data, row), trial_note_keys(ids[row.number])
        old = stored.get(body)
        if old != text and (old is None or str(old).startswith(_opening(row))):
            changed |= {body: text, version: _next(stored.get(version))}
    return changed


def _next(version: object) -> int:
    """Whatever the database has for one."""
    return version + 1 if isinstance(version, int) else 1


def note(data: StudyData, findings: aggregate.Findings, large: list[str]) -> str:
    """Markdown: the answer, what the study is, its progress, its findings, how to resume it.

    Args:
        large: figures that are too large for the dashboard.
    """
    said = conclude(data, findings)
    lines = [
        f"**{sentence(said.answer)}**",
        *(f"Warning: {sentence(warning)}" for warning in said.warnings),
        f"# {escaped(data.name)}",
        "\n".join(f"- {name}: {escaped(value)}" for name, value in describe(data)),
        f"Resume it with: {code(command('resume', data.name))}. "
        f"All tables and figures: {code(command('report', data.name) + ' --html FILE')}.",
        f"On that page only, too large for here: {', '.join(large)}." if large else "",
        *map(sentence, said.sentences),
        f"Notes are on the best {MOST_NOTES:,} of {len(data.rows):,} trials." if len(data.rows) > MOST_NOTES else "",
    ]
    failures = [f"- trial {row.number}: {code(row.error or '')}" for row in data.rows if row.state == "failed"]
    if failures:
        more = len(failures) - MOST_FAILURES
        lines += ["## Failed", "\n".join([*failures[:MOST_FAILURES], *([f"- and {more} more"] if more > 0 else [])])]
    return "\n\n".join(line for line in lines if line)


def escaped(text: str) -> str:
    """`text` in Markdown as it is, on one line: names and errors come from others, and are no markup."""
    return _escaped_part(one_line(text))


def _escaped_part(line: str) -> str:
    return MARKS.sub(r"\\\1", line)


def code(text: str) -> str:
    """`text` as a code span, whatever backticks it has."""
    line = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def sentence(text: str) -> str:
    """`text` in Markdown as it is, but for what stands between backticks: a command, as a code span."""
    parts = re.split("`([^`]+)`", one_line(text))
    return "".join(code(part) if place % 2 else _escaped_part(part) for place, part in enumerate(parts))


def trial_note(data: StudyData, row: TrialRow) -> str:
    """Markdown about one trial: what it is, its curve, how to get its model and to run its setting again."""
    best = data.best
    is_best = best is not None and best.number == row.number
    runs = sum(other.state == "complete" for other in data.rows)
    name = escaped(label(row.parameters) or row.policy)
    lines = [
        f"{_opening(row)} of {escaped(data.name)}: {name}" + (f", seed {row.seed}" if row.seed is not None else ""),
        f"{row.state.capitalize()}: best validation accuracy {percent(row.value)} at epoch {row.best_epoch or '–'} of "
        f"{row.epochs}, {row.images:,} images trained on in {row.seconds:.1f} s."
        + (f" The highest of {runs} complete trials." if is_best and runs > 1 else "")
        + (f" On the test split: {percent(row.test)}." if row.test is not None else ""),
    ]
    if row.error:
        lines.append(f"Error: {code(row.error)}")
    curve = data.curves.get(row.number, [])
    if curve:
        lines.append(f"Accuracy by epoch: `{sparkline([float(epoch['accuracy']) for epoch in curve])}`")
    if row.state == "complete":
        trial = ["--trial", str(row.number)]
        lines.append(
            f"Its model, where the study keeps it: {code(command('model', data.name, *trial))}. Its setting as a "
            f"config to run again: {code(command('model', data.name, *trial, '--toml'))}."
        )
    else:
        seed = [] if row.seed is None else ["--seed", str(row.seed)]
        again = command("enqueue", data.name, *map(_assignment, row.parameters.items()), *seed)
        lines.append(f"Its setting once more: {code(again)}, then {code(command('resume', data.name))}.")
    return "\n\n".join(lines)[:PART_LENGTH]


def _assignment(parameter: tuple[str, Any]) -> str:
    """As `study enqueue` reads it."""
    name, value = parameter
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"


def _opening(row: TrialRow) -> str:
    """By which a note of ours is known."""
    return f"**Trial {row.number}**"


def sparkline(values: list[float]) -> str:
    """The values as bars between their lowest and highest, at most WIDTH of them, with both ends in percent."""
    step = -(-len(values) // WIDTH)
    shown = [max(values[i : i + step]) for i in range(0, len(values), step)]
    low, span = min(shown), (max(shown) - min(shown)) or 1.0
    bars = "".join(BARS[min(len(BARS) - 1, int((value - low) / span * len(BARS)))] for value in shown)
    return f"{percent(low)} {bars} {percent(max(shown))}"


def _points(figure: go.Figure) -> int:
    return sum(len(trace.x) if getattr(trace, "x", None) is not None else 0 for trace in figure.data)
