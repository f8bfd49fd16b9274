"""How far a study is, who works on what, what failed: for people, for programs, once or as it changes.

Read with small queries of our own, because people ask often and half of the time it took was the loading of Optuna's
storage, Alembic and NumPy.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from dashboards.formatting import budget_lines, label, percent, plain_table
from storage import budgets, queries, retry, stop_requests
from storage.queries import Attempt, Progress, Running
from study.config.loading import parse_config
from study.config.models import PROTOCOLS, StudyConfig
from study.search.space import most_epochs

SECONDS = 1.0
MOST_FAILURES = 5


@dataclass(frozen=True)
class Status:
    name: str
    preset: str
    config: StudyConfig
    progress: Progress
    best_parameters: dict[str, Any]
    """Of the best trial."""
    budgets: dict[str, float]
    spent: dict[str, float]
    """By unit, as in `storage.control`."""
    stop: str | None
    """Why no worker goes on, if so."""
    failures: dict[int, str]
    """Trials that failed for good, and why."""
    setbacks: tuple[Attempt, ...]
    """The last attempts that ended in an error."""

    @property
    def protocol(self) -> str:
        return PROTOCOLS[self.config.data.protocol]

    @property
    def states(self) -> dict[str, int]:
        return self.progress.states

    @property
    def seconds_left(self) -> float | None:
        """From the time in which anybody worked and what came of it; None before anything did, and at the end."""
        now, images = self.progress, self.config.training.images
        whole = images or most_epochs(self.config)
        done = now.settled * whole + (now.images if images else now.epochs)
        worked = 3600 * self.spent["hours"]
        if not done or not worked or now.settled == now.total or self.stop:
            return None
        return max(0.0, worked * (now.total * whole - done) / done)


def read(engine: sa.Engine, name: str) -> Status:
    """Raises:
    UserError: no such study, or not one of ours.
    """
    study_id, attributes = queries.find(engine, name)
    now = queries.progress(engine, study_id)
    orders, spent = stop_requests.read_controls(engine, study_id), budgets.spending(engine, study_id)
    return Status(
        name,
        attributes.get("preset", ""),
        parse_config(attributes["config"]),
        now,
        {} if now.best_trial is None else queries.parameters(engine, study_id, now.best_trial),
        orders.budgets,
        spent.amounts,
        stop_requests.STOP_REQUESTED if orders.stop else spent.reason_to_stop(orders.budgets),
        queries.failures(engine, study_id) if now.states["failed"] else {},
        tuple(queries.attempts(engine, study_id, failed=MOST_FAILURES)),
    )


def watch(engine: sa.Engine, name: str, console: Console) -> None:
    """Show the study until it is settled or the reader leaves (Ctrl-C).

    Raises:
        UserError: no such study.
    """
    found = read(engine, name)
    with Live(page(found), console=console, auto_refresh=False, screen=False) as live:
        while found.progress.settled < found.progress.total:
            time.sleep(SECONDS)
            try:
                found = read(engine, name)
                live.update(page(found), refresh=True)
            except DBAPIError as error:
                if not retry.is_transient(error):
                    raise
                live.update(Text("the database does not answer; waiting"), refresh=True)


def heading(found: Status) -> list[str]:
    """The lines that also open a report."""
    states = ", ".join(f"{count} {state}" for state, count in found.states.items() if count)
    lines = [f"{found.name} ({found.preset}): {found.progress.total} trials: {states}", f"protocol {found.protocol}"]
    if found.progress.best_trial is not None:
        chosen = f", {label(found.best_parameters)}" if found.best_parameters else ""
        lines.append(f"best {percent(found.progress.best)}: trial {found.progress.best_trial}{chosen}")
    lines += budget_lines(found.budgets, found.spent)
    return lines + [f"trial {number} failed: {error}" for number, error in found.failures.items()]


def page(found: Status) -> RenderableType:
    lines = heading(found)
    if found.seconds_left is not None:
        lines.append(f"about {timedelta(seconds=round(found.seconds_left))} left, if the work goes on as so far")
    if found.stop and found.progress.settled < found.progress.total:
        lines.append(f"{found.stop}; {stop_requests.how_to_resume(found.name, found.stop)}")
    parts: list[RenderableType] = [Text("\n".join(lines))]
    if found.progress.running:
        parts.append(_workers(found.progress.running))
    elif found.progress.settled < found.progress.total:
        parts.append(Text("nobody is at work"))
    if found.setbacks:
        told = [f"trial {a.number} on {_host(a.owner)}: {a.error}" for a in found.setbacks]
        parts.append(Text("\n".join(["attempts that failed last:", *told])))
    return Group(*parts)


def _workers(running: tuple[Running, ...]) -> Table:
    heads = ["machine", "device", "trial", "epoch", "images/s", "best", "at it for", "lease left"]
    lines = []
    for at in running:
        rate = f"{at.images / at.seconds:,.0f}" if at.seconds else "–"
        held, left = timedelta(seconds=round(at.held_seconds)), f"{at.lease_seconds_left:.0f} s"
        numbers = [str(at.number), str(at.epoch), rate, percent(at.accuracy), str(held), left]
        lines.append([_host(at.owner), at.device, *numbers])
    return plain_table("", heads, lines, left=(0, 1))


def _host(owner: str) -> str:
    """`host:pid` of `host:pid:token`."""
    return ":".join(owner.split(":")[:2])


def document(found: Status) -> dict[str, Any]:
    """What `study status --json` prints."""
    now = found.progress
    return {
        "name": found.name,
        "preset": found.preset,
        "protocol": found.config.data.protocol,
        "tickets": now.total,
        "states": now.states,
        "best_value": now.best,
        "best_trial": now.best_trial,
        "best_params": found.best_parameters if now.best_trial is not None else None,
        "budgets": found.budgets,
        "spent": found.spent,
        "stop": found.stop,
        "seconds_left": found.seconds_left,
        "workers": [asdict(at) for at in now.running],
        "failures": found.failures,
    }
