"""What a study shows, in plain words; and "cannot tell" where it does not."""

from __future__ import annotations

from dashboards import paper
from dashboards.aggregate import Findings, noise, papers
from dashboards.formatting import percent
from dashboards.statistics import Comparison, Summary
from dashboards.study_data import StudyData

FEW = 5


def verdict(data: StudyData, findings: Findings) -> list[str]:
    """Sentences, the most important first; empty while nothing has been completed."""
    cells = [cell for cell in findings.cells if cell.rows]
    if not cells:
        return []
    sentences = []
    if data.config.search.cells is not None and data.study.user_attrs.get("confirms"):
        sentences += _confirmed(data, findings)
    sentences += [_sentence(comparison, findings.measure) for comparison in findings.comparisons]
    sentences += _explained(findings.comparisons)
    sentences += _timed(data, findings)
    for name, p in findings.effects.items():
        says = f"{name} makes a difference" if p < 0.05 else f"cannot tell whether {name} makes a difference"
        sentences.append(f"{says} (Friedman over its levels, p = {p:.2g}, Holm-corrected).".capitalize())
    fewest = min(len(cell.rows) for cell in cells)
    grid = data.config.search.sampler.kind == "grid"
    if grid and len(cells) > 1 and fewest < 2:
        sentences.append(
            "One seed a setting: their differences cannot be told from chance. More seeds: --set search.replicates=5."
        )
    elif len(cells) > 1 and fewest < FEW and findings.comparisons:
        sentences.append(f"Only {fewest} seeds a setting: small differences stay hidden.")
    if not grid and data.best is not None:
        sentences.append(
            f"The best of {len(data.rows)} searched settings is partly luck; `study confirm {data.name}` runs the best "
            "again on fresh seeds and asks the test split."
        )
    spread, delta = noise(data), data.config.policy.delta
    if spread is not None and isinstance(delta, float) and any(cell.policy == "dynamic" for cell in cells):
        images = data.counts["validation"]
        sentences.append(
            f"Validation on {images:,} images is uncertain by {100 * spread:.2f} points (binomial standard deviation); "
            f"delta is {100 * delta:.2g} {'point' if delta == 0.01 else 'points'}"
            + (", which is less: most stalls are noise." if delta < spread else ".")
        )
    if data.config.data.protocol == "paper":
        sentences.append("The test split chose the best epoch, as in the paper, so all accuracies here are optimistic.")
    if any(papers(data, cell) for cell in cells):
        sentences += [f"On the paper's own numbers: {caveat}" for caveat in paper.CAVEATS]
    return sentences


def interval(of: Summary, scale: float = 100.0, digits: int = 2) -> str:
    """`1.23 (0.50 to 1.96)`, or the mean alone."""
    mean = f"{scale * of.mean:.{digits}f}"
    if of.low is None or of.high is None:
        return mean
    return f"{mean} ({scale * of.low:.{digits}f} to {scale * of.high:.{digits}f})"


def _sentence(comparison: Comparison, measure: str) -> str:
    where = "on the test split" if measure == "test" else "in validation"
    of, a, b = comparison.difference, comparison.a, comparison.b
    amount = f"{interval(of)} points, 95 % interval" if of.n > 1 else f"{100 * of.mean:.2f} points, one pair"
    p = f", p = {comparison.p_holm:.2g} (paired t, Holm)" if comparison.p_holm is not None else ""
    if comparison.finding != "cannot tell":
        return f"{a} is {comparison.finding} than {b} {where}: {amount}, n = {of.n}{p}."
    seen = ""
    if comparison.detectable is not None:
        seen = f" Minimum detectable difference at 80 % power: {100 * comparison.detectable:.2f} points."
    return f"Cannot tell {a} from {b} {where}: {amount}, n = {of.n}{p}.{seen}"


def _explained(comparisons: list[Comparison]) -> list[str]:
    """What the controls say together, where there is one comparison with each."""
    by = {c.b.split(",")[0]: c.finding for c in comparisons if c.a.split(",")[0] == "dynamic"}
    names = [c.b.split(",")[0] for c in comparisons]
    if len(set(names)) < len(names) or "static" not in by:
        return []
    if by["static"] != "better":
        return ["So no gain over training on the same part of the data for ever was shown."]
    if "fresh" not in by:
        return ["So renewing the data helps; whether the rule does, only a `fresh` control can tell."]
    if by["fresh"] == "better":
        return ["So the rule adds something beyond fresh data."]
    if by["fresh"] == "worse":
        return ["So it is the fresh data that help: simply drawing anew every epoch does better than the rule."]
    return ["So renewing the data helps, but nothing shows that the rule does better than drawing anew every epoch."]


def _timed(data: StudyData, findings: Findings) -> list[str]:
    augment = data.config.data.augment is True
    table = "Table 5" if augment else "Table 4"
    beside = f" (the paper's {table}, with half of the images: {100 * paper.time_ratio(augment=augment):.1f} %)"
    if data.config.training.images is not None:  # the paper's runs have equally many epochs
        beside = ", at equally many images trained on"
    sentences = []
    for cell in findings.cells:
        ratio = findings.ratios.get(cell.label)
        if cell.policy == "dynamic" and ratio is not None:
            sentences.append(f"{cell.label} took {interval(ratio, digits=0)} % of the full run's time{beside}.")
    return sentences


def _confirmed(data: StudyData, findings: Findings) -> list[str]:
    origin = data.study.user_attrs["confirms"]
    sentences = []
    for cell, searched in zip(findings.cells, origin["values"], strict=False):
        of = cell.accuracy
        test = f"; on the test split, evaluated once, {interval(cell.test)} %" if cell.test is not None else ""
        sentences.append(
            f"{cell.label}: {percent(searched)} in the search {origin['study']}, {interval(of)} % on {of.n} fresh seeds"
            f" (a change of {100 * (of.mean - searched):+.2f} points; regression to the mean lowers the best of many)"
            f"{test}."
        )
    return sentences
