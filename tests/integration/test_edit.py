"""Changing what a study consists of: one more trial, trials left out, a trial ended by hand."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState
from rich.console import Console

from dashboards import status, study_data, tables
from dashboards.reports import console as console_report
from dashboards.reports import html
from storage import exclusions, queries
from storage.cached_storage import CachedStorage
from storage.engine import open_storage
from storage.errors import UserError
from storage.optuna_internals import storage_of, study_id_of
from storage.queue import LeaseLost
from storage.schema import STUDY_ATTRS
from storage.transfer import copy
from study.confirm import confirmation
from study.create import OpenStudy
from study.enqueue import enqueue, parse_parameters
from study.trial.runner import run_trial
from study.worker.stop_monitor import StopMonitor
from tests.support.command import study
from tests.support.harness import Harness, config_of, scripted_accuracies


def opened(harness: Harness) -> OpenStudy:
    return OpenStudy("sqlite://", harness.storage, harness.study, harness.config)


# Enqueue


def test_an_enqueued_trial_runs_with_its_parameters_and_its_seed(url: str) -> None:
    harness = Harness(url, config_of(policy={"alpha": [60, 90], "beta": 0.3}, training={"epochs": 1}))
    assert enqueue(opened(harness), {"alpha": 75}) == 2
    assert enqueue(opened(harness), {"alpha": 60}, seed=9) == 3
    harness.work()
    trials = harness.study.trials
    assert [(t.state, t.params["alpha"], t.user_attrs["seed"]) for t in trials] == [
        (TrialState.COMPLETE, 60, 0), (TrialState.COMPLETE, 90, 0), (TrialState.COMPLETE, 75, 0),
        (TrialState.COMPLETE, 60, 9),
    ]  # fmt: skip


def test_the_sampler_fills_in_what_an_enqueued_trial_leaves_open(sqlite_url: str) -> None:
    policy = {"alpha": {"low": 60, "high": 90}, "beta": {"low": 0.1, "high": 0.9}}
    search = {"sampler": "random", "trials": 1, "seed": 5}
    harness = Harness(sqlite_url, config_of(policy=policy, training={"epochs": 1}, search=search))
    enqueue(opened(harness), {"beta": 0.25})
    harness.study.enqueue_trial({"alpha": 61})  # Optuna's own
    harness.work()
    _, ours, optunas = harness.study.trials
    assert ours.params["beta"] == 0.25
    assert 60 <= ours.params["alpha"] <= 90
    assert ours.user_attrs["seed"] == 6
    assert optunas.params["alpha"] == 61


def test_launching_again_adds_no_trial_beside_enqueued_ones(sqlite_url: str) -> None:
    config = config_of()
    harness = Harness(sqlite_url, config)
    enqueue(opened(harness), {"alpha": 60, "beta": 0.3})
    assert len(Harness(sqlite_url, config).study.trials) == 5
    grown = Harness(sqlite_url, config_of(search={"replicates": 2}))
    assert len(grown.study.trials) == 9
    assert sorted(t.user_attrs.get("queue_position", -1) for t in grown.study.trials) == [-1, *range(8)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["alpha"], "a parameter is NAME=VALUE"),
        (["alpha=60", "alpha=90"], "alpha is given twice"),
        (["lr=0.1", "alpha=60"], r"lr is not searched \(searched: alpha, beta\)"),
        (["alpha=60"], "no sampler that could fill in beta"),
        (["alpha=6000", "beta=0.3"], "alpha must be within 60 to 90, got 6000"),
        (["alpha=0.5", "beta=0.3"], "must be a whole number"),
        (["alpha=[60]", "beta=0.3"], "alpha"),
        (["alpha=sixty", "beta=0.3"], "alpha"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(sqlite_url: str, words: list[str], message: str) -> None:
    harness = Harness(sqlite_url, config_of())
    with pytest.raises(UserError, match=message):
        enqueue(opened(harness), parse_parameters(words))
    assert len(harness.study.trials) == 4


def test_a_value_between_two_steps_is_refused_with_the_step(sqlite_url: str) -> None:
    alpha = {"low": 60, "high": 100, "step": 20}
    config = config_of(policy={"alpha": alpha, "beta": 0.3}, search={"sampler": "random", "trials": 1})
    with pytest.raises(UserError, match=r"alpha must be within 60 to 100 \(step 20\), got 70"):
        enqueue(opened(Harness(sqlite_url, config)), {"alpha": 70})


def test_a_study_that_was_copied_gets_work_by_force_only(sqlite_url: str, tmp_path: Path) -> None:
    """As `study resume` would refuse to run it. Afterwards what is suggested works."""
    harness = Harness(sqlite_url, config_of(policy={"alpha": [60, 90], "beta": 0.3}, training={"epochs": 1}))
    harness.work()
    enqueue(opened(harness), {"alpha": 70})
    queue = harness.queue()
    lease = queue.claim()
    assert lease is not None
    queue.fail(lease, "the disk was full")

    def copied(*words: str) -> str:
        at = ["--storage", sqlite_url]
        done = study("copy", "s", "--from", sqlite_url, "--to", f"sqlite:///{tmp_path / words[0]}.db", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        done = study(*words, *at, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "was copied (to s in sqlite:///" in done.stderr
        assert "in this one with --force" in done.stderr
        assert sum(not trial.state.is_finished() for trial in harness.study.trials) == 0
        done = study(*words, "--force", *at, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr.strip().rpartition(": study ")[2]

    suggested = shlex.split(copied("requeue", "s", "--failed"))
    done = study(*suggested, "--device", "cpu", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    copied("enqueue", "s", "alpha=75")
    assert [trial.state for trial in harness.study.trials] == [*[TrialState.COMPLETE] * 3, TrialState.WAITING]


# Exclude


@pytest.fixture
def finished(sqlite_url: str) -> Harness:
    """Four complete trials; the third is the best."""
    values = iter([0.2, 0.3, 0.9, 0.4])
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}, pruning={"kind": "median", "n_startup_trials": 1}))
    with scripted_accuracies(lambda _: next(values)):
        harness.work()
    return harness


def test_an_excluded_trial_is_left_out_everywhere_and_named(finished: Harness) -> None:
    engine, study_id = finished.storage.engine, study_id_of(finished.study)
    cached = storage_of(finished.study)
    assert cached.reports_at(study_id, 1)[0] == 4  # type: ignore[attr-defined]
    exclusions.exclude(engine, study_id, [2], "the <disk> was full")
    assert [t.number for t in finished.study.get_trials()] == [0, 1, 3]  # what samplers and successive halving read
    complete, reports = cached.reports_at(study_id, 1)  # type: ignore[attr-defined]
    assert (complete, sorted(reports)) == (3, [0.2, 0.3, 0.4])
    now = queries.progress(engine, study_id)
    assert (now.best, now.best_trial, now.finished) == (0.4, 3, 4)
    assert [summary.best for summary in queries.study_summaries(engine)] == [0.4]
    data = study_data.read(finished.storage, "s")
    assert [row.number for row in data.rows] == [0, 1, 3]
    assert 2 not in data.curves
    assert {row["trial"] for row in tables.epochs(data)} == {0, 1, 3}
    output = Console(file=io.StringIO(), width=200)
    output.print(console_report.report_text(data))
    assert "trial 2 is excluded: the <disk> was full" in output.file.getvalue()  # type: ignore[attr-defined]
    assert "Trial 2 is excluded: the &lt;disk&gt; was full" in html.page([data])
    assert status.document(data.status)["excluded"] == {2: "the <disk> was full"}
    config, _ = confirmation(finished.study, finished.config, 1, 1)
    assert config.search.cells == ({"alpha": 90, "beta": 0.6},)


def test_excluding_is_undone_and_new_storages_agree(finished: Harness) -> None:
    engine, study_id = finished.storage.engine, study_id_of(finished.study)
    before = study_data.read(finished.storage, "s").rows
    exclusions.exclude(engine, study_id, [1, 2], "x")
    exclusions.include(engine, study_id, [2])
    assert [t.number for t in finished.study.get_trials()] == [0, 2, 3]
    exclusions.include(engine, study_id, [1])
    assert study_data.read(finished.storage, "s").rows == before
    assert storage_of(finished.study).reports_at(study_id, 1)[0] == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text", ["{", "[1, 2]", "7", '{"a": "x"}', '{"1": 3}', f'{{"{"1" * 5000}": "x"}}', '{"²": "x"}']
)
def test_an_altered_list_of_exclusions_excludes_nothing(text: str, finished: Harness, tmp_path: Path) -> None:
    """No study of the database can be listed or run any more where one of them stops every reader."""
    engine, study_id = finished.storage.engine, study_id_of(finished.study)
    exclusions.exclude(engine, study_id, [1], "why")
    with engine.begin() as connection:
        connection.execute(sa.update(STUDY_ATTRS).where(STUDY_ATTRS.c.key == "excluded").values(value_json=text))
    with engine.connect() as connection:
        assert exclusions.excluded(connection, study_id) == {}
    assert len(CachedStorage(finished.storage).get_all_trials(study_id)) == len(finished.study.trials)
    assert [each.name for each in queries.study_summaries(engine)] == ["s"]
    exclusions.exclude(engine, study_id, [0], "because")
    with engine.connect() as connection:
        assert exclusions.excluded(connection, study_id) == {0: "because"}


def test_exclusions_travel_with_a_copy(finished: Harness, tmp_path: Path) -> None:
    exclusions.exclude(finished.storage.engine, study_id_of(finished.study), [0], "why")
    target = open_storage(f"sqlite:///{tmp_path / 'copy.db'}")
    copy(finished.storage, target, "s")
    assert study_data.read(target, "s").status.excluded == {0: "why"}


def test_only_trials_with_a_result_are_excluded_and_with_a_reason(url: str) -> None:
    harness = Harness(url, config_of())
    engine, study_id = harness.storage.engine, study_id_of(harness.study)
    for numbers, why, message in (
        ([0], "w", "complete or pruned can be excluded, got 0"),
        ([7], "w", "the study has no trial 7"),
        ([0], " ", "a reason"),
    ):
        with pytest.raises(UserError, match=message):
            exclusions.exclude(engine, study_id, numbers, why)
    with pytest.raises(UserError, match="not excluded: 0; excluded trials: none"):
        exclusions.include(engine, study_id, [0])


# Skip


def test_a_skipped_trial_is_pruned_and_its_worker_drops_it(url: str) -> None:
    harness = Harness(url, config_of(training={"epochs": 4}))
    queue = harness.queue()
    lease = queue.claim()
    assert lease is not None
    other = harness.queue()

    def accuracy(trainer: object) -> float:
        done = len(trainer.history)  # type: ignore[attr-defined]
        if done == 2:  # the first two epochs are stored, or soon
            while queue.stored_progress(lease.trial_id).epochs < 2:
                pass
            other.skip(lease.number)
        return 0.5 - 0.1 * done

    with scripted_accuracies(accuracy), pytest.raises(LeaseLost):
        run_trial(harness.study, harness.config, harness.data, queue, lease, StopMonitor(), harness.fallback)
    trial = harness.study.get_trials()[0]
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.5)
    assert (trial.user_attrs["skipped"], trial.user_attrs["epochs"], trial.user_attrs["best_epoch"]) == (True, 2, 1)
    (attempt,) = queries.attempts(harness.storage.engine, study_id_of(harness.study))
    assert (attempt.outcome, attempt.error) == ("skipped", None)
    assert study_data.read(harness.storage, "s").rows[0].epochs == 2
    harness.work()  # the others run to their end, and nothing takes the skipped one up again
    assert [t.state for t in harness.study.trials] == [TrialState.PRUNED, *[TrialState.COMPLETE] * 3]


def test_only_trials_that_have_begun_are_skipped(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}))
    with pytest.raises(UserError, match="0 is waiting"):
        harness.queue().skip(0)
    with pytest.raises(UserError, match="9 is not there"):
        harness.queue().skip(9)
    harness.work(most=1)
    with pytest.raises(UserError, match="0 is complete"):
        harness.queue().skip(0)
