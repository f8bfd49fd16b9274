"""How many workers one PostgreSQL serves: 1 to 256 simulated trainings, their statements and waiting times.

    python -m benchmarks.scale [workers] [nodes] [bouncer] [growth] [polls] [checkpoints] [short] [copies]

A worker is a forked process with the queue, the sampler, the lease and the stop monitor of a real one; its training is
a pause. It waits for every report, which a real one leaves to a thread, so its idle share is an upper bound.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import random
import resource
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.trial import TrialState

from benchmarks import overhead
from storage import checkpoints, transfer
from storage.budgets import recent_spending, spending
from storage.cached_storage import CachedStorage
from storage.engine import close, open_storage
from storage.optuna_internals import storage_of
from storage.queue import Queue
from storage.schema import SPENDING, TRIALS
from storage.stop_requests import read_controls
from study.config.loading import parse_config
from study.create import PreparedData, create_study, load_study
from study.training.policies import KEEP
from study.training.trainer import EpochResult
from study.trial import writer as writer_module
from study.trial.runner import ask
from study.trial.writer import TrialWriter
from study.worker.stop_monitor import StopMonitor
from tests.support.bouncer import Bouncer, usable
from tests.support.hosts import NETWORK, Hosts
from tests.support.postgres import Postgres

FORK = multiprocessing.get_context("fork")
CROWDS = (1, 4, 16, 64, 128, 192, 256)
CROWDS_OF_HOSTS = (3, 15, 63, 126)
CONNECTIONS = 10
EPOCHS, EPOCH_SECONDS, LASTING = 4, 5.0, 40.0
ROW = {
    "loss": 1.0, "images": 5000, "train_seconds": 1.5, "validation_seconds": 0.4, "kind": "type1", "k": 500,
    "beta": 0.1, "selection_seconds": 0.01, "seen": 5000,
}  # fmt: skip


@dataclass
class Tally:
    """What a worker did."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"claim": [], "report": [], "start": [], "end": []})
    statements: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    trained: float = 0.0
    lasted: float = 0.0


def new_study(server: Postgres, trials: int) -> str:
    """The URL of a new database with the study \"s\"."""
    url = server.new_database()
    config = parse_config(
        {
            "policy": {"alpha": {"low": 100, "high": 1000}, "beta": {"low": 0.1, "high": 1.0}},
            "search": {"sampler": "random", "trials": trials},
            "training": {"epochs": EPOCHS},
        }
    )
    data = PreparedData(
        "0" * 64, {"train": 1294, "validation": 144, "test": 359}, (1294, 144, 359), config, (), (32, 32, 3), None
    )
    create_study(open_storage(url), "s", "scale", config, data)
    return url


def worker(url: str, ready: Any, ends: Any, results: Any, net: Hosts | None = None, host: str = "") -> None:
    """One simulated worker, until the common end."""
    if net is not None:
        net.enter(host)
    doing, tally = threading.local(), Tally()
    storage = open_storage(url, create=False)
    engine = storage.engine

    @sa.event.listens_for(engine, "before_cursor_execute")
    def _count(*_: Any) -> None:
        thread = threading.current_thread().name
        tally.statements["stop monitor" if thread == "stop-monitor" else getattr(doing, "what", "lease")] += 1

    study, config = load_study(storage, "s")
    queue = Queue(engine, study._study_id, seconds=config.lease.seconds)

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        doing.what, started = what, time.monotonic()
        yield
        tally.seconds[what].append(time.monotonic() - started)

    ready.wait()
    tally.statements.clear()
    StopMonitor().watch(engine, study._study_id)
    time.sleep(random.uniform(0, EPOCH_SECONDS))  # no two clusters' workers start in one second
    started, end = time.monotonic(), ends.value
    while time.monotonic() < end:
        with timed("claim"):
            lease = queue.claim()
        assert lease is not None
        with queue.renewing(lease):
            with timed("start"):
                ask(study, config, lease, 1_000_000)
                checkpoints.load(queue, lease)
                queue.stored_progress(lease.trial_id)
            for epoch in range(1, EPOCHS + 1):
                time.sleep(EPOCH_SECONDS)
                tally.trained += EPOCH_SECONDS
                with timed("report"):
                    queue.record(lease, [ROW | {"epoch": epoch, "accuracy": 0.1 * epoch}], {epoch: 0.1 * epoch})
            with timed("end"):
                queue.finish(lease, TrialState.COMPLETE, [0.5], {"best_epoch": EPOCHS, "epochs": EPOCHS})
        tally.finished += 1
    tally.lasted = time.monotonic() - started
    results.put(tally)
    results.close()
    results.join_thread()


def ask_server(url: str, query: str) -> list[Any]:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        return list(connection.exec_driver_sql(query))


def cpu_seconds(server: Postgres) -> float:
    """Of the server's processes, up to now."""
    postmaster = (server.server.pgdata / "postmaster.pid").read_text().split()[0]
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if postmaster in (fields[1], entry.parent.name):  # of those that have ended the postmaster knows
                ticks += sum(map(int, fields[11:13] if fields[1] == postmaster else fields[11:15]))
    return ticks / 100


def crowd(server: Postgres, workers: int, net: Hosts | None = None, through: Callable[[str], str] = str) -> list[Tally]:
    """`net`: hosts for the workers; `through`: the URL by which they reach the database of a URL."""
    url = new_study(server, workers * 4 + 20)
    ready, ends, results = FORK.Barrier(workers + 1), FORK.Value("d", 0.0), FORK.Queue()
    processes = [
        FORK.Process(target=worker, args=(through(url), ready, ends, results, net, f"w{i % 3 + 1}"), daemon=True)
        for i in range(workers)
    ]
    gc.freeze()  # else every child's collector copies the pages that it could share
    for process in processes:
        process.start()
    while ready.n_waiting < workers:
        time.sleep(0.1)
    (before,), cpu = (
        ask_server(url, "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"),
        cpu_seconds(server),
    )
    ends.value = time.monotonic() + LASTING
    ready.wait()
    time.sleep(LASTING * 0.8)
    (connections,) = ask_server(
        url,
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'study' AND datname = current_database()",
    )
    used = (cpu_seconds(server) - cpu) / (LASTING * 0.8)
    tallies = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    time.sleep(1)
    (after,) = ask_server(url, "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")
    lasted = max(tally.lasted for tally in tallies)
    worked = sum(tally.lasted for tally in tallies)
    statements = sum((tally.statements for tally in tallies), Counter[str]())
    line = f"{workers:>7} {sum(t.finished for t in tallies) / lasted:>10.2f} {sum(statements.values()) / worked:>10.2f}"
    line += f" {(after[0] - before[0]) / lasted:>9.0f} {connections[0] / workers:>6.1f} {used:>6.2f}"
    for what in ("claim", "report"):
        each = np.concatenate([tally.seconds[what] for tally in tallies]) * 1000
        line += f" {np.percentile(each, 50):>7.0f} {np.percentile(each, 99):>7.0f}"
    print(line + f" {1 - sum(t.trained for t in tallies) / worked:>7.1%} {os.getloadavg()[0]:>5.0f}", flush=True)
    return tallies


def heads() -> None:
    print(f"{EPOCHS} epochs of {EPOCH_SECONDS:g} s a trial, {LASTING:g} s and until the last is finished; times in ms")
    print("workers finished/s st./worker/s  commits/s conn/w. cores  claim50 claim99  rep.50  rep.99    idle  load")


def nodes() -> None:
    """The crowd spread over three hosts, the server on a fourth: network namespaces, so needs root."""
    print("\nOn three hosts:", end=" ")
    heads()
    with Hosts("db", "w1", "w2", "w3") as net:
        here = os.open("/proc/self/ns/net", os.O_RDONLY)
        net.enter("db")
        server = Postgres("0.0.0.0", NETWORK)
        try:
            for count in CROWDS_OF_HOSTS:
                crowd(server, count, net, lambda url: url.replace("127.0.0.1", net.address("db")))
        finally:
            server.stop()
            Hosts.move(here)


def bouncer() -> None:
    """The crowd behind a pgbouncer with ten connections to the server, as docs/measurements/scale.md sets it up."""
    if not usable():
        print("\nno pgbouncer of 1.21 or newer here: left out")
        return
    print(f"\nThrough pgbouncer, {CONNECTIONS} connections:", end=" ")
    heads()
    server = Postgres()
    try:
        between = Bouncer(server, CONNECTIONS)
        try:
            for count in CROWDS[2:-1]:
                crowd(server, count, through=between.through)
        finally:
            between.stop()
    finally:
        server.stop()


def workers() -> None:
    heads()
    server = Postgres()
    try:
        for count in CROWDS:
            tallies = crowd(server, count)
        statements = sum((tally.statements for tally in tallies), Counter[str]())
        times = {what: sum(len(t.seconds[what]) for t in tallies) for what in tallies[0].seconds}
        each = ", ".join(f"{what} {statements[what] / times[what]:.1f}" for what in times)
        polls = statements["stop monitor"] / sum(t.lasted for t in tallies)
        print(f"statements of the last crowd, each: {each}; stop monitor {polls:.2f} a second")
    finally:
        server.stop()


def growth() -> None:
    """Rows and bytes of 50 trials of 200 epochs, and what updating leaves behind."""
    server = Postgres()
    try:
        url = new_study(server, 50)
        storage = open_storage(url, create=False)
        study, _ = load_study(storage, "s")
        queue = Queue(storage.engine, study._study_id)
        while (lease := queue.claim()) is not None:
            for epoch in range(1, 201):
                queue.record(lease, [ROW | {"epoch": epoch, "accuracy": 0.001 * epoch}], {epoch: 0.001 * epoch})
            queue.finish(lease, TrialState.COMPLETE, [0.2], {"best_epoch": 200, "epochs": 200})
        storage.engine.dispose()
        time.sleep(2)  # the server's statistics come late
        query = """SELECT relname, n_live_tup, n_tup_upd, n_tup_hot_upd, n_dead_tup, autovacuum_count,
            pg_total_relation_size(relid) FROM pg_stat_user_tables WHERE relname IN
            ('trial_epochs', 'trial_intermediate_values', 'trial_leases', 'trial_attempts', 'trials') ORDER BY 7 DESC"""
        print("\n50 trials of 200 epochs: table, live rows, updates (HOT), dead rows, autovacuums, bytes with indexes")
        for row in ask_server(url, query):
            print("  ", *row)
    finally:
        server.stop()


def polls() -> None:
    """A claim, and what one look of the stop monitor consists of, in studies of many attempts."""
    server = Postgres()
    try:
        print("\nMedians of 30, ms: a claim and its release, a look for a request to stop, adding up, the last sum")
        for attempts in (1_000, 10_000, 100_000):
            trials = min(attempts, 10_000)
            url = new_study(server, trials)
            storage = open_storage(url, create=False)
            engine, study_id = storage.engine, load_study(storage, "s")[0]._study_id
            queue = Queue(engine, study_id)
            ask_server_write(
                url,
                "INSERT INTO trial_attempts (trial_id, token, owner, device, started_at, ended_at, images, joules) "
                "SELECT trial_id, -n, 'o', 'd', 1000 + trial_id, 1100 + trial_id, 5, 0 FROM trials, "
                f"generate_series(1, {attempts // trials}) n",
            )
            calls: dict[str, Callable[[], object]] = {
                "claim": lambda queue=queue: queue.release(queue.claim()),  # type: ignore[misc]
                "orders": lambda engine=engine, study_id=study_id: read_controls(engine, study_id),  # type: ignore[misc]
                "spent": lambda engine=engine, study_id=study_id: spending(engine, study_id),  # type: ignore[misc]
            }
            medians = {name: median_ms(call) for name, call in calls.items()}
            recent_spending(engine, study_id)
            with engine.begin() as connection:
                connection.execute(sa.update(SPENDING).values(took=5.0))
            medians["lately"] = median_ms(lambda engine=engine, study_id=study_id: recent_spending(engine, study_id))  # type: ignore[misc]
            text = ", ".join(f"{name} {ms:.1f}" for name, ms in medians.items())
            print(f"  {attempts:>7} attempts, {trials:>6} unfinished trials: {text}", flush=True)
            engine.dispose()
    finally:
        server.stop()


def median_ms(call: Callable[[], object]) -> float:
    took = []
    for _ in range(30):
        started = time.monotonic()
        call()
        took.append(time.monotonic() - started)
    return float(np.median(took) * 1000)


def ask_server_write(url: str, statement: str) -> None:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)


def saving() -> None:
    """A checkpoint of the whole network (weights and Adam's two moments) into the database."""
    import torch

    from study.training.networks import CNN

    size = 3 * 4 * sum(parameter.numel() for parameter in CNN(10, torch.Generator()).parameters())
    server = Postgres()
    try:
        url = new_study(server, 10)
        storage = open_storage(url, create=False)
        study, _ = load_study(storage, "s")
        queue = Queue(storage.engine, study._study_id)
        lease = queue.claim()
        assert lease is not None
        payload, took = np.random.default_rng(0).bytes(size), []
        for _ in range(10):
            started = time.monotonic()
            checkpoints.save(queue, lease, 1, payload)
            took.append(time.monotonic() - started)
        (there,) = ask_server(url, "SELECT pg_total_relation_size('trial_checkpoints')")
        print(
            f"\nA checkpoint of {size / 1e6:.1f} MB: {np.median(took) * 1000:.0f} ms (median of 10); its table after "
            f"10 of them: {there[0] / 1e6:.0f} MB"
        )
    finally:
        server.stop()


SHORT_WORKERS, SHORT_SECONDS, SHORT_EPOCHS = 16, 0.15, 100


def short_worker(url: str, ready: Any, end: Any) -> None:
    """Trials of short epochs through the writer of a real worker."""
    storage = open_storage(url, create=False)
    study, config = load_study(storage, "s")
    queue = Queue(storage.engine, study._study_id, seconds=config.lease.seconds)
    ready.wait()
    time.sleep(random.uniform(0, 1))
    while time.monotonic() < end.value:
        lease = queue.claim()
        assert lease is not None
        with queue.renewing(lease), TrialWriter(study, queue, lease, identity={}) as writer:
            for n in range(1, SHORT_EPOCHS + 1):
                time.sleep(SHORT_SECONDS)
                result = EpochResult(n, 0.5, 1.0, 5000, 0.1, 0.05, 0.0, 5000, None, KEEP, 0.0, 0.0, 0.0)
                writer.write_epoch(result, {n: 0.5}, last=n == SHORT_EPOCHS)
                if time.monotonic() > end.value:
                    break
            writer.flush()
        if n == SHORT_EPOCHS:
            queue.finish(lease, TrialState.COMPLETE, [0.5], {"best_epoch": 1, "epochs": SHORT_EPOCHS})
        else:
            queue.release(lease)
    storage.engine.dispose()


def one_after_the_other(server: Postgres) -> float:
    """Milliseconds of the server for a look at the other trials and the epochs of a second."""
    storage = open_storage(new_study(server, 20), create=False)
    study, _ = load_study(storage, "s")
    cached, queue = storage_of(study), Queue(storage.engine, study._study_id)
    assert isinstance(cached, CachedStorage)
    lease, epoch, times = queue.claim(), 0, 500
    assert lease is not None
    cpu = cpu_seconds(server)
    for _ in range(times):
        with cached.one_look():
            cached.reports_at(study._study_id, 1)
        rows = [ROW | {"epoch": epoch + i, "accuracy": 0.1} for i in range(1, 8)]
        queue.record(lease, rows, {row["epoch"]: 0.1 for row in rows})  # type: ignore[misc]
        epoch += len(rows)
    used = cpu_seconds(server) - cpu  # before the connection's process ends, and its time with it
    storage.engine.dispose()
    return 1000 * used / times


def short() -> None:
    """Epochs of 0.15 s: the server's cores, by how long the writers wait between two transactions; and what the same
    transactions cost one after the other in one connection, without changes of process between them.
    """
    print(f"\n{SHORT_WORKERS} workers, epochs of {SHORT_SECONDS} s, cores of the server for 1,000 such workers:")
    server = Postgres()
    try:
        for pause in (0.0, 0.1, 0.3, 1.0) * 2:
            url = new_study(server, SHORT_WORKERS * 20)
            writer_module.SECONDS_A_WORKER = pause / SHORT_WORKERS
            ready, end = FORK.Barrier(SHORT_WORKERS + 1), FORK.Value("d", math.inf)
            processes = [
                FORK.Process(target=short_worker, args=(url, ready, end), daemon=True) for _ in range(SHORT_WORKERS)
            ]
            for process in processes:
                process.start()
            end.value = time.monotonic() + 25
            ready.wait()
            time.sleep(4)  # until each has counted the workers
            started, cpu = time.monotonic(), cpu_seconds(server)
            (before,) = ask_server(url, "SELECT count(*) FROM trial_epochs")
            time.sleep(15)
            used, lasted = cpu_seconds(server) - cpu, time.monotonic() - started
            (after,) = ask_server(url, "SELECT count(*) FROM trial_epochs")
            for process in processes:
                process.join(timeout=60)
            epochs = (after[0] - before[0]) / lasted
            cores = used / lasted * 1000 / SHORT_WORKERS
            each = epochs / SHORT_WORKERS
            print(
                f"  {pause:.1f} s: {cores:.2f} cores, {each:.1f} epochs/s a worker, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        print(f"  one after the other: {one_after_the_other(server):.2f} ms of the server a second of a worker")
    finally:
        server.stop()


COPIED, COPIED_BY_OPTUNA = 10_000, 50
"""Trials: the second takes a minute and a half of them."""


def copied(source: str, target: str, by_optuna: bool, results: Any) -> None:
    """Copy the study "s" and say how long that took and how much memory it added."""
    ends = open_storage(source, create=False, reading=True), open_storage(target)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if by_optuna:
        optuna.copy_study(from_study_name="s", from_storage=ends[0], to_storage=ends[1])
    else:
        transfer.copy(*ends, "s")
    results.put((time.monotonic() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
    results.close()
    results.join_thread()


def finished_study(url: str, trials: int) -> None:
    """A study "s" of finished trials of 200 epochs, and nothing else."""
    overhead.fill(url, trials)
    engine = open_storage(url).engine
    with engine.begin() as connection:
        others = sa.select(TRIALS.c.trial_id).where(TRIALS.c.number >= trials)
        for table in (*transfer.OF_TRIAL, TRIALS):
            connection.execute(sa.delete(table).where(table.c.trial_id.in_(others)))
    close(engine)


def rows_of(url: str) -> int:
    """Of all trials."""
    with open_storage(url, create=False, reading=True).engine.connect() as connection:
        tables = (TRIALS, *transfer.OF_TRIAL)
        return sum(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for table in tables)


def copies() -> None:
    """`study copy` and `optuna.copy_study`, which leaves out epochs, between SQLite and PostgreSQL."""
    heads = "from | to | by | trials | rows | s | trials/s | rows/s | server, CPU s | more memory, MB | load"
    print(f"\n| {heads} |\n|{11 * ' --- |'}")
    server = Postgres()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for trials, by_optuna in ((COPIED_BY_OPTUNA, True), (COPIED, False), (COPIED, False)):
                first = f"sqlite:///{folder}/{trials}.db"
                if not Path(folder, f"{trials}.db").exists():
                    finished_study(first, trials)
                there, back = server.new_database(), f"sqlite:///{folder}/back.db"
                for source, target in ((first, back), (first, there), (there, server.new_database()), (there, back)):
                    for left in Path(folder).glob("back.db*"):
                        left.unlink()
                    results, before = FORK.Queue(), cpu_seconds(server)
                    process = FORK.Process(target=copied, args=(source, target, by_optuna, results), daemon=True)
                    process.start()
                    seconds, megabytes = results.get(timeout=1000)
                    process.join(timeout=60)
                    kinds = " | ".join("SQLite" if "sqlite" in url else "PostgreSQL" for url in (source, target))
                    count = rows_of(target)
                    print(
                        f"| {kinds} | {'optuna.copy_study' if by_optuna else 'study copy'} | {trials:,} | {count:,} "
                        f"| {seconds:.1f} | {trials / seconds:,.0f} | {count / seconds:,.0f} "
                        f"| {cpu_seconds(server) - before:.1f} | {megabytes:.0f} | {os.getloadavg()[0]:.1f} |",
                        flush=True,
                    )
    finally:
        server.stop()


SCENES = {
    "workers": workers, "nodes": nodes, "bouncer": bouncer, "growth": growth, "polls": polls, "checkpoints": saving,
    "short": short, "copies": copies,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="*", choices=list(SCENES), metavar="SCENE", help="default: all")
    for scene in parser.parse_args().scenes or SCENES:
        SCENES[scene]()
