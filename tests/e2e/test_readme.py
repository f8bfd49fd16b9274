"""The README: every command is run in order in one folder, its output is what the demo prints, its promises exist."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
from PIL import Image

from storage.queries import progress
from study import exit_codes
from study.cli.app import app
from study.config.loading import load_config, preset_names
from tests.e2e.test_command import there, wait_for

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PARSED_ONLY = "<!-- Needs a GPU"
"""Begins the comment before a block that is not run here."""
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


class Line(NamedTuple):
    command: str
    comment: str


def lines_of(blocks: list[str]) -> list[Line]:
    """The commands of bash blocks, each with the comment behind it; continued lines are joined."""
    parts = [line.partition(" #") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [Line(command.strip(), comment.strip()) for command, _, comment in parts if command.strip()]


_BLOCKS = re.findall(rf"(^{PARSED_ONLY}[^\n]*\n)?^```bash\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
RUN = lines_of([block for mark, block in _BLOCKS if not mark])
PARSED = lines_of([block for mark, block in _BLOCKS if mark])


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    (body,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    return [line.strip().replace("$(BIN)/", "") for line in body.splitlines()]


SHORTER = ("network.width=0.125", "training.batch_size=128", "training.epochs=2")
"""What these tests are about is what a command does, not how well it trains: every launch gets these settings, where it
does not say otherwise itself. `make test-slow` runs all commands as they stand.
"""


def shorter(command: str) -> str:
    if not command.startswith("study launch"):
        return command
    return " ".join([command, *(f"--set {each}" for each in SHORTER if each.partition("=")[0] not in command)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return newcomers_folder(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def another_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return newcomers_folder(tmp_path_factory.mktemp("readme"))


def newcomers_folder(place: Path) -> Path:
    """Where a newcomer types, with a folder of photographs of his own."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 100), ("test", 20)):
        for number, name in enumerate(("cat", "dog", "owl")):
            images = place / "photos" / split / name
            images.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(70 * number)
                Image.fromarray(pixels).save(images / f"{i:03}.png")
    (place / "examples").symlink_to(ROOT / "examples")  # as in a clone
    (place / "bin").mkdir()
    command = place / "bin" / "study"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m study "$@"\n')
    command.chmod(0o755)
    return place


def typed(command: str, folder: Path) -> subprocess.Popen[str]:
    """The command in a shell that finds `study`, as in an activated environment."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths}
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def succeeds(command: str, folder: Path) -> str:
    """All that it prints."""
    with typed(command, folder) as process:
        out, errors = process.communicate(timeout=900)
    assert process.returncode == exit_codes.OK, errors
    return errors + out


def interrupted_after_the_first_epoch(command: str, name: str, folder: Path) -> None:
    url = f"sqlite:///{folder / 'study.db'}"
    with typed(f"exec {command}", folder) as process:
        wait_for(lambda: (study := there(url, name)) and progress(*study).epochs, seconds=600)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == exit_codes.INTERRUPTED, errors
    assert f"study resume {name}" in errors


def serves_until_interrupted(command: str, folder: Path) -> None:
    with typed(f"exec {command} --port 0", folder) as process:  # 8080 may belong to somebody else here
        assert process.stderr is not None
        address = re.search(r"http://[\w.]+:\d+", process.stderr.readline())
        assert address
        with urllib.request.urlopen(f"{address[0]}/dashboard/", timeout=60) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.mark.parametrize("line", RUN, ids=[line.command for line in RUN])
def test_every_command_works_when_typed_in_order(line: Line, folder: Path) -> None:
    works(line, folder, shorter)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("line", RUN, ids=[line.command for line in RUN])
def test_every_command_works_as_it_stands(line: Line, another_folder: Path) -> None:
    works(line, another_folder, str)


def works(line: Line, folder: Path, changed: Callable[[str], str]) -> None:
    if line.command == "make demo":
        printed = "".join(succeeds(changed(command), folder) for command in recipe("demo"))
        (block,) = re.findall(r"^```text\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
        lines = block.splitlines()
        assert len(lines) == 6
        for promised in lines:
            assert shape(promised) in [shape(each) for each in printed.splitlines()]
        assert (folder / "report.html").stat().st_size > 0
    elif line.command == "make test":
        assert recipe("test")
        assert "make test" in (ROOT / ".ci" / "run").read_text()
    elif line.command == "source .venv/bin/activate":
        assert "BIN := .venv/bin" in MAKEFILE
    elif "Ctrl-C" not in line.comment:
        succeeds(changed(line.command), folder)
    elif line.command == "study dashboard":
        serves_until_interrupted(line.command, folder)
    else:  # with more epochs: it must not end before it is interrupted
        name = shlex.split(line.command)[shlex.split(line.command).index("--name") + 1]
        interrupted_after_the_first_epoch(changed(line.command).replace("epochs=2", "epochs=6"), name, folder)


def shape(line: str) -> str:
    """A line of output without what depends on the processor: numbers, and whether a trial is pruned."""
    states = r"(?:N (?:complete|pruned)(?:, )?)+"
    numbers = re.sub(r"\d[\d.,]*\d|\d", "N", re.sub(r"\b(complete|pruned)\b", "complete", " ".join(line.split())))
    return re.sub(states, "N complete", numbers) if "trials:" in line else numbers


def test_shape_distinguishes_outputs() -> None:
    assert shape("best 89.44 %: trial 3, alpha 400, beta 0.1") == shape("best 9.4 %: trial 11, alpha 40, beta 1")
    assert shape("best 89.44 %: trial 3, alpha 400, beta 0.1") != shape("best: trial 3, alpha 400, beta 0.1")


@pytest.mark.parametrize("line", PARSED, ids=[line.command for line in PARSED])
def test_commands_that_need_a_gpu_parse(line: Line) -> None:
    check_command(line.command)


def check_command(command: str) -> None:
    """The command's options exist, and so does the config that it launches."""
    program, verb, *arguments = shlex.split(command)
    assert program == "study"
    context = VERBS[verb].make_context(verb, arguments)
    if verb == "launch":
        given = context.params
        trials = [f"search.trials={given['trials']}"] if given["trials"] else []
        load_config(given["source"], [*(given["assignments"] or []), *trials])


def test_it_is_short_and_fits_a_screen() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


def test_it_names_the_paper_and_has_one_picture() -> None:
    title = "Entrenamiento dinámico de redes convolucionales profundas"
    for word in ("Frausto-Pérez", "Rojas-Domínguez", title, "2019"):
        assert word in README
    assert len(re.findall(r"!\[.*?\]\(", README)) == 1


def test_every_preset_states_what_to_expect() -> None:
    for name in preset_names():
        head = (ROOT / "study" / "config" / "presets" / f"{name}.toml").read_text().partition("description")[0]
        assert len(head.splitlines()) >= 4
        assert "TO-BE" not in head
