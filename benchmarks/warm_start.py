"""Whether another study's trials help a sampler: TPE from nothing beside TPE with `--after`, on the digits.

    python -m benchmarks.warm_start [--seeds 10] [--trials 20] [--source 16] [--processes 2]

A study searches learning rate, batch size, weight decay and beta1 of Adam; a trial trains a small network for four
epochs on 300 of the images each. For each seed there are two studies from nothing with different seeds, so that there
is something fair to compare with (a study reaches its own best for certain), and studies informed by another one:

- same: another study of the very same settings, with another seed;
- static: one that trained on a fixed subset, a different policy;
- a third: one on a third of the images an epoch, whose accuracies are lower.

Everything is real but the worker, which is in this process. All studies see the same data.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from storage.engine import open_storage
from storage.optuna_internals import study_id_of
from storage.queue import Queue
from study.after import informing
from study.config.loading import parse_config
from study.create import create_study, load_study, prepare
from study.search.pruners import make_pruner
from study.training.device import be_deterministic
from study.trial.runner import run_trial
from study.worker.stop_monitor import StopMonitor
from study.worker.worker import load_data

SOURCES: dict[str, dict[str, Any]] = {
    "same": {},
    "static": {"name": "static"},
    "a third": {"alpha": 100},
}
"""What the policy of the other study differs in."""
POINTS = (3, 5, 10, 20)
"""Trials after which the best so far is compared."""
NOTHING = "nothing"
FAR = 10_000
"""Between the seeds of two studies."""


def config(trials: int, seed: int, sampler: str = "tpe", **policy: Any) -> Any:
    return parse_config(
        {
            "data": {"name": "digits", "holdout": 0.25},
            "network": {"width": 0.125},
            "policy": {"name": "dynamic", "alpha": 300, "beta": 0.5} | policy,
            "training": {
                "epochs": 4,
                "batch_size": {"low": 16, "high": 128, "log": True},
                "lr": {"low": 0.0003, "high": 0.1, "log": True},
                "weight_decay": {"low": 1e-6, "high": 0.01, "log": True},
                "beta1": {"low": 0.5, "high": 0.99},
            },
            "search": {"sampler": sampler, "trials": trials, "seed": seed},
            "artifacts": {"keep": "none"},
        }
    )


def run(url: str, name: str, options: Any, after: str | None = None) -> list[float]:
    """The accuracies of the study's trials, in their order."""
    storage = open_storage(url)
    prepared = prepare(options, None)
    informed = None if after is None else informing(storage, name, after, prepared)
    create_study(storage, name, "benchmark", prepared.config, prepared, informed=informed)
    study, stored = load_study(storage, name)
    data = load_data(study, stored, None, torch.device("cpu"))
    study.pruner = make_pruner(stored, len(data.train_labels))
    queue = Queue(storage.engine, study_id_of(study))
    while (lease := queue.claim()) is not None:
        with tempfile.TemporaryDirectory() as folder:
            run_trial(study, stored, data, queue, lease, StopMonitor(), Path(folder))
    storage.engine.dispose()
    return [trial.value if trial.value is not None else 0.0 for trial in study.get_trials(deepcopy=False)]


def reached(accuracies: list[float], goal: float) -> int:
    """The number of trials until one is at least as good as `goal`; one more than there are: none is."""
    return next((n for n, accuracy in enumerate(accuracies, 1) if accuracy >= goal), len(accuracies) + 1)


def of_seed(seed: int, trials: int, source: int) -> tuple[float, dict[str, list[float]]]:
    """The best of a study from nothing, and the accuracies of the studies to compare, by what informed them."""
    be_deterministic(True)
    torch.set_num_threads(1)
    again, found = seed + FAR, {}
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/study.db"
        goal = max(run(url, "goal", config(trials, seed)))
        found[NOTHING] = run(url, "again", config(trials, again))
        for arm, policy in SOURCES.items():
            run(url, f"source {arm}", config(source, seed + 2 * FAR, **policy))
            found[arm] = run(url, arm, config(trials, again), after=f"source {arm}")
    return goal, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--source", type=int, default=16, help="trials of the study that informs")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    began = time.monotonic()
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        each = functools.partial(of_seed, trials=options.trials, source=options.source)
        results = list(pool.map(each, range(options.seeds)))
    goals = [goal for goal, _ in results]
    found = {arm: [studies[arm] for _, studies in results] for arm in (NOTHING, *SOURCES)}
    print(
        f"{options.seeds} seeds, {options.trials} trials each, informed by {options.source}; the goal is the best of a "
        f"study from nothing, {100 * statistics.fmean(goals):.2f} % on average; {time.monotonic() - began:.0f} s\n"
    )
    points = [point for point in POINTS if point <= options.trials]
    heads = ["informed by", "trials to the goal, median", "goal reached", *(f"best after {n}, %" for n in points)]
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for arm, studies in found.items():
        counts = [reached(accuracies, goal) for accuracies, goal in zip(studies, goals, strict=True)]
        in_time = sum(count <= options.trials for count in counts)
        median = statistics.median(counts)
        cells = [arm, f"{median:g}" if median <= options.trials else f"over {options.trials}",
                 f"{in_time} of {options.seeds}"]  # fmt: skip
        cells += [f"{100 * statistics.fmean(max(accuracies[:n]) for accuracies in studies):.2f}" for n in points]
        print(f"| {' | '.join(cells)} |")
    print("\nGain over the study from nothing of the same seed, points (standard error):")
    for arm in SOURCES:
        gains = []
        for n in points:
            pairs = zip(found[arm], found[NOTHING], strict=True)
            each_gain = [100 * (max(warm[:n]) - max(cold[:n])) for warm, cold in pairs]
            error = statistics.stdev(each_gain) / len(each_gain) ** 0.5 if len(each_gain) > 1 else 0.0
            gains.append(f"after {n} {statistics.fmean(each_gain):+.2f} ({error:.2f})")
        print(f"{arm}: {', '.join(gains)}")


if __name__ == "__main__":
    main()
