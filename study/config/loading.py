"""Reads a config: presets, files that extend others, `--set section.key=value`; every fault in one sentence."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from storage.errors import UserError
from study.config.assignments import assign
from study.config.models import PARAMETERS, StudyConfig


def _leaves(model: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in model.items():
        if isinstance(value, Mapping) and not {"low", "high"} <= value.keys():
            flat |= _leaves(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def flat(config: StudyConfig) -> dict[str, Any]:
    """Every setting by its dotted key; lists as lists, ranges as dictionaries."""
    return _leaves(config.model_dump())


def differences(ours: StudyConfig, theirs: StudyConfig) -> list[str]:
    """What differs, as `key: ours, theirs` lines."""
    a, b = flat(ours), flat(theirs)
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


MOST_FILES = 10
"""That extend one another."""
MOST_BYTES = 1_000_000
"""Of a config file."""


@dataclass(frozen=True)
class LoadedConfig:
    """A config, and what its file says that is not part of the study."""

    config: StudyConfig
    name: str
    """Of the study, unless another is given: the preset's, or the file's without its ending."""
    folder: Path | None = None
    """The file's, which may hold own code; None: a preset."""
    data_root: str | None = None
    """`data.root` of the file, as a whole path."""


def is_file(source: str) -> bool:
    """Whether a preset's name or a path is a path."""
    return source.endswith(".toml") or "/" in source or "\\" in source


def load(source: str, assignments: Iterable[str] = ()) -> LoadedConfig:
    """A preset or a TOML file, with `section.key=value` assignments laid over it.

    A file may extend a preset or another file by `extends = "paper-grid"`; what it says replaces what that says, key by
    key, lists and ranges as a whole. Relative paths in a file (`data.root`, `checkpoint.store`, `artifacts.store`,
    `extends`) start at its folder.

    Raises:
        UserError: an unknown preset, key or value, all faults in one sentence; a file that cannot be read.
    """
    tree = _read(source, None, MOST_FILES)
    for assignment in assignments:
        assign(tree, assignment)
    data = tree.get("data")
    root = data.pop("root", None) if isinstance(data, dict) else None
    if root is not None and (not isinstance(root, str) or not root):
        raise UserError(f"data.root must be the path of a folder, got {root!r}")
    config = parse_config(tree)
    path = Path(source).expanduser()
    return LoadedConfig(
        config,
        path.stem if is_file(source) else source,
        path.resolve().parent if is_file(source) else None,
        None if root is None else str(Path(root).expanduser().resolve()),
    )


def load_config(source: str, assignments: Iterable[str] = ()) -> StudyConfig:
    """The config of `load` alone."""
    return load(source, assignments).config


def changed(config: StudyConfig, source: str | None, assignments: Iterable[str] = ()) -> StudyConfig:
    """A config with what a preset or file says laid over it, key by key, and assignments over that.

    Raises:
        UserError: as `load`.
    """
    tree: dict[str, Any] = config.model_dump(mode="json")
    if source is not None:
        over = _read(source, None, MOST_FILES)
        if isinstance(data := over.get("data"), dict):
            data.pop("root", None)
        tree = _merged(tree, over)
    for assignment in assignments:
        assign(tree, assignment)
    return parse_config(tree)


def _read(source: str, folder: Path | None, left: int) -> dict[str, Any]:
    """The tree of a preset or a file, with that of what it extends below it and its paths whole."""
    if not is_file(source):
        tree = tomllib.loads(preset_text(source))
        path = None
    else:
        path = Path(source).expanduser()
        path = (folder or Path()) / path
        tree = _read_file(path)
    base = tree.pop("extends", None)
    if path is not None:
        _make_paths_whole(tree, path.resolve().parent)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"extends names a preset or a file, got {base!r}")
    if left == 1:
        raise UserError(f"{source}: at most {MOST_FILES} files extend one another; is it a circle?")
    below = _read(base, path.resolve().parent if path is not None else None, left - 1)
    below.pop("description", None)
    return _merged(below, tree)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise UserError(
                f"no config file {str(path)!r}; a preset is named without a path: {', '.join(preset_names())}"
            )
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES:,} bytes: a config file is small")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8
        raise UserError(f"{path} is not TOML: {' '.join(str(error).split())[:300]}") from None


def _make_paths_whole(tree: dict[str, Any], folder: Path) -> None:
    for section, key in (("data", "root"), ("checkpoint", "store"), ("artifacts", "store")):
        values = tree.get(section)
        if not isinstance(values, dict):
            continue
        value = values.get(key)
        if isinstance(value, str) and value and value != "database" and "://" not in value:
            values[key] = str(folder / Path(value).expanduser())


def _merged(below: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `below`. Ranges are replaced as a whole, and so are the parameters of another kind of sampler or
    pruner and the arguments of another network or policy."""
    result = dict(below)
    for key, value in over.items():
        old = result.get(key)
        if not (isinstance(old, dict) and isinstance(value, dict)) or _is_whole(old, value):
            result[key] = value
            continue
        if "name" in value and value["name"] != old.get("name"):
            old = {name: each for name, each in old.items() if name != "arguments"}
        result[key] = _merged(old, value)
    return result


def _is_whole(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether `new` takes the place of `old` as a whole: a range, or the table of another kind."""
    return "low" in old or "low" in new or ("kind" in new and new["kind"] != old.get("kind"))


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
    if fault["type"] == "missing":
        return f"{where} is missing"
    if unknown:
        if len(location) == 1 and where in PARAMETERS:
            return f"unknown key {where} (did you mean {'.'.join(PARAMETERS[where])!r}?)"
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
