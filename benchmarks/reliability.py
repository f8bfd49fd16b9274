"""What is lost and what is run twice: ours beside stock Optuna, and real trainings under kills.

    python -m benchmarks.reliability [grid] [errors] [budget] [crowd] [chaos] [terminate] [restarts] [hosts]

Simulated trainings (no torch) where only the bookkeeping is in question, real ones on digits where the numbers are.
Stock Optuna is `study.optimize` with GridSampler, heartbeats with RetryHeartbeatStaleTrialCallback, MaxTrialsCallback.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage.engine import open_storage
from storage.enqueue import QUEUE_POSITION, enqueue_trials
from storage.queries import progress
from storage.queue import Queue
from storage.schema import EPOCHS
from tests.support.hosts import Database, Hosts
from tests.support.postgres import Postgres

FORK = multiprocessing.get_context("fork")
GRID = [{"x": float(x), "y": float(y)} for x, y in itertools.product(range(4), range(6))]
SPACE: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 3), "y": FloatDistribution(0, 5)}
EPOCH = {"loss": 0.0, "images": 1, "train_seconds": 0.0, "validation_seconds": 0.0, "kind": "keep", "k": 0, "beta": 0.0}

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore")


def ours_create(url: str, count: int, grid: bool) -> None:
    storage = open_storage(url)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize", load_if_exists=True)
    cells = GRID if grid else [{}] * count
    trials = [
        create_trial(
            state=TrialState.WAITING,
            params=cell,
            distributions=SPACE if cell else {},
            user_attrs={QUEUE_POSITION: position},
        )
        for position, cell in enumerate(cells)
    ]
    enqueue_trials(storage.engine, study._study_id, {}, trials)


def ours_worker(url: str, seed: int, error_rate: float, count: int, grid: bool) -> None:
    ours_create(url, count, grid)
    storage = open_storage(url)
    study = optuna.load_study(study_name="s", storage=storage, sampler=optuna.samplers.TPESampler(seed=seed))
    queue, chance = Queue(storage.engine, study._study_id, max_attempts=20), random.Random(seed)
    while (lease := queue.claim()) is not None:
        study._thread_local.cached_all_trials = None
        study.get_trials(deepcopy=False)
        trial = optuna.Trial(study, lease.trial_id)
        x, y = trial.suggest_float("x", 0, 3), trial.suggest_float("y", 0, 5)
        for n in (1, 2, 3):
            time.sleep(0.02)
            queue.record(lease, [EPOCH | {"epoch": n, "accuracy": 0.1 * n}], {n: 0.1 * n})
        if chance.random() < error_rate:
            queue.release(lease, error="RuntimeError: one in four")
            continue
        queue.finish(lease, TrialState.COMPLETE, [x + y])


def stock_worker(url: str, seed: int, error_rate: float, count: int, grid: bool) -> None:
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    storage = optuna.storages.RDBStorage(
        url.replace("postgresql:", "postgresql+psycopg:"),
        heartbeat_interval=1,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=20),
    )
    axes = {"x": [0.0, 1.0, 2.0, 3.0], "y": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
    sampler = optuna.samplers.GridSampler(axes, seed=seed) if grid else optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(study_name="s", storage=storage, sampler=sampler, load_if_exists=True)
    chance = random.Random(seed)

    def objective(trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", 0, 3), trial.suggest_float("y", 0, 5)
        for n in (1, 2, 3):
            time.sleep(0.02)
            trial.report(0.1 * n, n)
        if chance.random() < error_rate:
            raise RuntimeError("one in four")
        return x + y

    callbacks = [] if grid else [optuna.study.MaxTrialsCallback(count, states=(TrialState.COMPLETE,))]
    study.optimize(objective, callbacks=callbacks, catch=(RuntimeError,))


def crowd(
    worker: Callable[..., None], url: str, workers: int, *arguments: Any
) -> tuple[list[optuna.trial.FrozenTrial], int]:
    """The trials that `workers` processes leave behind, and how many of the processes died."""
    processes = [FORK.Process(target=worker, args=(url, seed, *arguments)) for seed in range(workers)]
    with open(os.devnull, "w") as null:
        error, sys.stderr = sys.stderr, null
        for process in processes:
            process.start()
        sys.stderr = error
    for process in processes:
        process.join(300)
    storage = url.replace("postgresql:", "postgresql+psycopg:")
    return optuna.load_study(study_name="s", storage=storage).trials, sum(p.exitcode != 0 for p in processes)


def fresh(backend: str, server: Postgres, folder: Path) -> str:
    return server.new_database() if backend == "postgresql" else f"sqlite:///{folder}/{random.getrandbits(60):x}.db"


def describe(trials: list[FrozenTrial], died: int, grid: bool) -> str:
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    cells = Counter(tuple(sorted(t.params.items())) for t in complete)
    text = f"{len(trials)} trials, {len(complete)} complete"
    if grid:
        text += f", {len(cells)} of 24 cells, {sum(n > 1 for n in cells.values())} run twice"
    return text + (f", {died} workers died" if died else "")


def bookkeeping(title: str, workers: int, error_rate: float, count: int, grid: bool, repetitions: int) -> None:
    print(f"\n{title}")
    with tempfile.TemporaryDirectory() as name:
        server = Postgres()
        try:
            for backend in ("sqlite", "postgresql"):
                for who, worker in (("stock Optuna", stock_worker), ("ours", ours_worker)):
                    for _ in range(repetitions):
                        url = fresh(backend, server, Path(name))
                        if who == "stock Optuna":  # gently: its tables made before the crowd comes
                            optuna.create_study(
                                study_name="s", storage=url.replace("postgresql:", "postgresql+psycopg:")
                            )
                        trials, died = crowd(worker, url, workers, error_rate, count, grid)
                        print(f"  {backend:<10} {who:<12} {describe(trials, died, grid)}", flush=True)
        finally:
            server.stop()


def crowd_worker(url: str, seed: int, reports: int, pause: float, times: Any) -> None:
    storage = open_storage(url)
    study_id = storage.get_study_id_from_name("s")
    queue = Queue(storage.engine, study_id)
    lease, taken = queue.claim(), []
    assert lease is not None
    time.sleep(pause * random.random())
    for n in range(1, reports + 1):
        started = time.perf_counter()
        queue.record(lease, [EPOCH | {"epoch": n, "accuracy": 0.5}], {n: 0.5})
        taken.append(time.perf_counter() - started)
        time.sleep(max(0.0, pause - taken[-1]))
    queue.finish(lease, TrialState.COMPLETE, [0.5])
    times.put(taken)


def many() -> None:
    print("\nMany workers, simulated trainings")
    reports_at_once("sqlite", 64, 20, 1.0)
    reports_at_once("postgresql", 200, 20, 1.0)


def reports_at_once(backend: str, workers: int, reports: int, pause: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        server = Postgres()
        try:
            url = fresh(backend, server, Path(name))
            ours_create(url, workers, grid=False)
            times: Any = FORK.SimpleQueue()
            processes = [
                FORK.Process(target=crowd_worker, args=(url, i, reports, pause, times)) for i in range(workers)
            ]
            for process in processes:
                process.start()
            taken = np.concatenate([times.get() for _ in range(workers)])
            for process in processes:
                process.join()
            died = sum(p.exitcode != 0 for p in processes)
            p50, p99 = 1000 * np.quantile(taken, [0.5, 0.99])
            print(
                f"  {backend}: {workers} workers, a report every {pause:g} s each, {len(taken)} reports: {died} died, "
                f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {1000 * taken.max():.0f} ms",
                flush=True,
            )
        finally:
            server.stop()


STUDY = [
    *("--set", "network.width=0.125", "--set", "data.train_images=300", "--set", "policy.alpha=[100, 150, 200]"),
    *("--set", "policy.beta=[0.2, 0.4, 0.6, 0.8]", "--set", "training.epochs=24", "--set", "training.batch_size=50"),
    *("--set", "pruning=none", "--set", "checkpoint.every_seconds=0.1", "--set", "lease.seconds=2"),
    *("--set", "lease.max_attempts=1000", "--device", "cpu"),
]
"""12 real trainings of 24 epochs, some seconds each."""


def start(url: str, *arguments: str, inside: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`study` with arguments, in the network namespace `inside` if one is named."""
    environment = os.environ | {"STUDY_STORAGE": url, "OMP_NUM_THREADS": "1"}
    command = [*inside, sys.executable, "-m", "study", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def launch(url: str, *more: str) -> None:
    process = start(url, "launch", "quick", *STUDY, *more)
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(error)


def outcome(url: str) -> list[Any]:
    storage = open_storage(url, create=False, reading=True)
    study = optuna.load_study(study_name="quick", storage=storage)
    timeless = [c for c in EPOCHS.c if not c.name.endswith("seconds")]
    with storage.engine.connect() as connection:
        rows = connection.execute(sa.select(*timeless).order_by(EPOCHS.c.trial_id, EPOCHS.c.epoch)).all()
    ids = {t._trial_id: t.number for t in study.trials}
    return [(t.number, t.state, t.params, t.values, t.intermediate_values) for t in study.trials] + [
        (ids[row.trial_id], *row[1:]) for row in rows
    ]


def kills(title: str, how: signal.Signals, least: int) -> None:
    """Two workers, killed again and again at random moments and replaced, until all trials are finished."""
    print(f"\n{title}")
    with tempfile.TemporaryDirectory() as name:
        quiet, wild = f"sqlite:///{name}/quiet.db", f"sqlite:///{name}/wild.db"
        launch(quiet)
        launch(other := f"sqlite:///{name}/other.db", "--set", "search.seed=1")
        chance, killed, repeated = random.Random(0), 0, 0
        first = start(wild, "launch", "quick", *STUDY)  # creates the study; its worker is killed with it
        time.sleep(9)
        first.send_signal(how)
        first.communicate()
        storage = open_storage(wild, create=False)
        study_id = storage.get_study_id_from_name("quick")
        workers: list[subprocess.Popen[str]] = []
        while progress(storage.engine, study_id).finished < 12:
            workers = [w for w in workers if w.poll() is None]
            while len(workers) < 2:
                workers.append(start(wild, "worker", "quick", "--device", "cpu"))
            time.sleep(chance.uniform(4, 9))  # of which starting takes about 4
            victim = chance.choice(workers)
            if victim.poll() is None:
                victim.send_signal(how)
                victim.wait()
                killed += 1
            if how == signal.SIGTERM:
                repeated += behind(storage.engine, study_id)
        for worker in workers:
            worker.communicate()
        same = outcome(wild) == outcome(quiet)
        print(f"  {killed + 1} kills (at least {least} wanted); table equal to the quiet run's: {same}; ", end="")
        print(f"to that of another seed (control): {outcome(wild) == outcome(other)}", end="")
        print(f"; whole epochs lost: {repeated}" if how == signal.SIGTERM else "", flush=True)


def behind(engine: sa.Engine, study_id: int) -> int:
    """Epochs stored but not in the checkpoint, over the released trials."""
    query = sa.text(
        "SELECT coalesce(sum(s.done - coalesce(c.epoch, 0)), 0) FROM trials t "
        "JOIN trial_leases l ON l.trial_id = t.trial_id "
        "JOIN (SELECT trial_id, max(epoch) AS done FROM trial_epochs GROUP BY trial_id) s ON s.trial_id = t.trial_id "
        "LEFT JOIN trial_checkpoints c ON c.trial_id = t.trial_id "
        "WHERE t.study_id = :study AND t.state = 'RUNNING' AND l.expires_at = 0"
    )
    with engine.connect() as connection:
        return int(connection.execute(query, {"study": study_id}).scalar_one())


def restarts() -> None:
    print("\nPostgreSQL restarted three times (pg_ctl restart -m immediate) under 8 workers with real trainings")
    with tempfile.TemporaryDirectory() as name:
        launch(quiet := f"sqlite:///{name}/quiet.db")
        server = Postgres()
        try:
            url = server.new_database()
            process = start(url, "launch", "quick", *STUDY, "--set", "lease.seconds=30", "--workers", "8")
            time.sleep(30)
            for _ in range(3):
                server.control("restart", "-m", "immediate")
                time.sleep(6)
            _, log = process.communicate(timeout=400)
            if process.returncode:
                print(log[-2000:])
            same = outcome(url) == outcome(quiet)
            print(f"  exit code {process.returncode}, workers that died: {log.count(' died ')}, table equal: {same}")
        finally:
            server.stop()


def hosts() -> None:
    """Needs root."""
    print("\nTwo hosts and a database in network namespaces; the first host's cable out for 60 s")
    with tempfile.TemporaryDirectory() as folder, Hosts("db", "w1", "w2") as net:
        launch(quiet := f"sqlite:///{folder}/quiet.db")
        server = Database(net, "db")
        try:
            url = server.new_database()
            first = start(url, "launch", "quick", *STUDY, "--set", "lease.seconds=10", inside=net.at("w1"))
            time.sleep(12)
            second = start(url, "worker", "quick", "--device", "cpu", inside=net.at("w2"))
            time.sleep(8)
            net.cut("w1")
            time.sleep(60)
            net.mend("w1")
            (_, log), (_, other_log) = first.communicate(timeout=300), second.communicate(timeout=300)
            lost = log.count("has been taken over; this worker drops it")
            check = "from benchmarks.reliability import outcome; import sys; print(outcome(sys.argv[1]))"
            inside = [*net.at("w2"), sys.executable, "-c", check, url]
            table = subprocess.run(inside, capture_output=True, text=True, check=True).stdout.strip()
            print(
                f"  exit codes {first.returncode} and {second.returncode}; trials that the cut-off host lost to the "
                f"other and dropped: {lost}; workers that died: {(log + other_log).count(' died ')}; "
                f"table equal to a quiet run's: {table == str(outcome(quiet))}",
                flush=True,
            )
        finally:
            server.stop()


SCENES: dict[str, Callable[[], None]] = {
    "grid": lambda: bookkeeping("A grid of 24 cells, 16 workers", 16, 0.0, 24, True, 5),
    "errors": lambda: bookkeeping("The same with 25 % of attempts raising, 8 workers", 8, 0.25, 24, True, 2),
    "budget": lambda: bookkeeping("A budget of 20 trials, TPE, 8 workers", 8, 0.0, 20, False, 3),
    "crowd": many,
    "chaos": lambda: kills("kill -9 at random moments, real trainings", signal.SIGKILL, 20),
    "terminate": lambda: kills("SIGTERM at random moments, real trainings", signal.SIGTERM, 20),
    "restarts": restarts,
    "hosts": hosts,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="*", choices=list(SCENES), metavar="SCENE", help="default: all")
    for scene in parser.parse_args().scenes or SCENES:
        SCENES[scene]()
