"""What a verb loads before it answers: nothing heavy that it has no use for."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import study_process
from tests.support.harness import Harness, config_of

PROGRAM = """
import json, sys
from study.cli.app import main as run
try:
    run()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(sys.modules)))
"""
HEAVY = {"torch", "torchvision", "scipy", "plotly", "sklearn", "PIL"}


def loaded(*arguments: str, cwd: Path) -> set[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200, check=True)
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_help_and_presets_load_no_database_and_no_torch(tmp_path: Path) -> None:
    for arguments in (("--help",), ("launch", "--help"), ("presets",)):
        assert not loaded(*arguments, cwd=tmp_path) & (HEAVY | {"optuna", "sqlalchemy", "numpy"})


def test_status_loads_no_torch(tmp_path: Path) -> None:
    Harness(f"sqlite:///{tmp_path / 'study.db'}", config_of())
    for verb in (("status", "s"), ("status", "s", "--json", "-"), ("list",)):
        modules = loaded(*verb, cwd=tmp_path)
        assert not modules & (HEAVY | {"fsspec"})
        assert "optuna" in modules  # it did look


def test_a_worker_loads_no_compiler(tmp_path: Path) -> None:
    """torch.compile is 160 MB and more than a second of every worker's start."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    Harness(url, config_of(training={"epochs": 1}))
    modules = loaded("worker", "s", "--storage", url, "--device", "cpu", cwd=tmp_path)
    assert "torch.nn" in modules
    assert "torch._dynamo" not in modules


@pytest.mark.parametrize(
    "closed", ["<&- >&- 2>&-", *(pytest.param(c, marks=pytest.mark.slow) for c in (">&-", "2>&-"))]
)
def test_streams_may_be_closed(closed: str, tmp_path: Path) -> None:
    """As some daemons start programs."""
    Harness(f"sqlite:///{tmp_path / 'study.db'}", config_of())
    for verb in ("list", "worker s --device cpu --log-file log.txt"):
        command = f"exec {sys.executable} -m study {verb} {closed}"
        assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=200, check=False).returncode == 0
    assert "trial 3 is complete" in (tmp_path / "log.txt").read_text()


SEARCHES = """
import gc, sys
from study.__main__ import main
try:
    main()
except SystemExit:
    print(*gc.get_threshold())
"""


def test_only_verbs_that_soon_end_search_less_for_garbage(tmp_path: Path) -> None:
    """An own network may make a cycle a step, with its activations in it."""
    usual = " ".join(map(str, gc.get_threshold()))
    for verb, same in (("worker", True), ("predict", True), ("bench", True), ("status", False)):
        command = [sys.executable, "-c", SEARCHES, verb, "--help"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=True)
        assert (ran.stdout.splitlines()[-1] == usual) == same, verb


@pytest.mark.parametrize(("more", "threads"), [((), 1), pytest.param(("--threads", "2"), 2, marks=pytest.mark.slow)])
def test_a_worker_by_hand_has_as_many_threads_as_one_of_a_launch(
    tmp_path: Path, more: tuple[str, ...], threads: int
) -> None:
    """And not torch's default of one a core, with which a few workers on one machine slow each other down."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    harness = Harness(url, config_of(policy={"alpha": 60, "beta": 0.5}, training={"epochs": 1}))
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = study_process("worker", "s", "--storage", url, "--device", "cpu", *more, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert harness.study.trials[0].user_attrs["device"].endswith(f", {threads} threads)")
