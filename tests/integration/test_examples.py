"""Every example file runs, on little data and for a moment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from study.config import extensions
from study.config.loading import load
from tests.support.harness import Harness

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "strong": [
        "data.name=digits", "data.train_images=60", "network.arguments={width=0.125}", "training.images=120",
        "search.replicates=1", "policy.score_epochs=1",
    ],
    "photos": ["training.epochs=1", "search.trials=1", "data.size=32", "policy.alpha='30 %'"],
    "table": ["training.epochs=2", "search.trials=2"],
    "hardest": ["training.epochs=2", "search.replicates=1", "data.train_images=100"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _examples_are_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(extensions.VARIABLE, str(EXAMPLES))
    path = list(sys.path)
    yield
    sys.path[:] = path


def test_all_examples_are_here() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.toml")} == SMALL.keys()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 48x40 pictures in different colours."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for number, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 90, (40, 48, 3), dtype=np.uint8)
                pixels[..., number] += 120
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs(name: str, photos: Path, sqlite_url: str) -> None:
    loaded = load(str(EXAMPLES / f"{name}.toml"), SMALL[name])
    run = Harness(sqlite_url, loaded.config, root=str(photos))
    run.work()
    assert all(trial.state.name in ("COMPLETE", "PRUNED") for trial in run.study.trials)


def test_the_example_network_has_the_size_that_it_says() -> None:
    network = extensions.load("resnet9:make")(10, 3, 32)
    assert round(sum(each.numel() for each in network.parameters()) / 1e6, 1) == 6.6
