"""`study launch quick` from the command to the prompt, beside the same study as a plain Optuna script.

    python -m benchmarks.end_to_end [--rounds 5]

Each run is a new process on a new SQLite file; rounds alternate the order. Wall seconds, processor seconds of all its
processes, and the epochs that were trained: pruning depends on the order in which trials end, so the two do not prune
the same ones.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS, PLAIN = "study launch quick", "plain Optuna"


@dataclass(frozen=True)
class Run:
    """Seconds."""

    wall: float
    processor: float
    epochs: int
    start: float = 0.0
    """Until the first trial began."""
    end: float = 0.0
    """After the last trial had ended."""


def run(contestant: str, folder: Path) -> Run:
    file = folder / f"{contestant.split()[0]}.db"
    url = f"sqlite:///{file}"
    command = {
        OURS: [sys.executable, "-P", "-m", "study", "launch", "quick", "--device", "cpu", "--storage", url],
        PLAIN: [sys.executable, "-m", "benchmarks.plain_optuna", url],
    }[contestant]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began, started = time.time(), time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall, ended = time.perf_counter() - started, time.time()
    if status:
        raise SystemExit(f"{contestant} ended with status {status}")
    with sqlite3.connect(file) as connection:
        (epochs,) = connection.execute("SELECT count(*) FROM trial_intermediate_values").fetchone()
        first, last = began, ended
        if contestant == OURS:
            query = "SELECT min(started_at), max(ended_at) FROM trial_attempts"
            first, last = connection.execute(query).fetchone()
    return Run(wall, usage.ru_utime + usage.ru_stime, epochs, first - began, ended - last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    runs: dict[str, list[Run]] = {OURS: [], PLAIN: []}
    for round_ in range(parser.parse_args().rounds):
        for contestant in (OURS, PLAIN) if round_ % 2 == 0 else (PLAIN, OURS):
            with tempfile.TemporaryDirectory() as folder:
                of = run(contestant, Path(folder))
            runs[contestant].append(of)
            load = os.getloadavg()[0]
            print(
                f"round {round_ + 1}, {contestant}: {of.wall:.1f} s, {of.processor:.1f} s of processors, {of.epochs} "
                f"epochs, {of.start:.1f} s before the first trial, {of.end:.1f} s after the last, load {load:.1f}",
                flush=True,
            )
    pairs = list(zip(runs[PLAIN], runs[OURS], strict=True))
    for name, ratios in (
        ("wall", [plain.wall / ours.wall for plain, ours in pairs]),
        ("processors", [plain.processor / ours.processor for plain, ours in pairs]),
        ("wall an epoch", [plain.wall / plain.epochs * ours.epochs / ours.wall for plain, ours in pairs]),
    ):
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}: plain Optuna takes {statistics.median(ratios):.2f} times as long ({spread})")


if __name__ == "__main__":
    main()
