"""What a study shows, in plain words: the answer first, warnings, findings; and "cannot tell" where it does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dashboards.aggregate import Cell, Findings, noise, pareto
from dashboards.formatting import count, label, p_value, percent, points
from dashboards.statistics import FEW, LEVEL, Comparison, Ratio, Summary, p_of_guessing, still_rising
from dashboards.study_data import StudyData, TrialRow
from storage.text import command

MOST_NAMED = 5
"""Settings that a sentence lists."""
LEAST = 0.0005
"""Fall, as a fraction, that is not worth a sentence."""
RISE = 0.002
"""Gain over the last epochs, as a fraction, below which it does not matter that curves still rise."""


@dataclass(frozen=True)
class Conclusions:
    answer: str
    warnings: list[str]
    sentences: list[str]

    @property
    def lines(self) -> list[str]:
        return [self.answer, *self.warnings, *self.sentences]


def conclude(data: StudyData, findings: Findings) -> Conclusions:
    if not findings.complete:
        return Conclusions(_no_answer(data), [], _test_split(data))
    guessing = _guessing(data, findings)
    warnings = [
        *_few_seeds(data, findings), *_one_step(findings), *_undertrained(data, findings), *_delta(data, findings),
        *_pruned(findings), *chosen_on_the_test_split(data), *_small_differences(data, findings),
    ]  # fmt: skip
    sentences = [
        *_confirmed(data, findings), *_regression(data, findings),
        *(_comparison(comparison, findings.measure) for comparison in findings.comparisons),
        *_explained(findings.comparisons), *_timed(findings), *_effects(findings), *_test_split(data),
    ]  # fmt: skip
    return Conclusions(guessing or _answer(data, findings), warnings, sentences)


def interval(of: Summary | Ratio, scale: float = 100.0, digits: int = 2) -> str:
    """`1.23 (0.50 to 1.96)`, or the mean alone."""
    mean = f"{scale * of.mean:.{digits}f}"
    if of.low is None or of.high is None:
        return mean
    return f"{mean} ({scale * of.low:.{digits}f} to {scale * of.high:.{digits}f})"


def accuracy(of: Summary) -> str:
    """`93.8 % (92.9 to 94.7)`."""
    if of.low is None or of.high is None:
        return f"{100 * of.mean:.1f} %"
    return f"{100 * of.mean:.1f} % ({100 * of.low:.1f} to {100 * of.high:.1f})"


def where(data: StudyData, measure: str) -> str:
    metric = "" if data.metric == "accuracy" else f"({data.metric}) "
    if measure == "test":
        return f"{metric}on the test split"
    if data.config.data.protocol == "paper":
        return f"{metric}on the test split, which chose the best epoch,"
    return f"{metric}in validation"


def is_confirmation(data: StudyData) -> bool:
    return isinstance(data.study.user_attrs.get("confirms"), dict)


# The answer


def _no_answer(data: StudyData) -> str:
    states = ", ".join(f"{number:,} {name}" for name, number in data.status.states.items() if number)
    return f"No answer yet: no trial is complete ({states or 'there are no trials'})."


def _guessing(data: StudyData, findings: Findings) -> str | None:
    """The answer where nothing was learnt; None where something was, or the classes are not known."""
    guess, images = data.guess, data.counts.get("validation")
    best = data.best
    if guess is None or not images or best is None or best.value is None:
        return None
    ended = [row for cell in findings.cells for row in cell.ended]
    if p_of_guessing(best.value, images, guess, max(1, sum(row.epochs for row in ended))) < LEVEL:
        return None
    text = (
        f"No trial is better than guessing ({data.classes} classes, largest class {100 * guess:.1f} %): the best "
        f"accuracy of {count(len(ended), 'run')} is {percent(best.value)} on {images:,} validation images"
    )
    return "; ".join([text, *(step.removesuffix(".") for step in _one_step(findings))]) + "."


def _answer(data: StudyData, findings: Findings) -> str:
    if data.config.search.objective != "accuracy":
        text = _front(data)
    elif findings.candidates:
        text = _of_replicates(data, findings)
    else:
        text = _of_single_runs(data, findings)
    done, total = data.status.progress.finished, data.status.progress.total
    if done >= total:
        return text
    if data.status.ended_early:
        return f"{text} The study ended early, with {done:,} of {total:,} trials."
    return f"{text} Not final: {done:,} of {total:,} trials have ended."


def _of_replicates(data: StudyData, findings: Findings) -> str:
    best, settings = findings.candidates, findings.complete
    first, place = best[0], where(data, findings.measure)
    fresh = "fresh seed" if is_confirmation(data) else "seed"
    seeds = count(min(len(cell.rows) for cell in best), fresh)
    if max(len(cell.rows) for cell in best) != min(len(cell.rows) for cell in best):
        seeds = f"at least {seeds}"
    if min(len(cell.rows) for cell in settings) < FEW and len(settings) > 1:
        seeds += f", provisional with fewer than {FEW}"
    if len(settings) == 1:
        value = accuracy(first.measured(findings.measure))
        return (
            f"One setting was run, {first.label}: {value} {place} on {seeds}; as a config file: {_model(data, first)}"
        )
    if len(best) == 1:
        value = accuracy(first.measured(findings.measure))
        return (
            f"Use {first.label}: {value} {place} on {seeds}, the only one of {len(settings)} settings that may be the "
            f"best (family-wise 95 %); as a config file: {_model(data, first)}"
        )
    named = "; ".join(f"{cell.label} {accuracy(cell.measured(findings.measure))}" for cell in best[:MOST_NAMED])
    more = f"; and {len(best) - MOST_NAMED} more" if len(best) > MOST_NAMED else ""
    rest = len(settings) - len(best)
    worse = (
        f" ({rest} of {len(settings)} settings {'is' if rest == 1 else 'are'} worse, family-wise 95 %)" if rest else ""
    )
    text = f"Cannot tell these {len(best)} settings apart{worse}, {place} on {seeds}: {named}{more}."
    cheapest = min(best, key=lambda cell: cell.mean("images"))
    images = sorted(cell.mean("images") for cell in best)
    if images[0] < images[1]:
        text += f" The fewest images are trained on with {cheapest.label}: {_model(data, cheapest)}"
    return text


def _of_single_runs(data: StudyData, findings: Findings) -> str:
    best = data.best
    cells, ended = findings.complete, sum(len(cell.ended) for cell in findings.cells)
    assert best is not None
    name = label(best.parameters) or best.policy
    place = where(data, "value")
    if len(findings.cells) == 1:
        runs = len(cells[0].rows)
        of = "one run" if runs == 1 else f"the highest of {runs} runs"
        return f"One setting was run, {name}: {percent(best.value)} {place}, {of}. More seeds show how much is chance."
    lost = len(findings.cells) - len(cells)
    pruned = f", {lost} of them pruned" if lost else ""
    searched = f"`{command('confirm', data.name, storage=data.storage_option)}` runs the best again on fresh seeds"
    return (
        f"Cannot tell which of {len(findings.cells):,} settings is the best: they are single runs{pruned}. The "
        "highest, "
        f"{percent(best.value)} {place} with {name}{_as_high(findings, best)}, is the maximum of "
        f"{count(ended, 'run')}; {searched}."
    )


def _as_high(findings: Findings, best: TrialRow) -> str:
    """Settings whose runs are as high: those that differ in beta alone are equal until the first exchange."""
    others = sum(
        any(row.value == best.value for row in cell.rows) and best not in cell.rows for cell in findings.complete
    )
    return f" and {count(others, 'other setting')}" if others else ""


def _front(data: StudyData) -> str:
    front = pareto(row for row in data.rows if row.state == "complete")
    ends = [f"{label(row.parameters) or row.policy} ({percent(row.value)}, {row.images:,} images)" for row in front]
    if len(front) == 1:
        return f"One setting has both the highest accuracy and the fewest images of all single runs: {ends[0]}."
    return (
        f"No single best: accuracy and images trained on are both objectives. {len(front)} single runs are on the "
        "Pareto "
        f"front, from {ends[0]} to {ends[-1]}, {where(data, 'value')}."
    )


def _model(data: StudyData, cell: Cell) -> str:
    """The command that writes the setting as a config."""
    best = max(cell.rows, key=lambda row: (row.value or 0.0, -row.number))
    is_default = data.best is not None and best.number == data.best.number
    trial = [] if is_default else ["--trial", str(best.number)]
    return command("model", data.name, *trial, "--toml", storage=data.storage_option)


# Warnings


def _few_seeds(data: StudyData, findings: Findings) -> list[str]:
    grid = data.config.search.sampler.kind == "grid" and data.config.search.cells is None
    if len(findings.complete) < 2:
        return []
    fewest = min(len(cell.rows) for cell in findings.complete)
    more = f" More seeds: --set search.replicates={FEW}." if grid else ""
    if not findings.candidates:
        return [f"Single runs: their differences cannot be told from chance.{more}"] if fewest < 2 and grid else []
    if fewest < FEW:
        return [
            f"Provisional: {count(fewest, 'seed')} a setting at least; below {FEW} every test rests on the assumption "
            "of "
            f"a normal distribution, and only large differences are found.{more}"
        ]
    return []


def _one_step(findings: Findings) -> list[str]:
    """Settings with one step of the optimizer an epoch."""
    named = dict.fromkeys(
        f"alpha {row.alpha:,} at batch {row.settings['batch_size']:,}"
        for row in (cell.ended[0] for cell in findings.cells)
        if row.alpha is not None and row.alpha <= row.settings["batch_size"]
    )
    if not named:
        return []
    return [f"{listed(list(named))} {'is' if len(named) == 1 else 'are'} one step an epoch."]


def _undertrained(data: StudyData, findings: Findings) -> list[str]:
    top = findings.candidates or findings.complete[:MOST_NAMED]
    rows = [row for cell in top for row in cell.rows if row.number in data.curves]
    curves = [[float(epoch["accuracy"]) for epoch in data.curves[row.number]] for row in rows]
    gain = still_rising(curves)
    if gain is None or gain < RISE:
        return []
    trials = sum(len(curve) >= 5 for curve in curves)
    return [
        f"Undertrained: accuracies still rise at the last epoch, by {points(gain)} from the second-last to the last "
        "fifth "
        f"of the epochs ({'mean of ' if trials > 1 else ''}{count(trials, 'trial')} of the best settings). More epochs "
        "may change the answer."
    ]


def _delta(data: StudyData, findings: Findings) -> list[str]:
    spread = noise(data)
    deltas = [c.ended[0].settings["delta"] for c in findings.cells if c.policy == "dynamic"]
    if spread is None or not deltas or min(deltas) >= spread:
        return []
    least = points(min(deltas)) if min(deltas) == max(deltas) else f"from {points(min(deltas))} on"
    return [
        f"delta ({least}) is below the noise of an accuracy on {data.counts['validation']:,} validation images "
        "(binomial "
        f"standard deviation {points(spread)}): gains of that size can be chance."
    ]


def _pruned(findings: Findings) -> list[str]:
    mixed = [cell.label for cell in findings.complete if cell.pruned]
    if not mixed:
        return []
    return [f"Of {listed(mixed)} some seeds were pruned: the mean of the others is too high."]


def chosen_on_the_test_split(data: StudyData) -> list[str]:
    if data.config.data.protocol != "paper":
        return []
    return ["The test split chose the best epoch, as in the paper: all accuracies here are optimistic."]


def _small_differences(data: StudyData, findings: Findings) -> list[str]:
    split = "test" if findings.measure == "test" else "validation"
    images, best = data.measured_on.get(split), findings.complete[0].measured(findings.measure).mean
    if not images:
        return []
    spread = (best * (1 - best) / images) ** 0.5
    found = [c for c in findings.comparisons if c.finding != "cannot tell" and abs(c.difference.mean) < 2 * spread]
    if not found:
        return []
    return [
        f"Found differences below {points(2 * spread)} are within the noise of the {images:,} {split} images: they "
        "hold "
        "for these images, and others may show less."
    ]


# Sentences


def _comparison(of: Comparison, measure: str) -> str:
    place = "on the test split" if measure == "test" else "in validation"
    difference = of.difference
    amount = f"{interval(difference)} points" if difference.n > 1 else f"{100 * difference.mean:.2f} points, one pair"
    p = f", p = {p_value(of.p_adjusted)}" if of.p_adjusted is not None else ""
    few = ", provisional" if of.provisional else ""
    numbers = f"{amount}, n = {difference.n}{p}{few}"
    if of.finding != "cannot tell":
        return f"{of.a} is {of.finding} than {of.b} {place}: {numbers}."
    seen = ""
    if of.detectable is not None:
        seen = f" Minimum detectable difference at 80 % power: {points(of.detectable)}."
    return f"Cannot tell {of.a} from {of.b} {place}: {numbers}.{seen}"


def _explained(comparisons: Sequence[Comparison]) -> list[str]:
    """What the controls say together, where there is one comparison with each."""
    by = {c.b.split(",")[0]: c for c in comparisons if c.a.split(",")[0] == "dynamic"}
    names = [c.b.split(",")[0] for c in comparisons]
    if len(set(names)) < len(names) or "static" not in by:
        return []
    used = [by["static"]]
    if by["static"].finding == "worse":
        text = "Training on the same part of the data for ever does better than the rule here."
    elif by["static"].finding == "cannot tell":
        text = "No gain of the rule over training on the same part of the data for ever was shown."
    elif "fresh" not in by:
        text = "Renewing the data helps here; whether the rule does, only a `fresh` control can tell."
    else:
        used.append(by["fresh"])
        text = {
            "better": "The rule adds something beyond fresh data here.",
            "worse": "Fresh data help here, and drawing anew every epoch does better than the rule.",
            "cannot tell": "Renewing the data helps here, but nothing shows that the rule does better than drawing "
            "anew "
            "every epoch.",
        }[by["fresh"].finding]
    return [f"Provisional: {text[0].lower()}{text[1:]}" if any(c.provisional for c in used) else text]


def _timed(findings: Findings) -> list[str]:
    sentences = []
    for cell in findings.cells:
        of = findings.ratios.get(cell.label)
        if cell.policy != "dynamic" or of is None:
            continue
        numbers = f"{interval(of, digits=0)} % of its time, n = {of.n}{', provisional' if of.provisional else ''}"
        if of.finding == "cannot tell":
            sentences.append(f"Cannot tell whether {cell.label} takes less time than the full run: {numbers}.")
        else:
            sentences.append(f"{cell.label} takes {of.finding} time than the full run: {numbers}.")
    return sentences


def _effects(findings: Findings) -> list[str]:
    sentences = []
    few = ", provisional" if min(len(cell.rows) for cell in findings.complete) < FEW else ""
    for name, p in findings.effects.items():
        numbers = f"(Friedman's test over its levels, p = {p_value(p)}, Holm-corrected{few})"
        if p < LEVEL:
            sentences.append(f"The choice of {name} makes a difference {numbers}.")
        else:
            sentences.append(f"Cannot tell whether the choice of {name} makes a difference {numbers}.")
    return sentences


def _regression(data: StudyData, findings: Findings) -> list[str]:
    """What the best of many will lose, before it is confirmed."""
    settings = len(findings.complete)
    if is_confirmation(data) or settings < 3 or data.config.search.objective != "accuracy":
        return []
    if not findings.candidates:
        return [
            f"Regression to the mean: the highest of {settings:,} single runs is expected to be lower on fresh seeds; "
            "by how much, only replicates can tell."
        ]
    if findings.fall is None or findings.fall < LEAST:
        return []
    return [
        f"Regression to the mean: the highest of {settings} means is expected to be {points(findings.fall)} lower on "
        "fresh "
        "seeds."
    ]


def _confirmed(data: StudyData, findings: Findings) -> list[str]:
    """The settings in the search and on fresh seeds, both in validation; and whether their order is another."""
    origin = data.study.user_attrs.get("confirms")
    if not isinstance(origin, dict) or not isinstance(origin.get("values"), list):
        return []
    pairs = [(cell, value) for cell in findings.complete if (value := _searched(cell, origin["values"])) is not None]
    sentences = []
    for cell, searched in pairs:
        of = cell.accuracy
        change = of.mean - searched
        how = f"{points(abs(change))} {'lower' if change < 0 else 'higher'}"
        if change < 0:
            how += ", a regression to the mean as the best of many show it"
        elif change == 0:
            how = "the same"
        test = ""
        if cell.test is not None:
            test = f"; on the test split, evaluated once a trial, {interval(cell.test)} %"
        sentences.append(
            f"{cell.label}: {percent(searched)} in the search {origin.get('study')}, {interval(of)} % on "
            f"{count(of.n, 'fresh seed')} in validation ({how}){test}."
        )
    if len(pairs) > 1:
        before, after = max(pairs, key=lambda pair: pair[1])[0], pairs[0][0]
        if before is not after:
            now = "the two cannot be told apart"
            if before not in findings.candidates:
                now = f"{before.label} is not among those that may be the best"
            sentences.append(
                f"The order has changed: {before.label} was first in the search, {after.label} is first on fresh "
                "seeds; "
                f"{now}."
            )
    return sentences


def _searched(cell: Cell, values: Sequence[Any]) -> float | None:
    """The cell's value in the search."""
    index = cell.ended[0].attributes.get("cell")
    if not isinstance(index, int) or not 0 <= index < len(values) or not isinstance(values[index], (int, float)):
        return None
    return float(values[index])


def _test_split(data: StudyData) -> list[str]:
    """Where the test split was asked, how often and for what; "untouched" only while that is true."""
    # Excluded trials have asked it too, and are among the uses of the database only.
    stored = sum(use.evaluations for use in data.test_uses if use.study == data.name)
    own = max(stored, sum(row.test is not None for row in data.rows))
    uses = []
    if data.config.data.protocol == "paper":
        uses.append("in this study it validates every epoch")
    elif own:
        uses.append(f"{count(own, 'time')} in this study, once a trial")
    uses += [
        f"in {use.study} it validates every epoch"
        if use.validates
        else f"{count(use.evaluations, 'time')} in {use.study}"
        for use in data.test_uses
        if use.study != data.name
    ]
    record = data.study.user_attrs.get("test_asked")
    gone = [entry for entry in record or [] if isinstance(entry, dict) and entry.get("study") not in data.studies]
    uses += [f"by {entry.get('study')}, a confirmation that was deleted" for entry in gone]
    if not uses:
        return ["The test split is untouched: no study in this database has evaluated it."]
    again = " It was asked again with --again." if data.study.user_attrs.get("asked_again") else ""
    shown = uses if len(uses) <= MOST_NAMED else [*uses[:MOST_NAMED], f"and in {len(uses) - MOST_NAMED} more studies"]
    return [f"The test split was evaluated: {'; '.join(shown)}.{again}"]


def listed(names: Iterable[str]) -> str:
    """`a, b and c`; of many the first and how many more."""
    items = list(names)
    if len(items) > MOST_NAMED:
        items = [*items[:MOST_NAMED], f"{len(items) - MOST_NAMED} more"]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
