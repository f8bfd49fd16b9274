"""What the accuracy took, as plotly figures: exchange and coverage of the data, time against the full run, workers."""

from __future__ import annotations

from datetime import UTC, datetime

import plotly.graph_objects as go

from dashboards import paper
from dashboards.aggregate import Cell, Findings
from dashboards.beside_paper import scale_differences
from dashboards.figures.style import COLOURS, INK, REST, finished, row_height, wrapped
from dashboards.study_data import StudyData
from storage.schema import LATEST

MOST_CELLS = len(COLOURS)
OUTCOMES = {
    "finished": (COLOURS[2], "finished its trial"),
    "released": (COLOURS[4], "asked to stop"),
    "error": (COLOURS[1], "error"),
    "vanished": (COLOURS[3], "vanished"),
    "skipped": (COLOURS[5], "skipped by hand"),
    None: (REST, "running, or vanished and not taken over yet"),
}

MOST_BARS = 2000
"""Attempts in the figure of workers, the latest."""


def exchange(data: StudyData, findings: Findings) -> go.Figure | None:
    """Share of the active set that is replaced after each epoch, a line a setting; None where nothing is."""
    figure = go.Figure()
    for i, cell in enumerate(_best(findings)):
        alpha = cell.ended[0].alpha
        shares = _by_epoch(data, cell, lambda epoch, alpha=alpha: 100 * epoch["k"] / alpha) if alpha else []
        if any(shares):
            _line(figure, cell, i, shares, "epoch %{x}: %{y:.1f} % exchanged")
    if not figure.data:
        return None
    figure.update_xaxes(title="after epoch", rangemode="tozero")
    figure.update_yaxes(title="active set exchanged (%)", rangemode="tozero")
    return finished(figure, 360, "Exchange of the active set", _capped(findings))


def coverage(data: StudyData, findings: Findings) -> go.Figure | None:
    """Different images trained on so far; None for studies that did not count them."""
    total = data.counts.get("train")
    figure = go.Figure()
    for i, cell in enumerate(_best(findings)):
        seen = _by_epoch(data, cell, lambda epoch: epoch["seen"] or 0)
        if total and any(seen):
            _line(figure, cell, i, [100 * count / total for count in seen], "epoch %{x}: %{y:.1f} % seen")
    if not figure.data:
        return None
    figure.update_xaxes(title="epoch", rangemode="tozero")
    figure.update_yaxes(title=f"images seen (% of {total:,})", rangemode="tozero")
    return finished(figure, 360, "Coverage of the training images", _capped(findings))


def _best(findings: Findings) -> list[Cell]:
    return findings.complete[:MOST_CELLS]


def _capped(findings: Findings) -> str:
    settings = len(findings.complete)
    return f"The best {MOST_CELLS} of {settings} settings." if settings > MOST_CELLS else ""


def _by_epoch(data: StudyData, cell: Cell, of: object) -> list[float]:
    """Mean over the cell's trials, epoch by epoch, as far as all of them go."""
    curves = [data.curves[row.number] for row in cell.rows if row.number in data.curves]
    return [round(sum(of(epoch) for epoch in epochs) / len(epochs), 3) for epochs in zip(*curves, strict=False)]  # type: ignore[operator]


def _line(figure: go.Figure, cell: Cell, i: int, y: list[float], hover: str) -> None:
    figure.add_scatter(
        x=list(range(1, len(y) + 1)), y=y, mode="lines", name=cell.label, line={"color": COLOURS[i], "width": 2},
        hovertemplate=f"{cell.label}<br>{hover}<extra></extra>",
    )  # fmt: skip


def times(data: StudyData, findings: Findings) -> go.Figure | None:
    """Each setting's seconds over those of the full run with the same seed; None without a full run to compare with."""
    others = [cell for cell in findings.cells if cell.label in findings.ratios and cell.policy != "full"]
    if not others:
        return None
    ratios = [findings.ratios[cell.label] for cell in others]
    names = [wrapped(cell.label) for cell in others]
    figure = go.Figure(
        go.Bar(
            x=[100 * ratio.mean for ratio in ratios],
            y=names,
            orientation="h",
            marker={"color": COLOURS[0]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [100 * ((r.high or r.mean) - r.mean) for r in ratios],
                "arrayminus": [100 * (r.mean - (r.low or r.mean)) for r in ratios],
                "color": INK,
            },
            hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
            showlegend=False,
        )
    )
    if not scale_differences(data):
        printed = 100 * paper.time_ratio(augment=data.config.data.augment is True)
        figure.add_vline(
            x=printed, line={"color": COLOURS[1], "dash": "dash"}, annotation_text=f"the paper: {printed:.1f} %"
        )
    figure.update_xaxes(title="seconds, % of the full run", rangemode="tozero")
    figure.update_yaxes(type="category", showgrid=False)
    note = "Means over pairs of one seed and device, with simultaneous 95 % intervals."
    return finished(figure, 150 + row_height(names) * len(others), "Time against the full run", note)


def _is_moment(at: object) -> bool:
    return isinstance(at, int | float) and 0 <= at <= LATEST


def timeline(data: StudyData) -> go.Figure | None:
    """Who worked on what, when: a line a worker, a bar an attempt; None before the first."""
    attempts = [a for a in data.attempts if _is_moment(a.started_at) and (a.ended_at is None or _is_moment(a.ended_at))]
    attempts = attempts[-MOST_BARS:]
    if not attempts:
        return None
    latest = max(a.ended_at or a.started_at for a in attempts)
    workers = list(dict.fromkeys(a.owner for a in attempts))
    names = {owner: f"{owner.split(':')[0][:24]} #{i}" for i, owner in enumerate(workers, 1)}
    figure = go.Figure()
    for outcome, (colour, meaning) in OUTCOMES.items():
        these = [a for a in attempts if a.outcome == outcome]
        if not these:
            continue
        ends = [max(a.ended_at or latest, a.started_at) for a in these]
        figure.add_bar(
            base=[datetime.fromtimestamp(a.started_at, UTC).isoformat() for a in these],
            x=[1000 * (end - a.started_at) for a, end in zip(these, ends, strict=True)],
            y=[names[a.owner] for a in these],
            orientation="h", name=meaning, marker={"color": colour, "line": {"color": "rgba(0,0,0,0)"}},
            text=[str(a.number) for a in these] if len(attempts) <= 100 else None, textposition="inside",
            customdata=[
                (a.number, f"{end - a.started_at:.1f} s", a.device, f"<br>{a.error[:100]}" if a.error else "")
                for a, end in zip(these, ends, strict=True)
            ],
            hovertemplate=f"trial %{{customdata[0]}}, %{{customdata[1]}}, {meaning}"
            "<br>%{customdata[2]}%{customdata[3]}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title="time (UTC)", type="date")
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    note = "A line for each worker, a bar for each attempt at a trial."
    if len(attempts) < len(data.attempts):
        note += f" Shown are the last {len(attempts):,} of {len(data.attempts):,} attempts."
    return finished(figure, min(900, 150 + 26 * len(workers)), "Workers", note)
