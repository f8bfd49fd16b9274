"""A folder of pictures and a ResNet: launched from a file, killed twice, resumed, reported, and the model used."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.test_command import study, wait_for

STUDY = """
description = "How little of my photographs does an epoch need?"

[data]
name = "imagefolder"
root = "photos"
size = 32
augment = ["flip"]

[network]
name = "torchvision:resnet18"

[policy]
alpha = { low = "50 %", high = "100 %" }
beta = { low = 0.1, high = 1.0 }

[training]
epochs = 4
batch_size = 16
optimizer = "sgd"
lr = { low = 0.005, high = 0.05, log = true }
schedule = "cosine"

[search]
sampler = "tpe"
trials = 2

[checkpoint]
every_seconds = 0

[lease]
seconds = 5
"""
COLOURS = ("blue", "green", "red")


def picture(number: int, draws: np.random.Generator) -> Image.Image:
    pixels = draws.integers(0, 100, (96, 96, 3), dtype=np.uint8)
    pixels[..., number] += 120
    return Image.fromarray(pixels)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for number, name in enumerate(COLOURS):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(number, draws).save(folder / f"{i}.png")
    (tmp_path / "new").mkdir()
    for number, name in enumerate(COLOURS):
        picture(number, draws).save(tmp_path / "new" / f"{name}.png")
    (tmp_path / "mine.toml").write_text(STUDY)
    return tmp_path


def started(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "study", *arguments],
        cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def done(home: Path, *arguments: str) -> str:
    process = study(*arguments, cwd=home)
    assert process.returncode == 0, process.stderr
    return process.stdout


def epochs_stored(home: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{home / 'study.db'}?mode=ro", uri=True, timeout=60)) as connection:
            return int(connection.execute("SELECT count(*) FROM trial_epochs").fetchone()[0])
    except sqlite3.OperationalError:  # no file or no tables yet
        return 0


@pytest.mark.slow  # by default each step has a test: test_readme.py, test_command.py, test_own_parts.py, test_model.py
def test_from_a_folder_of_pictures_to_a_model(home: Path) -> None:
    assert "network: torchvision:resnet18" in done(home, "check", "mine.toml")
    launcher = started(home, "launch", "mine.toml", "--workers", "1", "--device", "cpu")
    wait_for(lambda: epochs_stored(home) >= 1, seconds=240)
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 130, err
    assert f"study resume mine --data-root {home / 'photos'}" in err

    before = epochs_stored(home)
    worker = started(home, "worker", "mine", "--data-root", "photos", "--device", "cpu")
    wait_for(lambda: epochs_stored(home) > before or worker.poll() is not None, seconds=240)
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate()

    done(home, "resume", "mine", "--data-root", "photos", "--workers", "1", "--device", "cpu")
    assert epochs_stored(home) == 8  # nothing lost, nothing twice
    assert "2 complete" in done(home, "report", "mine")
    assert "torchvision:resnet18" in done(home, "model", "mine", "--output", "best.safetensors")
    assert (home / "best.safetensors").stat().st_size > 40_000_000
    assert 'name = "torchvision:resnet18"' in done(home, "model", "mine", "--toml")
    answers = done(home, "predict", "best.safetensors", "new", "--csv").splitlines()
    assert [line.split(",")[0] for line in answers] == ["file", *(f"new/{name}.png" for name in COLOURS)]
    assert "balanced accuracy" in done(home, "evaluate", "mine", "--data-root", "photos").lower()
