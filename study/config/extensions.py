"""Own code: `my_module:make`, found only in the folders that whoever starts this process allows.

A config in a database names code, and whoever can write to the database can change the name. So a name is looked up in
the allowed folders and nowhere else, must be defined by a file in one of them, and the study stores the SHA-256 of the
source: another source is refused like other data.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.errors import UserError

VARIABLE = "STUDY_CODE"
"""Environment variable: folders of own code, separated as in $PATH."""
IMPORT_PATH = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)", re.ASCII)


def is_import_path(text: str) -> bool:
    """Whether `text` names own code: `module:name`, with another module than `torchvision`."""
    match = IMPORT_PATH.fullmatch(text)
    return match is not None and match["module"] != "torchvision"


def named_in(config: Mapping[str, Any]) -> bool:
    """Whether a stored config, which need not be one of this version, names own code."""
    sections = [config.get(section) for section in ("data", "network", "policy")]
    named = [section.get("name") for section in sections if isinstance(section, Mapping)]
    search = config.get("search")
    cells = search.get("cells") if isinstance(search, Mapping) else None
    for cell in cells if isinstance(cells, list) else []:  # of a confirmation
        named += [cell.get("network"), cell.get("policy")] if isinstance(cell, Mapping) else []
    names = [name for each in named for name in (each if isinstance(each, list) else [each])]
    return any(isinstance(name, str) and is_import_path(name) for name in names)


def allowed_folders() -> list[Path]:
    """Those of $STUDY_CODE."""
    return [Path(folder).resolve() for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]


def allow(folders: Iterable[str | Path]) -> None:
    """Allow further folders in this process and those that it starts.

    Raises:
        UserError: one is no folder.
    """
    known = allowed_folders()
    for folder in folders:
        path = Path(folder).expanduser().resolve()
        if not path.is_dir():
            raise UserError(f"--code takes a folder with own code, got {str(folder)!r}")
        if path not in known:
            known.append(path)
    if known:
        os.environ[VARIABLE] = os.pathsep.join(map(str, known))


def place_of(error: BaseException | None) -> str:
    """` (nets.py:12)`: the last line of own code that an error, or what caused it, came through; empty: none."""
    folders = allowed_folders()
    while error is not None and folders:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if any(Path(frame.filename).resolve().is_relative_to(folder) for folder in folders):
                return f" ({Path(frame.filename).name}:{frame.lineno})"
        error = error.__cause__
    return ""


def load(spec: str) -> Callable[..., Any]:
    """The function or class `module:name` of an allowed folder.

    Raises:
        UserError: no such file, name or allowed folder; the module cannot be imported.
    """
    match = IMPORT_PATH.fullmatch(spec)
    if match is None:
        raise UserError(f"own code is named module:name, got {spec!r}")
    file = _file(match["module"], spec)
    folder = file.parents[match["module"].count(".") + (file.name == "__init__.py")]
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # as `python script.py` does; its neighbours can be imported
    try:
        module = importlib.import_module(match["module"])
    except Exception as error:
        raise UserError(f"{spec!r}: {file} cannot be imported: {type(error).__name__}: {error}") from error
    if Path(str(module.__file__)).resolve() != file:
        raise UserError(f"{spec!r}: the module {match['module']!r} is {module.__file__} already; rename {file}")
    target: Callable[..., Any] | None = getattr(module, match["name"], None)
    if target is None or not callable(target):
        raise UserError(f"{spec!r}: {file} has no function or class {match['name']!r}")
    defined = getattr(sys.modules.get(str(getattr(target, "__module__", ""))), "__file__", None)
    if defined is None or not any(Path(defined).resolve().is_relative_to(each) for each in allowed_folders()):
        raise UserError(f"{spec!r}: {match['name']!r} must be defined in {folder}, not imported from elsewhere")
    return target


def source_digest(specs: Sequence[str]) -> str | None:
    """SHA-256 of the files that define `specs` and of the modules of allowed folders that they import; None: no specs.

    Files count with their module's name, not their place: folders differ from machine to machine.

    Raises:
        UserError: a file is not there or cannot be read.
    """
    if not specs:
        return None
    sources: dict[str, bytes] = {}
    waiting = [(spec.partition(":")[0], spec) for spec in specs]
    while waiting:
        name, spec = waiting.pop()
        if name in sources:
            continue
        file = _file(name, spec)
        try:
            sources[name] = file.read_bytes()
            imported = _imports(ast.parse(sources[name]), name, is_package=file.name == "__init__.py")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{spec!r}: {file} cannot be read: {error}") from None
        waiting += [(module, spec) for module in imported if _find(module) is not None]
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(f"{name} {len(sources[name])}\n".encode() + sources[name])
    return digest.hexdigest()


def _file(module: str, spec: str) -> Path:
    file = _find(module)
    if file is None:
        where = ", ".join(map(str, allowed_folders())) or "no folder is"
        raise UserError(
            f"this study uses own code, {spec!r}, and {module!r} is in no allowed folder ({where}): "
            f"allow the folder that holds it with --code FOLDER or ${VARIABLE}"
        )
    return file


def _find(module: str) -> Path | None:
    for folder in allowed_folders():
        path = folder.joinpath(*module.split("."))
        for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if file.is_file():
                return file.resolve()
    return None


def _imports(tree: ast.AST, name: str, *, is_package: bool) -> list[str]:
    found: list[str] = []
    parts = name.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return [module for module in found if module]
