"""What was run, from the study's own config and trials: data, network, settings, protocol, machines, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from dashboards.formatting import count, label, shown
from dashboards.status import origin_lines
from dashboards.study_data import StudyData
from study.config.values import Range

MOST_NAMED = 6
MOST_PARAMETERS = 10**12
"""Of a network; more is no number that a worker counted."""
ELSEWHERE = ("policy", "network", "width", "norm", "augment")
"""Parameters that other lines than "Fixed" have."""


def describe(data: StudyData) -> list[tuple[str, str]]:
    """Names and values, in the order in which a method section has them."""
    config = data.config
    ended = [row for row in data.rows if row.state in ("complete", "pruned")]
    searched = config.searched()
    fixed = {
        name: value
        for name, value in config.searchable().items()
        if name not in searched
        and name not in ELSEWHERE
        and not name.startswith("network.")
        and value not in (None, 0, False, "none")
        and config.is_meaningful(name)
        and not (name == "epochs" and config.training.images is not None)
    }
    lines = [
        ("Data", _data(data)),
        ("Images", ", ".join(f"{number:,} {split}" for split, number in data.counts.items())),
        ("Validation", data.status.protocol),
        ("Network", _network(data)),
        ("Policies", ", ".join(config.policies())),
        ("Searched", "; ".join(f"{name} {_values(value)}" for name, value in searched.items() if name != "policy")),
        ("Fixed", ", ".join(f"{name} {shown(value)}" for name, value in fixed.items())),
        ("Length", f"{config.training.images:,} images trained on" if config.training.images else ""),
        ("Metric", data.metric),
        ("Search", _search(data)),
        ("Origin", "; ".join(origin_lines(data.status))),
        ("Trials", ", ".join(f"{number:,} {name}" for name, number in data.status.states.items() if number)),
        ("Machines", _machines(row.attributes for row in ended)),
        ("Cost", _cost(data)),
    ]
    return [(name, value) for name, value in lines if value]


def _data(data: StudyData) -> str:
    facts, options = data.facts, data.config.data
    parts: list[str] = [options.name]
    if data.classes:
        parts.append(count(data.classes, "class").replace("classs", "classes"))
    if data.largest_class is not None:
        parts.append(f"the largest {100 * data.largest_class:.1f} % of the validation images")
    shape = facts.get("shape")
    if isinstance(shape, list) and len(shape) == 3:
        parts.append("{} x {} pixels, {}".format(*shape[:2], count(shape[2], "channel")))
    augmentations = data.config.augmentations()
    if augmentations != ("none",):
        parts.append("augmented" if options.augment is True else f"augmented by {', '.join(augmentations)}")
    return ", ".join(parts)


def _network(data: StudyData) -> str:
    """Its name, its arguments, and how many parameters it has, as the workers counted them."""
    config, searched = data.config, data.config.searched()
    names = ["width", "norm", *(name for name in config.searchable() if name.startswith("network."))]
    parts = [", ".join(config.networks())]
    for name in names:
        value = searched.get(name, config.searchable()[name])  # of a confirmation, what its cells name
        if config.is_meaningful(name) and value is not None:
            parts.append(f"{name} {_values(value) if name in searched else shown(value)}")
    return "; ".join(filter(None, [", ".join(parts), _parameters(data, ["network", *names])]))


def _parameters(data: StudyData, names: list[str]) -> str:
    """`96,522 parameters`; of several networks `parameters 96,522 (width 0.25), 384,266 (width 0.5)`."""
    varied = [name for name in names if name in data.parameters]
    found: dict[str, set[int]] = {}
    for row in data.rows:
        number = row.attributes.get("network_parameters")
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= MOST_PARAMETERS:
            chosen = {name: row.parameters[name] for name in varied if name in row.parameters}
            found.setdefault(label(chosen), set()).add(number)
    if not found:
        return ""
    every = sorted({number for numbers in found.values() for number in numbers})
    if len(every) == 1:
        return f"{count(every[0], 'parameter')}"
    if len(found) > MOST_NAMED or not varied:
        return f"{every[0]:,} to {every[-1]:,} parameters"
    several = [
        f"{' or '.join(f'{number:,}' for number in sorted(numbers))} ({name})" for name, numbers in found.items()
    ]
    return f"parameters {', '.join(several)}"


def _values(value: Any) -> str:
    if isinstance(value, Range):
        scale = ", log" if value.log else ""
        step = f", step {shown(value.step)}" if value.step else ""
        return f"{shown(value.low)} to {shown(value.high)}{step}{scale}"
    items = [shown(item) for item in value]
    if len(items) > MOST_NAMED:
        return f"{items[0]} … {items[-1]} ({len(items)} values)"
    return ", ".join(items)


def _search(data: StudyData) -> str:
    search, pruning = data.config.search, data.config.pruning.kind
    seeds = f", {count(search.replicates, 'seed')} a setting" if search.sampler.kind == "grid" else ""
    return f"{search.sampler.kind}{seeds}; {'no pruning' if pruning == 'none' else f'pruned by {pruning}'}"


def _machines(attributes: Iterable[dict[str, Any]]) -> str:
    devices = Counter(str(each["device"]) for each in attributes if each.get("device"))
    named = [f"{device} ({count(number, 'trial')})" for device, number in devices.most_common(MOST_NAMED)]
    more = len(devices) - MOST_NAMED
    return "; ".join([*named, f"and {more} more"] if more > 0 else named)


def _cost(data: StudyData) -> str:
    images, seconds = sum(row.images for row in data.rows), sum(row.seconds for row in data.rows)
    if not images:
        return ""
    joules = [row.joules for row in data.rows if row.joules is not None]
    energy = f", {sum(joules) / 3.6e6:.3g} kWh in {count(len(joules), 'trial')}" if joules else ""
    time = f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"
    if seconds >= 3600:
        time = f"{seconds / 3600:,.1f} hours"
    return f"{images:,} images trained on, {time} of training and validation{energy}"
