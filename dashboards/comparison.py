"""Studies on the same validation images against the first of them: whose best setting is better, in plain words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dashboards import aggregate
from dashboards.aggregate import Cell
from dashboards.conclusions import LEAST, Conclusions, chosen_on_the_test_split, listed, where
from dashboards.formatting import count, label, points, shown
from dashboards.statistics import (
    FEW,
    LEVEL,
    BestAgainstBest,
    Difference,
    Summary,
    best_against_best,
    difference,
    expected_fall,
    summary,
)
from dashboards.study_data import StudyData, TrialRow
from storage.errors import UserError
from storage.origins import derived_from
from study.config.loading import flat
from study.config.models import means_something
from study.search import space

OF_THE_NUMBERS = ("training.images", "training.precision", "training.compile", "training.deterministic")
"""Settings that a trial's numbers depend on and that no trial can vary."""
ELSEWHERE = ("description", "data.placement", "data.test", "checkpoint.", "artifacts.", "lease.")
"""Settings that no number depends on."""
LONGEST = 60
"""Characters of a value in the list of what differs."""
VERSIONS = ("study", "torch")


@dataclass(frozen=True)
class Setting:
    """A setting of one of the studies, with its complete trials."""

    study: StudyData
    cell: Cell
    parameters: dict[str, Any]
    """What it was trained with, of all parameters those in which the settings of all studies differ."""
    values: dict[int, float]
    """By seed, in [0, 1]: of the measure that is compared."""
    mean: Summary
    """Its interval is simultaneous: those of all settings hold together with 95 %."""

    @property
    def label(self) -> str:
        """Empty: all settings of all studies are the same."""
        return label(self.parameters)


@dataclass(frozen=True)
class Against:
    """A setting minus one of the first study; differences in [0, 1]."""

    reference: Setting
    matching: bool
    """Whether the reference has the same values of what both studies vary; else it is the first study's best."""
    difference: Difference
    low: float | None
    """Simultaneous: the intervals of all settings against the first study's hold together with 95 %. None where a
    single run allows none."""
    high: float | None
    p_adjusted: float | None
    detectable: float | None
    """The true difference that is found with a probability of 80 %."""

    @property
    def finding(self) -> str:
        """`better`, `worse` or `cannot tell`."""
        if self.p_adjusted is None or self.p_adjusted >= LEVEL:
            return "cannot tell"
        return "better" if self.difference.mean > 0 else "worse"

    @property
    def provisional(self) -> bool:
        return min(self.difference.n) < FEW


@dataclass(frozen=True)
class Duel:
    """A study's best setting against the first study's, as one of a family with a member for each other study."""

    setting: Setting
    reference: Setting
    best: BestAgainstBest
    sizes: tuple[int, int]
    """Settings that each was the highest of."""


@dataclass(frozen=True)
class Compared:
    studies: tuple[StudyData, ...]
    measure: str
    """`test` if every complete trial of all studies has been evaluated on the test split, else `value`."""
    settings: list[tuple[Setting, Against | None]]
    """Study by study, the highest mean first; those of the first study stand against nothing."""
    duels: list[Duel]
    differences: list[tuple[str, tuple[str, ...]]]
    """Keys of the config in which the studies differ, and their values there."""
    said: Conclusions


def compare_studies(studies: Sequence[StudyData]) -> Compared:
    """Every other study against the first.

    Raises:
        UserError: fewer than two studies, one is named twice, or their values do not compare; what differs.
    """
    _check(studies)
    measure = _measure(studies)
    settings = _settings(studies, measure)
    by_study = [[each for each in settings if each.study is data] for data in studies]
    level, resolution = LEVEL / (len(studies) - 1), _resolution(studies[0], measure)
    duels = []
    for ours in by_study[1:]:
        if ours and by_study[0]:
            best = best_against_best(
                [each.values for each in ours], [each.values for each in by_study[0]], resolution, level
            )
            sizes = len(ours), len(by_study[0])
            duels.append(Duel(ours[best.ours], by_study[0][best.theirs], best, sizes))
    against = _against(by_study, resolution)
    return Compared(
        tuple(studies), measure, list(zip(settings, against, strict=True)), duels, _differences(studies),
        Conclusions(_answer(studies, duels, measure), _warnings(studies, settings, duels, measure),
                    _sentences(studies, by_study, duels, level)),
    )  # fmt: skip


# What is compared


def _check(studies: Sequence[StudyData]) -> None:
    names = [data.name for data in studies]
    if len(names) < 2:
        raise UserError(f"a comparison needs at least two studies, got {', '.join(names) or 'none'}")
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise UserError(f"a comparison names each study once, got {twice[0]!r} twice")
    first = studies[0]
    faults = []
    for other in studies[1:]:
        ours, theirs = _must_agree(first), _must_agree(other)
        found = [f"{key} {_short(ours[key])} != {_short(theirs[key])}" for key in ours if ours[key] != theirs[key]]
        if found:
            faults.append(f"{first.name!r} and {other.name!r} differ in {', '.join(found)}")
    if faults:
        raise UserError(
            f"only values of one metric on the same validation images compare: {'; '.join(faults)}; name studies that "
            "agree in these"
        )
    if not isinstance(first.validation_set["data fingerprint"], str):
        raise UserError(f"the study {first.name!r} does not say which data it has: its values compare with no other's")


def _must_agree(data: StudyData) -> dict[str, object]:
    return data.validation_set | {"search.metric": data.config.search.metric}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:16]


def _measure(studies: Sequence[StudyData]) -> str:
    done = [row for data in studies for row in data.rows if row.state == "complete"]
    return "test" if done and all(row.test is not None for row in done) else "value"


def _resolution(data: StudyData, measure: str) -> float:
    images = data.measured_on.get("test" if measure == "test" else "validation")
    return 1 / images if images else 0.0


def _settings(studies: Sequence[StudyData], measure: str) -> list[Setting]:
    """Those with a complete trial, study by study, the highest mean first."""
    found = [(data, cell) for data in studies for cell in aggregate.cells_of(data) if cell.by_seed(measure)]
    whole = [_parameters(data, cell) for data, cell in found]
    varied = [
        name
        for name in dict.fromkeys(name for each in whole for name in each)
        if len({repr(each.get(name)) for each in whole}) > 1
    ]
    replicated = sum(len(cell.by_seed(measure)) > 1 for _, cell in found)
    settings = []
    for (data, cell), each in zip(found, whole, strict=True):
        values = cell.by_seed(measure)
        images = data.measured_on.get("test" if measure == "test" else "validation")
        mean = summary(list(values.values()), images, LEVEL / max(1, replicated))
        settings.append(Setting(data, cell, {name: each[name] for name in varied if name in each}, values, mean))
    places = {data.name: place for place, data in enumerate(studies)}
    return sorted(settings, key=lambda each: (places[each.study.name], -each.mean.mean))


def _parameters(data: StudyData, cell: Cell) -> dict[str, Any]:
    """All that a setting was trained with and that means something to it."""
    config = data.config
    values = space.settings(config, cell.parameters)
    named = {name: values[name] for name in config.searchable() if means_something(name, values)}
    if config.training.images is not None:
        named.pop("epochs", None)
    fixed = flat(config)
    more = {name: fixed[name] for name in OF_THE_NUMBERS}
    more["train_images"] = data.counts.get("train")
    named |= {name.removeprefix("training."): value for name, value in more.items() if name != "training.images"}
    if config.training.images is not None:
        named["training.images"] = config.training.images
    return {name: value for name, value in named.items() if value is not None}


# Setting by setting


def _against(by_study: Sequence[Sequence[Setting]], resolution: float) -> list[Against | None]:
    """In the order of the settings. One family: a pair counts once, one with the first study's best once for each
    setting that could have been the best."""
    first = by_study[0]
    pairs: list[tuple[Setting, bool, Difference]] = []
    for settings in by_study[1:] if first else []:
        for each in settings:
            matching = _matching(each, first)
            reference = first[0] if matching is None else matching
            pairs.append((reference, matching is not None, difference(each.values, reference.values, resolution)))
    family = sum(1 if matching else len(first) for _, matching, of in pairs if of.error is not None)
    found: list[Against | None] = [None] * len(first)
    for reference, is_match, of in pairs:
        low, high = of.interval(LEVEL / max(1, family))
        known = of.p is not None
        found.append(
            Against(
                reference, is_match, of, low if known else None, high if known else None,
                None if of.p is None else min(1.0, family * of.p), of.detectable(LEVEL / max(1, family)),
            )
        )  # fmt: skip
    return found if first else [None] * sum(map(len, by_study))


def _matching(setting: Setting, first: Sequence[Setting]) -> Setting | None:
    """The one that has the same values of what both studies vary, if it is one."""
    theirs = set(first[0].study.config.searched())
    both = theirs & set(setting.study.config.searched())
    for names in (both, theirs):
        alike = [each for each in first if all(_value(each, name) == _value(setting, name) for name in names)]
        if len(alike) == 1:
            return alike[0]
    return None


def _value(setting: Setting, name: str) -> Any:
    """None where the parameter means nothing to the setting."""
    values = space.settings(setting.study.config, setting.cell.parameters)
    return values.get(name) if means_something(name, values) else None


def _differences(studies: Sequence[StudyData]) -> list[tuple[str, tuple[str, ...]]]:
    flats = [flat(data.config) for data in studies]
    keys = dict.fromkeys(key for each in flats for key in each)
    return [
        (key, tuple(_written(key, each.get(key)) for each in flats))
        for key in keys
        if not key.startswith(ELSEWHERE)
        and (".arguments." in key or all(key in each for each in flats))  # else a parameter of another pruner
        and any(each.get(key) != flats[0].get(key) for each in flats)
    ]


def _written(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if key == "search.cells":
        return count(len(value), "setting")
    if isinstance(value, Mapping):
        text = ", ".join(f"{name} {shown(each)}" for name, each in value.items() if each not in (None, False))
    elif isinstance(value, list | tuple):
        text = ", ".join(map(shown, value))
    else:
        text = shown(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


# The answer


def _answer(studies: Sequence[StudyData], duels: Sequence[Duel], measure: str) -> str:
    sentences = [_duel(duel, measure) for duel in duels]
    for data in studies:
        if not any(row.state == "complete" for row in data.rows):
            states = ", ".join(f"{number:,} {name}" for name, number in data.status.states.items() if number)
            sentences.append(f"No answer yet: no trial of {data.name} is complete ({states or 'there are no trials'}).")
    return " ".join([*sentences, *_unfinished(studies)])


def _unfinished(studies: Sequence[StudyData]) -> list[str]:
    ended, left = [], []
    for data in studies:
        done, total = data.status.progress.finished, data.status.progress.total
        if done >= total:
            continue
        if data.status.ended_early:
            ended.append(f"{data.name} ended early, with {done:,} of {total:,} trials.")
        else:
            left.append(f"{done:,} of {total:,} trials of {data.name}")
    return [*ended, f"Not final: {' and '.join(left)} have ended."] if left else ended


def _duel(duel: Duel, measure: str) -> str:
    best = duel.best
    ours, theirs = _named(duel.setting, duel.sizes[0]), _named(duel.reference, duel.sizes[1])
    place = where(duel.setting.study, measure).removesuffix(",")
    few = f", provisional with fewer than {FEW}" if best.provisional and best.difference.error is not None else ""
    if best.finding == "cannot tell":
        single = ""
        if not (math.isfinite(best.low) and math.isfinite(best.high)):
            single = "; a setting with a single run cannot be ruled out"
        return (
            f"Cannot tell {ours} from {theirs} {place}: a difference of {_amount(best)}, {_seeds(best.difference)}{few}"
            f"{single}."
        )
    return f"{ours} is {best.finding} than {theirs} by {_amount(best)} {place}, {_seeds(best.difference)}{few}."


def _named(setting: Setting, of: int = 1) -> str:
    """`wide's setting width 0.5`; of studies that do not differ the name alone."""
    if not setting.label:
        return setting.study.name
    return f"{setting.study.name}'s setting {setting.label}" + (f" (the highest of {of:,})" if of > 1 else "")


def _amount(best: BestAgainstBest) -> str:
    """Of a worse one the amount by which it is worse."""
    mean, low, high = best.difference.mean, best.low, best.high
    if best.finding == "worse":
        mean, low, high = -mean, -high, -low
    text = f"{100 * mean:.2f}"
    if math.isfinite(low) and math.isfinite(high):
        text += f" ({100 * low:.2f} to {100 * high:.2f})"
    elif math.isfinite(low):
        text += f" (at least {100 * low:.2f})"
    elif math.isfinite(high):
        text += f" (at most {100 * high:.2f})"
    return f"{text} points"


def _seeds(of: Difference) -> str:
    if of.paired:
        return f"paired over {count(of.n[0], 'seed')}"
    return f"not paired, {of.n[0]:,} and {count(of.n[1], 'seed')}"


# Warnings and sentences


def _warnings(
    studies: Sequence[StudyData], settings: Sequence[Setting], duels: Sequence[Duel], measure: str
) -> list[str]:
    warnings = []
    if any(duel.best.difference.error is None for duel in duels):
        warnings.append(
            "Single runs: their differences cannot be told from chance. `study confirm` runs the best settings again."
        )
    if any(duel.best.provisional and duel.best.difference.error is not None for duel in duels):
        warnings.append(
            f"Provisional: below {FEW} seeds every test rests on the assumption of a normal distribution, and only "
            "large differences are found."
        )
    warnings += _shared(studies)
    pruned = [_named(each) for each in settings if each.cell.pruned]
    if pruned:
        warnings.append(f"Of {listed(pruned)} some seeds were pruned: the mean of the others is too high.")
    warnings += chosen_on_the_test_split(studies[0])
    return [*warnings, *_small(studies[0], duels, measure), *_code(studies), *_versions(studies)]


def _small(first: StudyData, duels: Sequence[Duel], measure: str) -> list[str]:
    split = "test" if measure == "test" else "validation"
    images = first.measured_on.get(split)
    if not images:
        return []
    for duel in duels:
        accuracy = max(duel.setting.mean.mean, duel.reference.mean.mean)
        spread = math.sqrt(accuracy * (1 - accuracy) / images)
        if duel.best.finding != "cannot tell" and abs(duel.best.difference.mean) < 2 * spread:
            return [
                f"Found differences below {points(2 * spread)} are within the noise of the {images:,} {split} images: "
                "they hold for these images, and others may show less."
            ]
    return []


def _shared(studies: Sequence[StudyData]) -> list[str]:
    """A study and one derived from it have trials in common, whose differences are 0."""
    names = {data.name for data in studies}
    found = []
    for data in studies:
        origin = derived_from(data.study.user_attrs)
        if origin is not None and origin.study in names and origin.taken_over:
            trials = f"{count(origin.taken_over, 'trial')} of {data.name} {'was' if origin.taken_over == 1 else 'were'}"
            found.append(f"{trials} taken over from {origin.study}: these compare with themselves.")
    return found


def _code(studies: Sequence[StudyData]) -> list[str]:
    digests = {data.name: str(data.study.user_attrs.get("code_sha256", "none"))[:16] for data in studies}
    if len(set(digests.values())) < 2:
        return []
    return [f"Their own code differs (SHA-256): {_by_study(digests)}."]


def _versions(studies: Sequence[StudyData]) -> list[str]:
    warnings = []
    for package in VERSIONS:
        used = {}
        for data in studies:
            stored = [row.attributes.get("versions") for row in data.rows]
            found = {str(each[package])[:LONGEST] for each in stored if isinstance(each, dict) and package in each}
            if found:
                used[data.name] = ", ".join(sorted(found))
        if len(set(used.values())) > 1:
            warnings.append(f"Trained by other versions of {package}: {_by_study(used)}.")
    return warnings


def _by_study(values: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in values.items())


def _sentences(
    studies: Sequence[StudyData], by_study: Sequence[Sequence[Setting]], duels: Sequence[Duel], level: float
) -> list[str]:
    sentences = [_timed(duel.setting, duel.reference, level) for duel in duels]
    for settings in by_study:
        fall = expected_fall([each.values for each in settings])
        if fall is not None and fall >= LEAST:
            sentences.append(
                f"Regression to the mean: the highest of {len(settings):,} means of {settings[0].study.name} is "
                f"expected to be {points(fall)} lower on fresh seeds."
            )
    for data in studies:
        ended = {_chosen(row) for row in data.rows if row.state == "pruned"}
        ended -= {_chosen(row) for row in data.rows if row.state == "complete"}
        if ended:
            are = "is" if len(ended) == 1 else "are"
            sentences.append(f"{count(len(ended), 'setting')} of {data.name} {are} left out: all trials were pruned.")
        sentences += [
            f"Trial {number} of {data.name} is excluded: {why}" for number, why in data.status.excluded.items()
        ]
    return [sentence for sentence in sentences if sentence]


def _chosen(row: TrialRow) -> tuple[tuple[str, str], ...]:
    return tuple((name, repr(value)) for name, value in row.parameters.items())


def _timed(setting: Setting, reference: Setting, level: float) -> str:
    """The ratio of their times, on one kind of device of one machine with as many threads."""
    ours, theirs = _by_machine(setting), _by_machine(reference)
    common = [machine for machine in ours if machine in theirs]
    a, b = _named(setting), _named(reference)
    if not common:
        if not ours or not theirs:
            return ""
        devices = [", ".join(sorted({f"{device} of {host}" for device, host in each})) for each in (ours, theirs)]
        return f"The times of {a} ({devices[0]}) and {b} ({devices[1]}) do not compare."
    machine = max(common, key=lambda each: min(len(ours[each]), len(theirs[each])))
    of = difference(ours[machine], theirs[machine])
    low, high = (math.exp(end) if math.isfinite(end) else None for end in of.interval(level))
    spread = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
    few = f", provisional with fewer than {FEW}" if min(of.n) < FEW else ""
    numbers = f"{100 * math.exp(of.mean):.0f}{spread} % of it, {_seeds(of)}{few}, on {machine[0]} of {machine[1]}"
    if low is None or high is None or low <= 1 <= high:
        return f"Cannot tell whether {a} takes less time than {b}: {numbers}."
    return f"{a} takes {'less' if high < 1 else 'more'} time than {b}: {numbers}."


def _by_machine(setting: Setting) -> dict[tuple[str, str], dict[int, float]]:
    """Device with its threads, and host, to the logarithm of the seconds by seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in setting.cell.rows:
        device, host = row.attributes.get("device"), row.attributes.get("host")
        if isinstance(device, str) and isinstance(host, str) and row.seed is not None and row.seconds > 0:
            found.setdefault((device, host), {})[row.seed] = math.log(row.seconds)
    return found
