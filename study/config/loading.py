"""Reads a config: presets, `--set section.key=value`, and every fault as part of one sentence."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from pydantic import ValidationError

from storage.errors import UserError
from study.config.assignments import assign
from study.config.models import StudyConfig


def _leaves(model: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in model.items():
        if isinstance(value, Mapping) and not {"low", "high"} <= value.keys():
            flat |= _leaves(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(ours: StudyConfig, theirs: StudyConfig) -> list[str]:
    """What differs, as `key: ours, theirs` lines."""
    a, b = _leaves(ours.model_dump()), _leaves(theirs.model_dump())
    return [f"{key}: {a.get(key)} != {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def preset_names() -> list[str]:
    files = resources.files("study.config.presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def preset_text(name: str) -> str:
    if name not in preset_names():
        raise UserError(
            f"no preset {name!r}{_did_you_mean(name, preset_names())}; presets: {', '.join(preset_names())}"
        )
    return (resources.files("study.config.presets") / f"{name}.toml").read_text()


def load_config(preset: str, assignments: Iterable[str] = ()) -> StudyConfig:
    """A preset with `section.key=value` assignments laid over it.

    Raises:
        UserError: an unknown preset, key or value; all faults in one sentence.
    """
    tree = tomllib.loads(preset_text(preset))
    for assignment in assignments:
        assign(tree, assignment)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> StudyConfig:
    try:
        return StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_sentence(fault) for fault in error.errors())) from None


def _sentence(fault: Any) -> str:
    kinds = {"grid", "random", "tpe", "gp", "cma-es", "qmc", "none", "median", "percentile"}
    kinds |= {"successive-halving", "hyperband", "patient"}
    path, unknown = [str(key) for key in fault["loc"]], fault["type"] == "extra_forbidden"
    typed = {0, len(path) - 1} if unknown else {0}  # what somebody wrote, and not pydantic's name of an alternative
    kinds |= {"int", "float", "str", "Range"}
    location = [key for position, key in enumerate(path) if position in typed or key not in kinds]
    where = ".".join(location)
    if unknown:
        return f"unknown key {where}{_did_you_mean(location[-1], _known_keys(location[:-1]))}"
    if fault["type"] == "union_tag_invalid":
        context = fault["ctx"]
        expected = context["expected_tags"].replace("'", "")
        return f"{where}.kind must be one of {expected}, got {context['tag']!r}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if message.startswith("Input should be "):
        expected = message.removeprefix("Input should be ").replace("'", "")
        message = f"must be {expected}, got {fault['input']!r}"
    return f"{where}: {message}" if where else message


def _known_keys(path: list[str]) -> list[str]:
    model: Any = StudyConfig
    for key in path:
        field = model.model_fields.get(key) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = field.annotation
    if hasattr(model, "model_fields"):
        return list(model.model_fields)
    members = getattr(model, "__args__", ())
    return sorted({name for member in members for name in getattr(member, "model_fields", ())})


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
