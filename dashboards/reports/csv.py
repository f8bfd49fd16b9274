"""A study's tables as CSV files, for pandas, R and spreadsheets."""

from __future__ import annotations

import csv
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dashboards import tables
from dashboards.study_data import StudyData
from storage.errors import UserError
from storage.text import printable

Row = dict[str, Any]


def write(studies: Sequence[StudyData], folder: Path) -> list[Path]:
    """Write trials.csv, epochs.csv, attempts.csv and settings.csv into `folder`, which is made where it is missing.

    The rows of several studies stand below each other; the column `study` tells them apart. All files are written
    before the first takes its name, so a folder never holds some new and some old ones after an error.

    Returns:
        The files.

    Raises:
        UserError: the folder cannot be written.
    """
    contents: dict[str, Iterable[Row]] = {
        "trials": [row for data in studies for row in tables.trials(data)],
        "epochs": itertools.chain.from_iterable(tables.epochs(data) for data in studies),
        "attempts": [row for data in studies for row in tables.attempts(data)],
        "settings": [row for data in studies for row in tables.settings(data)],
    }
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as unfinished:
            for name, rows in contents.items():
                _write(Path(unfinished) / f"{name}.csv", rows)
            for name in contents:
                os.replace(Path(unfinished) / f"{name}.csv", folder / f"{name}.csv")
    except OSError as error:
        raise UserError(f"cannot write into the folder {folder}: {error.strerror}; name another") from None
    return [folder / f"{name}.csv" for name in contents]


def _write(file: Path, rows: Iterable[Row]) -> None:
    heads, rows = _heads(rows)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _heads(rows: Iterable[Row]) -> tuple[list[str], Iterable[Row]]:
    """The columns, and the rows. An iterator's rows, which are too many to keep, all have the columns of the first."""
    if isinstance(rows, Iterator):
        first = next(rows, None)
        return list(first or ()), () if first is None else itertools.chain([first], rows)
    return list(dict.fromkeys(key for row in rows for key in row)), rows


def _cell(value: Any) -> Any:
    """Text as a spreadsheet shows it and never calculates it: errors and names come from other machines."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text
