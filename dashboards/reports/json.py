"""A study as plain data, for programs: its status, its findings, and the manifest that lets anyone repeat it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dashboards import aggregate, conclusions, status
from dashboards.beside_paper import beside_paper, papers
from dashboards.comparison import Against, Compared, Setting
from dashboards.description import describe
from dashboards.study_data import StudyData, TrialRow
from dashboards.tables import RECORDED


def report(data: StudyData) -> dict[str, Any]:
    """What `study report --json` writes. Accuracies are in [0, 1], times in seconds."""
    findings = aggregate.findings(data)
    said, beside = conclusions.conclude(data, findings), beside_paper(data, findings)
    return status.document(data.status) | {
        "answer": said.answer,
        "warnings": said.warnings,
        "verdict": said.lines,
        "measure": findings.measure,
        "cells": [_cell(data, cell, findings) for cell in findings.cells],
        "comparisons": [asdict(c) | {"finding": c.finding} for c in findings.comparisons],
        "may_be_best": [cell.label for cell in findings.candidates],
        "expected_fall": findings.fall,
        "effects": findings.effects,
        "test_split": [asdict(use) for use in data.test_uses],
        "paper": None if beside is None else beside.document(),
        "pareto": [row.number for row in aggregate.pareto(_ended(data))],
        "description": dict(describe(data)),
        "trials": [_trial(row) for row in data.rows],
        "epochs": {row.number: data.curves[row.number] for row in data.rows if row.number in data.curves},
        "manifest": manifest(data),
    }


def text(studies: Sequence[StudyData]) -> str:
    """One study as an object, several as an array."""
    findings = [report(data) for data in studies]
    return json.dumps(findings[0] if len(findings) == 1 else findings, indent=2)


def comparison(compared: Compared) -> dict[str, Any]:
    """What `study compare --json` writes. Accuracies and differences are in [0, 1]."""
    return {
        "answer": compared.said.answer,
        "warnings": compared.said.warnings,
        "verdict": compared.said.lines,
        "measure": compared.measure,
        "metric": compared.studies[0].config.search.metric,
        "studies": [
            {
                "name": data.name,
                "trials": data.status.progress.total,
                "finished": data.status.progress.finished,
                "ended_early": data.status.ended_early,
                "excluded": data.status.excluded,
                "config": data.config.model_dump(mode="json"),
            }
            for data in compared.studies
        ],
        "differences": {key: list(values) for key, values in compared.differences},
        "best": [
            {
                "study": duel.setting.study.name,
                "setting": duel.setting.label,
                "against": duel.reference.label,
                "finding": duel.best.finding,
                "provisional": duel.best.provisional,
                "difference": duel.best.difference.mean,
                "low": _finite(duel.best.low),
                "high": _finite(duel.best.high),
                "n": list(duel.best.difference.n),
                "paired": duel.best.difference.paired,
            }
            for duel in compared.duels
        ],
        "settings": [_compared(setting, against) for setting, against in compared.settings],
    }


def comparison_text(compared: Compared) -> str:
    return json.dumps(comparison(compared), indent=2)


def _compared(setting: Setting, against: Against | None) -> dict[str, Any]:
    entry = {
        "study": setting.study.name,
        "label": setting.label,
        "parameters": setting.parameters,
        "mean": asdict(setting.mean),
        "values": setting.values,
        "images": setting.cell.mean("images"),
        "seconds": setting.cell.mean("seconds"),
        "pruned": len(setting.cell.ended) - len(setting.cell.rows),
        "against": None,
    }
    if against is not None:
        of = against.difference
        entry["against"] = {
            "setting": against.reference.label,
            "matching": against.matching,
            "difference": of.mean,
            "low": against.low,
            "high": against.high,
            "n": list(of.n),
            "paired": of.paired,
            "p": of.p,
            "p_adjusted": against.p_adjusted,
            "detectable": against.detectable,
            "finding": against.finding,
            "provisional": against.provisional,
        }
    return entry


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ended(data: StudyData) -> list[TrialRow]:
    return [row for row in data.rows if row.state in ("complete", "pruned") and row.value is not None]


def _cell(data: StudyData, cell: aggregate.Cell, findings: aggregate.Findings) -> dict[str, Any]:
    theirs, ratio = papers(data, cell), findings.ratios.get(cell.label)
    return {
        "label": cell.label,
        "parameters": cell.parameters,
        "policy": cell.policy,
        "trials": [row.number for row in cell.ended],
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


def _trial(row: TrialRow) -> dict[str, Any]:
    cells = asdict(row) | {"seconds": row.seconds}
    attributes = cells.pop("attributes")
    return cells | {key: attributes.get(key) for key in RECORDED}


def manifest(data: StudyData) -> dict[str, Any]:
    """What produced the numbers: config, data, versions, devices."""
    ended = [row for row in data.rows if "versions" in row.attributes]
    counted = {
        key: dict(Counter(str(row.attributes.get(key)) for row in ended)) for key in ("device", "host", "precision")
    }
    versions = {
        name: dict(Counter(str(row.attributes["versions"].get(name)) for row in ended))
        for name in sorted({name for row in ended for name in row.attributes["versions"]})
    }
    return {
        "study": data.name,
        "preset": data.preset,
        "config": data.config.model_dump(mode="json"),
        "data_fingerprint": data.study.user_attrs.get("data_fingerprint"),
        "images": data.counts,
        "trials_by": counted,
        "versions": versions,
    }
