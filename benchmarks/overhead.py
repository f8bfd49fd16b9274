"""What a study costs around its training: shares of wall time, a worker's start, decisions; beside stock Optuna.

    python -m benchmarks.overhead [share] [start] [decisions] [--sizes TRIALS …]

Studies of 21, 1,000 and 10,000 finished trials of 200 epochs, 32 more running, in SQLite and PostgreSQL. The training
is a pause of 0.15 s an epoch, a GPU's pace; all else is real: the network and its 18 MB of checkpoint, run_trial, the
writer, the queue. Every measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from storage.engine import database_time

SIZES = (21, 1_000, 10_000)
EPOCHS, SECONDS, STEPS = 200, 0.15, 30
RUNNING = 32
TRIALS_EACH = 2
PRUNING: dict[str, dict[str, Any]] = {
    "median": {"kind": "median"},
    "successive-halving": {"kind": "successive-halving", "min_resource": 1, "reduction_factor": 3},
    "hyperband": {"kind": "hyperband", "min_resource": 1, "reduction_factor": 3},
    "patient": {"kind": "patient", "patience": 20},
}


def config(pruning: str = "median", trials: int = 1) -> Any:
    from study.config.loading import parse_config

    return parse_config(
        {
            "data": {"name": "digits"},
            "policy": {
                "alpha": {"low": 100, "high": 1000, "step": 10},
                "beta": {"low": 0.1, "high": 1.0},
                "delta": {"low": 0.001, "high": 0.1, "log": True},
            },
            "training": {"epochs": EPOCHS, "lr": {"low": 0.0001, "high": 0.01, "log": True}},
            "search": {"sampler": "tpe", "trials": trials},
            "pruning": PRUNING[pruning],
        }
    )


def fill(url: str, finished: int) -> None:
    """A study of `finished` trials (two in three complete, the others pruned at the end), RUNNING trials at epoch 100
    that others hold, and queued trials.
    """
    import sqlalchemy as sa
    from optuna.distributions import distribution_to_json
    from optuna.trial import TrialState

    from storage import schema
    from storage.engine import open_storage
    from study.create import create_study, prepare
    from study.search import space

    def of(column: sa.Column[Any], value: Any) -> sa.Cast[Any]:
        return sa.cast(sa.literal(value, column.type), column.type)

    storage, chance = open_storage(url), random.Random(0)
    settings = config(trials=finished + RUNNING + 100)
    create_study(storage, "s", "overhead", settings, prepare(settings, None))
    spread = {name: space.distribution(settings, name) for name in settings.searched()}
    state = sa.case(
        (schema.TRIALS.c.number >= finished, of(schema.TRIALS.c.state, TrialState.RUNNING)),
        (schema.TRIALS.c.number % 3 == 0, of(schema.TRIALS.c.state, TrialState.PRUNED)),
        else_=of(schema.TRIALS.c.state, TrialState.COMPLETE),
    )
    series = sa.select(sa.literal(1).label("n")).cte(recursive=True)
    series = series.union_all(sa.select(series.c.n + 1).where(series.c.n < EPOCHS))
    # Curves that rise to a top of the trial's own.
    curve = (schema.TRIALS.c.trial_id * 7919 % 1000) / 1000.0 * series.c.n / (series.c.n + 20.0)
    worked = schema.TRIALS.c.number < finished + RUNNING
    reached = sa.and_(worked, sa.or_(schema.TRIALS.c.number < finished, series.c.n <= EPOCHS // 2))
    attributes: dict[str, Any] = dict.fromkeys(
        ("best_epoch", "epochs", "images", "seen", "train_seconds", "validation_seconds"), 200
    )
    attributes |= {
        "precision": "bf16",
        "device": "some device",
        "host": "some host",
        "versions": {"study": "1", "torch": "2"},
    }
    with storage.engine.begin() as connection:
        connection.execute(
            sa.update(schema.TRIALS).where(worked).values(state=state, datetime_start=sa.func.current_timestamp())
        )
        done = sa.update(schema.TRIALS).where(schema.TRIALS.c.number < finished)
        connection.execute(done.values(datetime_complete=sa.func.current_timestamp()))
        every = schema.TRIALS.join(series, reached)
        finite = of(schema.REPORTS.c.intermediate_value_type, schema.REPORT_TYPE.FINITE)
        report = sa.select(schema.TRIALS.c.trial_id, series.c.n, curve, finite).select_from(every)
        names = ["trial_id", "step", "intermediate_value", "intermediate_value_type"]
        connection.execute(sa.insert(schema.REPORTS).from_select(names, report))
        epoch: dict[str, sa.ColumnElement[Any]] = {c.name: sa.literal(0) for c in schema.EPOCHS.c if not c.nullable}
        epoch |= {
            "trial_id": schema.TRIALS.c.trial_id,
            "epoch": series.c.n,
            "accuracy": curve,
            "kind": sa.literal("keep"),
        }
        connection.execute(
            sa.insert(schema.EPOCHS).from_select(list(epoch), sa.select(*epoch.values()).select_from(every))
        )
        value = sa.select(
            schema.REPORTS.c.trial_id,
            sa.literal(0),
            schema.REPORTS.c.intermediate_value,
            of(schema.TRIAL_VALUES.c.value_type, schema.VALUE_TYPE.FINITE),
        ).where(schema.REPORTS.c.step == EPOCHS)
        names = ["trial_id", "objective", "value", "value_type"]
        connection.execute(sa.insert(schema.TRIAL_VALUES).from_select(names, value))
        params, attribute_rows, rungs = [], [], []
        for id, number in connection.execute(
            sa.select(schema.TRIALS.c.trial_id, schema.TRIALS.c.number).where(worked)
        ).all():
            for name, one in spread.items():
                drawn = chance.uniform(one.low, one.high)  # type: ignore[attr-defined]
                drawn = drawn // 10 * 10 if name == "alpha" else drawn
                text = distribution_to_json(one)
                params.append({"trial_id": id, "param_name": name, "param_value": drawn, "distribution_json": text})
            if number < finished:
                attribute_rows += [
                    {"trial_id": id, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()
                ]
            for rung in range(5):
                text = json.dumps(chance.random())
                rungs.append({"trial_id": id, "key": f"completed_rung_{rung}", "value_json": text})
        for table, rows in (
            (schema.TRIAL_PARAMS, params),
            (schema.TRIAL_ATTRS, attribute_rows),
            (schema.TRIAL_SYSTEM_ATTRS, rungs),
        ):
            connection.execute(sa.insert(table), rows)
        held = sa.and_(worked, schema.TRIALS.c.number >= finished)
        lease: dict[str, sa.ColumnElement[Any]] = {
            "trial_id": schema.TRIALS.c.trial_id,
            "token": sa.literal(1),
            "owner": sa.literal("somebody"),
        }
        lease |= {"expires_at": database_time(storage.engine) + 86400.0, "attempts": sa.literal(0)}
        connection.execute(sa.insert(schema.LEASES).from_select(list(lease), sa.select(*lease.values()).where(held)))
    if storage.engine.dialect.name == "postgresql":
        with storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")


def peak_mb() -> float:
    """The most memory this process has had; unlike getrusage's, not what its parent had when it forked."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def share(url: str) -> list[dict[str, float]]:
    """Trials one after the other in one worker; seconds of each by what they went into."""
    import torch

    from storage.queue import Queue
    from study.search.pruners import make_pruner
    from study.training.policies import KEEP
    from study.training.trainer import EpochResult, Trainer
    from study.trial import runner
    from study.trial.runner import run_trial
    from study.worker import worker
    from study.worker.stop_monitor import StopMonitor

    clock = {"training": 0.0, "asked": 0.0, "began": 0.0, "ended": 0.0}

    class Simulated(Trainer):
        """The real state and a pause for an epoch."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            clock["asked"] = time.perf_counter()
            super().__init__(*arguments, **options)
            for parameter in self.network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()  # Adam's part of the checkpoint

        def run(self) -> Iterator[EpochResult | None]:
            clock["began"] = time.perf_counter()
            while not self.over:
                for _ in range(STEPS):
                    started = time.perf_counter()
                    time.sleep(SECONDS / STEPS)
                    clock["training"] += time.perf_counter() - started
                    yield None
                n = len(self.history) + 1
                self.history.append(
                    EpochResult(n, 0.9 + 0.0001 * n, 0.0, 1, 0.0, 0.0, 0.0, 1, None, KEEP, 0.0, 0.0, 0.0)
                )
                yield self.history[-1]
            clock["ended"] = time.perf_counter()

    runner.Trainer = Simulated  # type: ignore[attr-defined]
    storage, study, settings = worker._join(url, "s", StopMonitor())
    worker.preload_trials(study, settings)
    data = worker.load_data(study, settings, None, torch.device("cpu"))
    study.pruner = make_pruner(settings, len(data.train_labels))
    queue = Queue(storage.engine, study._study_id)
    fixed = {"alpha": 500, "beta": 0.5, "delta": 0.01, "lr": 0.001}
    runner.make_trainer(settings, data, fixed, 0)  # torch's own start: seconds, once a process
    shares = []
    with tempfile.TemporaryDirectory() as fallback:
        for _ in range(TRIALS_EACH):
            clock["training"] = 0.0
            started, cpu, all_cpu = time.perf_counter(), time.thread_time(), time.process_time()
            lease = queue.claim()
            assert lease is not None
            claimed = time.perf_counter()
            with queue.renewing(lease):
                run_trial(study, settings, data, queue, lease, StopMonitor(), Path(fallback))
            over, used, all_used = time.perf_counter(), time.thread_time() - cpu, time.process_time() - all_cpu
            among = clock["ended"] - clock["began"] - clock["training"]
            parts = {"claim": claimed - started, "ask": clock["asked"] - claimed}
            parts |= {"build": clock["began"] - clock["asked"], "between steps": among, "end": over - clock["ended"]}
            shares.append(
                parts | {"training": clock["training"], "wall": over - started, "cpu": used, "all_cpu": all_used}
            )
    return shares


def start(url: str, stock: bool) -> dict[str, float]:
    """From an imported program to the first parameters and the first decision."""
    import optuna

    from storage.cached_storage import CachedStorage
    from storage.engine import open_storage
    from study.search import space
    from study.search.pruners import make_pruner
    from study.search.samplers import make_sampler
    from tests.support.harness import stock_pruner

    settings = config()
    before, started = peak_mb(), time.perf_counter()
    storage = open_storage(url, create=False)
    study = optuna.load_study(study_name="s", storage=storage if stock else CachedStorage(storage, lean=True))
    study.pruner = (stock_pruner if stock else make_pruner)(settings, 1000)
    number = next(trial.number for trial in study.get_trials(deepcopy=False) if trial.state.name == "WAITING")
    trial_id = study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    storage.set_trial_state_values(trial_id, optuna.trial.TrialState.RUNNING)
    study.sampler = make_sampler(settings, number)
    trial = optuna.Trial(study, trial_id)
    space.suggest(trial, settings)
    asked, memory = time.perf_counter(), peak_mb()
    trial.report(0.9, 1)
    study.pruner.prune(study, study._storage.get_trial(trial_id))
    decided = time.perf_counter()
    return {
        "to the first parameters, s": asked - started,
        "its memory, MB": memory - before,
        "first decision, s": decided - asked,
        "memory then, MB": peak_mb() - before,
        "imports' memory, MB": before,
    }


def decisions(url: str, stock: bool) -> dict[str, list[float]]:
    """Milliseconds of the decisions about epochs 1 to 100 of one trial; now and then another trial ends."""
    import optuna
    from optuna.trial import TrialState

    from storage.cached_storage import CachedStorage
    from storage.engine import open_storage
    from storage.queue import Queue
    from study.search.pruners import make_pruner
    from study.trial.writer import TrialWriter
    from tests.support.harness import stock_pruner

    milliseconds: dict[str, list[float]] = {}
    storage = open_storage(url, create=False)
    study = optuna.load_study(study_name="s", storage=storage if stock else CachedStorage(storage, lean=True))
    queue = Queue(storage.engine, study._study_id)
    others = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]
    for kind in PRUNING:
        settings = config(kind)
        study.pruner = (stock_pruner if stock else make_pruner)(settings, 1000)
        lease = queue.claim()
        assert lease is not None
        writer, times = TrialWriter(study, queue, lease, identity={}), []
        for epoch in range(1, 101):
            if epoch % 40 == 0:
                storage.set_trial_state_values(others.pop(0)._trial_id, TrialState.COMPLETE, [0.5])
            value = 0.9 + 0.0001 * epoch
            study._storage.set_trial_intermediate_value(lease.trial_id, epoch, value)
            began = time.perf_counter()
            if stock:
                study.pruner.prune(study, study._storage.get_trial(lease.trial_id))
            else:
                writer._ask_pruner({epoch: value})
            times.append(1000 * (time.perf_counter() - began))
        milliseconds[kind] = times[1:]  # the first reads the study, which is part of the start
        queue.finish(lease, TrialState.COMPLETE, [0.9])
    return milliseconds


def child(*arguments: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.overhead", "child", *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def show_share(url: str, title: str) -> None:
    for i, parts in enumerate(child("share", url)):
        wall, training, cpu = parts.pop("wall"), parts.pop("training"), parts.pop("cpu")
        every = parts.pop("all_cpu")
        rest = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in parts.items())
        shares = (
            f"{100 * (wall - training) / wall:.2f} % | {100 * cpu / training:.2f} % | {100 * every / training:.2f} %"
        )
        print(f"| {title} | {i + 1} | {shares} | {rest} ms |", flush=True)


def show_start(url: str, title: str) -> None:
    for stock in (False, True):
        runs = [child("start", url, "stock" * stock) for _ in range(1 if stock and "10,000" in title else 3)]
        cells = " | ".join(
            f"{statistics.median(run[key] for run in runs):,.1f} ({min(run[key] for run in runs):,.1f}–"
            f"{max(run[key] for run in runs):,.1f})"
            for key in runs[0]
        )
        print(f"| {title} | {'stock' if stock else 'ours'} | {cells} |", flush=True)


def show_decisions(url: str, title: str) -> None:
    for stock in (False, True):
        for kind, times in child("decisions", url, "stock" * stock).items():
            ordered = sorted(times)
            cells = f"{statistics.median(times):.2f} | {ordered[int(0.9 * len(times))]:.2f} | {ordered[-1]:.1f}"
            print(f"| {title} | {kind} | {'stock' if stock else 'ours'} | {cells} |", flush=True)


SCENES: dict[str, tuple[Callable[[str, str], None], str]] = {
    "share": (
        show_share,
        "| study | its worker's trial | not training | CPU of its thread | of its process | not training: wall |",
    ),
    "start": (
        show_start,
        "| study | | first parameters after, s | for MB | first decision, s | then MB | imports, MB |",
    ),
    "decisions": (show_decisions, "| study | pruner | | median, ms | 90 % under, ms | longest, ms |"),
}


def main() -> None:
    from tests.support.postgres import Postgres

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="*", choices=list(SCENES), metavar="SCENE", help="default: all")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="TRIALS", help="finished trials")
    options = parser.parse_args()
    server = Postgres()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for size in options.sizes:
                urls = {"SQLite": f"sqlite:///{folder}/{size}.db", "PostgreSQL": server.new_database()}
                for kind, url in urls.items():
                    fill(url, size)
                    for name in options.scenes or SCENES:
                        show, heads = SCENES[name]
                        print(heads + "\n|" + " --- |" * (heads.count("|") - 1), flush=True)
                        show(url, f"{size:,}, {kind}")
    finally:
        server.stop()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["child"]:
        scene, url, *kind = sys.argv[2:]
        if scene == "share":
            print(json.dumps(share(url)))
        else:
            print(json.dumps({"start": start, "decisions": decisions}[scene](url, kind == ["stock"])))
    else:
        main()
