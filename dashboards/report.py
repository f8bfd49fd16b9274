"""One self-contained HTML page about a study: opens from disk, asks the network for nothing."""

from __future__ import annotations

from html import escape
from pathlib import Path

import plotly.io
from plotly.offline import get_plotlyjs

from dashboards import figures, tables
from dashboards.tables import View, percent, shown

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; } .warning { border-left: 4px solid #D55E00; padding-left: .7rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:last-child, td:last-child { text-align: left; } code { font-size: .9em; }
"""
# Nothing may be fetched: not by this page, not by what a later edit puts into it.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write(view: View, path: Path) -> None:
    path.write_text(page(view), encoding="utf-8")


def page(view: View) -> str:
    curves = figures.learning_curves(view)
    table = tables.grid(view)
    heat = figures.heat_map(table) if table is not None else None
    sections = []
    if curves is None:
        sections.append("<p>No trial has finished an epoch yet.</p>")
    else:
        note = "Dotted: pruned. Marks: the active set was resampled after this epoch."
        sections.append(f"<h2>Learning curves</h2><p>{note}</p>{_drawn(curves)}")
    if heat is not None:
        sections.append(f"<h2>Validation accuracy by alpha and beta</h2>{_drawn(heat)}")
    sections.append(f"<h2>Trials</h2><div class='wide'>{_trials(view)}</div>")
    script = f"<script>{get_plotlyjs()}</script>" if curves is not None else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(view.name)}</title><style>{STYLE}</style>{script}</head>
<body><h1>{escape(view.name)}</h1><p>{escape(view.config.description)}</p>{_summary(view)}{"".join(sections)}</body></html>
"""


def _summary(view: View) -> str:
    states = ", ".join(f"{count} {name}" for name, count in view.counts().items() if count)
    lines = [f"<p>{len(view.rows)} trials: {escape(states)}.</p>"]
    best = view.best
    if best is not None:
        chosen = "".join(f", {key} {shown(value)}" for key, value in best.parameters.items())
        where = f"trial {best.number}{chosen}, epoch {best.best_epoch}"
        lines.append(f"<p>Best validation accuracy <b>{percent(best.value)}</b>: {escape(where)}.</p>")
    style = ' class="warning"' if view.config.data.protocol == "paper" else ""
    lines.append(f"<p{style}>Protocol {escape(view.protocol)}.</p>")
    return "".join(lines)


def _drawn(figure: object) -> str:
    html: str = plotly.io.to_html(
        figure, include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True}
    )
    return html


def _trials(view: View) -> str:
    heads, lines = tables.trials(view)
    rows = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"]
    rows += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines]
    failures = [
        f"<p>Trial {row.number} failed: {escape(row.error or '')}</p>" for row in view.rows if row.state == "failed"
    ]
    return f"<table>{''.join(rows)}</table>{''.join(failures)}"
