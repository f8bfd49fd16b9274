"""One self-contained HTML page about one or several studies: opens from disk, asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from dashboards import aggregate
from dashboards.conclusions import verdict
from dashboards.figures import accuracy, effort, search
from dashboards.formatting import budget_lines, label, percent
from dashboards.reports import console
from dashboards.reports import json as json_report
from dashboards.study_data import StudyData

MOST_TRIALS = 500
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 2.5rem 0 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; } .warning { border-left: 4px solid #D55E00; padding-left: .7rem; }
.verdict { border-left: 4px solid #0072B2; padding-left: .7rem; margin: 1rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
.first th:first-child, .first td:first-child, th:last-child, td:last-child { text-align: left; }
code, pre { font-size: .85em; } pre { overflow-x: auto; } summary { cursor: pointer; }
"""
# Nothing may be fetched: not by this page, not by what a later edit puts into it.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(studies: Sequence[StudyData]) -> str:
    sections = [_side_by_side(studies)] if len(studies) > 1 else []
    sections += [_study(data) for data in studies]
    body = "".join(sections)
    script = f"<script>{get_plotlyjs()}</script>" if "plotly-graph-div" in body else ""
    title = escape(", ".join(data.name for data in studies))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title><style>{STYLE}</style>{script}</head>
<body>{body}</body></html>
"""


def _study(data: StudyData) -> str:
    findings = aggregate.findings(data)
    parts = [f"<h1>{escape(data.name)}</h1><p>{escape(data.config.description)}</p>", _summary(data)]
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict(data, findings))
    if sentences:
        parts.append(f"<div class='verdict'>{sentences}</div>")
    if len(findings.cells) > 1 and len(findings.cells) <= MOST_TRIALS:
        parts.append(_section("Settings", _table(*console.cells_table(data, findings), css="first")))
    if findings.comparisons:
        note = (
            "Holm: corrected for all of this table. Min. detectable: the true difference that so many pairs with this "
        )
        note += "spread detect with 80 % power."
        parts.append(
            _section("Comparisons, paired by seed", _table(*console.comparisons_table(findings), "first"), note)
        )
    table = aggregate.grid(data)
    drawn = [
        ("Settings with their seeds", accuracy.intervals(data, findings), ""),
        ("Accuracy by alpha and beta", accuracy.heat_map(data, table) if table is not None else None, ""),
        (
            "Learning curves",
            accuracy.learning_curves(data, findings),
            "Marks: the active set was resampled after this epoch.",
        ),
        ("Time against the full run", effort.times(data, findings), ""),
        ("Accuracy against cost", search.cost([data]), ""),
        ("Exchange", effort.exchange(data, findings), "How much of the active set each epoch's end replaced."),
        ("Coverage", effort.coverage(data, findings), "How many different images had been trained on."),
        ("Accuracy by parameter", search.slices(data), ""),
        ("Importance", search.importance(data), ""),
        ("Workers", effort.timeline(data), "One line a worker, one bar an attempt at a trial."),
    ]
    parts += [_section(title, _drawn(figure), note) for title, figure, note in drawn if figure is not None]
    if not any(data.curves.values()):
        parts.append("<p>No trial has finished an epoch yet.</p>")
    parts.append(_trials(data))
    manifest = escape(json.dumps(json_report.manifest(data), indent=2, ensure_ascii=False))
    parts.append(
        _section("Manifest", f"<details><summary>What produced these numbers</summary><pre>{manifest}</pre></details>")
    )
    return "".join(parts)


def _section(title: str, content: str, note: str = "") -> str:
    return f"<h2>{title}</h2>" + (f"<p>{note}</p>" if note else "") + content


def _summary(data: StudyData) -> str:
    states = ", ".join(f"{count} {name}" for name, count in data.status.states.items() if count)
    lines = [f"<p>{data.status.progress.total} trials: {escape(states)}.</p>"]
    lines += [f"<p>Trial {n} is excluded: {escape(why)}</p>" for n, why in data.status.excluded.items()]
    best = data.best
    if best is not None:
        chosen = f", {label(best.parameters)}" if best.parameters else ""
        where = f"trial {best.number}{chosen}, epoch {best.best_epoch}"
        lines.append(f"<p>Best validation accuracy <b>{percent(best.value)}</b>: {escape(where)}.</p>")
    style = ' class="warning"' if data.config.data.protocol == "paper" else ""
    lines += [
        f"<p>{escape(line)}.</p>".replace("spent", "Spent", 1)
        for line in budget_lines(data.status.budgets, data.status.spent)
    ]
    lines.append(f"<p{style}>Protocol {escape(data.status.protocol)}.</p>")
    return "".join(lines)


def _side_by_side(studies: Sequence[StudyData]) -> str:
    heads = ["study", "trials", "complete", "best %", "images", "hours", "protocol"]
    lines = []
    for data in studies:
        best = percent(data.best.value if data.best else None)
        hours = sum(row.seconds for row in data.rows) / 3600
        images = sum(row.images for row in data.rows)
        complete = data.status.states["complete"]
        numbers = [str(len(data.rows)), str(complete), best, f"{images:,}", f"{hours:.2f}"]
        lines.append([data.name, *numbers, data.config.data.protocol])
    figure = search.cost(studies)
    prints = {data.study.user_attrs.get("data_fingerprint") for data in studies}
    note = "" if len(prints) == 1 else "These studies are on different data: their accuracies do not compare."
    cost = _section("Accuracy against cost", _drawn(figure)) if figure is not None else ""
    return f"<h1>Side by side</h1>{_section('Studies', _table(heads, lines, 'first'), note)}{cost}"


def _drawn(figure: go.Figure) -> str:
    html: str = plotly.io.to_html(
        figure, include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True}
    )
    return html


def _table(heads: list[str], lines: list[list[str]], css: str = "") -> str:
    rows = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"]
    rows += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines]
    return f"<div class='wide'><table class='{css}'>{''.join(rows)}</table></div>"


def _trials(data: StudyData) -> str:
    heads, lines = console.trials_table(data)
    failures = "".join(
        f"<p>Trial {row.number} failed: {escape(row.error or '')}</p>" for row in data.rows if row.state == "failed"
    )
    note = (
        f"The best {MOST_TRIALS} of {len(lines):,}; all of them: study report --json."
        if len(lines) > MOST_TRIALS
        else ""
    )
    return _section("Trials", _table(heads, lines[:MOST_TRIALS]) + failures, note)
