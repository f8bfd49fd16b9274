"""A study's settings beside the paper's tables: numbers where the scale is the paper's, shapes where it is another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dashboards import paper
from dashboards.aggregate import Cell, Findings
from dashboards.formatting import count, p_value, points, shown
from dashboards.paper import BETAS, Printed
from dashboards.statistics import Summary, rank_correlation
from dashboards.study_data import StudyData

Lines = tuple[list[str], list[list[str]]]
Match = tuple[Cell, Printed]
OF_THE_TABLES = ("policy", "alpha", "beta", "augment")
"""Parameters that the paper's tables have rows and columns for."""


@dataclass(frozen=True)
class Beside:
    """What of a study has a counterpart in the paper."""

    differs: list[str]
    """How it was not run as the paper's; empty: at its scale, so that numbers compare."""
    matches: list[Match]
    sentences: list[str]
    rank_correlation: dict[str, float] | None
    """Spearman's `rho` of accuracies over `cells` cells of Table 2, its `p`; at another scale only."""

    def tables(self) -> list[tuple[str, Lines]]:
        """Titles, heads and lines, with the rows and columns of the paper; none at another scale."""
        if self.differs:
            return []
        grid = [(cell, theirs) for cell, theirs in self.matches if theirs in paper.GRID]
        rows = [(cell, theirs) for cell, theirs in self.matches if theirs not in paper.GRID]
        tables = []
        if grid:
            tables.append(("Table 2 of the paper: best validation accuracy, %", _grid(grid, _accuracies, "difference")))
            tables.append(
                ("Table 3 of the paper: time of the run, minutes:seconds", _grid(grid, _times, "ours / paper"))
            )
        if rows:
            title = f"{rows[0][1].tables} of the paper: regular against dynamic"
            tables.append((title, _rows(rows)))
        return tables

    def document(self) -> dict[str, Any]:
        """For programs: accuracies in [0, 1], times in seconds."""
        return {
            "same_scale": not self.differs,
            "differs": self.differs,
            "cells": [_document(cell, theirs, same_scale=not self.differs) for cell, theirs in self.matches],
            "rank_correlation": self.rank_correlation,
            "sentences": self.sentences,
            "caveats": list(paper.CAVEATS),
        }


def beside_paper(data: StudyData, findings: Findings) -> Beside | None:
    """None where fewer than two settings have a counterpart; one is enough at the paper's scale."""
    differs = scale_differences(data)
    matches = [(cell, theirs) for cell in findings.cells if cell.rows and (theirs := _theirs(data, cell)) is not None]
    if len(matches) < (2 if differs else 1):
        return None
    sentences, rho = [], None
    if differs:
        rho = _ranks([match for match in matches if match[1] in paper.GRID])
        if rho:
            sentences.append(
                f"Rank correlation of the accuracies with Table 2 over {int(rho['cells'])} cells: {rho['rho']:.2f} "
                f"(Spearman, p = {p_value(rho['p'])})."
            )
    sentences += _gain(matches)
    if differs and not sentences:
        return None
    if differs:
        sentences.insert(0, f"Run otherwise than the paper ({'; '.join(differs)}), so only shapes compare.")
    return Beside(differs, matches, sentences, rho)


def papers(data: StudyData, cell: Cell) -> Printed | None:
    """What the paper prints for the cell, where the study was run at the paper's scale."""
    return None if scale_differences(data) else _theirs(data, cell)


def scale_differences(data: StudyData) -> list[str]:
    """In what a study differs from the paper's, beside the settings of its tables."""
    config, counts = data.config, data.counts
    facts = [
        (config.data.name == "cifar10", f"data {config.data.name}"),
        (config.data.protocol == "paper", "a holdout of the training split validates"),
        (counts.get("train") == paper.IMAGES, f"{counts.get('train', 0):,} training images"),
        (config.training.images is None, f"{config.training.images or 0:,} images trained on"),
        (config.data.augment in (True, False), "other augmentation"),
        (config.search.metric == "accuracy", f"metric {config.search.metric}"),
    ]
    # The defaults are the paper's: network, optimizer, epochs, delta, gamma.
    usual = type(config).model_validate({"policy": {"alpha": 1}}).searchable()
    for name, value in config.searchable().items():
        told = name in OF_THE_TABLES or (name == "epochs" and config.training.images is not None)
        if not told and config.is_meaningful(name):
            facts.append((value == usual.get(name), f"{name} {_written(value)}"))
    return [text for alike, text in facts if not alike]


def _written(value: Any) -> str:
    return shown(value) if isinstance(value, (int, float, str)) else "several"


def _theirs(data: StudyData, cell: Cell) -> Printed | None:
    """What the paper prints for the cell's policy, beta, and part of all training images."""
    total, settings = data.counts.get("train"), cell.ended[0].settings
    if not total:
        return None
    alpha = cell.ended[0].alpha
    part = None if alpha is None else round(paper.IMAGES * alpha / total)
    beta = settings["beta"] if cell.policy == "dynamic" else None
    augment = data.config.data.augment is True
    # Its best cell is in Table 4, too, beside the regular runs: there where a study has those.
    regular = {"full", "static"} & set(data.config.policies())
    tables = paper.TABLE_5 if augment else (*paper.TABLE_4, *paper.GRID) if regular else paper.GRID
    for run in tables:
        if (run.policy, run.alpha, run.beta) == (cell.policy, part, beta):
            return run
    return None


def _grid(matches: list[Match], lines_of: Callable[[Match], list[str]], third: str) -> Lines:
    """Rows and columns of Tables 2 and 3; of each alpha a line of ours, the paper's, and how they differ."""
    by = {(theirs.alpha, theirs.beta): (cell, theirs) for cell, theirs in matches}
    lines = []
    for alpha in paper.TABLE_2:
        if any((alpha, beta) in by for beta in BETAS):
            columns = [lines_of(by[alpha, beta]) if (alpha, beta) in by else ["–"] * 3 for beta in BETAS]
            names = (f"{alpha:,} ours", "paper", third)
            lines += [[name, *(column[i] for column in columns)] for i, name in enumerate(names)]
    return ["alpha \\ beta", *(shown(beta) for beta in BETAS)], lines


def _accuracies(match: Match) -> list[str]:
    cell, theirs = match
    of = cell.accuracy
    return [_with_n(of), f"{100 * theirs.accuracy:.1f}", f"{100 * (of.mean - theirs.accuracy):+.1f}"]


def _times(match: Match) -> list[str]:
    cell, theirs = match
    ours = cell.mean("seconds")
    return [_clock(ours), _clock(theirs.seconds), f"{ours / theirs.seconds:.3f}"]


def _rows(matches: list[Match]) -> Lines:
    """Rows and columns of Tables 4 and 5."""
    heads = ["training images", "dynamic", "accuracy %, ours (95 %)", "paper", "difference", "time, ours", "paper"]
    heads += ["ours / paper", "of the full run, ours", "paper"]
    full = next((match for match in matches if match[1].policy == "full"), None)
    lines = []
    for cell, theirs in matches:
        numbers = [*_accuracies((cell, theirs)), *_times((cell, theirs))]
        if full is None:
            numbers += ["–", "–"]
        else:
            numbers.append(f"{100 * cell.mean('seconds') / full[0].mean('seconds'):.1f} %")
            numbers.append(f"{100 * theirs.seconds / full[1].seconds:.1f} %")
        part = 1.0 if theirs.alpha is None else theirs.alpha / paper.IMAGES
        lines.append([f"{100 * part:.0f} %", "yes" if theirs.policy == "dynamic" else "no", *numbers])
    return heads, lines


def _with_n(of: Summary) -> str:
    spread = "" if of.low is None or of.high is None else f" ({100 * of.low:.1f} to {100 * of.high:.1f})"
    return f"{100 * of.mean:.1f}{spread}, n {of.n}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _ranks(matches: list[Match]) -> dict[str, float] | None:
    found = rank_correlation([cell.accuracy.mean for cell, _ in matches], [run.accuracy for _, run in matches])
    return None if found is None else {"rho": found[0], "p": found[1], "cells": float(len(matches))}


def _gain(matches: list[Match]) -> list[str]:
    """Dynamic against static, and against the full run, in both."""
    by = {run.policy: (cell, run) for cell, run in matches if run not in paper.GRID}
    sentences = []
    for other in ("static", "full"):
        if "dynamic" in by and other in by:
            (ours, run), (control, control_run) = by["dynamic"], by[other]
            gain, theirs = ours.accuracy.mean - control.accuracy.mean, run.accuracy - control_run.accuracy
            sentences.append(
                f"Dynamic against {other}: {_signed(gain)} here "
                f"({count(min(ours.accuracy.n, control.accuracy.n), 'seed')}"
                f"), {_signed(theirs)} in the paper ({run.tables})."
            )
    if "dynamic" in by and "full" in by and by["full"][0].mean("seconds"):
        ours_share = by["dynamic"][0].mean("seconds") / by["full"][0].mean("seconds")
        theirs_share = by["dynamic"][1].seconds / by["full"][1].seconds
        sentences.append(
            f"Time of dynamic training over the full run: {100 * ours_share:.1f} % here, {100 * theirs_share:.1f} % in "
            "the "
            "paper."
        )
    return sentences


def _signed(fraction: float) -> str:
    return f"{'+' if fraction > 0 else '-' if fraction < 0 else ''}{points(abs(fraction))}"


def _document(cell: Cell, theirs: Printed, *, same_scale: bool) -> dict[str, Any]:
    entry = {
        "label": cell.label,
        "ours": asdict(cell.accuracy),
        "seconds": cell.mean("seconds"),
        "paper": asdict(theirs),
    }
    if same_scale:
        entry["difference"] = cell.accuracy.mean - theirs.accuracy
        entry["seconds_over_paper"] = cell.mean("seconds") / theirs.seconds
    return entry
