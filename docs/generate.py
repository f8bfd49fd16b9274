"""Write the reference pages that the code defines: `python docs/generate.py` from the repository's root.

Command line from typer's commands, settings from the config's models, exit codes, tables. `tests/unit/test_docs.py`
fails while a page differs from what this writes.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from sqlalchemy import Table
from typer.models import ArgumentInfo, OptionInfo

from storage import schema
from study import exit_codes
from study.cli import app as command_line
from study.config.models import StudyConfig

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py: edit the code and run `python docs/generate.py`. -->\n"

UNITS = {
    "data.holdout": "fraction",
    "data.train_images": "images",
    "network.width": "factor",
    "policy.alpha": "images",
    "policy.beta": "fraction",
    "policy.delta": "accuracy in [0, 1]",
    "policy.ratio": "fraction",
    "policy.anneal": "fraction",
    "training.epochs": "epochs",
    "training.images": "images",
    "training.batch_size": "images",
    "search.trials": "trials",
    "checkpoint.every_seconds": "seconds",
    "lease.seconds": "seconds",
    "lease.max_attempts": "attempts",
}
TABLES = {
    "trial_leases": "Who may work on a trial, and until when.",
    "trial_checkpoints": "The last checkpoint of each unfinished trial.",
    "trial_artifacts": "The trained models of the best finished trials, as Optuna artifacts.",
    "trial_artifact_chunks": "Their content, where the study keeps it in the database.",
    "trial_epochs": "A row for each epoch of each trial.",
    "trial_attempts": "A row for each claim of a trial: by whom, on what, and how it ended.",
    "trial_logs": "What workers logged about each trial; at most 200 lines an attempt.",
    "study_spending": "What a study has spent of its budgets, added up by one worker for all.",
}


def pages() -> dict[str, str]:
    """File name to content."""
    return {
        "cli.md": cli(),
        "configuration.md": configuration(),
        "exit-codes.md": codes(),
        "schema.md": tables(),
    }


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' or ') for cell in line)} |" for line in lines) + "\n"


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def prose(text: str | None) -> str:
    return " ".join((text or "").split())


def cli() -> str:
    verbs = {info.name: info.callback for info in command_line.app.registered_commands}
    parts = [
        "# Command line\n",
        NOTE,
        "`study VERB --help` shows the same. `study --version` shows the version, and `study --install-completion` "
        "installs completion for your shell. [Exit codes](exit-codes.md) are the same for all verbs.\n",
    ]
    for panel, functions in command_line.VERBS.items():
        parts.append(f"## {panel}\n")
        for function in functions:
            name = function.__name__.rstrip("_")
            parts += verb(name, verbs[name])
    return "\n".join(parts)


def verb(name: str, function: Any) -> list[str]:
    """The section of one verb."""
    text, _, example = inspect.cleandoc(function.__doc__).partition("Example:")
    arguments: list[list[str]] = []
    usage = ["study", name]
    panels: dict[str, list[list[str]]] = {}
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        annotation, info = _annotated(hints[parameter.name])
        default = "" if parameter.default in (None, False, parameter.empty) else code(str(parameter.default).lower())
        if isinstance(info, ArgumentInfo):
            required = parameter.default is parameter.empty
            metavar = parameter.name.upper() + "..." * (typing.get_origin(annotation) is list)
            usage.append(metavar if required else f"[{metavar}]")
            arguments.append([code(metavar), prose(info.help), default])
        else:
            # In Annotated the first name is where a default stands elsewhere.
            given = [each for each in (info.default, *(info.param_decls or ())) if str(each).startswith("-")]
            name_itself = parameter.name.replace("_", "-")
            names = [str(each) for each in given] or [
                f"--{name_itself}",
                *([f"--no-{name_itself}"] if annotation is bool else []),
            ]
            title = info.rich_help_panel or "option"
            row = [", ".join(map(code, names)), code(_value(annotation, info)), prose(info.help), default]
            panels.setdefault(title, []).append(row)
    parts = [f"### `study {name}`\n", f"{prose(text)}\n", f"```text\n{' '.join([*usage, '[OPTIONS]'])}\n```\n"]
    parts += [f"For example:\n\n```bash\n{example.strip()}\n```\n"] if example else []
    parts += [table(["argument", "meaning", "default"], arguments)] if arguments else []
    return parts + [table([title, "value", "meaning", "default"], rows) for title, rows in panels.items()]


def _annotated(hint: Any) -> tuple[Any, OptionInfo | ArgumentInfo]:
    """The type and what typer knows of a parameter, from `Annotated[type, typer.Option(...)]` or `... | None` of it."""
    annotation, info = typing.get_args(hint)[:2]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return annotation, info


def _value(annotation: Any, info: OptionInfo) -> str:
    """How the option's value is written; nothing for a switch."""
    if info.metavar or annotation is bool:
        return info.metavar or ""
    if typing.get_origin(annotation) is Literal:
        return "|".join(typing.get_args(annotation))
    kind = {int: "N", float: "X", Path: "PATH"}.get(annotation, "TEXT")
    if info.min is None:
        return kind
    return f"{kind} from {info.min:g}" + (f" to {info.max:g}" if info.max is not None else "")


def configuration() -> str:
    stale = [path for path in UNITS if not hasattr_path(StudyConfig, path)]
    if stale:
        raise KeyError(f"units of settings that are gone: {', '.join(stale)}")
    parts = [
        "# Settings\n",
        NOTE,
        "Set them in a preset's file or by `--set section.key=value`. *Value, list or range* is explained in "
        "[Configuration](../guides/configuration.md#values-lists-and-ranges). A dash as default: not set.\n",
        "## Top level\n",
    ]
    top = {name: field for name, field in StudyConfig.model_fields.items() if not _models(field.annotation)}
    parts.append(settings(StudyConfig, "", top))
    for name, field in StudyConfig.model_fields.items():
        models = _models(field.annotation)
        if len(models) == 1:
            parts += section(name, models[0], f"## `{name}`\n")
        elif models:
            parts += [f"## `{name}`\n", f"A kind, or a table with its `kind` and parameters. {_default_kind(field)}\n"]
            parts += kinds(name, models)
    return "\n".join(parts)


def section(name: str, model: type[BaseModel], heading: str) -> list[str]:
    parts = [heading, f"{prose(model.__doc__)}\n", settings(model, f"{name}.", model.model_fields)]
    for key, field in model.model_fields.items():
        models = _models(field.annotation)
        if models:
            parts += kinds(f"{name}.{key}", models)
    return parts


def kinds(path: str, models: list[type[BaseModel]]) -> list[str]:
    parts = []
    for model in models:
        kind = typing.get_args(model.model_fields["kind"].annotation)[0]
        fields = {key: field for key, field in model.model_fields.items() if key != "kind"}
        parts += [f"### `{path}` = `{kind}`\n", f"{prose(model.__doc__)}\n"]
        if fields:
            parts.append(settings(model, f"{path}.", fields))
    return parts


def settings(model: type[BaseModel], prefix: str, fields: dict[str, FieldInfo]) -> str:
    texts = meanings(model)
    rows = []
    for key, field in fields.items():
        default = "required" if field.is_required() else _toml(field.get_default(call_default_factory=True))
        rows.append([code(prefix + key), texts[key], UNITS.get(prefix + key, ""), default, allowed(field)])
    return table(["setting", "meaning", "unit", "default", "allowed"], rows)


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """The docstring under each field, also of the classes that the model derives from."""
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not issubclass(base, BaseModel) or not base.__module__.startswith("study."):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = prose(str(text.value.value))  # type: ignore[union-attr]
    return texts


def allowed(field: FieldInfo) -> str:
    """The rule for a setting's value."""
    for part in field.metadata:
        if isinstance(part, BeforeValidator) and not _models(field.annotation):
            annotation = str(field.annotation)
            if "tuple" not in annotation:
                return _rule(part)
            parts = " or a part such as `10 %`" if "PartRange" in annotation else ""
            return f"{_rule(part)}{parts}; {'value, list or range' if 'Range' in annotation else 'value or list'}"
    bounds = [_bound(part) for part in field.metadata if _bound(part)]
    return ", ".join(filter(None, [_kind(field.annotation), " and ".join(bounds)]))


def _rule(validator: BeforeValidator) -> str:
    """What the validator demands, from its own error message."""
    try:
        validator.func(object())  # type: ignore[call-arg]
    except ValueError as error:
        return str(error).removeprefix("must be ").partition(", got ")[0]
    raise TypeError("a validator that accepts everything")


def _bound(part: Any) -> str:
    signs = {annotated_types.Ge: ("ge", "≥"), annotated_types.Gt: ("gt", ">"), annotated_types.Le: ("le", "≤"),
             annotated_types.Lt: ("lt", "<")}  # fmt: skip
    for kind, (name, sign) in signs.items():
        if isinstance(part, kind):
            value = getattr(part, name)
            return f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}"
    return ""


def _kind(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return ", ".join(code(str(value)) for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in typing.get_args(annotation) if part is not type(None))
    if origin is typing.Annotated:
        return _kind(typing.get_args(annotation)[0])
    if origin in (tuple, list):
        return "a list of texts" if str in typing.get_args(annotation) else "a list of tables"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return code(str(typing.get_args(annotation.model_fields["kind"].annotation)[0]))
    return {bool: "`true`, `false`", int: "a whole number", float: "a number", str: "text"}[annotation]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The config classes among the annotation's alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is typing.Annotated or typing.get_origin(annotation) in (
        typing.Union,
        types.UnionType,
    ):
        parts = typing.get_args(annotation)
        models = [model for part in parts for model in _models(part)]
        return models if all("kind" in model.model_fields for model in models) else []
    return []


def _default_kind(field: FieldInfo) -> str:
    return f"Default: `{field.default.kind}`."


def _toml(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, BaseModel):
        return code(str(getattr(value, "kind", "")))
    if isinstance(value, tuple):
        value = list(value)
    return code(str(value).lower() if isinstance(value, bool) else str(value))


def hasattr_path(model: type[BaseModel], path: str) -> bool:
    first, _, rest = path.partition(".")
    field = model.model_fields.get(first)
    return field is not None and (not rest or any(hasattr_path(each, rest) for each in _models(field.annotation)))


def codes() -> str:
    names = {value: name for name, value in vars(exit_codes).items() if isinstance(value, int)}
    rows = [[str(number), code(names[number]), text] for number, text in exit_codes.MEANINGS.items()]
    return "\n".join(
        [
            "# Exit codes\n",
            NOTE,
            "Every verb ends with one of these. The names are those of `study.exit_codes`.\n",
            table(["code", "name", "meaning"], rows),
        ]
    )


def tables() -> str:
    parts = [
        "# Database schema\n",
        NOTE,
        "A storage is a database of Optuna's with these tables beside Optuna's own. They are defined in "
        "`storage/schema.py`. Trials and studies are referred to by Optuna's ids.\n",
    ]
    for each in schema.METADATA.sorted_tables:
        parts += [f"## `{each.name}`\n", *([f"{TABLES[each.name]}\n"] if each.name in TABLES else []), columns(each)]
    return "\n".join(parts)


def columns(of: Table) -> str:
    rows = []
    for column in of.columns:
        kind = re.sub(r"\s+", " ", str(column.type)).lower()
        notes = ["key"] * column.primary_key + ["may be NULL"] * bool(column.nullable)
        rows.append([code(column.name), kind, ", ".join(notes), prose(column.doc)])
    return table(["column", "type", "", "meaning"], rows)


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
