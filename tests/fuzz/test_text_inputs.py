"""Random presets, `--set` assignments and checkpoint rows: each is used or refused in one line, in bounded time.

A failure names its seed: FUZZ_SEED=<seed> FUZZ_SECONDS=0 repeats that input alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from storage.errors import UserError
from storage.queries import attempts
from storage.schema import CHECKPOINTS
from study.cli import app
from study.config import loading
from study.config.loading import load_config, parse_config, preset_names
from study.config.models import StudyConfig
from tests.support.harness import Harness, StopAfter, config_of

SECONDS = float(os.environ.get("FUZZ_SECONDS", 30))
SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**32)))
LONGEST = 30
"""Seconds that one input may take."""

KEYS = (*loading._leaves(load_config("quick").model_dump()), *StudyConfig.model_fields)
NUMBERS = ("0", "-1", "1", "3", "1e308", "1e-320", "9" * 400, "0.1", "nan", "-inf", "1__0", "0x7f", "1_000_000", "2e15")
WORDS = (
    "dynamic",
    "tpe",
    "grid",
    "cma-es",
    "hyperband",
    "none",
    "true",
    "\x1b[31m",
    "日本",
    "a\u202eb",
    "'",
    '"',
    "\ud800",
)
SIGNS = (*"[]{}=.,#\n\t '\"\\", "low", "high", "step", "log", "kind", "\x00")


def value(draw: random.Random, depth: int = 3) -> str:
    """Text that may be a TOML value."""
    kind = draw.random()
    if kind < 0.35 or not depth:
        return draw.choice(NUMBERS)
    if kind < 0.5:
        return draw.choice((draw.choice(WORDS), f'"{draw.choice(WORDS)}"'))
    if kind < 0.65:
        return f"[{', '.join(value(draw, depth - 1) for _ in range(draw.choice((0, 1, 2, 5))))}]"
    if kind < 0.8:
        names = ("low", "high", "step", "log", "kind", "name", draw.choice(KEYS).rpartition(".")[2])
        pairs = (f"{draw.choice(names)}={value(draw, depth - 1)}" for _ in range(draw.choice((1, 2, 3))))
        return f"{{{', '.join(pairs)}}}"
    if kind < 0.83:
        return draw.choice("[{") * draw.choice((10, 1000, 100_000))
    if kind < 0.86:
        return f"[{', '.join(map(str, range(draw.choice((100, 100_000)))))}]"
    if kind < 0.9:
        return f"{{low=0, high={draw.choice(NUMBERS)}, step={draw.choice(NUMBERS)}}}"
    return "".join(draw.choice(SIGNS + NUMBERS + WORDS) for _ in range(draw.choice((1, 3, 10))))


def key(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.8:
        return draw.choice(KEYS)
    if kind < 0.9:
        return f"{draw.choice(KEYS)}.{draw.choice(KEYS + WORDS)}"
    return draw.choice(("", ".", "a.b", ".".join("a" * 5000), draw.choice(WORDS)))


def assignment(draw: random.Random) -> str:
    return draw.choice((f"{key(draw)}={value(draw)}",) * 9 + (value(draw),))


def document(draw: random.Random) -> str:
    """Text that may be a config file."""
    if draw.random() < 0.1:
        return value(draw)
    return "\n".join(
        draw.choice((f"{key(draw)} = {value(draw)}",) * 5 + (f"[{key(draw)}]", value(draw)))
        for _ in range(draw.choice((1, 3, 8)))
    )


def too_long(*_: object) -> None:
    raise TimeoutError(f"more than {LONGEST} s")


@contextmanager
def bounded() -> Iterator[None]:
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)


def repeat(attempt: Callable[[random.Random], str]) -> Counter[str]:
    """Attempts from SEED on until SECONDS have passed, one at least; what came of them."""
    outcomes: Counter[str] = Counter()
    deadline, seed = time.monotonic() + SECONDS, SEED
    while True:
        try:
            with bounded():
                outcomes[attempt(random.Random(seed))] += 1
        except BaseException as error:
            raise AssertionError(f"FUZZ_SEED={seed}") from error
        seed += 1
        if time.monotonic() >= deadline:
            return outcomes


def report(what: str, outcomes: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{outcomes.total()} {what} from FUZZ_SEED={SEED}: {dict(outcomes)}")  # noqa: T201


@pytest.mark.fuzz
@pytest.mark.timeout(int(SECONDS) + 10 * LONGEST)
def test_random_assignments_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    def attempt(draw: random.Random) -> str:
        try:
            if draw.random() < 0.3:
                try:
                    tree = tomllib.loads(document(draw))
                except (ValueError, RecursionError):
                    return "no TOML"
                parse_config(tree)
            else:
                load_config(draw.choice(preset_names()), [assignment(draw) for _ in range(draw.choice((1, 1, 2, 4)))])
        except UserError:
            return "refused"
        return "accepted"

    report("configs", repeat(attempt), capsys)


@pytest.mark.fuzz
@pytest.mark.timeout(int(SECONDS) + 10 * LONGEST)
def test_random_command_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study of a million images an epoch, which the digits refuse at the last: nothing is created."""
    monkeypatch.chdir(tmp_path)

    def attempt(draw: random.Random) -> str:
        more = [word for _ in range(draw.choice((1, 2))) for word in ("--set", assignment(draw))]
        options = ("--name", "--trials", "--budget", "--storage", "--workers", "--device", "--objective", "--threads")
        if draw.random() < 0.5:
            more += [draw.choice(options), value(draw)]
        arguments = ["launch", "quick", *more, "--set", "data.name=digits", "--set", "policy.name=dynamic"]
        arguments += ["--set", "policy.alpha=1000000"]
        monkeypatch.setattr(sys, "argv", ["study", *arguments])
        with pytest.raises(SystemExit) as end:
            app.main()
        printed = capsys.readouterr()
        assert end.value.code == 2, printed.err
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("study: ")
        assert lines[0].isprintable(), lines[0]
        assert list(tmp_path.iterdir()) == []
        return "refused"

    report("command lines", repeat(attempt), capsys)


def damaged(draw: random.Random, payload: bytes) -> bytes:
    """Bytes of the payload changed, or a value of its state replaced."""
    if draw.random() < 0.4:
        changed = bytearray(payload)
        for _ in range(draw.choice((1, 3, 30))):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        if draw.random() < 0.5:
            del changed[draw.randrange(len(changed)) :]
        return bytes(changed)
    content = torch.load(io.BytesIO(payload), weights_only=True)
    place: Any = content["state"]
    where = draw.choice([name for name in place if name not in ("network", "optimizer", "best_network", "step")])
    while isinstance(place[where], dict | list) and len(place[where]) and draw.random() < 0.8:
        place = place[where]
        where = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
    place[where] = draw.choice(
        (None, True, -1, 10**30, float("nan"), "x", [], {}, torch.zeros(3), torch.zeros(2).to_sparse(), (1, 2))
    )
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.fuzz
@pytest.mark.timeout(int(SECONDS) + 10 * LONGEST)
def test_random_checkpoint_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def attempt(draw: random.Random) -> str:
        file = tmp_path / f"{draw.random()}.db"
        config = config_of(policy={"alpha": 60, "beta": 0.5}, data={"train_images": 100}, training={"epochs": 2})
        harness = Harness(f"sqlite:///{file}", config)
        harness.work(StopAfter(4), most=1)
        with harness.storage.engine.begin() as connection:
            stored = connection.scalar(sa.select(CHECKPOINTS.c.payload))
            assert stored is not None
            payload = damaged(draw, stored)
            row = {"payload": payload, "sha256": hashlib.sha256(payload).hexdigest()}
            connection.execute(sa.update(CHECKPOINTS).values(row))
        harness.work()
        ends = attempts(harness.storage.engine, harness.study._study_id)
        assert not [attempt for attempt in ends if attempt.error]
        assert [trial.state.name for trial in harness.study.trials] == ["COMPLETE"]
        lines = [line for line in harness.messages if "not used" in line]
        assert all(line.isprintable() for line in lines)
        harness.storage.engine.dispose()
        file.unlink()
        return "dropped" if lines else "used"

    report("checkpoints", repeat(attempt), capsys)
