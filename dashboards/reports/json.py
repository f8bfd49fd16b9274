"""A study as plain data, for programs: its status, its findings, and the manifest that lets anyone repeat it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dashboards import aggregate, conclusions, status
from dashboards.study_data import Row, View


def report(view: View) -> dict[str, Any]:
    """What `study report --json` writes. Accuracies are in [0, 1], times in seconds."""
    found = aggregate.findings(view)
    return status.document(view.status) | {
        "verdict": conclusions.verdict(view, found),
        "measure": found.measure,
        "cells": [_cell(view, cell, found) for cell in found.cells],
        "comparisons": [asdict(c) | {"finding": c.finding} for c in found.comparisons],
        "effects": found.effects,
        "pareto": [row.number for row in aggregate.pareto(_complete(view))],
        "trials": [_trial(row) for row in view.rows],
        "manifest": manifest(view),
    }


def text(views: Sequence[View]) -> str:
    """One study as an object, several as an array."""
    found = [report(view) for view in views]
    return json.dumps(found[0] if len(found) == 1 else found, indent=2)


def _complete(view: View) -> list[Row]:
    return [row for row in view.rows if row.state == "complete"]


def _cell(view: View, cell: aggregate.Cell, found: aggregate.Findings) -> dict[str, Any]:
    theirs, ratio = aggregate.papers(view, cell), found.ratios.get(cell.label)
    return {
        "label": cell.label,
        "parameters": cell.parameters,
        "policy": cell.policy,
        "complete": len(cell.rows),
        "pruned": len(cell.ended) - len(cell.rows),
        "accuracy": asdict(cell.accuracy),
        "test": asdict(cell.test) if cell.test else None,
        "images": cell.mean("images"),
        "seen": cell.mean("seen"),
        "seconds": cell.mean("seconds"),
        "seconds_over_full": asdict(ratio) if ratio else None,
        "paper": asdict(theirs) if theirs else None,
    }


def _trial(row: Row) -> dict[str, Any]:
    cells = asdict(row) | {"seconds": row.seconds}
    attributes = cells.pop("attributes")
    return cells | {key: attributes.get(key) for key in ("device", "host", "peak_memory_bytes")}


def manifest(view: View) -> dict[str, Any]:
    """What produced the numbers: config, data, versions, devices."""
    ended = [row for row in view.rows if "versions" in row.attributes]
    counted = {
        key: dict(Counter(str(row.attributes.get(key)) for row in ended)) for key in ("device", "host", "precision")
    }
    versions = {
        name: dict(Counter(str(row.attributes["versions"].get(name)) for row in ended))
        for name in sorted({name for row in ended for name in row.attributes["versions"]})
    }
    return {
        "study": view.name,
        "preset": view.preset,
        "config": view.config.model_dump(mode="json"),
        "data_fingerprint": view.study.user_attrs.get("data_fingerprint"),
        "images": view.counts,
        "trials_by": counted,
        "versions": versions,
    }
