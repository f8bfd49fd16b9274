"""The architecture, held against the code: who may import whom, and how large a file may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for package in ("study", "storage", "dashboards") for p in (ROOT / package).rglob("*.py"))

# Module prefix -> the prefixes of ours that it may import. The longest matching prefix decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "storage": ("storage",),
    "study": ("study", "storage"),
    "study.cli": ("study", "storage", "dashboards"),
    "study.options": ("study", "storage", "dashboards"),
    "study.looking": ("study", "storage", "dashboards"),
    "study.config": (),
    "study.parsing": ("study.config", "storage.errors"),
    "study.training": ("study.training",),
    "study.space": ("study.config", "storage.errors"),
    "study.search": ("study.config", "study.space"),
    "study.plan": ("study.config", "study.parsing", "study.space", "study.training.data", "storage"),
    "dashboards": ("dashboards", "storage", "study.config", "study.parsing", "study.plan", "study.space"),
}
THIRD_PARTY_BANS: dict[str, tuple[str, ...]] = {
    "storage": ("torch", "torchvision", "plotly", "typer"),
    "study.training": ("optuna", "sqlalchemy", "plotly", "typer", "rich"),
    "study.config": ("torch", "optuna", "sqlalchemy"),
    "dashboards": ("torch", "torchvision", "typer"),
}
OURS = ("study", "storage", "dashboards")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rule(table: dict[str, tuple[str, ...]], module: str) -> tuple[str, ...] | None:
    fitting = [prefix for prefix in table if below(module, prefix)]
    return table[max(fitting, key=len)] if fitting else None


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_downwards(path: Path) -> None:
    module = module_of(path)
    allowed = rule(MAY_IMPORT, module)
    assert allowed is not None
    banned = rule(THIRD_PARTY_BANS, module) or ()
    for name in imports(path):
        if any(below(name, ours) for ours in OURS):
            assert name == "study.__version__" or any(below(name, prefix) for prefix in allowed), f"{module}: {name}"
        assert not any(below(name, ban) for ban in banned), f"{module} must not know {name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_say_what_they_are_for_and_stay_small(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it is for"
    assert len(text.splitlines()) <= 400, f"{path} asks to be simplified"


def test_suggest_is_called_in_one_file() -> None:
    callers = [module_of(p) for p in FILES if ".suggest_" in p.read_text().replace("`trial.suggest_*`", "")]
    assert callers == ["study.space"]
