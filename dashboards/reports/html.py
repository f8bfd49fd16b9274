"""One self-contained HTML page about one or several studies: opens from disk, asks the network for nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from dashboards import aggregate
from dashboards.beside_paper import Beside, beside_paper
from dashboards.comparison import Compared
from dashboards.conclusions import Conclusions, conclude
from dashboards.description import describe
from dashboards.figures import accuracy, effort, search
from dashboards.formatting import budget_lines, percent
from dashboards.reports import console
from dashboards.reports import json as json_report
from dashboards.study_data import StudyData

MOST_TRIALS = 500
# Plotly writes colours into each text's style; in dark mode those of axes, titles and legends are ours.
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1d; --quiet: #555; --page: #fff; --line: #0006; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --quiet: #bbb; --page: #121212; --line: #fff5; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 1.5rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--page); }
h1 { font-size: 1.6rem; margin: 2.5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; } a { color: inherit; }
.answer { border-left: 5px solid #0077BB; padding: .2rem 0 .2rem .8rem; margin: 1rem 0; font-size: 1.15rem; }
.warning { border-left: 5px solid #D55E00; padding-left: .8rem; }
.quiet { color: var(--quiet); font-size: .92em; }
figure { margin: 1.4rem 0 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
.first th:first-child, .first td:first-child, .last th:last-child, .last td:last-child { text-align: left; }
.compared th:nth-child(-n+2), .compared td:nth-child(-n+2) { text-align: left; }
.facts th, .facts td { text-align: left; vertical-align: top; white-space: normal; overflow-wrap: anywhere; }
.facts th { font-weight: 600; white-space: nowrap; }
code, pre { font-size: .85em; } pre { overflow-x: auto; } summary { cursor: pointer; }
[class$=tick] > text, text[class$=title], .cbaxis text, .cbtitle text, .legendtext, .annotation-text {
  fill: var(--ink) !important; }
@media (max-width: 700px) { .modebar-container { display: none; } }
"""
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    # Few enough to stand beside a title on a narrow screen.
    "modeBarButtonsToRemove": ["zoomIn2d", "zoomOut2d", "autoScale2d", "select2d", "lasso2d", "sendDataToCloud"],
}
# Nothing may be fetched: not by this page, not by what a later edit puts into it.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(studies: Sequence[StudyData]) -> str:
    sections = [_contents(studies), _side_by_side(studies)] if len(studies) > 1 else []
    sections += [_study(data, i) for i, data in enumerate(studies)]
    return _whole(", ".join(data.name for data in studies), "".join(sections))


def comparison_page(compared: Compared) -> str:
    """Several studies against the first."""
    names = [data.name for data in compared.studies]
    figures = [accuracy.settings_of_studies(compared), search.cost(compared.studies)]
    drawn = "".join(_drawn(figure) for figure in figures if figure is not None)
    shown = " ".join(console.left_out(compared, MOST_TRIALS))
    note = f"Means with 95 % intervals over seeds and number of images; all of them hold together. {shown}"
    table = _table(*console.compared_table(compared, MOST_TRIALS), css="compared")
    parts = [
        f"<h1>{escape(' and '.join(names))}, compared</h1>",
        _said(compared.said),
        _section("Figures", drawn) if drawn else "",
        _section("Settings", table, escape(note)),
    ]
    heads, lines = console.against_table(compared, MOST_TRIALS)
    if lines:
        note = (
            f"In points. Each setting against that of {names[0]} with the same values of what both studies vary, else "
            "against its best. The 95 % intervals are over seeds, on the same images, and hold together; p adjusted "
            "(Bonferroni over this table) is below 0.05 where the interval leaves out 0. Min. detectable: the true "
            "difference that so many seeds with this spread find with 80 % power."
        )
        parts.append(
            _section("Settings against the first study's", _table(heads, lines, "compared last"), escape(note))
        )
    if compared.differences:
        parts.append(_section("Config: what differs", _table(*console.differences_table(compared), css="first")))
    return _whole(f"{', '.join(names)} compared", f"<article>{''.join(parts)}</article>")


def _whole(title: str, body: str) -> str:
    """The page around its content."""
    script = f"<script>{get_plotlyjs()}</script>" if "plotly-graph-div" in body else ""
    title = escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title><style>{STYLE}</style>{script}</head>
<body>{body}</body></html>
"""


def _contents(studies: Sequence[StudyData]) -> str:
    """Each study with its answer, as links."""
    items = "".join(
        f"<li><a href='#study-{i}'>{escape(data.name)}</a>: "
        f"{escape(conclude(data, aggregate.findings(data)).answer)}</li>"
        for i, data in enumerate(studies)
    )
    return f"<nav><h1>Contents</h1><ul><li><a href='#side-by-side'>Side by side</a></li>{items}</ul></nav>"


def _study(data: StudyData, place: int) -> str:
    """The answer, what was studied, figures, tables, manifest."""
    findings = aggregate.findings(data)
    said, beside = conclude(data, findings), beside_paper(data, findings)
    parts = [_said(said), _section("What was studied", _facts(data))]
    figures, missing = _figures(data, findings)
    if figures:
        parts.append(_section("Figures", "".join(figures) + missing))
    if not any(data.curves.values()):
        parts.append("<p>No trial has finished an epoch yet.</p>")
    if beside is not None:
        parts.append(_section("Beside the paper", _paper(beside)))
    if 1 < len(findings.cells) <= MOST_TRIALS:
        note = "Intervals of 95 %, over seeds and number of images. Costs are means over the seeds."
        if findings.single:
            note = "Best first. Single runs: nothing tells how far another seed would be from them."
        css = "first last" if findings.single else "first"
        parts.append(_section("Settings", _table(*console.cells_table(data, findings), css=css), note))
    if findings.comparisons:
        note = (
            "In points. Differences with simultaneous 95 % intervals: all hold together with 95 %. p adjusted "
            "(Bonferroni "
            "over this table) is below 0.05 where the interval leaves out 0. Min. detectable: the true difference that "
            "so "
            "many pairs with this spread find with 80 % power. Both settings are measured on the same images: the "
            "intervals are about other seeds, not about other images."
        )
        table = _table(*console.comparisons_table(findings), css="first last")
        parts.append(_section("Comparisons, paired by seed", table, note))
    parts.append(_trials(data))
    manifest = escape(json.dumps(json_report.manifest(data), indent=2, ensure_ascii=False))
    parts.append(
        _section("Manifest", f"<details><summary>What produced these numbers</summary><pre>{manifest}</pre></details>")
    )
    return f"<article id='study-{place}'><h1>{escape(data.name)}</h1>{''.join(parts)}</article>"


def _paper(beside: Beside) -> str:
    tables = "".join(f"<h3>{escape(title)}</h3>{_table(*lines, css='first')}" for title, lines in beside.tables())
    return tables + "".join(f"<p>{escape(sentence)}</p>" for sentence in console.paper_sentences(beside))


def _said(said: Conclusions) -> str:
    warnings = "".join(f"<p class='warning'>{_sentence(warning)}</p>" for warning in said.warnings)
    sentences = "".join(f"<p>{_sentence(sentence)}</p>" for sentence in said.sentences)
    return f"<p class='answer'><b>{_sentence(said.answer)}</b></p>{warnings}{sentences}"


def _sentence(text: str) -> str:
    """What stands between backticks, a command, as code."""
    parts = re.split("`([^`]+)`", text)
    return "".join(f"<code>{escape(part)}</code>" if place % 2 else escape(part) for place, part in enumerate(parts))


def _facts(data: StudyData) -> str:
    facts = [*describe(data)]
    facts += [("Excluded", f"Trial {number} is excluded: {why}") for number, why in data.status.excluded.items()]
    facts += [("Budget", line) for line in budget_lines(data.status.budgets, data.status.spent)]
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f"<table class='facts'>{rows}</table>"


def _figures(data: StudyData, findings: aggregate.Findings) -> tuple[list[str], str]:
    """The figures that there is something to show in, and why there are no importances."""
    table, importance = aggregate.grid(data), search.importance(data)
    drawn = [
        accuracy.intervals(data, findings),
        accuracy.heat_map(data, table) if table is not None else None,
        accuracy.learning_curves(data, findings),
        search.cost([data]),
        search.history(data),
        effort.times(data, findings),
        search.parallel(data),
        search.slices(data),
        None if isinstance(importance, str) else importance,
        effort.exchange(data, findings),
        effort.coverage(data, findings),
        effort.timeline(data),
    ]
    missing = f"<p class='quiet'>No importances: {escape(importance)}.</p>" if isinstance(importance, str) else ""
    return [_drawn(figure) for figure in drawn if figure is not None], missing


def _section(title: str, content: str, note: str = "") -> str:
    return f"<h2>{title}</h2>" + (f"<p class='quiet'>{note}</p>" if note else "") + content


def _side_by_side(studies: Sequence[StudyData]) -> str:
    heads = ["study", "trials", "complete", "highest run", "images", "hours", "protocol"]
    lines = []
    for data in studies:
        best = percent(data.best.value if data.best else None)
        hours = sum(row.seconds for row in data.rows) / 3600
        images = sum(row.images for row in data.rows)
        complete = data.status.states["complete"]
        numbers = [str(len(data.rows)), str(complete), best, f"{images:,}", f"{hours:.2f}"]
        lines.append([data.name, *numbers, data.config.data.protocol])
    # A front is over accuracies that compare, so over one validation set.
    sets: dict[tuple[object, ...], list[StudyData]] = {}
    for data in studies:
        sets.setdefault(tuple(data.validation_set.values()), []).append(data)
    note = "" if len(sets) == 1 else "These studies validate on different images: their accuracies do not compare."
    figures = [search.cost(members) for members in sets.values() if len(members) > 1]
    drawn = "".join(_drawn(figure) for figure in figures if figure is not None)
    table = _section("Studies", _table(heads, lines, "first last"), note)
    return f"<div id='side-by-side'><h1>Side by side</h1>{table}{drawn}</div>"


def _drawn(figure: go.Figure) -> str:
    html: str = plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, config=CONFIG)
    return f"<figure>{html}</figure>"


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
    return _section("Trials", _table(heads, lines[:MOST_TRIALS], css="last") + failures, note)
