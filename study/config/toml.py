"""Writes a config as a TOML file that `study launch` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from study.config.models import StudyConfig


def to_toml(config: StudyConfig, shown: Mapping[str, Collection[str]], comments: Sequence[str] = ()) -> str:
    """The config as TOML: what differs from the defaults, and of each section the keys in `shown`, which hold whatever
    later versions have as defaults.

    Args:
        comments: lines for the top, without control characters.
    """
    lines = [f"# {comment}" for comment in comments]
    sections = []
    for name, value in config:
        if isinstance(value, BaseModel):
            keys = _section(value, shown.get(name, ()))
            sections += [f"\n[{name}]", *keys] if keys else []
        elif value:
            lines.append(f"{name} = {_value(value)}")
    return "\n".join([*lines, *sections]) + "\n"


def _section(section: BaseModel, shown: Collection[str]) -> list[str]:
    fields, plain = type(section).model_fields, section.model_dump(mode="json")
    return [
        f"{name} = {_value(plain[name])}"
        for name, value in section
        if value is not None and (name in shown or value != fields[name].get_default(call_default_factory=True))
    ]


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            items = (f"{_key(key)} = {_value(each)}" for key, each in value.items() if each is not None)
            return f"{{{', '.join(items)}}}"
        case _:
            return f"[{', '.join(map(_value, value))}]"


def _key(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else _value(text)
