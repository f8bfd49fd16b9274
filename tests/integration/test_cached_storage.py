"""What samplers and pruners read of past trials of any state: the same as from stock Optuna's storage."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage import cached_storage, transfer
from storage.cached_storage import CachedStorage
from storage.engine import open_storage
from storage.enqueue import enqueue_trials
from storage.errors import UserError
from storage.queue import Lease, Queue
from storage.schema import TRIAL_SYSTEM_ATTRS
from study.config.models import StudyConfig
from study.search import space
from study.search.pruners import make_pruner
from study.search.samplers import make_sampler
from study.trial.runner import ask
from tests.support.harness import config_of, stock_pruner

EPOCHS = 9
ROW = {"loss": 0.0, "images": 1, "train_seconds": 0.0, "validation_seconds": 0.0, "kind": "keep", "k": 0, "beta": 0.0}
SPACE = {
    "alpha": IntDistribution(50, 100, step=10),
    "beta": FloatDistribution(0.1, 0.9),
    "lr": FloatDistribution(0.001, 0.01, log=True),
}
STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING)


def mixed(chance: random.Random, count: int) -> list[FrozenTrial]:
    """Trials of every state, as Optuna's own API may have left them: gaps, no reports, NaN, attributes, rungs."""
    trials = []
    for i in range(count):
        state = chance.choices(STATES, (4, 3, 1, 4, 1))[0]
        params = {
            "alpha": chance.randrange(50, 101, 10),
            "beta": chance.uniform(0.1, 0.9),
            "lr": math.exp(chance.uniform(math.log(0.001), math.log(0.01))),
        }
        last = chance.randint(0, EPOCHS) if state != TrialState.COMPLETE else chance.choice((EPOCHS, EPOCHS, 0, 4))
        top = chance.random()
        reports = {n: top * n / EPOCHS for n in range(1, last + 1) if chance.random() < 0.9}
        if reports and chance.random() < 0.1:
            reports[max(reports)] = chance.choice((math.nan, math.inf, -math.inf))
        passed = 0 if state == TrialState.WAITING else chance.randint(0, min(3, last))
        rungs = {f"completed_rung_{rung}": chance.random() for rung in range(passed)}
        bare = state in (TrialState.RUNNING, TrialState.WAITING) and chance.random() < 0.5
        trials.append(
            create_trial(
                state=state,
                value=top if state == TrialState.COMPLETE or (state == TrialState.PRUNED and i % 2) else None,
                params={} if bare else params,
                distributions={} if bare else SPACE,
                user_attrs={"seed": i, "größe": {"λ": [1e-300, "x"]}},
                system_attrs=rungs,
                intermediate_values=reports if state != TrialState.WAITING else {},
            )
        )
    return trials


def stock_study(storage: RDBStorage, name: str = "s") -> optuna.Study:
    """With a cache that has seen nothing yet."""
    return optuna.load_study(study_name=name, storage=storage)


def plain(trial: FrozenTrial, whole: bool = True) -> dict[str, Any]:
    """Everything of a trial; of its reports the last one only, unless `whole`."""
    cells = copy.deepcopy(trial.__dict__)
    reports = cells["intermediate_values"]
    if not whole and reports:
        reports = {max(reports): reports[max(reports)]}
    return cells | {"intermediate_values": {step: repr(value) for step, value in reports.items()}}  # NaN is not NaN


def check(history: CachedStorage, storage: RDBStorage, study_id: int) -> None:
    """Whatever it saw before: all that the cached storage returns is what the ORM reads now."""
    stock = storage.get_all_trials(study_id, deepcopy=False)
    ours = history.get_all_trials(study_id, deepcopy=False)
    assert [plain(trial) for trial in ours] == [plain(trial, whole=False) for trial in stock]
    for states in ((TrialState.COMPLETE,), (TrialState.RUNNING, TrialState.PRUNED), (TrialState.WAITING,)):
        chosen = history.get_all_trials(study_id, states=states)
        assert [plain(t) for t in chosen] == [plain(t, whole=False) for t in stock if t.state in states]
    lean = CachedStorage(storage, lean=True)
    without = [plain(trial, whole=False) | {"_user_attrs": {}} for trial in stock]
    assert [plain(trial) for trial in lean.get_all_trials(study_id, deepcopy=False)] == without
    for trial in stock:
        assert plain(history.get_trial(trial._trial_id)) == plain(lean.get_trial(trial._trial_id)) == plain(trial)
    complete = [trial.intermediate_values for trial in stock if trial.state == TrialState.COMPLETE]
    for step in range(EPOCHS + 2):
        count, reports = history.reports_at(study_id, step)
        assert count == len(complete)
        assert sorted(map(repr, reports.tolist())) == sorted(repr(r[step]) for r in complete if step in r)


@pytest.mark.parametrize(
    ("single_steps", "url"), [(0, "sqlite"), (3, "sqlite"), (100, "sqlite"), (3, "postgresql")], indirect=["url"]
)
def test_all_that_can_happen_to_a_trial_is_seen(url: str, single_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps are read one by one before all are."""
    monkeypatch.setattr(cached_storage, "SINGLE_STEPS", single_steps)
    storage = open_storage(url)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    other = optuna.create_study(study_name="other", storage=storage, direction="maximize")
    history, queue = CachedStorage(storage), Queue(storage.engine, study._study_id, max_attempts=1)
    check(history, storage, study._study_id)
    enqueue_trials(storage.engine, study._study_id, {}, [create_trial(state=TrialState.WAITING)] * 6)
    check(history, storage, study._study_id)
    lease = queue.claim()
    assert lease is not None
    check(history, storage, study._study_id)
    for trial in mixed(random.Random(1), 30):
        study.add_trial(trial)
        other.add_trial(trial)
    check(history, storage, study._study_id)
    check(history, storage, other._study_id)

    queue.record(lease, [ROW | {"epoch": 1, "accuracy": 0.5}], {1: 0.5})
    history.set_trial_param(lease.trial_id, "beta", 0.25, SPACE["beta"])
    history.set_trial_system_attr(lease.trial_id, "completed_rung_0", 0.5)
    check(history, storage, study._study_id)
    queue.finish(lease, TrialState.PRUNED, [0.5], {"epochs": 1})
    check(history, storage, study._study_id)
    for number in (1, 2):
        lease = queue.claim()
        assert lease is not None
        assert lease.number == number
        queue.release(lease, error="boom")
        check(history, storage, study._study_id)
    assert {1, 2} < set(transfer.requeue(storage, "s", trials=None))
    check(history, storage, study._study_id)
    for step, state in enumerate((TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL), 1):
        lease = queue.claim()  # the first two have failed before
        assert lease is not None
        assert lease.number == step
        queue.record(lease, [ROW | {"epoch": step, "accuracy": 0.5}], {step: 0.5})
        queue.finish(lease, state, [0.5])
        check(history, storage, study._study_id)
    assert transfer.requeue(storage, "s", trials=[3]) == [3]
    lease = queue.claim()
    assert lease is not None
    queue.finish(lease, TrialState.COMPLETE, [0.75])  # put back and run between two looks
    check(history, storage, study._study_id)
    optuna.delete_study(study_name="other", storage=storage)
    enqueue_trials(storage.engine, study._study_id, {}, [create_trial(state=TrialState.WAITING)] * 2)
    check(history, storage, study._study_id)


PRUNERS: list[dict[str, Any]] = [
    {"kind": "median", "n_startup_trials": 3, "n_min_trials": 3},
    {"kind": "median", "n_startup_trials": 0, "n_warmup_steps": 1, "interval_steps": 2},
    {"kind": "percentile", "percentile": 30.0},
    {"kind": "successive-halving", "min_resource": "auto"},
    {"kind": "successive-halving", "min_resource": 1, "reduction_factor": 2, "bootstrap_count": 2},
    {"kind": "hyperband", "min_resource": 1, "reduction_factor": 3},
    {"kind": "patient", "patience": 2, "min_delta": 0.15},
]


def label(case: Any) -> str:
    return case if isinstance(case, str) else "-".join(map(str, case.values()))


ON_POSTGRESQL = [(PRUNERS[i], "postgresql") for i in (0, 3, 5)]
"""A pruner for each way to read the database: the reports of a step, the attributes of all trials, brackets."""


@pytest.mark.parametrize(
    ("pruning", "url"), [*((each, "sqlite") for each in PRUNERS), *ON_POSTGRESQL], indirect=["url"], ids=label
)
def test_pruners_decide_as_on_stock_optuna(pruning: dict[str, Any], url: str) -> None:
    """At every state a study passes through, about every trial that runs."""
    config = config_of(pruning=pruning, training={"epochs": EPOCHS})
    storage = open_storage(url)
    optuna.create_study(study_name="s", storage=storage, direction="maximize")
    ours = optuna.load_study(study_name="s", storage=CachedStorage(storage), pruner=make_pruner(config, 200))
    decisions: list[tuple[bool, bool]] = []
    trials = mixed(random.Random(2), 80)
    for some in (trials[:1], trials[1:20], trials[20:40], trials[40:]):
        for trial in some:
            ours.add_trial(trial)
        stock = stock_study(storage)
        for trial in stock.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not trial.intermediate_values:
                continue
            theirs = stock_pruner(config, 200).prune(stock, trial)  # first: it goes by the attributes before its own
            wrote = storage.get_trial(trial._trial_id).system_attrs
            for key in wrote.keys() - trial.system_attrs.keys():
                _forget(storage, trial._trial_id, key)
            # A new pruner each time: successive halving keeps what it once made of min_resource="auto".
            mine = make_pruner(config, 200).prune(ours, ours._storage.get_trial(trial._trial_id))
            assert storage.get_trial(trial._trial_id).system_attrs == wrote
            decisions.append((mine, theirs))
    assert len(decisions) > 20
    assert all(mine == theirs for mine, theirs in decisions)
    assert {mine for mine, _ in decisions} == {True, False}


def _forget(storage: RDBStorage, trial_id: int, key: str) -> None:
    with storage.engine.begin() as connection:
        of_trial = TRIAL_SYSTEM_ATTRS.c.trial_id == trial_id
        connection.execute(sa.delete(TRIAL_SYSTEM_ATTRS).where(of_trial, TRIAL_SYSTEM_ATTRS.c.key == key))


SAMPLERS: list[dict[str, Any]] = [
    {"kind": "random"},
    {"kind": "tpe", "n_startup_trials": 3},
    {"kind": "tpe", "n_startup_trials": 3, "multivariate": True},
    {"kind": "tpe", "n_startup_trials": 3, "constant_liar": False},
    {"kind": "gp", "n_startup_trials": 3},
    {"kind": "cma-es"},
    {"kind": "qmc"},
]


@pytest.mark.parametrize(
    ("sampler", "pruner", "url"),
    [
        *((sampler, "none", "sqlite") for sampler in SAMPLERS),
        (SAMPLERS[1], "hyperband", "sqlite"),  # which shows samplers one bracket only
        (SAMPLERS[1], "hyperband", "postgresql"),
        (SAMPLERS[5], "none", "postgresql"),  # keeps its state in attributes
    ],
    indirect=["url"],
    ids=label,
)
def test_samplers_suggest_as_on_stock_optuna(sampler: dict[str, Any], pruner: str, url: str, tmp_path: Path) -> None:
    """Ten suggestions in a study of trials of every state, and in its copy through Optuna's own storage."""
    config = config_of(
        policy={"alpha": {"low": 50, "high": 100, "step": 10}, "beta": {"low": 0.1, "high": 0.9}},
        training={"lr": {"low": 0.001, "high": 0.01, "log": True}, "epochs": EPOCHS},
        search={"sampler": sampler, "trials": 10},
        pruning={"kind": pruner},
    )
    here, there = open_storage(url), open_storage(f"sqlite:///{tmp_path / 'stock.db'}")
    study = optuna.create_study(study_name="s", storage=here, direction="maximize")
    for trial in mixed(random.Random(3), 30):
        study.add_trial(trial)
    enqueue_trials(here.engine, study._study_id, {}, space.queued_trials(config))
    transfer.copy(here, there, "s")
    ours = optuna.load_study(study_name="s", storage=CachedStorage(here), pruner=make_pruner(config, 200))
    stock = optuna.load_study(study_name="s", storage=there, pruner=make_pruner(config, 200))

    chosen, theirs = [], []
    for number in range(30, 40):
        # The trials before the queued ones have no lease: both sides take the queued ones themselves.
        mine, other = (_start(storage, number) for storage in (here, there))
        parameters, _ = ask(ours, config, mine, 1000)
        chosen.append(parameters)
        theirs.append(_stock_ask(stock, config, other))
        state = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL)[number % 4]
        for storage, lease in ((here, mine), (there, other)):
            storage.set_trial_intermediate_value(lease.trial_id, 1, parameters["beta"])
            if number != 35:  # it goes on running
                value = [1 - (parameters["beta"] - 0.4) ** 2]
                storage.set_trial_state_values(lease.trial_id, state, None if state == TrialState.FAIL else value)
    assert chosen == theirs
    # What is equal is not one value again and again; a model may find its maximum at the edge more than once.
    assert len({parameters["beta"] for parameters in chosen}) > (1 if sampler["kind"] == "gp" else 5)


def _start(storage: RDBStorage, number: int) -> Lease:
    """A lease as far as `ask` looks at it."""
    study_id = storage.get_study_id_from_name("s")
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    assert storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    return Lease(trial_id, number, 1)


def _stock_ask(study: optuna.Study, config: StudyConfig, lease: Lease) -> space.Parameters:
    study.sampler = make_sampler(config, lease.number)
    study._thread_local.cached_all_trials = None
    study.get_trials(deepcopy=False)
    return space.suggest(optuna.Trial(study, lease.trial_id), config)


def test_a_trial_that_ends_while_it_is_read(url: str) -> None:
    """Between any two queries: what is seen as ended has its value, now or at the next look."""
    storage, worker = open_storage(url), open_storage(url)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    running = study.ask(SPACE)
    watched = CachedStorage(open_storage(url))
    watched.get_all_trials(study._study_id)
    queries = 0

    def before(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        nonlocal queries
        if statement.startswith("SELECT") and connection.engine.pool is watched.engine.pool:
            queries += 1
            if queries == position:
                worker.set_trial_state_values(running._trial_id, TrialState.COMPLETE, [0.5])

    sa.event.listen(sa.Engine, "before_cursor_execute", before)
    try:
        for position in range(1, 9):
            queries = 0
            (seen,) = watched.get_all_trials(study._study_id)
            assert seen.values == ([0.5] if seen.state == TrialState.COMPLETE else None), position
            (seen,) = watched.get_all_trials(study._study_id)
            assert (seen.state, seen.values) == (TrialState.COMPLETE, [0.5]), position
            study = optuna.create_study(storage=storage, direction="maximize")
            running = study.ask(SPACE)
            watched.get_all_trials(study._study_id)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", before)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trial_user_attributes SET value_json = '{' WHERE trial_id = 3",
        "UPDATE trial_params SET distribution_json = '[]' WHERE trial_id = 3",
        "UPDATE trial_values SET value = NULL WHERE trial_id = 3",
        "UPDATE trials SET number = NULL WHERE trial_id = 3",
        "UPDATE trials SET datetime_start = 'abc' WHERE trial_id = 3",
    ],
)
def test_a_trial_that_cannot_be_read_is_named(statement: str, sqlite_url: str) -> None:
    storage = open_storage(sqlite_url)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    for number in range(5):
        trial = study.ask(SPACE)
        trial.set_user_attr("x", number)
        study.tell(trial, 0.5)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql(statement)
    with pytest.raises(
        UserError, match=r"^the trial with the id 3 has a stored value that cannot be read \(.*; correct"
    ):
        CachedStorage(storage).get_all_trials(study._study_id)


def test_two_objectives(url: str) -> None:
    storage = open_storage(url)
    study = optuna.create_study(study_name="s", storage=storage, directions=["maximize", "minimize"])
    for values in ((0.5, 7e9), (math.inf, -1.0)):
        study.add_trial(create_trial(values=values))
    check(CachedStorage(storage), storage, study._study_id)


def test_categories_come_back_as_they_were(sqlite_url: str) -> None:
    storage = open_storage(sqlite_url)
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    kinds: dict[str, BaseDistribution] = {
        "policy": CategoricalDistribution(["dynamic", "fresh"]),
        "batch_size": CategoricalDistribution([64, 128]),
    }
    study.add_trial(create_trial(value=1.0, params={"policy": "fresh", "batch_size": 64}, distributions=kinds))
    check(CachedStorage(storage), storage, study._study_id)
