"""What studies of ten and a hundred thousand finished trials cost: commands, claims, a worker's start, report, queries.

    python -m benchmarks.many_trials [commands] [claims] [start] [report] [sizes] [plans] [samplers]
        [--trials N …] [--databases sqlite postgresql]

The studies are those of `benchmarks.overhead`: 200 epochs a trial, four searched parameters. `samplers` needs none: it
asks Optuna's samplers for the parameters of one trial among N others that are in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.overhead import config, fill, peak_mb
from tests.support.postgres import Postgres

SIZES = (10_000, 99_800)
CLAIMS = 200
SAMPLED = (100, 300, 1_000, 2_000)
LARGE = 1_000
"""Rows that a query may read without being named."""


COMMAND = """
import sys
from benchmarks.overhead import peak_mb
from study.__main__ import main
try:
    main()
finally:
    print(peak_mb(), file=sys.stderr)
"""
"""Tells its own memory: what wait4 tells of a child is at least what its parent had when it forked."""


def command(*arguments: str, peak: bool = False) -> tuple[float, float, float]:
    """Seconds of wall, processor seconds, and with `peak` the most MB of memory of `study …`."""
    started = time.perf_counter()
    program = ["-c", COMMAND] if peak else ["-m", "study"]
    process = subprocess.Popen(
        [sys.executable, *program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = process.stderr.read().splitlines()
    _, code, used = os.wait4(process.pid, 0)
    assert code == 0, arguments
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, float(lines[-1]) if peak else 0.0


def commands(url: str) -> None:
    for verb in (("status", "s"), ("list",)):
        runs = [command(*verb, "--storage", url) for _ in range(5)]
        wall, cpu = (statistics.median(run[i] for run in runs) for i in (0, 1))
        print(f"  study {verb[0]}: {cpu:.2f} processor seconds, {wall:.2f} s", flush=True)


def claims(url: str) -> None:
    from storage.engine import open_storage
    from storage.queue import Queue

    storage = open_storage(url, create=False)
    queue = Queue(storage.engine, 1)
    took = []
    for _ in range(CLAIMS):
        started = time.perf_counter()
        lease = queue.claim()
        took.append(1000 * (time.perf_counter() - started))
        assert lease is not None
        queue.release(lease)
    storage.engine.dispose()
    print(f"  claim: p50 {statistics.median(took):.1f} ms, p99 {sorted(took)[int(0.99 * CLAIMS)]:.1f} ms", flush=True)


def start(url: str) -> None:
    runs = [child("start", url) for _ in range(3)]
    for what in runs[0]:
        print(f"  worker's start, {what}: {statistics.median(run[what] for run in runs):.2f}", flush=True)


def started(url: str) -> dict[str, float]:
    """Of a process of its own: Optuna's part of a start apart from ours."""
    import optuna
    from optuna.trial import TrialState

    from storage.cached_storage import CachedStorage
    from storage.engine import open_storage
    from study.search import space
    from study.search.pruners import make_pruner
    from study.search.samplers import make_sampler

    settings, before, began = config(), peak_mb(), time.perf_counter()
    storage = open_storage(url, create=False)
    study = optuna.load_study(study_name="s", storage=CachedStorage(storage, lean=True))
    study.pruner = make_pruner(settings, 1000)
    trials = study.get_trials(deepcopy=False)
    read, memory = time.perf_counter(), peak_mb()
    waiting = next(trial for trial in trials if trial.state == TrialState.WAITING)
    sampler = make_sampler(settings, waiting.number)
    for name in settings.searched():
        sampler.sample_independent(study, waiting, name, space.distribution(settings, name))
    sampled, with_sampler = time.perf_counter(), peak_mb()
    waiting = study._storage.get_trial(waiting._trial_id)
    waiting.intermediate_values[1] = 0.9
    study.pruner.prune(study, waiting)
    decided = time.perf_counter()
    return {
        "reading, s": read - began,
        "reading, MB": memory - before,
        "TPE's four parameters, s": sampled - read,
        "TPE, MB": with_sampler - memory,
        "first decision (median), s": decided - sampled,
    }


def report(url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        wall, cpu, memory = command("report", "s", "--storage", url, "--html", str(page), peak=True)
        size = page.stat().st_size / 1e6
    print(f"  report: {wall:.1f} s, {cpu:.1f} processor seconds, {memory:.0f} MB, a page of {size:.1f} MB", flush=True)


def sizes(url: str) -> None:
    """Bytes of each table and of its indexes."""
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            size = Path(str(engine.url.database)).stat().st_size
            print(f"  {size / 1e6:,.0f} MB in all")
            return
        rows = connection.exec_driver_sql(
            "SELECT relname, n_live_tup, pg_relation_size(relid), pg_indexes_size(relid) FROM pg_stat_user_tables "
            "WHERE n_live_tup > 1000 ORDER BY 3 DESC"
        )
        for name, count, table, indexes in rows:
            print(f"  {name}: {count:,} rows, {table / 1e6:,.0f} MB, indexes {indexes / 1e6:,.0f} MB")
    engine.dispose()


def plans(url: str) -> None:
    """How the database finds what the statements of everyday work ask for."""
    from optuna import load_study
    from optuna.trial import TrialState

    from dashboards import status
    from storage import budgets, checkpoints, stop_requests
    from storage.cached_storage import CachedStorage
    from storage.engine import open_engine, open_storage
    from storage.queue import Queue

    storage = open_storage(url, create=False)
    engine, reading = storage.engine, open_engine(url)
    queue, cached = Queue(engine, 1), CachedStorage(storage, lean=True)
    study = load_study(study_name="s", storage=cached)
    study.get_trials(deepcopy=False)
    row: dict[str, Any] = {
        "epoch": 1,
        "accuracy": 0.1,
        "loss": 1.0,
        "images": 500,
        "train_seconds": 1.0,
        "validation_seconds": 1.0,
    }
    row |= {"kind": "keep", "k": 0, "beta": 0.0}

    with _explained(engine, "claim"):
        lease = queue.claim()
    assert lease is not None
    scenes: dict[str, Callable[[], object]] = {
        "report of an epoch": lambda: queue.record(lease, [row], {1: 0.1}),
        "look at what is new": lambda: study.get_trials(deepcopy=False),
        "one step of all trials": lambda: cached.reports_at(1, 7),
        "checkpoint, looked for": lambda: checkpoints.load(queue, lease),
        "stop monitor": lambda: stop_requests.read_controls(engine, 1),
        "adding up": lambda: budgets.spending(engine, 1),
        "workers counted": lambda: queue.live_leases(60.0),
        "trials left": lambda: queue.unfinished(),
        "end of a trial": lambda: queue.finish(lease, TrialState.COMPLETE, [0.1], {"epochs": 1}),
    }
    for name, call in scenes.items():
        with _explained(engine, name):
            call()
    for name, call in {
        "study status": lambda: status.read(reading, "s"),
        "study list": lambda: status.summaries(reading),
    }.items():
        with _explained(reading, name):
            call()
    engine.dispose()


@contextmanager
def _explained(engine: sa.Engine, name: str) -> Iterator[None]:
    """Print how the statements of the block find their rows."""
    asked: dict[str, Any] = {}

    def note(_: Any, __: Any, statement: str, parameters: Any, ___: Any, many: bool) -> None:
        if statement.split(None, 1)[0] in ("SELECT", "UPDATE", "INSERT", "DELETE", "WITH"):
            asked.setdefault(statement, parameters[0] if many else parameters)

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    whole: dict[str, None] = {}
    with engine.connect() as connection:
        for statement, parameters in asked.items():
            if engine.dialect.name == "sqlite":
                steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                whole |= dict.fromkeys(step for *_, step in steps if step.startswith("SCAN"))
            else:
                (((plan, *_),),) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
                whole |= dict.fromkeys(_read_whole(plan["Plan"]))
        connection.rollback()
    print(f"  {name}: {len(asked)} statements; read whole: {'; '.join(whole) or 'nothing'}", flush=True)


def _read_whole(plan: dict[str, Any]) -> Iterator[str]:
    if plan["Node Type"] == "Seq Scan" and plan["Plan Rows"] > LARGE:
        yield str(plan["Relation Name"])
    for below in plan.get("Plans", ()):
        yield from _read_whole(below)


def samplers() -> None:
    """Seconds in which Optuna's samplers choose the four parameters of one trial, by how many others have finished."""
    import optuna
    from optuna.trial import TrialState, create_trial

    from study.config.loading import parse_config
    from study.search import space
    from study.search.samplers import make_sampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plain = config().model_dump(exclude_unset=True)
    for kind in ("tpe", "gp", "cma-es"):
        settings = parse_config(plain | {"search": {"sampler": kind, "trials": 10}})
        spread = {name: space.distribution(settings, name) for name in settings.searched()}
        for count in SAMPLED:
            study = optuna.create_study(direction="maximize")
            random = optuna.samplers.RandomSampler(seed=0)
            for number in range(count):
                drawn = {
                    name: random.sample_independent(study, None, name, one)  # type: ignore[arg-type]
                    for name, one in spread.items()
                }
                value = (number * 7919 % 1000) / 1000
                study.add_trial(
                    create_trial(state=TrialState.COMPLETE, params=drawn, distributions=spread, value=value)
                )
            times = []
            for number in (count, count + 1):
                study.sampler = make_sampler(settings, number)
                began = time.perf_counter()
                study.ask(spread)
                times.append(time.perf_counter() - began)
            print(f"  {kind}, {count:,} finished trials: {min(times):.2f} to {max(times):.2f} s", flush=True)


def child(*arguments: str) -> Any:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.many_trials", "child", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


SCENES: dict[str, Callable[[str], None]] = {
    "commands": commands, "claims": claims, "start": start, "report": report, "sizes": sizes, "plans": plans,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="*", choices=[*SCENES, "samplers"], metavar="SCENE", help="default: all")
    parser.add_argument("--trials", nargs="+", type=int, default=SIZES, metavar="N", help="finished trials")
    parser.add_argument("--databases", nargs="+", choices=("sqlite", "postgresql"), default=("sqlite", "postgresql"))
    options = parser.parse_args()
    scenes = options.scenes or [*SCENES, "samplers"]
    if "samplers" in scenes:
        samplers()
    server = Postgres()
    try:
        for size in options.trials if set(scenes) - {"samplers"} else ():
            for database in options.databases:
                with tempfile.TemporaryDirectory() as folder:
                    url = f"sqlite:///{folder}/study.db" if database == "sqlite" else server.new_database()
                    fill(url, size)
                    print(f"{size:,} trials, {database}, load {os.getloadavg()[0]:.1f}", flush=True)
                    for name in scenes:
                        if name != "samplers":
                            SCENES[name](url)
    finally:
        server.stop()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:3] == ["child", "start"]:
        print(json.dumps(started(sys.argv[3])))
    else:
        main()
