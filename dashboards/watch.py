"""A live page on the terminal: how far a study is, who works on what, what failed lately."""

from __future__ import annotations

import time
from datetime import timedelta

import optuna
from optuna.storages import RDBStorage
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from dashboards.terminal import plain_table
from dashboards.view import budget_lines, percent
from storage import control, progress, queue
from study.config import StudyConfig
from study.plan import load_study
from study.space import most_epochs

SECONDS = 1.0
MOST_FAILURES = 5


def watch(storage: RDBStorage, name: str, console: Console) -> None:
    """Show the study until it is settled or the reader leaves (Ctrl-C).

    Raises:
        UserError: no such study.
    """
    study, config = load_study(storage, name)
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            try:
                now = progress.progress(storage.engine, study._study_id)
                live.update(page(storage, study, config, now), refresh=True)
                if now.settled == now.total:
                    return
            except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
                if not queue.passing(error):
                    raise
                live.update(Text("the database does not answer; waiting"), refresh=True)
            time.sleep(SECONDS)


def page(storage: RDBStorage, study: optuna.Study, config: StudyConfig, now: progress.Progress) -> RenderableType:
    spent = control.spent(storage.engine, study._study_id).amounts
    states = ", ".join(f"{count} {state}" for state, count in now.states.items() if count)
    best = f"; best {percent(now.best)}" if now.best is not None else ""
    lines = [f"{study.study_name}: {now.settled} of {now.total} trials settled ({states}){best}"]
    left = seconds_left(config, now, spent["hours"] * 3600)
    if left is not None:
        lines.append(f"about {timedelta(seconds=round(left))} left, if the work goes on as so far")
    lines += budget_lines(control.orders(storage.engine, study._study_id).budgets, spent)
    parts: list[RenderableType] = [Text("\n".join(lines))]
    parts.append(_workers(now) if now.running else Text("nobody is at work"))
    failures = [a for a in progress.attempts(storage.engine, study._study_id) if a.error][-MOST_FAILURES:]
    if failures:
        parts.append(
            Text("\n".join(["last failures:", *(f"trial {a.number} on {_host(a.owner)}: {a.error}" for a in failures)]))
        )
    return Group(*parts)


def seconds_left(config: StudyConfig, now: progress.Progress, worked: float) -> float | None:
    """From the time in which anybody worked and what came of it; None before anything did."""
    whole = config.training.images or most_epochs(config)
    done = now.settled * whole + (now.images if config.training.images else now.epochs)
    if not done or not worked or now.settled == now.total:
        return None
    return max(0.0, worked * (now.total * whole - done) / done)


def _workers(now: progress.Progress) -> Table:
    heads = ["machine", "device", "trial", "epoch", "images/s", "best", "at it for", "lease left"]
    lines = []
    for at in now.running:
        rate = f"{at.images / at.seconds:,.0f}" if at.seconds else "–"
        held, left = timedelta(seconds=round(at.held_seconds)), f"{at.lease_seconds_left:.0f} s"
        numbers = [str(at.number), str(at.epoch), rate, percent(at.accuracy), str(held), left]
        lines.append([_host(at.owner), at.device, *numbers])
    return plain_table("", heads, lines, left=(0, 1))


def _host(owner: str) -> str:
    """`host:pid` of `host:pid:token`."""
    return ":".join(owner.split(":")[:2])
