"""Trials inside studies: what is reported, pruned and stored, and that a disturbed trial ends as an undisturbed one."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial
from rich.console import Console

from dashboards import aggregate, study_data
from dashboards.reports import console, html, json
from storage import transfer
from storage.cached_storage import CachedStorage
from storage.engine import open_storage
from storage.enqueue import enqueue_trials
from storage.errors import UserError
from storage.queries import epoch_rows
from storage.queue import Queue
from study.config.models import StudyConfig
from study.create import create_study, load_study, prepare
from study.search import space
from study.search.pruners import make_pruner
from study.search.samplers import make_sampler
from study.training.policies import KEEP
from study.training.trainer import EpochResult
from study.trial.runner import ask
from study.trial.writer import TrialWriter
from study.worker.worker import load_data
from tests.support.harness import Harness, StopAfter, config_of, stock_pruner


def test_a_finished_trial_keeps_what_the_issue_asks(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    harness.work()
    rows = epoch_rows(harness.storage.engine, harness.study._study_id)
    assert len(harness.study.trials) == 4
    for trial in optuna.load_study(study_name="s", storage=harness.storage).trials:
        assert trial.state == TrialState.COMPLETE
        attributes = trial.user_attrs
        assert {"seed", "device", "host", "versions", "precision"} <= attributes.keys()
        assert attributes["images"] == 3 * trial.params["alpha"]
        assert attributes["train_seconds"] > 0
        epochs = rows[trial.number]
        assert [row["epoch"] for row in epochs] == [1, 2, 3]
        accuracies = [row["accuracy"] for row in epochs]
        assert trial.value == max(accuracies)
        assert attributes["best_epoch"] == accuracies.index(max(accuracies)) + 1
        assert epochs[0]["kind"] == "keep"
        for row in epochs:
            assert row["kind"] in ("keep", "type1", "type2")
            assert (row["k"] > 0) == (row["kind"] != "keep")
        # Reported: the best so far, so that pruned and finished trials mean the same by a value.
        assert trial.intermediate_values == {n: max(accuracies[:n]) for n in (1, 2, 3)}


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "cma-es", "qmc"])
def test_samplers_fill_the_blanks_and_repeat(sampler: str, sqlite_url: str) -> None:
    searched = {
        "policy": {"alpha": {"low": 50, "high": 100, "step": 10}, "beta": {"low": 0.1, "high": 0.9}},
        "search": {
            "sampler": {"kind": sampler} | ({"n_startup_trials": 2} if sampler in ("tpe", "gp") else {}),
            "trials": 4,
        },
        "training": {"epochs": 1, "lr": {"low": 0.001, "high": 0.01, "log": True}, "batch_size": [32, 64]},
    }
    first, second = (Harness(sqlite_url, config_of(**searched), name) for name in ("one", "two"))
    for harness in (first, second):
        harness.work()
    assert first.outcome() == second.outcome()
    trials = first.study.trials
    assert len(trials) == 4
    assert all(set(t.params) == {"alpha", "beta", "lr", "batch_size"} for t in trials)
    # Drawn each time; but a model that searches for a maximum may find it at the edge again.
    drawn = trials[:2] if sampler == "gp" else trials
    assert len({t.params["beta"] for t in drawn}) == len(drawn)
    assert all(t.params["alpha"] in range(50, 101, 10) for t in trials)


def test_a_search_over_policies_asks_only_for_what_they_use(sqlite_url: str) -> None:
    config = config_of(
        policy={
            "name": ["full", "static", "dynamic"],
            "alpha": {"low": 50, "high": 100},
            "beta": {"low": 0.1, "high": 0.9},
        },
        search={"sampler": "random", "trials": 8},
        training={"epochs": 1},
    )
    harness = Harness(sqlite_url, config)
    harness.work()
    uses = {"full": {"policy"}, "static": {"policy", "alpha"}, "dynamic": {"policy", "alpha", "beta"}}
    chosen = [t.params for t in harness.study.trials]
    assert {params["policy"] for params in chosen} == set(uses)
    assert all(set(params) == uses[params["policy"]] for params in chosen)


CURVES = [[0.1 * (i % 4) + 0.05 * n * (1 + i % 3) for n in range(1, 10)] for i in range(14)]
PRUNERS: list[dict[str, Any]] = [
    {"kind": "median", "n_startup_trials": 2},
    {"kind": "percentile", "percentile": 60.0, "n_startup_trials": 2, "n_warmup_steps": 2, "interval_steps": 2},
    {"kind": "successive-halving", "min_resource": 1, "reduction_factor": 2},
    {"kind": "hyperband", "min_resource": 1, "reduction_factor": 3},
]


@pytest.mark.parametrize(
    # One on PostgreSQL: how each of the databases is read for them is tested in test_cached_storage.py.
    ("pruning", "url"),
    [*((each, "sqlite") for each in PRUNERS), (PRUNERS[-1], "postgresql")],
    ids=lambda p: p if isinstance(p, str) else p["kind"],
    indirect=["url"],
)
def test_pruners_decide_as_stock_optuna_does(pruning: dict[str, Any], url: str) -> None:
    """The same curves, through our queue and through Optuna's ask, report and tell."""
    config = config_of(pruning=pruning, training={"epochs": 9})
    storage = open_storage(url)
    pruner = make_pruner(config, 200)
    ours = optuna.create_study(study_name="ours", storage=CachedStorage(storage), direction="maximize", pruner=pruner)
    enqueue_trials(
        storage.engine,
        ours._study_id,
        {},
        [create_trial(state=TrialState.WAITING, user_attrs={"queue_position": i}) for i in range(14)],
    )
    # Hyperband's brackets depend on the study's name.
    elsewhere = (
        open_storage(url.replace("study.db", "stock.db"))
        if url.startswith("sqlite")
        else optuna.storages.InMemoryStorage()
    )
    stock = optuna.create_study(
        study_name="ours", storage=elsewhere, direction="maximize", pruner=stock_pruner(config, 200)
    )
    queue = Queue(storage.engine, ours._study_id)
    for curve in CURVES:
        lease = queue.claim()
        assert lease is not None
        with TrialWriter(ours, queue, lease, identity={}) as writer:
            for n, accuracy in enumerate(curve, 1):
                result = EpochResult(n, accuracy, 0.0, 1, 0.0, 0.0, 0.0, 1, None, KEEP, 0.0, 0.0, 0.0)
                writer.write_epoch(result, {n: accuracy}, last=n == len(curve))
            assert writer.flush()
        pruned = writer.pruned_at
        queue.finish(
            lease,
            TrialState.PRUNED if pruned else TrialState.COMPLETE,
            [curve[pruned - 1] if pruned else max(curve)],
        )

        trial = stock.ask()
        for n, accuracy in enumerate(curve, 1):
            trial.report(accuracy, n)
            if n < len(curve) and trial.should_prune():
                stock.tell(trial, state=TrialState.PRUNED)
                break
        else:
            stock.tell(trial, max(curve))
    stored = optuna.load_study(study_name="ours", storage=storage)
    mine, theirs = ([(t.state, t.value, t.intermediate_values) for t in s.trials] for s in (stored, stock))
    assert mine == theirs
    assert TrialState.PRUNED in {t.state for t in ours.trials}


@pytest.mark.parametrize(
    ("sampler", "url"),
    [*((each, "sqlite") for each in ("random", "tpe", "gp", "cma-es", "qmc")), ("cma-es", "postgresql")],
    indirect=["url"],
)
def test_samplers_suggest_as_stock_optuna_does(sampler: str, url: str) -> None:
    """The same values for the same parameters, through our queue and through Optuna's ask and tell."""
    startup = {"n_startup_trials": 3} if sampler in ("tpe", "gp") else {}
    config = config_of(
        policy={"alpha": {"low": 50, "high": 100, "step": 10}, "beta": {"low": 0.1, "high": 0.9}},
        training={"lr": {"low": 0.001, "high": 0.01, "log": True}},
        search={"sampler": {"kind": sampler} | startup, "trials": 10},
    )

    def value(params: dict[str, Any]) -> float:
        return float(1 - (params["beta"] - 0.4) ** 2 - (params["alpha"] / 100 - 0.7) ** 2 - params["lr"])

    storage = open_storage(url)
    ours = optuna.create_study(study_name="ours", storage=CachedStorage(storage), direction="maximize")
    enqueue_trials(storage.engine, ours._study_id, {}, space.queued_trials(config))
    queue = Queue(storage.engine, ours._study_id)
    while (lease := queue.claim()) is not None:
        chosen, _ = ask(ours, config, lease, 1000)
        queue.finish(lease, TrialState.COMPLETE, [value(chosen)])
    stock = optuna.create_study(direction="maximize")
    for number in range(10):
        stock.sampler = make_sampler(config, number)
        trial = stock.ask()
        stock.tell(trial, value(space.suggest(trial, config)))
    assert [t.params for t in ours.trials] == [t.params for t in stock.trials]
    # Drawn each time; but a model that searches for a maximum may find it at the edge again.
    drawn = ours.trials[:3] if sampler == "gp" else ours.trials
    assert len({t.params["beta"] for t in drawn}) == len(drawn)


def test_patience_is_counted_in_epochs_without_a_rise() -> None:
    pruner = make_pruner(config_of(pruning={"kind": "patient", "patience": 2, "min_delta": 0.1}), 200)
    study = optuna.create_study(direction="maximize")
    for reports, pruned in (
        ([0.5], False),
        ([0.5, 0.5], False),
        ([0.5, 0.5, 0.5], True),
        ([0.5, 0.55, 0.59], True),
        ([0.5, 0.55, 0.62], False),
        ([0.1, 0.5, 0.5, 0.7], False),
    ):
        trial = create_trial(state=TrialState.RUNNING, intermediate_values=dict(enumerate(reports, 1)))
        assert pruner.prune(study, trial) is pruned, reports


def test_interrupted_trials_resume_and_end_as_undisturbed_ones(url: str, undisturbed: list[tuple[Any, ...]]) -> None:
    """Stopped at every possible step of the first trials, resumed each time by another worker."""
    harness = Harness(url, config_of())
    for steps in (1, 2, 3, 4, 2, 1, 5, 3, 6, 2):
        harness.work(StopAfter(steps), most=1)
    assert sum("resumes after epoch" in line for line in harness.messages) >= 5
    harness.work()
    assert harness.outcome() == undisturbed


def test_a_damaged_checkpoint_is_logged_and_costs_time_only(
    sqlite_url: str, undisturbed: list[tuple[Any, ...]]
) -> None:
    harness = Harness(sqlite_url, config_of())
    harness.work(StopAfter(5), most=1)
    with harness.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_checkpoints SET payload = substr(payload, 1, 1000)")
    harness.work()
    assert any("damaged" in line for line in harness.messages)
    assert harness.outcome() == undisturbed


def test_the_comparison_can_fail(sqlite_url: str, undisturbed: list[tuple[Any, ...]]) -> None:
    harness = Harness(sqlite_url, config_of(search={"seed": 1}))
    harness.work()
    assert harness.outcome() != undisturbed


def test_a_diverged_trial_fails_at_once_with_its_reason(sqlite_url: str) -> None:
    harness = Harness(
        sqlite_url, config_of(policy={"alpha": 60, "beta": 0.5}, training={"lr": 1e14}, network={"norm": "none"})
    )
    harness.work()
    (trial,) = harness.study.trials
    assert trial.state == TrialState.FAIL
    assert "not finite" in trial.user_attrs["error"]


def test_creating_again_changes_nothing_and_other_configs_are_refused(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    data = prepare(harness.config, None)
    assert create_study(harness.storage, "s", "test", harness.config, data) is False
    assert len(harness.study.trials) == 4
    with pytest.raises(UserError, match=r"training\.epochs: 4 != 3"):
        create_study(harness.storage, "s", "test", config_of(training={"epochs": 4}), data)
    with pytest.raises(UserError, match="are not those of the study"):
        create_study(harness.storage, "s", "test", harness.config, dataclasses.replace(data, fingerprint="0" * 64))
    stranger = optuna.create_study(study_name="stranger", storage=harness.storage)
    stranger.ask()
    with pytest.raises(UserError, match="was not created by"):
        create_study(harness.storage, "stranger", "test", harness.config, data)


def test_a_study_grows_and_ends_as_if_it_had_been_so_from_the_start(url: str) -> None:
    def config(replicates: int) -> StudyConfig:
        policy = {"alpha": 60, "beta": [0.3, 0.6]}
        return config_of(search={"replicates": replicates}, training={"epochs": 1}, policy=policy)

    harness = Harness(url, config(1))
    harness.work(most=1)
    data = prepare(config(3), None)
    assert create_study(harness.storage, "s", "test", config(3), data) is False
    assert create_study(harness.storage, "s", "test", config(3), data) is False
    harness.work()
    whole = Harness(url, config(3), "whole")
    whole.work()
    assert len(whole.study.trials) == 6
    assert harness.outcome() == whole.outcome()
    assert load_study(harness.storage, "s")[1] == config(3)
    with pytest.raises(UserError, match=r"search\.replicates: 2 != 3"):
        create_study(harness.storage, "s", "test", config(2), data)


def test_a_worker_with_other_data_refuses(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    harness.study.set_user_attr("data_fingerprint", "f" * 64)
    with pytest.raises(UserError, match="ffffffffffffffff"):
        load_data(harness.study, harness.config, None, torch.device("cpu"))


def test_every_sampler_of_a_trial_is_seeded_by_the_trial() -> None:
    config = config_of(policy={"beta": {"low": 0.1, "high": 0.9}}, search={"sampler": "random", "trials": 3})

    def draw(number: int) -> float:
        study = optuna.create_study(sampler=make_sampler(config, number))
        return float(space.suggest(study.ask(), config)["beta"])

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize("policy", ["static", "full", ["full", "dynamic"]])
def test_reports_of_the_controls(policy: str | list[str], sqlite_url: str, tmp_path: Path) -> None:
    """Parameters that a policy does not use are no columns, and no holes in a table."""
    harness = Harness(sqlite_url, config_of(policy={"name": policy}, training={"epochs": 1}))
    harness.work()
    data = study_data.read(harness.storage, "s")
    assert aggregate.grid(data) is None
    Console(file=io.StringIO()).print(console.report_text(data))
    (tmp_path / "page.html").write_text(html.page([data]))
    expected = {"static": ("alpha",), "full": ()}.get(str(policy), ("policy", "alpha", "beta"))
    assert data.parameters == expected


def test_reports_before_anything_has_run(sqlite_url: str, tmp_path: Path) -> None:
    harness = Harness(sqlite_url, config_of())
    data = study_data.read(harness.storage, "s")
    Console(file=io.StringIO()).print(console.report_text(data))
    (tmp_path / "page.html").write_text(html.page([data]))
    assert "No trial has finished an epoch yet" in (tmp_path / "page.html").read_text()
    assert json.report(data)["best_value"] is None


def test_qmc_draws_what_it_does_not_cover_anew_for_every_trial() -> None:
    config = config_of(
        policy={"name": ["dynamic", "static"], "beta": {"low": 0.1, "high": 0.9}},
        search={"sampler": "qmc", "trials": 8},
    )
    study = optuna.create_study(direction="maximize")
    for number in range(8):
        study.sampler = make_sampler(config, number)
        trial = study.ask()
        study.tell(trial, 0.1 * len(space.suggest(trial, config)))
    betas = [t.params["beta"] for t in study.trials if "beta" in t.params]
    assert len(set(betas)) == len(betas) > 1


def test_a_study_of_another_program_is_not_changed(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    data = prepare(harness.config, None)
    optuna.create_study(study_name="minimised", storage=harness.storage, direction="minimize")
    optuna.create_study(study_name="noted", storage=harness.storage, direction="maximize").set_user_attr("a", 1)
    for name in ("minimised", "noted"):
        with pytest.raises(UserError, match="was not created by"):
            create_study(harness.storage, name, "test", harness.config, data)


def test_a_worker_retries_a_trial_that_it_failed(sqlite_url: str) -> None:
    config = config_of(policy={"alpha": 60, "beta": [0.3, 0.6]}, lease={"max_attempts": 1})
    harness = Harness(sqlite_url, config)
    queue = harness.queue(max_attempts=1)
    lease = queue.claim()
    assert lease is not None
    queue.release(lease, error="boom")
    harness.work()
    assert [t.state for t in harness.study.trials] == [
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]  # and now it is in the cache
    assert transfer.requeue(harness.storage, "s", trials=None) == [0]
    harness.work()
    quiet = Harness(sqlite_url, config, "quiet")
    quiet.work()
    study = optuna.load_study(study_name="s", storage=harness.storage)
    assert [t.value for t in study.trials] == [t.value for t in quiet.study.trials]


def test_checkpoints_in_a_folder(url: str, tmp_path: Path, undisturbed: list[tuple[Any, ...]]) -> None:
    """One file a trial, named in the database, gone at the trial's end; a copy of the study has its own."""
    folder = tmp_path / "shared" / "checkpoints"
    harness = Harness(url, config_of(checkpoint={"every_seconds": 0, "store": f"file://{folder}"}))
    for steps in (2, 3, 2):
        harness.work(StopAfter(steps), most=1)
        assert len(list(folder.iterdir())) == 1
    elsewhere = open_storage(f"sqlite:///{tmp_path}/copy.db")
    transfer.copy(harness.storage, elsewhere, "s")
    with elsewhere.engine.connect() as connection:
        (row,) = connection.exec_driver_sql("SELECT payload, location FROM trial_checkpoints").all()
    assert (row.payload, row.location) == (next(folder.iterdir()).read_bytes(), None)
    harness.work()
    assert sum("resumes after epoch" in line for line in harness.messages) >= 2
    assert list(folder.iterdir()) == []
    assert harness.outcome() == undisturbed


def test_a_folder_that_fails_costs_the_checkpoint_and_not_the_trial(
    sqlite_url: str, tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    store = tmp_path / "store"
    harness = Harness(sqlite_url, config_of(checkpoint={"every_seconds": 0, "store": str(store)}))
    shutil.rmtree(store, ignore_errors=True)
    store.write_text("in the way")
    harness.work(StopAfter(4), most=1)
    assert any("could not be stored" in line for line in harness.messages)
    harness.work()
    assert harness.outcome() == undisturbed


def test_a_lost_checkpoint_file_restarts_the_trial(
    sqlite_url: str, tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    harness = Harness(sqlite_url, config_of(checkpoint={"store": str(tmp_path / "folder")}))
    harness.work(StopAfter(4), most=1)
    next((tmp_path / "folder").iterdir()).unlink()
    harness.work()
    assert any("damaged" in line for line in harness.messages)
    assert harness.outcome() == undisturbed
