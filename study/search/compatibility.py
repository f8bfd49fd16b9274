"""Whether trials of one study can stand in another: which settings of the two differ, and which trials fit."""

from __future__ import annotations

from typing import Any

from study.config.loading import flat
from study.config.models import CHOICES, PARAMETERS, StudyConfig, means_something
from study.search import space

SAME_BITS = ("data.placement",)
"""Settings that change no number."""
SAME_RESULT = ("data", "network", "policy", "training", "pruning")
"""Sections that decide what a trial's numbers are; of `search`, these keys do."""
SEARCH_KEYS = ("seed", "metric", "objective")
INFORMING_DATA = ("name", "size", "channels", "protocol", "holdout", "train_images")
"""Settings of the data without which a sampler would learn from other numbers."""


def deciding_differences(new: StudyConfig, old: StudyConfig) -> list[str]:
    """What differs of all that decides a trial's numbers beside the parameters that one of the two searches, as
    `key: new != old`.
    """
    ours, theirs = _deciding(new), _deciding(old)
    keys = sorted(ours.keys() | theirs.keys())
    texts = [f"{key}: {ours.get(key)} != {theirs.get(key)}" for key in keys if ours.get(key) != theirs.get(key)]
    return texts + fixed_differences(new, old)


def informing_differences(new: StudyConfig, old: StudyConfig) -> list[str]:
    """What differs of data, protocol, network, length, metric and objective, as `key: new != old`."""

    def listed(config: StudyConfig) -> dict[str, Any]:
        values = {f"data.{key}": getattr(config.data, key) for key in INFORMING_DATA}
        values |= {f"search.{key}": getattr(config.search, key) for key in ("metric", "objective")}
        return values | {"training.images": config.training.images}

    ours, theirs = listed(new), listed(old)
    texts = [f"{key}: {ours[key]} != {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    return texts + [text for text in fixed_differences(new, old) if text.startswith(("network.", "training.epochs"))]


def fixed_differences(new: StudyConfig, old: StudyConfig) -> list[str]:
    """The parameters that both studies fix, that mean something to both, and whose values differ."""
    ours, theirs = new.searchable(), old.searchable()
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [
        f"{_key(name)}: {ours.get(name)} != {theirs.get(name)}"
        for name in names
        if name not in new.searched()
        and name not in old.searched()
        and ours.get(name) != theirs.get(name)
        and new.is_meaningful(name)
        and old.is_meaningful(name)
    ]


def fit(new: StudyConfig, old: StudyConfig, params: space.Parameters) -> tuple[space.Parameters, list[str]]:
    """A trial of the study `old` as one of `new`: its searched parameters there, and why it does not fit.

    What both studies fix is not looked at: `fixed_differences` has it.
    """
    values, fixed, searched = space.settings(old, params), new.searchable(), new.searched()
    choices = {name: values[name] for name in CHOICES}
    chosen, faults = {}, []
    for name in dict.fromkeys([*searched, *old.searched()]):
        if not means_something(name, choices):
            continue
        value = values.get(name)
        if value is None:
            faults.append(f"{name} has no value")
        elif name not in searched:
            faults += [f"{name} {value} is not {fixed.get(name)}"] if value != fixed.get(name) else []
        elif not space.contains(new, name, value):
            faults.append(f"{name} {value} is outside the new space")
        else:
            chosen[name] = value
    if not faults:
        faults += [f"it breaks the constraint {text!r}" for text in space.broken_constraints(new, chosen)]
    return chosen, faults


def _deciding(config: StudyConfig) -> dict[str, Any]:
    places = {f"{section}.{key}" for section, key in PARAMETERS.values()}
    arguments = ("network.arguments", "policy.arguments")
    values = {
        key: value
        for key, value in flat(config).items()
        if key.partition(".")[0] in SAME_RESULT and key not in (*places, *SAME_BITS) and not key.startswith(arguments)
    }
    values |= {f"search.{key}": getattr(config.search, key) for key in SEARCH_KEYS}
    values["own code"] = ", ".join(sorted(config.own_code())) or "none"
    unit = space.step_images(config)
    return values if unit is None else values | {"images a step of pruning": unit}


def _key(name: str) -> str:
    section, dot, argument = name.partition(".")
    return f"{section}.arguments.{argument}" if dot else ".".join(PARAMETERS[name])
