"""Parses `--set section.key=value` and puts the value into a config's tree."""

from __future__ import annotations

import tomllib
from typing import Any

from storage.errors import UserError

MOST_LEVELS = 10
"""Of the sections of a key."""


def assign(tree: dict[str, Any], assignment: str) -> None:
    """Set the key of `assignment` in `tree`, in place.

    Raises:
        UserError: it is not section.key=value, or a section of it is a value.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > MOST_LEVELS:
        raise UserError(f"--set takes section.key=value, got {assignment[:200]!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except RecursionError:
        raise UserError(f"--set {path}: its value is nested too deeply, got {text[:40]!r}…") from None
    except ValueError:  # not TOML, or a number of thousands of digits
        value = text.strip()  # a bare word: data.name=imagefolder
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            raise UserError(f"--set {path}: {key} is a value, not a section")
        tree = below
    # Another kind of sampler or pruner has other parameters: those of the preset's kind go.
    if keys[-1] == "kind" and tree.get("kind") != value:
        tree.clear()
    tree[keys[-1]] = value
