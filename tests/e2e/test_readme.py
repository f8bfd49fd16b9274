"""What the README promises exists: its commands parse, its settings are there, its two commands are CI's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import study.cli.app  # noqa: F401
from study.cli.options import app
from study.config.loading import load_config, preset_names
from study.config.models import StudyConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LINES = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("study ")])
def test_commands_parse(line: str) -> None:
    verb, *arguments = shlex.split(line)[1:]
    context = VERBS[verb].make_context(verb, arguments)
    if verb == "launch":
        given = context.params
        trials = [f"search.trials={given['trials']}"] if given["trials"] else []
        load_config(given["preset"], [*(given["assignments"] or []), *trials])


def test_the_two_commands_are_real_and_run_by_ci() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in LINES
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_setting_is_in_the_table() -> None:
    for section, field in StudyConfig.model_fields.items():
        if section == "description":
            continue
        assert f"`{section}`" in README or f"`{section}," in README, section
        for key in getattr(field.annotation, "model_fields", {}):
            assert f"`{key}`" in README, f"{section}.{key}"


def test_every_preset_says_what_to_expect() -> None:
    for name in preset_names():
        head = (ROOT / "study" / "config" / "presets" / f"{name}.toml").read_text().partition("description")[0]
        assert len(head.splitlines()) >= 4
        assert "TO-BE" not in head


def test_pictures_are_there() -> None:
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file(), picture


def test_nothing_is_left_to_fill() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        assert "TO-FILL" not in path.read_text(), path
