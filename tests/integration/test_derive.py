"""Studies derived from others: which trials are taken over, what of them, what is left to run, what is refused."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

import study
from dashboards import status, study_data
from dashboards.reports import html
from dashboards.reports import json as json_report
from storage import artifacts, exclusions, queries
from storage.engine import close, open_storage
from storage.errors import UserError
from storage.optuna_internals import study_id_of
from storage.schema import ARTIFACTS, STUDIES, TRIAL_ATTRS, TRIAL_PARAMS
from storage.study_attributes import set_attribute
from storage.transfer import copy, delete, import_study
from study.config.loading import parse_config
from study.confirm import TEST_ASKED
from study.create import OpenStudy, open_study
from study.derive import Derivation, derive
from study.enqueue import enqueue
from study.training.data.dataset import DataError
from tests.support import command
from tests.support.harness import Harness, config_of, scripted_accuracies

TPE = {"sampler": "tpe", "trials": 4, "seed": 5}
RANGES = {"alpha": {"low": 60, "high": 90}, "beta": {"low": 0.1, "high": 0.9}}


def opened(harness: Harness) -> OpenStudy:
    return OpenStudy("sqlite://", harness.storage, harness.study, harness.config)


def derived(harness: Harness, *assignments: str, name: str = "d", trials: int | None = None) -> Derivation:
    return derive(opened(harness), name, None, assignments, trials)


def resumed(url: str, name: str = "d") -> Harness:
    """A worker for a study that exists."""
    there = open_study(url, name)
    return Harness(url, there.config, name)


def finished(url: str, values: Iterable[float] = (0.2, 0.3, 0.9, 0.4), **sections: Any) -> Harness:
    """A grid of alpha 60, 90 and beta 0.3, 0.6; the third trial, alpha 90 and beta 0.3, is the best."""
    results = iter(values)
    harness = Harness(url, config_of(training={"epochs": 1}, **sections))
    with scripted_accuracies(lambda _: next(results)):
        harness.work()
    return harness


def everything_of(storage: Any, name: str, numbers: dict[int, int]) -> list[Any]:
    """All of the trials with the numbers `numbers`, in their order, that does not say where they are."""
    rows = queries.epoch_rows(storage.engine, study_id_of(optuna.load_study(study_name=name, storage=storage)))
    attempts = queries.attempts(storage.engine, open_study(str(storage.url), name).id)
    trials = {t.number: t for t in optuna.load_study(study_name=name, storage=storage).trials}
    return [
        (
            trials[n].state, trials[n].values, trials[n].params, trials[n].intermediate_values,
            trials[n].datetime_start, trials[n].datetime_complete, rows[n],
            [(a.owner, a.device, a.started_at, a.ended_at, a.outcome) for a in attempts if a.number == n],
            {k: v for k, v in trials[n].user_attrs.items() if k not in ("origin_trial", "queue_position", "cell")},
        )
        for n in numbers
    ]  # fmt: skip


def test_trials_in_the_new_grid_are_taken_over_whole_and_the_others_named(url: str) -> None:
    harness = finished(url)
    before = harness.outcome()
    done = derived(harness, "policy.alpha=[90, 120]")
    assert sorted(done.taken) == [2, 3]
    assert done.lines() == ["not taken over: 0, 1: alpha 60 is outside the new space"]
    new = optuna.load_study(study_name="d", storage=open_storage(url))
    assert [(t.state.name, t.params) for t in new.trials] == [
        ("COMPLETE", {"alpha": 90, "beta": 0.3}),
        ("COMPLETE", {"alpha": 90, "beta": 0.6}),
        ("WAITING", {"alpha": 120, "beta": 0.3}),
        ("WAITING", {"alpha": 120, "beta": 0.6}),
    ]
    assert [t.user_attrs.get("origin_trial") for t in new.trials] == [2, 3, None, None]
    old = everything_of(harness.storage, "s", {2: 0, 3: 1})
    assert everything_of(harness.storage, "d", {0: 2, 1: 3}) == old
    assert old[0][-2]
    assert len({repr(d) for t in new.trials for d in t.distributions.values()}) == 2  # one a parameter, not the old too
    work = resumed(url)
    assert work.study.user_attrs["uid"] != harness.study.user_attrs["uid"]
    work.work()
    assert all(t.state == TrialState.COMPLETE for t in work.study.trials)
    assert harness.outcome() == before  # a stored study is never edited
    data = study_data.read(work.storage, "d")
    assert data.best is not None
    assert data.best.number == 0
    assert [row.seed for row in data.rows] == [0, 0, 0, 0]


def test_the_model_goes_along_and_can_be_loaded(url: str) -> None:
    harness = finished(url)
    derived(harness, "policy.alpha=[90, 120]")
    ids = []
    for name in ("s", "d"):
        there = open_study(url, name)
        (kept,) = artifacts.stored(there.engine, there.id)
        assert kept.value == pytest.approx(0.9)
        with artifacts.DatabaseArtifactStore(there.engine).open_reader(kept.id) as file:
            ids.append((kept.trial, file.read()))
    assert ids[0][1] == ids[1][1]
    assert [number for number, _ in ids] == [2, 0]
    assert study.load_model("d", url).description.value == pytest.approx(0.9)
    derived(harness, "artifacts.keep=none", name="without")
    with harness.storage.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(ARTIFACTS)) == 2


def test_a_model_in_a_folder_is_copied_into_the_database(sqlite_url: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    harness = finished(sqlite_url, artifacts={"store": str(tmp_path / "store")})
    derived(harness, "policy.beta=[0.3]")
    before = study.load_model("s", sqlite_url).description
    delete(harness.storage, "s")
    assert not list((tmp_path / "store").rglob("*.safetensors"))
    assert study.load_model("d", sqlite_url).description == before


def test_more_replicates_keep_what_has_run(sqlite_url: str) -> None:
    harness = finished(sqlite_url)
    done = derived(harness, "search.replicates=2", "policy.alpha=[60, 75, 90]")
    assert (sorted(done.taken), len(done.queued)) == ([0, 1, 2, 3], 8)
    work = resumed(sqlite_url)
    assert len(work.study.trials) == 12  # the launch of the derived study adds nothing
    seeds = sorted((t.params["alpha"], t.params["beta"], t.user_attrs["seed"]) for t in work.study.trials)
    assert seeds == [(a, b, seed) for a in (60, 75, 90) for b in (0.3, 0.6) for seed in (0, 1)]
    assert sorted(t.user_attrs["queue_position"] for t in work.study.trials) == list(range(12))
    by_place = {(t.user_attrs["cell"], t.user_attrs["replicate"]) for t in work.study.trials}
    assert len(by_place) == 12
    fewer = derived(work, "search.replicates=1", "policy.alpha=[60]", name="fewer")
    assert (len(fewer.taken), len(fewer.queued)) == (2, 0)
    grown = Harness(sqlite_url, fewer.config.model_copy(
        update={"search": fewer.config.search.model_copy(update={"replicates": 2})}), "fewer")  # fmt: skip
    assert [t.user_attrs["seed"] for t in grown.study.trials] == [0, 0, 1, 1]


def test_what_a_person_queued_takes_the_cell_that_it_ran_or_stays_beside_the_grid(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}))
    enqueue(opened(harness), {"alpha": 75, "beta": 0.3})
    harness.work()
    done = derived(harness, "policy.alpha=[75, 90]")
    assert (sorted(done.taken), len(done.queued)) == ([2, 3, 4], 1)
    assert "enqueued" not in open_study(sqlite_url, "d").study.trials[2].user_attrs
    done = derived(harness, "policy.alpha=[60, 90]", name="beside")
    assert (sorted(done.taken), len(done.queued)) == ([0, 1, 2, 3, 4], 0)
    trial = open_study(sqlite_url, "beside").study.trials[4]
    assert trial.user_attrs["enqueued"] is True
    assert "queue_position" not in trial.user_attrs
    done = derived(harness, "policy.alpha=[80, 90]", name="outside")
    assert done.not_taken[4] == "alpha 75 is outside the new space"


def test_a_cell_that_the_new_grid_leaves_out_is_not_taken_over(sqlite_url: str) -> None:
    harness = finished(sqlite_url, [0.2] * 6, policy={"alpha": [60, 75, 90], "beta": [0.3, 0.6]})
    done = derived(harness, "policy.alpha=[60, 90]", "policy.beta=[0.3]")
    assert sorted(done.taken) == [0, 4]
    assert done.not_taken[2] == "alpha 75, beta 0.3, seed 0 is no cell of the new grid"
    constrained = derived(harness, "search.constraints=['alpha > 70']", name="constrained")
    assert constrained.not_taken[1] == "it breaks the constraint 'alpha > 70'"
    assert (sorted(constrained.taken), len(constrained.queued)) == ([2, 3, 4, 5], 0)


def test_a_parameter_that_was_fixed_can_be_searched_and_the_other_way_round(url: str) -> None:
    harness = finished(url)
    done = derived(harness, "policy.beta=0.6", "training.lr=[0.005, 0.01]")
    assert done.lines() == ["not taken over: 0, 2: beta 0.3 is not 0.6"]
    trials = open_study(url, "d").study.trials
    assert [t.params for t in trials[:2]] == [{"alpha": 60, "lr": 0.005}, {"alpha": 90, "lr": 0.005}]
    assert [t.params["lr"] for t in trials[2:]] == [0.01, 0.01]
    with harness.storage.engine.connect() as connection:
        names = connection.scalars(sa.select(TRIAL_PARAMS.c.param_name).where(
            TRIAL_PARAMS.c.trial_id.in_([t._trial_id for t in trials]))).all()  # fmt: skip
    assert set(names) == {"alpha", "lr"}


def test_other_policies_beside_the_first(sqlite_url: str) -> None:
    harness = finished(sqlite_url)
    done = derived(harness, 'policy.name=["dynamic", "static"]')
    assert (sorted(done.taken), len(done.queued)) == ([0, 1, 2, 3], 2)
    trials = open_study(sqlite_url, "d").study.trials
    assert trials[0].params == {"policy": "dynamic", "alpha": 60, "beta": 0.3}
    assert [t.params for t in trials[4:]] == [{"policy": "static", "alpha": 60}, {"policy": "static", "alpha": 90}]


def test_a_sampler_counts_taken_over_trials_and_learns_from_them(url: str) -> None:
    harness = finished(url, [0.2, 0.9, 0.3, 0.4], policy=RANGES, search=TPE)
    values = [t.params["alpha"] for t in harness.study.trials]
    done = derived(harness, "policy.alpha.high=120", trials=6)
    assert (len(done.taken), len(done.queued), done.not_taken) == (4, 2, {})
    new = open_study(url, "d").study
    assert [t.params.get("alpha") for t in new.trials] == [*values, None, None]
    assert [t.user_attrs["seed"] for t in new.trials] == [5, 6, 7, 8, 9, 10]
    assert {d.high for t in new.trials for n, d in t.distributions.items() if n == "alpha"} == {120}  # type: ignore[attr-defined]
    resumed(url).work()
    assert [t.state for t in optuna.load_study(study_name="d", storage=harness.storage).trials] == [
        TrialState.COMPLETE
    ] * 6
    with pytest.raises(UserError, match=r"search.trials is 3, and 4 finished trials fit, .* at least 4"):
        derived(harness, name="few", trials=3)
    narrow = derived(harness, f"policy.alpha={{low={max(values)}, high=120}}", name="narrow")
    kept = [i for i, value in enumerate(values) if value == max(values)]
    assert (sorted(narrow.taken), len(narrow.queued)) == (kept, 4 - len(kept))
    seeds = [t.user_attrs["seed"] for t in open_study(url, "narrow").study.trials]
    assert sorted(seeds) == [5, 6, 7, 8]


def test_a_list_in_another_order_is_stored_in_another_way(sqlite_url: str) -> None:
    policy = {"alpha": 60, "beta": [0.3, 0.6, 0.9]}
    harness = finished(sqlite_url, [0.2] * 4, policy=policy, search=TPE)
    betas = [t.params["beta"] for t in harness.study.trials]
    done = derived(harness, "policy.beta=[0.9, 0.6, 0.3, 0.1]")
    assert len(done.taken) == 4
    assert [t.params["beta"] for t in open_study(sqlite_url, "d").study.trials] == betas


def test_failed_excluded_and_unfinished_trials_stay_with_their_study(url: str) -> None:
    harness = Harness(url, config_of(training={"epochs": 1}))
    harness.work(most=2)
    queue = harness.queue()
    lease = queue.claim()
    assert lease is not None
    queue.fail(lease, "boom")
    exclusions.exclude(harness.storage.engine, study_id_of(harness.study), [1], "the disk was full")
    done = derived(harness)
    assert sorted(done.taken) == [0]
    assert done.lines() == [
        "not taken over: 1: it is excluded: the disk was full",
        "not taken over: 2: it failed",
        "not taken over: 1 trial that has not finished",
    ]
    new = open_study(url, "d").study
    assert [t.state.name for t in new.trials] == ["COMPLETE", "WAITING", "WAITING", "WAITING"]
    assert "excluded" not in new.user_attrs


def test_pruned_trials_and_their_rungs(sqlite_url: str) -> None:
    pruning = {"kind": "hyperband", "min_resource": 1, "reduction_factor": 2}
    harness = Harness(sqlite_url, config_of(training={"epochs": 4}, pruning=pruning, policy={
        "alpha": [60, 70, 80, 90], "beta": [0.3, 0.6]}))  # fmt: skip
    left = iter(range(100))
    with scripted_accuracies(lambda _: 0.9 - 0.005 * next(left)):
        harness.work()
    states = [t.state.name for t in harness.study.trials]
    assert {"COMPLETE", "PRUNED"} == set(states)
    assert any(key.startswith("completed_rung_") for t in harness.study.trials for key in t.system_attrs)
    done = derived(harness, "policy.alpha=[70, 80, 90, 100]")
    trials = open_study(sqlite_url, "d").study.trials
    assert [t.state.name for t in trials[: len(done.taken)]] == states[2:]
    assert not any(key.startswith("completed_rung_") for t in trials for key in t.system_attrs)


@pytest.mark.parametrize(
    ("assignment", "differs"),
    [
        ("training.epochs=2", r"training\.epochs: 2 != 1"),
        ("data.holdout=0.3", r"data\.holdout: 0\.3 != 0\.1"),
        ("data.protocol=paper", r"data\.protocol: paper != holdout"),
        ("data.test=true", r"data\.test: True != False"),
        ("network.width=0.25", r"network\.width: 0\.25 != 0\.125"),
        ("policy.delta=0.5", r"policy\.delta: 0\.5 != 0\.01"),
        ("training.precision=fp32", r"training\.precision: fp32 != auto"),
        ("training.batch_size=20", r"training\.batch_size: 20 != 50"),
        ("search.seed=1", r"search\.seed: 1 != 0"),
        ("search.metric=macro_f1", r"search\.metric: macro_f1 != accuracy"),
        ("pruning=median", r"pruning\.kind: median != none"),
    ],
)
def test_what_decides_the_numbers_cannot_change(sqlite_url: str, assignment: str, differs: str) -> None:
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}))
    with pytest.raises(UserError, match=differs) as error:
        derived(harness, assignment)
    assert "study launch" in str(error.value)
    assert "--after s" in str(error.value)
    assert "\n" not in str(error.value)
    assert queries.study_names(harness.storage.engine) == {"s"}


def test_what_decides_no_number_can_change(sqlite_url: str) -> None:
    harness = finished(sqlite_url)
    done = derived(harness, "data.placement=host", "policy.gamma=0.97", "search.target=0.95", "lease.seconds=5",
                   "description='wider'", "artifacts.keep=2", "checkpoint.every_seconds=9")  # fmt: skip
    assert len(done.taken) == 4


def test_pruning_in_images_needs_the_same_smallest_alpha(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}, pruning={"kind": "median", "step": "images"}))
    with pytest.raises(UserError, match="images a step of pruning: 30 != 60"):
        derived(harness, "policy.alpha=[30, 60]")
    derived(harness, "policy.alpha=[60, 120]")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["policy.alpha=[60"], "alpha"),
        (["policy.alhpa=[60]"], "did you mean 'alpha'"),
        (["policy.alpha=[60, 6000]"], "policy.alpha must be at most the 200 training images"),
        (["search.sampler=tpe"], "search.trials is needed"),
        (['policy.name=["dynamic", "module:Class"]'], "own code: module:Class != none"),
        (['network.name=["paper", "torchvision:resnet0"]'], "resnet0"),
    ],
)
def test_bad_changes_are_refused_and_nothing_is_made(sqlite_url: str, assignments: list[str], message: str) -> None:
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}))
    with pytest.raises((UserError, DataError), match=message):
        derived(harness, *assignments)
    assert queries.study_names(harness.storage.engine) == {"s"}


@pytest.mark.parametrize("seed", ["x", [], 1.5, None])
def test_a_trial_whose_seed_is_no_number_is_not_taken_over(seed: Any, sqlite_url: str) -> None:
    harness = finished(sqlite_url)
    with harness.storage.engine.begin() as connection:
        of_first = sa.and_(TRIAL_ATTRS.c.trial_id == 1, TRIAL_ATTRS.c.key == "seed")
        connection.execute(sa.update(TRIAL_ATTRS).where(of_first).values(value_json=json.dumps(seed)))
    done = derived(harness)
    assert list(done.taken) == [1, 2, 3]
    assert done.not_taken == {0: "its seed is no whole number"}


def test_names_that_are_there_and_deleted_trials(url: str) -> None:
    harness = finished(url)
    trials = len(harness.study.trials)
    with pytest.raises(UserError, match="a study 's' is in this storage already"):
        derived(harness, name="s")
    with pytest.raises(UserError, match="does not begin with a dash"):
        derived(harness, name="-d")
    assert len(harness.study.trials) == trials
    with harness.storage.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(STUDIES)) == 1


def test_a_quasi_random_sequence_continues(sqlite_url: str) -> None:
    search = {"sampler": "qmc", "trials": 3, "seed": 5}
    harness = finished(sqlite_url, [0.2] * 3, policy=RANGES, search=search)
    derived(harness, trials=5)
    with scripted_accuracies(lambda _: 0.5):
        resumed(sqlite_url).work()
    whole = finished(f"{sqlite_url}.whole", [0.5] * 5, policy=RANGES, search=search | {"trials": 5})
    assert [t.params for t in open_study(sqlite_url, "d").study.trials] == [t.params for t in whole.study.trials]


@pytest.mark.parametrize("change", ["search.trials=6", "policy.beta.high=0.95"])
def test_cma_es_starts_anew_in_another_space_only(sqlite_url: str, change: str) -> None:
    harness = finished(sqlite_url, [0.2, 0.3, 0.4, 0.5], policy=RANGES, search=TPE | {"sampler": "cma-es"})

    def state(study: optuna.Study) -> list[str]:
        return [key for t in study.trials for key in t.system_attrs if key.startswith("plain-cma:")]

    attributes = state(harness.study)
    assert attributes
    derived(harness, change)
    copied = [
        key for t in open_study(sqlite_url, "d").study.trials for key in t.system_attrs if key.startswith("plain-cma:")
    ]
    assert copied == (attributes if change.startswith("search") else [])


def test_the_origin_is_shown_and_travels(finished_twice: tuple[Harness, str], tmp_path: Path) -> None:
    harness, name = finished_twice
    sentence = f"derived from {'s<i>'!r}: 2 of its 4 finished trials taken over"
    data = study_data.read(harness.storage, name)
    assert sentence in status.heading(data.status)
    page = html.page([data])
    assert "derived from &#x27;s&lt;i&gt;&#x27;: 2 of its 4 finished trials taken over" in page
    assert "s<i>" not in page.replace("s&lt;i&gt;", "")
    document = json.loads(json.dumps(json_report.report(data)))
    assert document["derived_from"] == {"study": "s<i>", "taken_over": 2, "finished": 4}
    exported, url = open_storage(f"sqlite:///{tmp_path / 'd.study'}"), f"sqlite:///{tmp_path / 'target.db'}"
    copy(harness.storage, exported, name)
    close(exported.engine)
    assert import_study(tmp_path / "d.study", url, check_config=parse_config) == (name, 4)
    assert sentence in status.heading(status.read(open_storage(url).engine, name))
    with closing(sqlite3.connect(tmp_path / "d.study")) as connection, connection:
        connection.execute("UPDATE study_user_attributes SET value_json = '{}' WHERE key = 'derived_from'")
    with pytest.raises(UserError, match="its after or derived_from is not what this program writes"):
        import_study(tmp_path / "d.study", url, "again", check_config=parse_config)


@pytest.fixture
def finished_twice(sqlite_url: str) -> tuple[Harness, str]:
    results = iter([0.2, 0.3, 0.9, 0.4])
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}), "s<i>")
    with scripted_accuracies(lambda _: next(results)):
        harness.work()
    derive(opened(harness), "d", None, ["policy.alpha=[90, 120]"])
    return harness, "d"


@pytest.mark.parametrize("value", [[], {"study": 3}, {"study": "x", "taken_over": -1, "finished": 2}, "x" * 5000])
def test_an_altered_origin_is_left_out(sqlite_url: str, value: Any) -> None:
    harness = finished(sqlite_url)
    derived(harness)
    there = open_study(sqlite_url, "d")
    set_attribute(there.engine, there.id, "derived_from", value)
    data = study_data.read(there.storage, "d")
    assert data.status.derived_from is None
    html.page([data])


def test_test_splits_that_were_asked_stay_recorded_and_confirmations_are_no_source(sqlite_url: str) -> None:
    harness = finished(sqlite_url)
    asked = [{"study": "s-confirmed", "settings": 1, "seeds": 2, "again": False}]
    set_attribute(harness.storage.engine, study_id_of(harness.study), TEST_ASKED, asked)
    derived(harness)
    there = open_study(sqlite_url, "d")
    assert there.study.user_attrs[TEST_ASKED] == asked
    set_attribute(there.engine, there.id, "confirms", {"study": "s", "values": [0.9]})
    with pytest.raises(UserError, match="'d' is a confirmation"):
        derive(open_study(sqlite_url, "d"), "e")


def test_the_command_and_python(sqlite_url: str, tmp_path: Path) -> None:
    finished(sqlite_url)
    (tmp_path / "wider.toml").write_text('[policy]\nalpha = [90, 120]\n\n[data]\nroot = "."\n')
    done = command.study("derive", "d", "--from", "s", "--config", "wider.toml", "--storage", sqlite_url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not taken over: 0, 1: alpha 60 is outside the new space\n" in done.stderr
    assert "derived 'd' from 's': took over 2 of 4 finished trials, queued 2; run them with: study resume d" in (
        done.stderr
    )
    whole = ("derive", "w", "--from", "s", "--set", "policy.alpha=[60]", "--storage", sqlite_url)
    assert "took over 2 of 4 finished trials, all of its trials\n" in command.study(*whole, cwd=tmp_path).stderr
    again = command.study("derive", "d", "--from", "s", "--storage", sqlite_url, cwd=tmp_path)
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)
    assert "a study 'd' is in this storage already" in again.stderr
    missing = command.study("derive", "e", "--from", "x", "--storage", sqlite_url, cwd=tmp_path)
    assert (missing.returncode, "no study 'x'" in missing.stderr) == (2, True)
    new = study.open_study("s", sqlite_url).derive("p", assignments=["policy.alpha=[60]"])
    assert list(new.trials()["state"]) == ["complete", "complete"]
    assert new.config.policy.alpha == (60,)
