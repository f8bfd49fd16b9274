"""A study as numbers: one row a trial, the alpha x beta table of a grid, and how both look on a terminal."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import TrialState
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from storage import progress
from study.config import StudyConfig
from study.plan import PROTOCOLS, load_study
from study.space import relevant


@dataclass(frozen=True)
class Row:
    """One trial."""

    number: int
    state: str
    parameters: dict[str, Any]
    seed: int | None
    value: float | None
    """Best validation accuracy in [0, 1]; of an unfinished trial, the best so far."""
    best_epoch: int | None
    epochs: int
    images: int
    seconds: float
    """Training and validation."""
    error: str | None


@dataclass(frozen=True)
class View:
    """A study as read from its database."""

    name: str
    preset: str
    config: StudyConfig
    rows: tuple[Row, ...]
    curves: dict[int, list[dict[str, Any]]]
    """Trial number to its rows of `trial_epochs`."""

    @property
    def parameters(self) -> tuple[str, ...]:
        policy = self.config.policy.name
        searched = self.config.searched()
        return tuple(name for name in searched if not isinstance(policy, str) or relevant(policy, name))

    @property
    def protocol(self) -> str:
        return PROTOCOLS[self.config.data.protocol]

    @property
    def best(self) -> Row | None:
        done = [row for row in self.rows if row.state == "complete" and row.value is not None]
        return max(done, key=lambda row: (row.value or 0.0, -row.number), default=None)

    def counts(self) -> dict[str, int]:
        names = progress.STATE_NAMES.values()
        return {name: sum(row.state == name for row in self.rows) for name in names}


def read(storage: RDBStorage, name: str) -> View:
    """Raises:
    UserError: no such study.
    """
    study, config = load_study(storage, name)
    curves = progress.epoch_rows(storage.engine, study._study_id)
    errors = progress.last_errors(storage.engine, study._study_id)
    rows = []
    for trial in study.get_trials(deepcopy=False):
        epochs = curves.get(trial.number, [])
        top = max(epochs, key=lambda epoch: (epoch["accuracy"], -epoch["epoch"]), default=None)
        failed = trial.state == TrialState.FAIL
        rows.append(
            Row(
                trial.number,
                progress.STATE_NAMES[trial.state],
                dict(trial.params),
                trial.user_attrs.get("seed"),
                None if failed or top is None else top["accuracy"],
                None if top is None else top["epoch"],
                len(epochs),
                sum(epoch["images"] for epoch in epochs),
                sum(epoch["train_seconds"] + epoch["validation_seconds"] for epoch in epochs),
                trial.user_attrs.get("error") or errors.get(trial.number),
            )
        )
    return View(name, study.user_attrs.get("preset", ""), config, tuple(rows), curves)


@dataclass(frozen=True)
class Grid:
    """The alpha x beta table of a study: mean value over all trials of a cell that ended, in [0, 1]."""

    alphas: tuple[int, ...]
    betas: tuple[float, ...]
    values: dict[tuple[int, float], float]
    complete: frozenset[tuple[int, float]]
    """Cells none of whose trials was pruned."""


def grid(view: View) -> Grid | None:
    """The table, if the study is a grid over alpha and beta and nothing else."""
    searched = view.config.searched()
    if set(view.parameters) != {"alpha", "beta"} or view.config.search.sampler.kind != "grid":
        return None
    found: dict[tuple[int, float], list[Row]] = {}
    for row in view.rows:
        if row.value is not None and row.state in ("complete", "pruned"):
            found.setdefault((row.parameters["alpha"], row.parameters["beta"]), []).append(row)
    return Grid(
        tuple(sorted(searched["alpha"])),
        tuple(sorted(searched["beta"])),
        {cell: statistics.fmean(row.value or 0.0 for row in rows) for cell, rows in found.items()},
        frozenset(cell for cell, rows in found.items() if all(row.state == "complete" for row in rows)),
    )


def status(view: View) -> dict[str, Any]:
    """What `study status --json` prints."""
    best = view.best
    return {
        "name": view.name,
        "preset": view.preset,
        "protocol": view.config.data.protocol,
        "tickets": len(view.rows),
        "states": view.counts(),
        "best_value": best.value if best else None,
        "best_trial": best.number if best else None,
        "best_params": best.parameters if best else None,
        "failures": {row.number: row.error for row in view.rows if row.state == "failed"},
    }


def status_text(view: View) -> RenderableType:
    states = ", ".join(f"{count} {name}" for name, count in view.counts().items() if count)
    lines = [f"{view.name} ({view.preset}): {len(view.rows)} trials: {states}", f"protocol {view.protocol}"]
    if view.best is not None:
        chosen = "".join(f", {key} {shown(value)}" for key, value in view.best.parameters.items())
        lines.append(f"best {percent(view.best.value)}: trial {view.best.number}{chosen}")
    lines += [f"trial {row.number} failed: {row.error}" for row in view.rows if row.state == "failed"]
    return Text("\n".join(lines))


def report_text(view: View) -> RenderableType:
    parts: list[RenderableType] = [status_text(view), _trials(view)]
    table = grid(view)
    if table is not None:
        parts.append(_grid(table))
    return Group(*parts)


def trials(view: View) -> tuple[list[str], list[list[str]]]:
    """The heads and cells of the table of trials, best first; the state is the last column."""
    replicated = view.config.search.replicates > 1
    heads = ["trial", *view.parameters, *(["seed"] if replicated else [])]
    heads += ["accuracy", "best at", "epochs", "images", "seconds", "state"]
    lines = []
    for row in sorted(view.rows, key=lambda row: (row.value is None, -(row.value or 0.0), row.number)):
        chosen = [shown(row.parameters[name]) if name in row.parameters else "" for name in view.parameters]
        numbers = [percent(row.value), str(row.best_epoch or ""), str(row.epochs), f"{row.images:,}"]
        seed = [str(row.seed)] if replicated else []
        lines.append([str(row.number), *chosen, *seed, *numbers, f"{row.seconds:.1f}", row.state])
    return heads, lines


def _trials(view: View) -> Table:
    table = _table("Trials, best first")
    heads, lines = trials(view)
    for head in heads:
        table.add_column(head, justify="left" if head == "state" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _grid(grid: Grid) -> Table:
    table = _table("Accuracy (%) by alpha, beta; p: pruned")
    table.add_column("alpha \\ beta", justify="right", no_wrap=True)
    for beta in grid.betas:
        table.add_column(f"{shown(beta)}", justify="right", no_wrap=True)
    for alpha in grid.alphas:
        cells = []
        for beta in grid.betas:
            value = grid.values.get((alpha, beta))
            mark = "" if value is None or (alpha, beta) in grid.complete else " p"
            cells.append("–" if value is None else f"{100 * value:.2f}{mark}")
        table.add_row(f"{alpha:,}", *cells)
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )


def shown(value: Any) -> str:
    """A parameter as people write it: 0.1, not 0.1000; 15,000."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
