"""The architecture, checked against the code: which module may import which, and which packages a layer may know."""

from __future__ import annotations

import ast
import fnmatch
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("study", "storage", "dashboards")
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))

# Module prefix -> the prefixes of ours that it may import. The longest matching prefix decides.
TRAINING = ("study.training",)
CONFIG = ("study.config", "storage.errors")
SEARCH = ("study.search", "storage.optuna_internals", *CONFIG)
CREATE = ("study.create", "study.trial.components", *SEARCH, "study.training.data", "storage")
TRIAL = ("study.trial", "study.model_file", *SEARCH, *TRAINING, "storage")
WORKER = ("study.worker", "study.exit_codes", *TRIAL, *CREATE)
LAUNCH = ("study.launchers", "study.logs", *WORKER)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "storage": ("storage",),
    "study.exit_codes": (),
    "study.logs": ("storage.errors", "storage.text"),
    "study.config": CONFIG,
    "study.search": SEARCH,
    "study.training": TRAINING,
    "study.create": CREATE,
    "study.confirm": CREATE,
    "study.enqueue": CREATE,
    "study.after": CREATE,
    "study.derive": ("study.confirm", "study.enqueue", *CREATE),
    "study.estimate": TRIAL,
    "study.model_file": ("study.model_file", *CONFIG, *TRAINING, "storage"),
    "study.trial": TRIAL,
    "study.worker": WORKER,
    "study.launchers": LAUNCH,
    "study.cli": OURS,
    "study": OURS,
    "dashboards": ("dashboards", "storage", "study.config", "study.search.space"),
}
THIRD_PARTY_BANS: dict[str, tuple[str, ...]] = {
    "storage": ("torch", "torchvision", "plotly", "typer"),
    "study.training": ("optuna", "sqlalchemy", "plotly", "typer", "rich"),
    "study.config": ("torch", "optuna", "sqlalchemy"),
    "dashboards": ("torch", "torchvision", "typer"),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{name.name}" for name in node.names}
    return names


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
def test_every_file_states_its_purpose(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring that states its purpose"


def test_suggest_is_called_in_one_file() -> None:
    callers = [module_of(path) for path in FILES if ".suggest_" in path.read_text()]
    assert callers == ["study.search.space"]


def test_optunas_private_parts_are_imported_in_one_file() -> None:
    """`storage/optuna_internals.py` says what each is for; an upgrade of Optuna has one place to look at."""
    users = {module_of(path) for path in FILES for name in imports(path) if _is_private(name)}
    assert users <= {"storage.optuna_internals"}


def test_every_package_and_data_file_is_installed() -> None:
    """setuptools installs the packages and data files that pyproject.toml names, and no others."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [path for package in OURS for path in (ROOT / package).rglob("*") if path.is_file()]
    for path in (path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts):
        package = ".".join(path.parts[:-1])
        assert package in setuptools["packages"], package
        patterns = ["*.py", *setuptools["package-data"].get(package, [])]
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), f"{path} is not package data"
    assert all((ROOT / package / "py.typed").is_file() for package in OURS)


def _is_private(name: str) -> bool:
    return name.partition(".")[0] in ("optuna", "optuna_dashboard") and "._" in name
