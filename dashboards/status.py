"""The progress of a study, who works on what, what failed: for people, for programs, once or as it changes.

Read with small queries of our own, because people ask often and half of the time was the loading of Optuna's storage,
Alembic and NumPy. The config is not parsed: a study whose config has keys that this version lacks can still be watched.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from dashboards.formatting import budget_lines, duration, label, moment, percent, plain_table, process_of
from storage import budgets, early_end, exclusions, queries, retry, stop_requests
from storage.engine import reader
from storage.origins import Derived, Informed, derived_from, informed_by
from storage.queries import Attempt, Progress, Running, StudySummary
from storage.text import command, printable
from study.config import extensions as own_code

SECONDS = 1.0
"""Between two looks of `--watch`."""
MOST_FAILURES = 5
WIDE = 110
"""Characters of a terminal from which on the table of workers shows whole names and devices."""
MACHINE_WIDTH = 24
"""Characters of a machine's name in a narrower table, which then fits 80."""


@dataclass(frozen=True)
class Status:
    name: str
    preset: str
    config: Mapping[str, Any]
    """As stored."""
    protocol: str
    """Which images validated, as a sentence."""
    progress: Progress
    best_parameters: dict[str, Any]
    """Of the best trial."""
    budgets: dict[str, float]
    spent: dict[str, float]
    """By unit, as in `storage.budgets`."""
    stop: str | None
    """Why no worker continues, if so."""
    failures: dict[int, str]
    """Trials that failed for good, and why."""
    failed_attempts: tuple[Attempt, ...]
    """The last attempts that ended in an error."""
    ended_early: str | None = None
    """Why, if `search.target` or `search.patience` has ended the study."""
    excluded: dict[int, str] = field(default_factory=dict)
    """Trials that a person has left out of sampler, pruner and tables, and why."""
    derived_from: Derived | None = None
    """The study whose trials it took over."""
    informed_by: Informed | None = None
    """The study whose trials its sampler learns from too."""

    @property
    def states(self) -> dict[str, int]:
        """Trials by state; of the running ones those that nobody holds are `interrupted`."""
        interrupted = len(self.progress.interrupted)
        states = dict(self.progress.states)
        states["running"] -= interrupted
        return {"waiting": states.pop("waiting"), "running": states.pop("running"), "interrupted": interrupted} | states

    @property
    def trial_length(self) -> int:
        """Of the longest trial, in images where the study counts in images, else in epochs."""
        training = self.config.get("training", {})
        return int(training.get("images") or _largest(training.get("epochs", 1)))

    @property
    def seconds_left(self) -> float | None:
        """From the time in which anybody worked and what came of it; None while nobody works."""
        now, images = self.progress, self.config.get("training", {}).get("images")
        done = now.finished * self.trial_length + (now.images if images else now.epochs)
        worked = 3600 * self.spent["hours"]
        if not done or not worked or not now.running or self.stop or self.ended_early:
            return None
        return max(0.0, worked * (now.total * self.trial_length - done) / done)


def _largest(value: Any) -> float:
    """Of a stored value, list or range."""
    if isinstance(value, Mapping):
        return float(value["high"])
    return float(max(value)) if isinstance(value, list) else float(value)


def read(engine: sa.Engine, name: str) -> Status:
    """Raises:
    UserError: no such study, or not one of ours.
    """
    study_id, attributes = queries.find(engine, name)
    now = queries.progress(engine, study_id)
    with reader(engine).connect() as connection:
        left_out = exclusions.excluded(connection, study_id)
    controls, spent = stop_requests.read_controls(engine, study_id), budgets.spending(engine, study_id)
    return Status(
        name=name,
        preset=attributes.get("preset", ""),
        config=attributes["config"],
        # Studies of version 0.2 and older store a promise after the comma that need not be true any more.
        protocol=attributes.get("protocol", attributes["config"].get("data", {}).get("protocol", "")).removesuffix(
            ", the test split is untouched"
        ),
        progress=now,
        best_parameters={} if now.best_trial is None else queries.parameters(engine, study_id, now.best_trial),
        budgets=controls.budgets,
        spent=spent.amounts,
        stop=stop_requests.STOP_REQUESTED if controls.stop else spent.reason_to_stop(controls.budgets),
        failures=queries.failures(engine, study_id) if now.states["failed"] else {},
        failed_attempts=tuple(queries.attempts(engine, study_id, failed=MOST_FAILURES)),
        ended_early=early_end.reason_to_end(engine, study_id, controls.early_end),
        excluded=left_out,
        derived_from=derived_from(attributes),
        informed_by=informed_by(attributes),
    )


def watch(engine: sa.Engine, name: str, console: Console, storage: str | None = None) -> None:
    """Show the study until it has finished or the reader leaves (Ctrl-C).

    Args:
        storage: as in `page`.

    Raises:
        UserError: no such study.
    """
    status = read(engine, name)
    with Live(page(status, storage, console.width), console=console, auto_refresh=False, screen=False) as live:
        while status.progress.finished < status.progress.total and not status.ended_early:
            time.sleep(SECONDS)
            try:
                status = read(engine, name)
                live.update(page(status, storage, console.width), refresh=True)
            except DBAPIError as error:
                if not retry.is_transient(error):
                    raise
                live.update(Text("the database does not answer; waiting"), refresh=True)


def heading(status: Status) -> list[str]:
    """The lines that also open a report."""
    states = ", ".join(f"{count} {state}" for state, count in status.states.items() if count)
    lines = [
        f"{status.name} ({status.preset}): {status.progress.total} trials: {states}",
        f"protocol {status.protocol}",
    ]
    lines += origin_lines(status)
    if status.progress.best_trial is not None:
        chosen = f", {label(status.best_parameters)}" if status.best_parameters else ""
        runs = status.progress.states["complete"]
        which = f"highest of {runs:,} complete trials" if runs > 1 else "the one complete trial"
        lines.append(f"{which} {percent(status.progress.best)}: trial {status.progress.best_trial}{chosen}")
    lines += budget_lines(status.budgets, status.spent)
    if status.ended_early:
        lines.append(f"ended early: {status.ended_early}")
    lines += [f"trial {number} is excluded: {why}" for number, why in status.excluded.items()]
    return lines + [f"trial {number} failed: {error}" for number, error in status.failures.items()]


def origin_lines(status: Status) -> list[str]:
    """Which other studies it comes from; what their trials count for."""
    lines = [] if status.derived_from is None else [str(status.derived_from)]
    if status.informed_by is not None:
        lines.append(f"{status.informed_by}, which count for the sampler alone")
    return lines


def page(status: Status, storage: str | None = None, width: int = WIDE) -> RenderableType:
    """The lines and tables of `study status`.

    Args:
        storage: the URL that commands need for `--storage`, as it may be shown; None: none.
        width: of the terminal, in characters; below WIDE the table of workers shortens machines and leaves out devices.
    """
    lines = heading(status)
    if status.seconds_left is not None:
        lines.append(f"about {duration(status.seconds_left)} left at the pace so far")
    now = status.progress
    for trial in now.interrupted:
        lines.append(f"trial {trial.number} is interrupted (epoch {trial.epoch} of {_epochs(status)})")
    if now.finished < now.total:
        resume = command("resume", status.name, storage=storage)
        resume += " --code FOLDER" * own_code.named_in(status.config)
        if status.stop == stop_requests.STOP_REQUESTED:
            lines.append(f"{status.stop}; continue with: {resume}")
        elif status.ended_early:
            lines.append(f"continue with: {resume} --target none --patience none")
        elif status.stop:
            lines.append(f"{status.stop}; continue with: {resume} --budget …")
        elif not now.running:
            lines.append(f"paused: no worker runs; continue with: {resume}")
    parts: list[RenderableType] = [Text(printable("\n".join(lines)))]
    if now.running:
        parts.append(_workers(now.running, narrow=width < WIDE))
    if status.failed_attempts:
        failed = [f"trial {a.number} on {process_of(a.owner)}: {a.error}" for a in status.failed_attempts]
        parts.append(Text(printable("\n".join(["attempts that failed last:", *failed]))))
    return Group(*parts)


def _epochs(status: Status) -> str:
    training = status.config.get("training", {})
    return "?" if training.get("images") else f"{_largest(training.get('epochs', 1)):.0f}"


def _workers(running: tuple[Running, ...], *, narrow: bool) -> Table:
    heads = ["trial", "epoch", "images/s", "best", "elapsed", "lease left"]
    heads = ["machine", *heads] if narrow else ["machine", "device", *heads]
    lines = []
    for trial in running:
        rate = f"{trial.images / trial.seconds:,.0f}" if trial.seconds else "–"
        elapsed, left = duration(trial.held_seconds), f"{trial.lease_seconds_left:.0f} s"
        numbers = [str(trial.number), str(trial.epoch), rate, percent(trial.accuracy), elapsed, left]
        host, device = process_of(trial.owner), trial.device
        lines.append([_shortened(host, MACHINE_WIDTH), *numbers] if narrow else [host, device, *numbers])
    return plain_table("", heads, lines, left=(0,) if narrow else (0, 1))


def _shortened(text: str, width: int) -> str:
    """The end of `text`, where a host's process is."""
    return text if len(text) <= width else f"…{text[1 - width :]}"


def document(status: Status) -> dict[str, Any]:
    """What `study status --json` writes. Times in seconds, accuracies in [0, 1]."""
    now = status.progress
    return {
        "name": status.name,
        "preset": status.preset,
        "protocol": status.config.get("data", {}).get("protocol"),
        "total": now.total,
        "states": status.states,
        "best_value": now.best,
        "best_trial": now.best_trial,
        "best_params": status.best_parameters if now.best_trial is not None else None,
        "budgets": status.budgets,
        "spent": status.spent,
        "stop": status.stop,
        "ended_early": status.ended_early,
        "seconds_left": status.seconds_left,
        "workers": [asdict(trial) for trial in now.running],
        "interrupted": [asdict(trial) for trial in now.interrupted],
        "failures": status.failures,
        "excluded": status.excluded,
        "derived_from": None if status.derived_from is None else status.derived_from.attribute(),
        "informed_by": None
        if status.informed_by is None
        else {"study": status.informed_by.study, "trials": len(status.informed_by.trials)},
        "tickets": now.total,  # the name of `total` in version 0.1
    }


def summaries(engine: sa.Engine) -> list[StudySummary]:
    """All studies of a storage, by name."""
    return queries.study_summaries(engine)


def summaries_table(studies: list[StudySummary]) -> Table:
    heads = ["study", "state", "finished", "failed", "best", "last activity"]
    lines = []
    for study in studies:
        total = sum(study.states.values())
        finished = study.states["complete"] + study.states["pruned"] + study.states["failed"]
        best = percent(study.best) if study.is_ours else "–"
        numbers = [f"{finished}/{total}", str(study.states["failed"]), best, moment(study.last_activity)]
        lines.append([study.name, _state(study, finished, total), *numbers])
    return plain_table("", heads, lines, left=(0, 1))


def _state(study: StudySummary, finished: int, total: int) -> str:
    if not study.is_ours:
        return "not from `study launch`"
    if finished == total:
        return "finished"
    if study.workers:
        return f"running, {study.workers} worker{'s' if study.workers > 1 else ''}"
    if study.ended_early:
        return "ended early"
    return "stopped" if study.stop_requested else "paused"
