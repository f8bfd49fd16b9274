"""A study as flat tables, a dictionary a row: its trials, epochs, attempts and settings.

What `study report --csv` writes and what the Python API returns. Accuracies are in [0, 1], times in seconds, moments in
seconds since 1970 on the database's clock, energy in joules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from dashboards import aggregate
from dashboards import logs as trial_logs
from dashboards.comparison import Compared
from dashboards.study_data import StudyData
from storage import queries
from study.config.models import means_something

Row = dict[str, Any]
RECORDED = ("device", "host", "network_parameters", "peak_memory_bytes")
"""What a worker has recorded of a trial and what is shown as it is."""


def trials(data: StudyData) -> list[Row]:
    """A row a trial. Its parameters come last; those that mean nothing to its policy are None."""
    rows = []
    for row in data.rows:
        parameters = {key: value if means_something(key, row.settings) else None for key, value in row.settings.items()}
        rows.append(
            {
                "study": data.name,
                "trial": row.number,
                "state": row.state,
                "seed": row.seed,
                "value": row.value,
                "test": row.test,
                "best_epoch": row.best_epoch,
                "epochs": row.epochs,
                "images": row.images,
                "seen": row.seen,
                "seconds": row.seconds,
                "train_seconds": row.train_seconds,
                "validation_seconds": row.validation_seconds,
                "selection_seconds": row.selection_seconds,
                "joules": row.joules,
                **{
                    key: row.attributes.get(key)
                    for key in ("device", "host", "network_parameters", "peak_memory_bytes")
                },
                "error": row.error,
                **parameters,
            }
        )
    return rows


def epochs(data: StudyData) -> Iterator[Row]:
    """A row an epoch of every trial of `trials`, in order, read from the database as it is consumed."""
    numbers = [row.number for row in data.rows]
    for row in queries.each_epoch(data.engine, data.id, numbers):
        yield {"study": data.name, **row}


def attempts(data: StudyData) -> list[Row]:
    """A row a worker's time with one trial, by its start."""
    rows = []
    for attempt in data.attempts:
        cells = asdict(attempt)
        rows.append({"study": data.name, "trial": cells.pop("number"), **cells})
    return rows


def logs(engine: sa.Engine, name: str, trial: int | None = None) -> Iterator[Row]:
    """A row a line that workers logged, by time; or of one trial, by attempt.

    Raises:
        UserError: no such trial.
    """
    for line in trial_logs.read(engine, name, trial):
        cells = asdict(line)
        yield {"study": name, **{key: cells[key] for key in ("trial", "attempt", "owner", "at", "level", "message")}}


def settings(data: StudyData) -> list[Row]:
    """A row a setting: the numbers of its trials, means over the complete ones with their 95 % confidence interval. Its
    parameters come last.

    A setting without a complete trial has the mean of its pruned ones, and `complete` is 0.
    """
    findings = aggregate.findings(data)
    rows = []
    for cell in findings.cells:
        row: Row = {
            "study": data.name,
            "setting": cell.label,
            "trials": [row.number for row in cell.ended],
            "complete": len(cell.rows),
            "pruned": len(cell.ended) - len(cell.rows),
        }
        row |= {f"accuracy_{key}": value for key, value in asdict(cell.accuracy).items() if key != "n"}
        row |= {f"test_{key}": value for key, value in (asdict(cell.test) if cell.test else {}).items() if key != "n"}
        row |= {name: cell.mean(name) for name in ("images", "seen", "seconds")}
        rows.append(row | cell.parameters)
    return rows


def compared(of: Compared) -> list[Row]:
    """A row a setting of each of several studies, with its difference from the first study's; intervals of a column
    hold together with 95 %. Parameters in which the settings differ come last.
    """
    rows = []
    for setting, against in of.settings:
        row: Row = {"study": setting.study.name, "setting": setting.label or setting.cell.policy}
        row |= {key: getattr(setting.mean, key) for key in ("n", "mean", "low", "high")}
        row["images"] = setting.cell.mean("images")
        row |= {
            "against": None if against is None else against.reference.label or against.reference.cell.policy,
            "matching": None if against is None else against.matching,
            "difference": None if against is None else against.difference.mean,
            "difference_low": None if against is None else against.low,
            "difference_high": None if against is None else against.high,
            "paired": None if against is None else against.difference.paired,
            "p_adjusted": None if against is None else against.p_adjusted,
            "finding": None if against is None else against.finding,
        }
        rows.append(row | setting.parameters)
    return rows
