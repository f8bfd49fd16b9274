"""Studies whose sampler learns from another study's trials: what it sees, that nothing else does, what is refused."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import study
from dashboards import status, study_data, tables
from dashboards.reports import html
from dashboards.reports import json as json_report
from storage import budgets, early_end, exclusions, origins, transfer
from storage.engine import close, open_storage
from storage.errors import UserError
from storage.optuna_internals import storage_of, study_id_of
from storage.origins import AFTER, MOST_INFORMING, Informed, informed_by
from storage.queue import Queue
from storage.study_attributes import set_attribute
from study.after import informing
from study.config.loading import parse_config
from study.config.models import StudyConfig
from study.create import create_study, load_study, open_study, prepare
from study.derive import derive
from study.search import warm_start
from study.search.pruners import make_pruner
from study.trial.runner import ask
from tests.support import command
from tests.support.harness import config_of

SPACE = {"alpha": {"low": 60, "high": 180}, "beta": {"low": 0.1, "high": 0.9}}
SAMPLERS: dict[str, Any] = {
    "tpe": {"kind": "tpe", "n_startup_trials": 5},
    "multivariate tpe": {"kind": "tpe", "n_startup_trials": 5, "multivariate": True},
    "gp": {"kind": "gp", "n_startup_trials": 5},
    "cma-es": {"kind": "cma-es"},
}
EPOCH = {"epoch": 1, "loss": 1.0, "images": 60, "kind": "keep", "k": 0, "beta": 0.1, "train_seconds": 1.0} | {
    "validation_seconds": 0.1
}
Params = dict[str, Any]


def searching(sampler: Any = "random", trials: int = 4, **sections: Any) -> StudyConfig:
    search = {"sampler": sampler, "trials": trials, "seed": 3} | sections.pop("search", {})
    return config_of(**{"policy": SPACE, "training": {"epochs": 1}, "search": search, **sections})


def value(params: Params) -> float:
    """The highest near alpha 80 and beta 0.2."""
    return float(0.9 - 0.003 * abs(params["alpha"] - 80) - 0.4 * abs(params["beta"] - 0.2))


class Made:
    """A study, and a worker that asks for parameters as ever and has a made-up result in the place of training."""

    def __init__(self, url: str, config: StudyConfig, name: str = "s", after: str | None = "other") -> None:
        self.storage = open_storage(url)
        prepared = prepare(config, None)
        informed = None if after is None else informing(self.storage, name, after, prepared)
        self.is_new = create_study(self.storage, name, "test", prepared.config, prepared, informed=informed)
        self.join(name)

    def join(self, name: str) -> None:
        """As another worker."""
        self.study, self.config = load_study(self.storage, name)
        self.study.pruner = make_pruner(self.config, 200)
        self.id = study_id_of(self.study)
        self.engine = self.storage.engine
        self.queue = Queue(self.engine, self.id)

    def work(self, most: int = 1000, states: Mapping[int, TrialState] | None = None) -> list[Params]:
        asked = []
        for _ in range(most):
            lease = self.queue.claim()
            if lease is None:
                break
            params, _ = ask(self.study, self.config, lease, 200)
            asked.append(params)
            self.queue.record(lease, [EPOCH | {"accuracy": value(params)}], {1: value(params)})
            self.queue.finish(lease, (states or {}).get(lease.number, TrialState.COMPLETE), [value(params)])
        return asked


def other(url: str, trials: int = 12, **sections: Any) -> Made:
    made = Made(url, searching(trials=trials, **sections), "other", after=None)
    made.work()
    return made


@pytest.mark.parametrize(
    ("sampler", "url"),
    [*((sampler, "sqlite") for sampler in SAMPLERS), ("tpe", "postgresql"), ("cma-es", "postgresql")],
    indirect=["url"],
)
def test_the_sampler_learns_from_the_others_and_every_worker_the_same(url: str, sampler: str) -> None:
    other(url, trials=30)
    config = searching(SAMPLERS[sampler], trials=8)
    cold = Made(url, config, "cold", after=None).work()
    warm = Made(url, config, "warm").work()
    again = Made(url, config, "again")
    for params in warm:  # a new process for each trial
        assert again.work(most=1) == [params]
        again = Made(url, config, "again")
    assert warm != cold
    informed = sum(value(params) for params in warm[1:]) / 7  # the first of CMA-ES is random
    assert informed > sum(value(params) for params in cold[1:]) / 7 + 0.05


def test_the_first_trial_knows_what_the_others_do_not_start_with(sqlite_url: str) -> None:
    """A control: fewer trials than the sampler's random start change nothing but the count."""
    other(sqlite_url, trials=4)
    config = searching(SAMPLERS["tpe"], trials=3)
    cold, warm = Made(sqlite_url, config, "cold", after=None), Made(sqlite_url, config, "warm")
    assert warm.work(most=1) == cold.work(most=1)
    assert warm.work(most=1) != cold.work(most=1)  # the fifth that is known


def test_what_is_stored_and_who_sees_it(url: str) -> None:
    first = Made(url, searching(trials=7), "mixed", after=None)
    first.work(6, {2: TrialState.PRUNED})
    exclusions.exclude(first.engine, first.id, [1], "the disk was full")
    config = searching(
        SAMPLERS["tpe"], trials=3, search={"target": 0.89}, pruning={"kind": "median", "n_startup_trials": 0}
    )
    made = Made(url, config, "s", "mixed")
    informed = informed_by(made.study.user_attrs)
    assert informed is not None
    assert [(each["number"], each["state"]) for each in informed.trials] == [
        (0, "complete"), (2, "pruned"), (3, "complete"), (4, "complete"), (5, "complete"),
    ]  # fmt: skip
    trials = {t.number: t for t in first.study.trials}
    for each in informed.trials:
        assert each["params"] == trials[each["number"]].params  # bit for bit
        assert (each["values"], each["step"]) == (trials[each["number"]].values, 1)
    seen = warm_start.informed(made.study, warm_start.informing_trials(made.config, informed.trials))
    numbers = [t.number for t in storage_of(seen).get_all_trials(made.id)]
    assert len(set(numbers)) == len(numbers) == 8
    assert numbers == sorted(numbers)
    pruned = storage_of(seen).get_all_trials(made.id, states=(TrialState.PRUNED,))
    assert [(t.intermediate_values, t.value) for t in pruned] == [({1: trials[2].value}, trials[2].value)]
    # Everybody else: the study's own trials, before and after a worker has asked.
    made.work(most=1)
    assert len(made.study.trials) == 3
    assert len(made.study._get_trials(use_cache=True)) == 3
    assert storage_of(made.study).reports_at(made.id, 1)[0] == 1  # type: ignore[attr-defined]
    data = study_data.read(made.storage, "s")
    assert [row.number for row in data.rows] == [0, 1, 2]
    assert data.best is not None
    assert data.best.number == 0
    assert len(tables.trials(data)) == 3
    assert budgets.spending(made.engine, made.id).amounts["images"] == 60
    assert sum(row.images for row in data.rows) == 60
    assert early_end.reason_to_end(made.engine, made.id, early_end.read_rules(made.engine, made.id)) is None
    assert data.status.progress.total == 3


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_constraints_and_two_objectives(sqlite_url: str, sampler: str) -> None:
    search: dict[str, Any] = {"objective": "accuracy,images"}
    made = Made(sqlite_url, searching(trials=8, search=search), "other", after=None)
    for _ in range(8):
        lease = made.queue.claim()
        assert lease is not None
        params, _ = ask(made.study, made.config, lease, 200)
        made.queue.finish(lease, TrialState.COMPLETE, [value(params), float(params["alpha"])])
    search |= {"constraints": ["alpha < 150"]}
    warm = Made(sqlite_url, searching(SAMPLERS[sampler], trials=2, search=search))
    lease = warm.queue.claim()
    assert lease is not None
    params, _ = ask(warm.study, warm.config, lease, 200)
    assert params["alpha"] < 150
    informed = informed_by(warm.study.user_attrs)
    assert informed is not None
    assert 0 < len(informed.trials) < 8  # those that satisfy the constraint


def test_trials_outside_the_space_and_of_other_settings(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    made = other(sqlite_url, trials=12)
    narrow = {"alpha": {"low": 60, "high": 120}, "beta": {"low": 0.1, "high": 0.9}}
    with caplog.at_level("WARNING", "study"):
        warm = Made(sqlite_url, searching("tpe", policy=narrow | {"delta": 0.02}))
    assert "the trials of 'other' had another setting: policy.delta: 0.02 != 0.01" in caplog.messages
    informed = informed_by(warm.study.user_attrs)
    assert informed is not None
    inside = [t.number for t in made.study.trials if t.params["alpha"] <= 120]
    assert [each["number"] for each in informed.trials] == inside
    fixed = Made(sqlite_url, searching("tpe", policy={"alpha": made.study.trials[3].params["alpha"],
                                                     "beta": SPACE["beta"]}), "fixed")  # fmt: skip
    informed = informed_by(fixed.study.user_attrs)
    assert informed is not None
    assert [(each["number"], list(each["params"])) for each in informed.trials] == [(3, ["beta"])]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (searching("tpe", training={"epochs": 2}), r"training\.epochs: 2 != 1"),
        (searching("tpe", data={"holdout": 0.3}), r"data\.holdout: 0\.3 != 0\.1"),
        (searching("tpe", data={"protocol": "paper"}), r"data\.protocol: paper != holdout; data fingerprint|protocol"),
        (searching("tpe", data={"train_images": 190}), r"data\.train_images: 190 != 200"),
        (searching("tpe", network={"width": 0.25}), r"network\.width: 0\.25 != 0\.125"),
        (searching("tpe", search={"metric": "macro_f1"}), r"search\.metric: macro_f1 != accuracy"),
        (searching("random"), "sampler 'random' does not learn from trials"),
        (searching("qmc"), "sampler 'qmc' does not learn from trials, .*: tpe, gp, cma-es"),
        (config_of(training={"epochs": 1}), "sampler 'grid' does not learn"),
        (searching({"kind": "cma-es", "sigma0": 0.1}), "sigma0"),
        (searching("cma-es"), "cma-es learns from at least 10 complete trials of another study; 3 of 'other'"),
        (searching("tpe", policy=SPACE | {"alpha": {"low": 190, "high": 200}}),
         r"no trial of 'other' lies in this study's space, such as trial 0: alpha \d+ is outside the new space"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_made(sqlite_url: str, config: StudyConfig, message: str) -> None:
    other(sqlite_url, trials=3)
    with pytest.raises(UserError, match=message) as error:
        Made(sqlite_url, config)
    assert "\n" not in str(error.value)
    assert optuna.get_all_study_names(open_storage(sqlite_url)) == ["other"]


def test_other_data_and_studies_that_are_not_there(sqlite_url: str) -> None:
    made = other(sqlite_url, trials=3)
    with pytest.raises(UserError, match="no study 'x' in this storage; studies there: other"):
        Made(sqlite_url, searching("tpe"), after="x")
    set_attribute(made.engine, made.id, "data_fingerprint", "0" * 64)
    with pytest.raises(UserError, match=r"data fingerprint: [0-9a-f]{16} != 0000000000000000; launch it without"):
        Made(sqlite_url, searching("tpe"))
    Made(sqlite_url, searching(trials=2), "empty", after=None)
    with pytest.raises(UserError, match="no trial of 'empty' lies in this study's space: none has finished"):
        Made(sqlite_url, searching("tpe"), after="empty")


def test_launching_again_loads_the_study_and_only_with_the_same_other(url: str) -> None:
    made = other(url, trials=6)
    config = searching("tpe", trials=2)
    warm = Made(url, config)
    stored = warm.study.user_attrs[AFTER]
    assert warm.is_new
    Made(url, searching(trials=3), "another", after=None).work()
    for after, message in (
        (None, "the study 's' exists and is informed by 'other': choose another --name, or give --after other"),
        ("another", "the study 's' exists and is informed by 'other'"),
    ):
        with pytest.raises(UserError, match=message):
            Made(url, config, after=after)
    Made(url, config, "cold", after=None)
    with pytest.raises(UserError, match=r"'cold' exists and is informed by no other study: .* leave out --after"):
        Made(url, config, "cold")
    assert AFTER not in open_study(url, "cold").study.user_attrs
    transfer.delete(made.storage, "other")  # it has what it needs
    again = Made(url, searching("tpe", trials=5))
    assert not again.is_new
    assert again.study.user_attrs[AFTER] == stored
    assert len(again.study.trials) == 5


def test_an_attribute_that_somebody_altered_does_no_harm(sqlite_url: str) -> None:
    other(sqlite_url, trials=8)
    warm = Made(sqlite_url, searching(SAMPLERS["tpe"], trials=30))
    good = warm.study.user_attrs[AFTER]
    one = good["trials"][0]
    broken: list[Any] = [
        3, {}, {**one, "number": -1}, {**one, "state": "running"}, {**one, "values": []}, {**one, "values": ["x"]},
        {**one, "values": [float("nan")]}, {**one, "values": [0.5, 0.5]},
        {**one, "params": {"alpha": 5000, "beta": 0.3}},
        {**one, "params": {"alpha": 70}}, {**one, "params": {**one["params"], "gamma": 0.9}}, {**one, "step": "1"},
        {**one, "params": {"alpha": 70, "beta": "x"}}, {**one, "params": {"alpha": [70], "beta": 0.3}},
        {**one, "extra": 1},
    ]  # fmt: skip
    expected = len(warm_start.informing_trials(warm.config, good["trials"]))
    altered: list[Any] = [[], None, {"study": "x"}, {"study": "\0", "trials": []}, {"study": "x", "trials": 3},
                      {"study": "x", "trials": [*broken, *good["trials"]]}]  # fmt: skip
    for attribute in altered:
        set_attribute(warm.engine, warm.id, AFTER, attribute)
        html.page([study_data.read(warm.storage, "s")])
        warm.join("s")
        assert len(warm.work(most=1)) == 1
    informed = informed_by(warm.study.user_attrs)
    assert informed is not None
    assert len(warm_start.informing_trials(warm.config, informed.trials)) == expected
    many = Informed("x", tuple([one] * (MOST_INFORMING + 5))).attribute()
    assert len((informed_by({AFTER: many}) or Informed("", ())).trials) == MOST_INFORMING
    assert not origins.is_whole({AFTER: many})


def test_a_large_study_informs_by_an_even_part(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("study.after.MOST_INFORMING", 4)
    other(sqlite_url, trials=7)
    informed = informed_by(Made(sqlite_url, searching("tpe")).study.user_attrs)
    assert informed is not None
    assert [each["number"] for each in informed.trials] == [0, 2, 4, 6]


def test_it_is_shown_and_travels(sqlite_url: str, tmp_path: Path) -> None:
    made = Made(sqlite_url, searching(trials=6), "o<i>", after=None)
    made.work()
    warm = Made(sqlite_url, searching(SAMPLERS["tpe"], trials=4), after="o<i>")
    warm.work(most=2)
    sentence = "informed by 6 trials of 'o<i>', which count for the sampler alone"
    data = study_data.read(warm.storage, "s")
    assert sentence in status.heading(data.status)
    page = html.page([data])
    assert "informed by 6 trials of &#x27;o&lt;i&gt;&#x27;" in page
    assert "o<i>" not in page
    document = json.loads(json.dumps(json_report.report(data)))
    assert document["informed_by"] == {"study": "o<i>", "trials": 6}
    assert len(document["trials"]) == 4
    file = tmp_path / "s.study"
    exported = open_storage(f"sqlite:///{file}")
    transfer.copy(warm.storage, exported, "s")
    close(exported.engine)
    target = f"sqlite:///{tmp_path / 'target.db'}"
    transfer.import_study(file, target, check_config=parse_config)
    assert sentence in status.heading(status.read(open_storage(target).engine, "s"))
    copied = Made.__new__(Made)
    copied.storage = open_storage(target)
    copied.join("s")
    assert copied.work() == warm.work()  # the rest, elsewhere
    for changed in ('{"study": "x"}', '{"study": "x", "trials": [{"number": 1}]}', "[]"):
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("UPDATE study_user_attributes SET value_json = ? WHERE key = 'after'", [changed])
        with pytest.raises(UserError, match="is not a study that `study export` wrote: its after"):
            transfer.import_study(file, target, "again", check_config=parse_config)


def test_a_derived_study_keeps_those_that_lie_in_its_space(sqlite_url: str) -> None:
    made = other(sqlite_url, trials=12)
    warm = Made(sqlite_url, searching(SAMPLERS["tpe"], trials=2))
    warm.work()
    derive(open_study(sqlite_url, "s"), "d", None, ["policy.alpha.high=120"], 5)
    informed = informed_by(open_study(sqlite_url, "d").study.user_attrs)
    assert informed is not None
    assert informed.study == "other"
    assert [each["number"] for each in informed.trials] == [
        t.number for t in made.study.trials if t.params["alpha"] <= 120
    ]
    derive(open_study(sqlite_url, "s"), "grid", None, ["policy.alpha=[60, 90]", "policy.beta=[0.3]",
                                                       "search.sampler=random"])  # fmt: skip
    assert AFTER not in open_study(sqlite_url, "grid").study.user_attrs


def test_a_real_run_by_command_and_from_python(sqlite_url: str, tmp_path: Path) -> None:
    """Trials that train, in worker processes; with Hyperband, whose brackets the sampler's view passes through."""
    other(sqlite_url, trials=6)
    text = """
data.train_images = 200
network.width = 0.125
policy = { alpha = { low = 60, high = 180 }, beta = { low = 0.1, high = 0.9 } }
training = { epochs = 1, batch_size = 50, lr = 0.005 }
search = { sampler = { kind = "tpe", n_startup_trials = 5 }, trials = 2, seed = 3 }
pruning = { kind = "hyperband" }
"""
    (tmp_path / "my.toml").write_text(text)
    words = ["launch", "my.toml", "--storage", sqlite_url, "--workers", "1", "--device", "cpu"]
    done = command.study_process(*words, "--after", "other", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "informed by 6 trials of 'other'" in done.stderr
    assert "informed by 6 trials of 'other', which count for the sampler alone" in done.stdout
    trials = open_study(sqlite_url, "my").study.trials
    assert [t.state.is_finished() for t in trials] == [True, True]
    expected = Made(sqlite_url, searching(SAMPLERS["tpe"], trials=2, pruning="hyperband"), "same").work(most=1)
    assert trials[0].params == expected[0]
    refused = command.study(*words, "--after", "my", cwd=tmp_path)
    assert refused.returncode == 2
    assert "the study 'my' exists and is informed by 'other'" in refused.stderr
    result = study.launch(str(tmp_path / "my.toml"), storage=sqlite_url, after="other", workers=1, device="cpu")
    assert len(result.trials()) == 2
