"""Copies of studies, failed trials put back, deleted studies: on SQLite, on PostgreSQL and between the two."""

from __future__ import annotations

import gc
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import shlex
import signal
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import pytest
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage import budgets, bulk, checkpoints, enqueue, transfer
from storage.engine import open_storage
from storage.errors import UserError
from storage.queue import Lease, LeaseLost, Queue
from storage.schema import EPOCHS, LEASES, METADATA, REPORT_TYPE, REPORTS, STUDY_ATTRS, TRIAL_ATTRS, TRIALS
from study import exit_codes
from tests.support import command
from tests.support.postgres import Postgres

SPACE = {
    "policy": CategoricalDistribution(("full", "dynamic", "früh")),
    "alpha": IntDistribution(10, 1000, step=10),
    "lr": FloatDistribution(1e-300, 1.0, log=True),
}
PARAMS = {"policy": "früh", "alpha": 990, "lr": 0.1 + 0.2}
TABLES = (*models.BaseModel.metadata.sorted_tables, *METADATA.sorted_tables)
PAYLOAD = bytes(range(256)) * 1000
# The trials of `rich`, by number.
BLANK, COMPLETE, PRUNED, FAILED, RELEASED, ABANDONED, INFINITE = range(7)


def queued_trial(number: int, params: dict[str, Any]) -> FrozenTrial:
    space = {name: SPACE[name] for name in params}
    user_attrs = {"queue_position": number, "seed": 100 + number}
    return create_trial(state=TrialState.WAITING, params=params, distributions=space, user_attrs=user_attrs)


def epoch(number: int, accuracy: float) -> dict[str, Any]:
    seconds = {"train_seconds": 0.1 + 0.2, "validation_seconds": 1e-300}
    more = {"loss": 2 / 3, "images": 10, "kind": "type2", "k": 7, "beta": math.pi}
    return {"epoch": number, "accuracy": accuracy} | seconds | more


def claimed(worker: Queue) -> Lease:
    lease = worker.claim()
    assert lease is not None
    return lease


def enqueue_trials(storage: RDBStorage, name: str, count: int) -> optuna.Study:
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    enqueue.enqueue_trials(storage.engine, study._study_id, {}, [queued_trial(i, PARAMS) for i in range(count)])
    return study


def rich(storage: RDBStorage) -> optuna.Study:
    """The study "s": a trial in every state, and the values that a careless copy loses first."""
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    attributes = {"config": {"ä": [1, None, 0.1 + 0.2]}, "снимок": "学習\x00\n'\"\\"}
    enqueue.enqueue_trials(
        storage.engine, study._study_id, attributes, [queued_trial(i, PARAMS if i else {}) for i in range(7)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["validation accuracy"])
    workers = [Queue(storage.engine, study._study_id, owner=f"gpu{i}:ü") for i in range(7)]
    leases = [claimed(worker) for worker in workers]
    for worker, lease in list(zip(workers, leases, strict=True))[1:]:
        for n, value in enumerate((0.1 + 0.2, 1e-300, 0.5), 1):
            worker.record(lease, [epoch(n, value)], {n: value})
        for step, value in ((10, math.nan), (11, math.inf), (12, -math.inf), (13, 5e-324)):
            study._storage.set_trial_intermediate_value(lease.trial_id, step, value)
        study._storage.set_trial_system_attr(lease.trial_id, "completed_rung_0", 0.1 + 0.2)
        study._storage.set_trial_user_attr(lease.trial_id, "größe", {"λ": [1e-300, "x"]})
        checkpoints.save(worker, lease, 3, PAYLOAD + bytes([lease.number]))
        lease.log.add(logging.WARNING, f"früh {lease.number}\nund 学習")
        worker.write_log(lease)
    workers[COMPLETE].finish(leases[COMPLETE], TrialState.COMPLETE, [0.1 + 0.2], {"best_epoch": 1})
    workers[PRUNED].finish(leases[PRUNED], TrialState.PRUNED, [1e-300])
    workers[FAILED].fail(leases[FAILED], "zu wenig Speicher 💥")
    workers[RELEASED].release(leases[RELEASED], error="boom")
    study._storage.set_trial_state_values(leases[INFINITE].trial_id, TrialState.COMPLETE, [-math.inf])
    with storage.engine.begin() as connection:
        for number, expires_at, token in ((INFINITE, 0.0, 1), (ABANDONED, 1.5, 9)):
            held = LEASES.c.trial_id == leases[number].trial_id
            connection.execute(sa.update(LEASES).where(held).values(expires_at=expires_at, token=token))
        blank = leases[BLANK].trial_id
        connection.execute(sa.delete(LEASES).where(LEASES.c.trial_id == blank))
        never = {"state": TrialState.WAITING, "datetime_start": None}
        connection.execute(sa.update(TRIALS).where(TRIALS.c.trial_id == blank).values(never))
    return study


def load(storage: RDBStorage, name: str = "s", **options: Any) -> optuna.Study:
    """As another process sees it: without what Optuna remembers of finished trials in this one."""
    return optuna.load_study(study_name=name, storage=storage, **options)


def fields(storage: RDBStorage, name: str = "s") -> list[dict[str, str]]:
    """Every field of every trial but its id; as text, because NaN is not equal to itself and 1 is equal to 1.0."""
    return [
        {key: repr(sorted(v.items()) if isinstance(v, dict) else v) for key, v in vars(t).items() if key != "_trial_id"}
        for t in load(storage, name).trials
    ]


def rows(storage: RDBStorage, name: str = "s") -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table that is the study's, without ids; trials by their numbers."""
    of_study = TRIALS.c.study_id == load(storage, name)._study_id
    tables = {}
    for table in TABLES:
        columns = [c for c in table.c if c is not table.autoincrement_column and c.name not in ("trial_id", "study_id")]
        if "trial_id" in table.c and table is not TRIALS:
            joined = table.join(TRIALS, table.c.trial_id == TRIALS.c.trial_id)
            query = sa.select(TRIALS.c.number, *columns).select_from(joined).where(of_study)
        elif "study_id" in table.c and table.name != "studies":
            query = sa.select(*columns).where(table.c.study_id == load(storage, name)._study_id)
        else:
            continue
        with storage.engine.connect() as connection:
            tables[table.name] = sorted(map(tuple, connection.execute(query)), key=repr)
    return tables


def released(tables: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[tuple[Any, ...]]]:
    """The same with all leases expired at 0: number, token, owner, expires_at, attempts, last_error."""
    leases = [(*row[:3], 0.0, *row[4:]) for row in tables["trial_leases"]]
    return tables | {"trial_leases": leases}


def renamed(found: dict[str, list[tuple[Any, ...]]], original: str = "s") -> dict[str, list[tuple[Any, ...]]]:
    """The same under another name: the copy keeps the name that its pruner goes by."""
    attributes = [*found["study_user_attributes"], (transfer.ORIGINAL_NAME, json.dumps(original))]
    return found | {"study_user_attributes": sorted(attributes, key=repr)}


def counts(storage: RDBStorage) -> dict[str, int]:
    with storage.engine.connect() as connection:
        return {
            table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in TABLES
            if table.name != "version_info"
        }


def test_a_study_goes_from_sqlite_to_postgresql_and_back_unchanged(tmp_path: Path, postgres: Postgres) -> None:
    first = open_storage(f"sqlite:///{tmp_path / 'first.db'}")
    there = open_storage(postgres.new_database())
    back = open_storage(f"sqlite:///{tmp_path / 'back.db'}")
    rich(first)
    enqueue_trials(there, "another", 7)  # so that no id is the same in two of them
    enqueue_trials(back, "another", 14)
    expected, trials = rows(first), fields(first)
    assert transfer.copy(first, there, "s") == 7
    assert transfer.copy(there, back, "s", "returned") == 7

    states = [t.state.name for t in load(first).trials]
    assert states == ["WAITING", "COMPLETE", "PRUNED", "FAIL", "RUNNING", "RUNNING", "COMPLETE"]
    lengths = {"trial_epochs": 6 * 3, "trial_intermediate_values": 6 * 7, "trial_checkpoints": 3, "trial_leases": 6}
    assert lengths.items() <= {name: len(tables) for name, tables in expected.items()}.items()
    ids: set[int] = {t._trial_id for t in load(first).trials}
    for storage, name in ((there, "s"), (back, "returned")):
        same = released(expected) if name == "s" else renamed(released(expected))
        assert rows(storage, name) == same != expected
        assert fields(storage, name) == trials
        copied = load(storage, name)
        assert (copied.directions, copied.metric_names) == (load(first).directions, ["validation accuracy"])
        original = {} if name == "s" else {transfer.ORIGINAL_NAME: "s"}
        assert copied.user_attrs == load(first).user_attrs | original
        assert not ids & {t._trial_id for t in copied.trials}
        ids |= {t._trial_id for t in copied.trials}
    assert len(load(back, "another").trials) == 14
    assert rows(first) == expected


def test_within_one_database_under_another_name(url: str) -> None:
    """A connection that waited for its own process would find the database locked after BUSY_SECONDS."""
    storage = open_storage(url)
    rich(storage)
    expected, trials = rows(storage), fields(storage)
    for source, name in (
        (storage, "the same storage"),
        (open_storage(url), "two that write"),
        (open_storage(url, create=False, reading=True), "one that reads"),
    ):
        assert transfer.copy(source, storage, "s", name) == 7
        assert rows(storage, name) == renamed(released(expected))
        assert fields(storage, name) == trials
    assert rows(storage) == expected


def test_one_file_by_two_paths_is_one_database(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")
    enqueue_trials(storage, "s", 3)
    (tmp_path / "link").symlink_to(tmp_path)
    assert transfer.copy(open_storage(f"sqlite:///{tmp_path / 'link' / 'study.db'}"), storage, "s", "t") == 3
    assert len(load(storage, "t").trials) == 3


def test_an_empty_study_is_copied_too(url: str) -> None:
    storage = open_storage(url)
    optuna.create_study(study_name="s", storage=storage, direction="minimize")
    assert transfer.copy(storage, storage, "s", "t") == 0
    assert load(storage, "t").direction == optuna.study.StudyDirection.MINIMIZE


def test_more_trials_than_a_batch(url: str) -> None:
    storage = open_storage(url)
    count = 2 * bulk.BATCH + 3
    trials = enqueue_trials(storage, "s", count).trials
    with storage.engine.begin() as connection:
        reports = [
            {
                "trial_id": t._trial_id,
                "step": step,
                "intermediate_value": t.number + step / 7,
                "intermediate_value_type": REPORT_TYPE.FINITE,
            }
            for t in trials
            for step in range(5)
        ]
        connection.execute(sa.insert(REPORTS), reports)
        stored = [{"trial_id": t._trial_id, **epoch(n, t.number / 7)} for t in trials for n in (1, 2)]
        connection.execute(sa.insert(EPOCHS), stored)
    assert transfer.copy(storage, storage, "s", "t") == count
    assert rows(storage, "t") == renamed(rows(storage))
    assert len(rows(storage, "t")["trial_epochs"]) == 2 * count


def test_an_unfinished_copy_is_claimed_and_resumes_from_its_checkpoint(url: str) -> None:
    storage = open_storage(url)
    rich(storage)
    expected = rows(storage)
    transfer.copy(storage, storage, "s", "t")
    study = load(storage, "t")
    tokens = {BLANK: 1, RELEASED: 2, ABANDONED: 10}
    for number, token in tokens.items():
        worker = Queue(storage.engine, study._study_id, owner=f"new{number}")
        lease = claimed(worker)
        assert (lease.number, lease.token) == (number, token)
        if number == BLANK:
            assert checkpoints.load(worker, lease) is None
            continue
        assert checkpoints.load(worker, lease) == checkpoints.StoredCheckpoint(3, PAYLOAD + bytes([number]))
        worker.record(lease, [epoch(4, 0.75)], {4: 0.75})
        worker.finish(lease, TrialState.COMPLETE, [0.75])
        done = load(storage, "t").trials[number]
        assert (done.value, done.params) == (0.75, PARAMS)
        assert sorted(done.intermediate_values) == [1, 2, 3, 4, 10, 11, 12, 13]
    assert rows(storage) == expected


def test_a_sampler_draws_from_a_copy_what_it_draws_from_the_original(url: str) -> None:
    storage = open_storage(url)
    study = optuna.create_study(
        study_name="s",
        storage=storage,
        sampler=optuna.samplers.TPESampler(seed=1, n_startup_trials=5),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
    )

    def suggested(trial: optuna.Trial) -> list[Any]:
        return [
            trial.suggest_float("x", -1, 1),
            trial.suggest_int("n", 1, 100, log=True),
            trial.suggest_categorical("c", ["a", "ü"]),
        ]

    def objective(trial: optuna.Trial) -> float:
        x, n, c = suggested(trial)
        for step in range(3):
            trial.report(x * x + n / 100 + step / 10, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(x * x + n / 100 + (c == "a"))

    def following(name: str) -> list[Any]:
        sampler = optuna.samplers.TPESampler(seed=2, n_startup_trials=5)
        return suggested(load(storage, name, sampler=sampler).ask())

    study.optimize(objective, n_trials=20)
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    for name in ("copy", "other history"):
        transfer.copy(storage, storage, "s", name)
    drawn = following("s")
    assert following("copy") == drawn
    params = models.TrialParamModel.__table__
    trials = sa.select(TRIALS.c.trial_id).where(TRIALS.c.study_id == load(storage, "other history")._study_id)
    halved = sa.update(params).where(params.c.param_name == "x", params.c.trial_id.in_(trials))
    with storage.engine.begin() as connection:
        connection.execute(halved.values(param_value=params.c.param_value / 2))
    assert following("other history") != drawn


def test_notes_go_with_their_trials(url: str, tmp_path: Path) -> None:
    source, target = open_storage(url), open_storage(f"sqlite:///{tmp_path / 'target.db'}")
    enqueue_trials(source, "before", 2)
    study = enqueue_trials(source, "s", 5)
    optuna_dashboard.save_note(study, "on the study")
    for number in (1, 3):
        optuna_dashboard.save_note(optuna.Trial(study, study.trials[number]._trial_id), f"on trial {number}")
    # On a trial of another study: what optuna.copy_study leaves. Its id clashes with one of the target's.
    study._storage.set_study_system_attr(study._study_id, "dashboard:2:note_ver", 7)
    transfer.copy(source, target, "s")
    copied = load(target)
    assert optuna_dashboard.get_note(copied) == "on the study"
    notes = [optuna_dashboard.get_note(optuna.Trial(copied, t._trial_id)) for t in copied.trials]
    assert notes == ["", "on trial 1", "", "on trial 3", ""]


def test_what_is_copied_is_one_state_of_the_source(url: str, tmp_path: Path) -> None:
    source, reader = open_storage(url), open_storage(url, reading=True)
    target = open_storage(f"sqlite:///{tmp_path / 'target.db'}")
    study = enqueue_trials(source, "s", 1)
    with source.engine.begin() as connection:
        connection.execute(sa.insert(STUDY_ATTRS).values(study_id=study._study_id, key="turn", value_json="0"))
    turn, reads, writing = 0, [], False

    def write(_: Any, __: Any, statement: str, *___: Any) -> None:
        """Between any two reads of the copy somebody writes: both attributes, in one transaction."""
        nonlocal turn, writing
        if "SELECT" not in statement or writing:
            return
        turn, writing = turn + 1, True
        reads.append(statement)
        with source.engine.begin() as connection:
            for table in (TRIAL_ATTRS, STUDY_ATTRS):
                keys = ("queue_position", "turn")
                connection.execute(sa.update(table).where(table.c.key.in_(keys)).values(value_json=str(turn)))
        writing = False

    turns = []
    for i in range(3):
        sa.event.listen(sa.Engine, "after_cursor_execute", write)  # of all: which one reads is the copy's business
        try:
            transfer.copy(reader, target, "s", f"s{i}")
        finally:
            sa.event.remove(sa.Engine, "after_cursor_execute", write)
        copied = load(target, f"s{i}")
        turns.append((copied.user_attrs["turn"], copied.trials[0].user_attrs["queue_position"]))
    trials, studies = (
        next(n for n, statement in enumerate(reads) if re.search(rf"FROM (source\.)?{table.name}\b", statement))
        for table in (TRIAL_ATTRS, STUDY_ATTRS)
    )
    assert trials < studies  # so a write fell between the two
    assert all(of_study == of_trial for of_study, of_trial in turns), turns
    assert len(set(turns)) == 3


def long(storage: RDBStorage) -> int:
    """The study "s" with epochs and reports in more than one batch; the number of its trials."""
    count = bulk.BATCH + 20
    trials = enqueue_trials(storage, "s", count).trials
    with storage.engine.begin() as connection:
        connection.execute(sa.insert(EPOCHS), [{"trial_id": t._trial_id, **epoch(1, t.number / 777)} for t in trials])
    return count


def other_database(kind: str, tmp_path: Path, postgres: Postgres) -> RDBStorage:
    return open_storage(f"sqlite:///{tmp_path / 'other.db'}" if kind == "sqlite" else postgres.new_database())


kinds = pytest.mark.parametrize("kind", ["sqlite", "postgresql"])


@kinds
def test_every_row_of_every_table_between_any_two_databases(
    url: str, kind: str, tmp_path: Path, postgres: Postgres
) -> None:
    source, target = open_storage(url), other_database(kind, tmp_path, postgres)
    made = rich(source).trials
    odd = "\t\n\r\\\\N\\.\x7f\u2028 'quoted' \"twice\" %s :name ? 💥 " + "ü" * 100_000  # what COPY would have escaped
    with source.engine.begin() as connection:
        for trial in made:
            row = {"trial_id": trial._trial_id, "key": odd[:50], "value_json": json.dumps(odd, ensure_ascii=False)}
            connection.execute(sa.insert(TRIAL_ATTRS), row)
            held = LEASES.c.trial_id == trial._trial_id
            connection.execute(sa.update(LEASES).where(held).values(last_error=odd))
            numbers = {"loss": math.inf, "beta": -0.0, "macro_f1": 5e-324, "images": 2**31 - 1, "joules": None}
            row = {"trial_id": trial._trial_id, **epoch(4, 0.1), **numbers, "seen": -(2**31)}
            connection.execute(sa.insert(EPOCHS), row)
    enqueue_trials(target, "another", 3)
    expected, trials = rows(source), fields(source)
    assert transfer.copy(source, target, "s") == 7
    assert rows(target) == released(expected)
    assert fields(target) == trials


@kinds
def test_trials_that_do_not_follow_one_another(url: str, kind: str, tmp_path: Path, postgres: Postgres) -> None:
    """Two studies whose trials were made in turns, and ids that another study's trials leave out in the target."""
    source, target = open_storage(url), other_database(kind, tmp_path, postgres)
    studies = [optuna.create_study(study_name=name, storage=source) for name in ("s", "t")]
    for i in range(9):
        for number, study in enumerate(studies):
            if i % (number + 2) == 0 or i > 5:
                study.add_trial(create_trial(value=i + number / 2, params=PARAMS, distributions=SPACE))
    enqueue_trials(target, "another", 3)
    for name in ("s", "t"):
        transfer.copy(source, target, name)
        assert fields(target, name) == fields(source, name)
        assert rows(target, name) == rows(source, name)


def test_runs_of_trials() -> None:
    ids = {1: 11, 2: 12, 4: 13, 5: 14, 6: 16, 9: 15}
    assert list(bulk._runs(ids)) == [(1, 2), (4, 5), (6, 6), (9, 9)]
    many = list(bulk._runs({i: i + 5 for i in range(bulk.BATCH + 2)}))
    assert many == [(0, bulk.BATCH - 1), (bulk.BATCH, bulk.BATCH + 1)]
    assert list(bulk._runs({})) == []


@kinds
def test_types_that_the_drivers_read_in_different_forms(
    url: str, kind: str, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of a future schema version."""
    table = sa.Table(
        "trial_future",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("trial_id", sa.Integer, nullable=False),
        sa.Column("yes", sa.Boolean),
        sa.Column("day", sa.DateTime),
        sa.Column("json", sa.JSON),
        sa.Column("exact", sa.Numeric(10, 3)),
        sa.Column("state", sa.Enum(TrialState)),
        sa.Column("bytes", sa.LargeBinary),
    )
    source, target = open_storage(url), other_database(kind, tmp_path, postgres)
    (trial,) = enqueue_trials(source, "s", 1).trials
    enqueue_trials(target, "another", 3)
    values: list[dict[str, Any]] = [
        {"yes": True, "day": datetime(2026, 2, 3, 4, 5, 6, 789), "json": {"ü": [1, None]}, "exact": Decimal("1.250"),
         "state": TrialState.PRUNED, "bytes": bytes(range(256))},
        dict.fromkeys(("yes", "day", "exact", "state", "bytes")) | {"json": [False]},
    ]  # fmt: skip
    for storage in (source, target):
        table.create(storage.engine)
    with source.engine.begin() as connection:
        connection.execute(sa.insert(table), [row | {"trial_id": trial._trial_id} for row in values])
    monkeypatch.setattr(transfer, "OF_TRIAL", (*transfer.OF_TRIAL, table))
    transfer.copy(source, target, "s")
    query = sa.select(*(table.c[name] for name in values[0])).order_by(table.c.id)
    (copied,) = load(target).trials
    with target.engine.connect() as connection:
        assert [dict(row) for row in connection.execute(query).mappings()] == values
        assert set(connection.scalars(sa.select(table.c.trial_id))) == {copied._trial_id}


@kinds
def test_nothing_is_left_of_a_copy_that_fails(url: str, kind: str, tmp_path: Path, postgres: Postgres) -> None:
    source, target = open_storage(url), other_database(kind, tmp_path, postgres)
    count = long(source)
    if kind == "sqlite":
        refuse = "WHEN NEW.accuracy > 0.14 BEGIN SELECT RAISE(ABORT, 'no room'); END"
        full, empty = f"CREATE TRIGGER room BEFORE INSERT ON trial_epochs {refuse}", "DROP TRIGGER room"
    else:
        full = "ALTER TABLE trial_epochs ADD CONSTRAINT room CHECK (accuracy <= 0.14)"
        empty = "ALTER TABLE trial_epochs DROP CONSTRAINT room"
    with target.engine.begin() as connection:
        connection.exec_driver_sql(full)
    for _ in range(2):
        with pytest.raises(UserError, match=r"the study 's' has a value that the target does not take .*room"):
            transfer.copy(source, target, "s")
        assert set(counts(target).values()) == {0}
    with target.engine.begin() as connection:
        connection.exec_driver_sql(empty)
    assert transfer.copy(source, target, "s") == count
    assert rows(target) == rows(source)


def _copy_until(urls: tuple[str, str], batch: int) -> None:
    """Is killed when it writes a batch of epochs."""
    written = 0

    @sa.event.listens_for(sa.Engine, "before_cursor_execute")
    def kill(_: Any, __: Any, statement: str, *___: Any) -> None:
        nonlocal written
        written += bool(re.search(r"(INTO|COPY) trial_epochs\b", statement))
        if written == batch:
            os.kill(os.getpid(), signal.SIGKILL)

    transfer.copy(open_storage(urls[0], create=False, reading=True), open_storage(urls[1]), "s")


@kinds
def test_nothing_is_left_of_a_copy_that_is_killed(
    url: str, kind: str, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # its own temporary folder stays
    source, target = open_storage(url), other_database(kind, tmp_path, postgres)
    count = long(source)
    urls = url, target.engine.url.render_as_string(hide_password=False)
    process = multiprocessing.get_context("spawn").Process(target=_copy_until, args=(urls, 2))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert set(counts(target).values()) == {0}
    assert transfer.copy(source, target, "s") == count
    assert rows(target) == rows(source)


def test_an_interrupted_copy_leaves_no_lock(tmp_path: Path) -> None:
    """At any statement, in a program that continues, such as a notebook."""
    source, target = (open_storage(f"sqlite:///{tmp_path / name}.db") for name in ("source", "target"))
    rich(source)
    other = sqlite3.connect(tmp_path / "target.db", timeout=0, isolation_level=None)

    places = ["INTO studies", "INTO trials", "INTO trial_params", "INTO trial_epochs", "INTO trial_checkpoints"]

    def interrupt(_: Any, __: Any, statement: str, *___: Any) -> None:
        if places[0] in statement:
            raise KeyboardInterrupt

    gc.disable()
    sa.event.listen(sa.Engine, "before_cursor_execute", interrupt)
    try:
        while places:
            with pytest.raises(KeyboardInterrupt):
                transfer.copy(source, target, "s")
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
            places.pop(0)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", interrupt)
        gc.enable()
        other.close()
    assert set(counts(target).values()) == {0}
    assert transfer.copy(source, target, "s") == 7


def test_a_copy_survives_a_lost_connection(url: str, postgres: Postgres) -> None:
    """Which COPY meets, not SQLAlchemy."""
    source, target = open_storage(url), open_storage(postgres.new_database())
    count = long(source)
    lost: list[int] = []

    @sa.event.listens_for(target.engine, "before_cursor_execute")
    def lose(connection: sa.Connection, _: Any, statement: str, *__: Any) -> None:
        if statement.startswith("COPY trial_epochs") and not lost:
            lost.append(connection.connection.driver_connection.info.backend_pid)  # type: ignore[union-attr]
            engine = sa.create_engine(target.engine.url, poolclass=sa.NullPool)
            with engine.connect() as other:
                other.execute(sa.select(sa.func.pg_terminate_backend(lost[0])))

    assert transfer.copy(source, target, "s") == count
    assert len(lost) == 1
    assert rows(target) == rows(source)


def test_a_copy_holds_up_no_writer_of_its_source(tmp_path: Path) -> None:
    source, target = (open_storage(f"sqlite:///{tmp_path / name}.db") for name in ("source", "target"))
    count = long(source)
    reader = open_storage(f"sqlite:///{tmp_path / 'source.db'}", create=False, reading=True)
    writer = sqlite3.connect(tmp_path / "source.db", timeout=0, isolation_level=None)
    wrote = []

    @sa.event.listens_for(target.engine, "after_cursor_execute")
    def write(*_: Any) -> None:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("ROLLBACK")
        wrote.append(True)

    assert transfer.copy(reader, target, "s") == count
    assert wrote
    writer.close()


def test_a_copy_inherits_nothing_of_a_deleted_study(tmp_path: Path, postgres: Postgres) -> None:
    """SQLite gives the trial ids of a deleted study again, and Optuna leaves our tables alone."""
    source, target = open_storage(postgres.new_database()), open_storage(f"sqlite:///{tmp_path / 'target.db'}")
    rich(target)
    budgets.recent_spending(target.engine, 1)
    optuna.delete_study(study_name="s", storage=target)
    assert counts(target)["trial_epochs"] == 18
    assert counts(target)["study_spending"] == 1
    enqueue_trials(source, "s", 7)
    budgets.recent_spending(source.engine, 1)
    transfer.copy(source, target, "s")
    assert rows(target) == rows(source) | {"study_spending": []}
    for table in ("trial_epochs", "trial_leases", "trial_checkpoints", "study_spending"):
        assert counts(target)[table] == 0


def test_refused_copies_write_nothing(url: str, tmp_path: Path) -> None:
    source, target = open_storage(url), open_storage(f"sqlite:///{tmp_path / 'target.db'}")
    with pytest.raises(UserError, match=r"no study 's'.*there are none yet"):
        transfer.copy(source, target, "s")
    study = enqueue_trials(source, "s", 4)
    enqueue_trials(source, "t", 1)
    with pytest.raises(UserError, match=r"no study 'x'.*studies there: s, t$"):
        transfer.copy(source, target, "x")
    workers = [Queue(source.engine, study._study_id, owner=f"w{i}") for i in range(2)]
    leases = [claimed(worker) for worker in workers]
    with pytest.raises(UserError, match=r"at rest, but workers hold 2 trials of 's'; stop those workers first$"):
        transfer.copy(source, target, "s")
    workers[0].release(leases[0])
    with pytest.raises(UserError, match=r"workers hold 1 trial of 's'"):
        transfer.copy(source, target, "s")
    assert set(counts(target).values()) == {0}
    workers[1].release(leases[1])
    transfer.copy(source, target, "s")
    once = counts(target)
    with pytest.raises(UserError, match=r"'s' is in the target already; choose another --name"):
        transfer.copy(source, target, "s")
    with pytest.raises(UserError, match=r"'t' is in the target already"):
        transfer.copy(source, source, "s", "t")
    assert counts(target) == once
    assert transfer.copy(source, target, "s", "again") == 4


NOT_IN_POSTGRESQL = {
    "a long key": "UPDATE trial_user_attributes SET key = hex(zeroblob(300)) WHERE key = 'seed'",
    "a zero in a text": "UPDATE trial_user_attributes SET value_json = char(0) WHERE key = 'seed'",
    "text for a number": "UPDATE trial_epochs SET accuracy = 'abc'",
    "a large number": "UPDATE trial_epochs SET images = 9000000000000000000",
    "no UTF-8": "UPDATE trial_user_attributes SET value_json = CAST(x'22ff22' AS TEXT) WHERE key = 'seed'",
}
IN_NEITHER = {
    "a number twice": "UPDATE trials SET number = 1 WHERE number = 2",
    "no state": "UPDATE trials SET state = 'DONE'",
    "no date": "UPDATE trials SET datetime_start = 'abc'",
}


@kinds
@pytest.mark.parametrize("fault", [*NOT_IN_POSTGRESQL, *IN_NEITHER])
def test_values_that_no_column_has(fault: str, kind: str, tmp_path: Path, postgres: Postgres) -> None:
    """SQLite takes any value in any column. They are copied as they are, or refused in one line."""
    url = f"sqlite:///{tmp_path / 'source.db'}"
    source = open_storage(url)
    rich(source)
    with source.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM study_user_attributes WHERE key <> 'config'")  # one has a zero
        connection.exec_driver_sql((NOT_IN_POSTGRESQL | IN_NEITHER)[fault])
    to = f"sqlite:///{tmp_path / 'target.db'}" if kind == "sqlite" else postgres.new_database_with_tables()
    target = open_storage(to)
    reading = open_storage(url, create=False, reading=True)
    if kind == "sqlite" and fault in NOT_IN_POSTGRESQL:
        assert transfer.copy(reading, target, "s") == 7
        return
    with pytest.raises(UserError) as refusal:
        transfer.copy(reading, target, "s")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500
    assert set(counts(target).values()) == {0}


def test_a_checkpoint_that_is_text_is_left_out(tmp_path: Path) -> None:
    source, target = (open_storage(f"sqlite:///{tmp_path / name}.db") for name in ("source", "target"))
    rich(source)
    with source.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_checkpoints SET payload = 'abc'")
    transfer.copy(source, target, "s")
    assert counts(target)["trial_checkpoints"] == 0


def test_a_refused_copy_makes_no_target(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = enqueue_trials(open_storage(url), "s", 2)
    claimed(Queue(study._storage._backend.engine, study._study_id))  # type: ignore[attr-defined]
    to = f"sqlite:///{tmp_path / 'target.db'}"
    for words, message in (
        (("nope", "--to", to), "no study 'nope'"),
        (("s", "--to", to), "workers hold 1 trial"),
        (("s", "--to", to, "--name=-x"), "begin"),
    ):
        done = command.study("copy", *words, "--from", url, cwd=tmp_path)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        done = command.study("export", words[0], "x.study", "--storage", url, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"study.db"}


def test_a_study_of_optunas_own_is_copied_and_not_exported(tmp_path: Path) -> None:
    """`study import` would refuse the file, and `study resume` the copy: neither is suggested."""
    url, to = (f"sqlite:///{tmp_path / name}.db" for name in ("study", "target"))
    optuna.create_study(study_name="plain", storage=open_storage(url)).optimize(lambda _: 0.5, n_trials=2)
    done = command.study("export", "plain", "x.study", "--storage", url, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    suggested = done.stderr.strip().partition("copy it with: study ")[2]
    assert not list(tmp_path.glob("x.study*"))
    done = command.study(*shlex.split(suggested), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(optuna.load_study(study_name="plain", storage=f"sqlite:///{tmp_path / 'x.study'}").trials) == 2
    done = command.study("copy", "plain", "--from", url, "--to", to, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, f"copied 2 trials of 'plain' to {to}\n")
    done = command.study("delete", "plain", "--yes", "--storage", to, cwd=tmp_path)
    assert done.returncode == 2
    assert "optuna delete-study" in done.stderr


def test_an_export_that_finds_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    rich(open_storage(url))  # six checkpoints of 256 kB
    monkeypatch.setattr(transfer, "PATIENCE_SECONDS", 0.1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, before[1]))
    try:
        done = command.study("export", "s", "x.study", "--storage", url, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == exit_codes.DATABASE_UNAVAILABLE, done.stderr
    assert not list(tmp_path.glob("x.study*"))


def test_of_exports_into_one_file_one_writes_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    rich(open_storage(url))
    words = [sys.executable, "-m", "study", "export", "s", str(tmp_path / "x.study"), "--storage", url]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2], errors
    assert sum("x.study is there already; name another" in error for error in errors) == 2, errors
    exported = open_storage(f"sqlite:///{tmp_path / 'x.study'}", create=False, reading=True)
    assert fields(exported) == fields(open_storage(url))


def failing(storage: RDBStorage, count: int, fails: set[int]) -> optuna.Study:
    """All trials claimed, with an epoch and a checkpoint each, and some of them failed."""
    study = enqueue_trials(storage, "s", count)
    for i in range(count):
        worker = Queue(storage.engine, study._study_id, owner=f"w{i}")
        lease = claimed(worker)
        worker.record(lease, [epoch(1, 0.5)], {1: 0.5})
        study._storage.set_trial_system_attr(lease.trial_id, "completed_rung_0", 0.5)
        study._storage.set_trial_system_attr(lease.trial_id, "fixed", 1)
        checkpoints.save(worker, lease, 1, b"x")
        if i in fails:
            study._storage.set_trial_user_attr(lease.trial_id, "device", "cpu")
            study._storage.set_trial_state_values(lease.trial_id, TrialState.FAIL, [0.5])  # its checkpoint stays
            with storage.engine.begin() as connection:
                row = {"trial_id": lease.trial_id, "key": "error", "value_json": json.dumps("boom")}
                connection.execute(sa.insert(TRIAL_ATTRS), row)
                held = LEASES.c.trial_id == lease.trial_id
                connection.execute(sa.update(LEASES).where(held).values(attempts=5, last_error="boom"))
    return study


def of_trial(tables: dict[str, list[tuple[Any, ...]]], number: int) -> dict[str, list[tuple[Any, ...]]]:
    return {
        name: [row for row in table if row[0] == number] for name, table in tables.items() if name.startswith("trial")
    }


def test_failed_trials_go_back_into_the_queue(url: str) -> None:
    storage = open_storage(url)
    failing(storage, 5, {1, 3, 4})
    before = rows(storage)
    assert transfer.requeue(storage, "s", trials=[3]) == [3]
    after = rows(storage)
    for number in (0, 1, 2, 4):
        assert of_trial(after, number) == of_trial(before, number)
    trial = load(storage).trials[3]
    assert (trial.state, trial.params, trial.values, trial.number) == (TrialState.WAITING, PARAMS, None, 3)
    assert (trial.datetime_start, trial.datetime_complete, trial.intermediate_values) == (None, None, {})
    assert trial.user_attrs == {"queue_position": 3, "seed": 103, "device": "cpu"}
    assert trial.system_attrs == {"fixed": 1}
    assert not of_trial(after, 3)["trial_epochs"]
    assert not of_trial(after, 3)["trial_checkpoints"]
    assert transfer.requeue(storage, "s", trials=None) == [1, 4]
    assert transfer.requeue(storage, "s", trials=None) == []
    states = [t.state.name for t in load(storage).trials]
    assert states == ["RUNNING", "WAITING", "RUNNING", "WAITING", "WAITING"]


def test_a_trial_put_back_is_worked_on_anew_and_only_by_whoever_claims_it(url: str) -> None:
    storage = open_storage(url)
    study = enqueue_trials(storage, "s", 1)
    late = Queue(storage.engine, study._study_id, owner="late")
    stale = claimed(late)
    study._storage.set_trial_state_values(stale.trial_id, TrialState.FAIL)  # by hand, while `late` trains
    assert transfer.requeue(storage, "s", trials=None) == [0]
    with pytest.raises(LeaseLost):
        late.record(stale, [epoch(1, 0.1)], {1: 0.1})
    worker = Queue(storage.engine, study._study_id, owner="new", max_attempts=1)
    lease = claimed(worker)
    with pytest.raises(LeaseLost):
        late.finish(stale, TrialState.COMPLETE, [0.1])
    assert checkpoints.load(worker, lease) is None
    worker.record(lease, [epoch(1, 0.75)], {1: 0.75})
    worker.finish(lease, TrialState.COMPLETE, [0.75])
    trial = load(storage).trials[0]
    assert (trial.value, trial.intermediate_values) == (0.75, {1: 0.75})
    assert trial.datetime_start is not None


def test_only_failed_trials_go_back(url: str) -> None:
    storage = open_storage(url)
    failing(storage, 3, {1})
    before = rows(storage)
    with pytest.raises(UserError, match=r"got 0 \(running\), 7 \(not there\); failed in 's': 1$"):
        transfer.requeue(storage, "s", trials=[7, 1, 0])
    with pytest.raises(UserError, match=r"no study 't'.*studies there: s$"):
        transfer.requeue(storage, "t", trials=None)
    assert transfer.requeue(storage, "s", trials=[]) == []
    assert rows(storage) == before


def test_a_deleted_study_leaves_nothing(url: str) -> None:
    storage = open_storage(url)
    rich(storage)
    transfer.copy(storage, storage, "s", "other")
    other = rows(storage, "other")
    storage.record_heartbeat(load(storage).trials[BLANK]._trial_id)
    assert counts(storage)["trial_heartbeats"] == 1
    transfer.delete(storage, "s")
    assert optuna.get_all_study_names(storage) == ["other"]
    assert rows(storage, "other") == other
    assert counts(storage)["trial_heartbeats"] == 0
    with pytest.raises(UserError, match=r"no study 's'.*studies there: other$"):
        transfer.delete(storage, "s")
    transfer.delete(storage, "other")
    assert set(counts(storage).values()) == {0}


def test_a_study_that_is_worked_on_is_deleted_by_force_only(url: str) -> None:
    storage = open_storage(url)
    study = enqueue_trials(storage, "s", 2)
    worker = Queue(storage.engine, study._study_id)
    lease = claimed(worker)
    before = rows(storage)
    with pytest.raises(UserError, match=r"workers hold 1 trial of 's'; stop those workers first, or --force$"):
        transfer.delete(storage, "s")
    assert rows(storage) == before
    transfer.delete(storage, "s", force=True)
    forbidden_writes: tuple[Callable[[], object], ...] = (
        lambda: worker.record(lease, [epoch(1, 0.5)], {1: 0.5}),
        lambda: checkpoints.save(worker, lease, 1, b"x"),
        lambda: worker.finish(lease, TrialState.COMPLETE, [0.5]),
    )
    for forbidden in forbidden_writes:
        with pytest.raises(LeaseLost):
            forbidden()
    assert worker.claim() is None
    assert set(counts(storage).values()) == {0}
