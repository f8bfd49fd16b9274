"""Studies that end before all of their trials have run: at a target, or when no trial gets better."""

from __future__ import annotations

import pytest
from optuna.trial import TrialState

from dashboards import status
from storage import early_end, exclusions, stop_requests
from storage.early_end import Rules
from storage.errors import UserError
from storage.optuna_internals import study_id_of
from study import exit_codes
from study.config.models import StudyConfig
from study.confirm import confirmation
from study.worker.stop_monitor import StopMonitor
from study.worker.worker import _work_through
from tests.support.harness import Harness, config_of, scripted_accuracies


def config(**search: float) -> StudyConfig:
    return config_of(training={"epochs": 1}, search={"replicates": 2, **search})


def work(harness: Harness, values: list[float]) -> StopMonitor:
    """One worker, as a process has it, whose trials end with these values; its monitor's thread is left out."""
    stop, left = StopMonitor(), iter(values)
    stop._study = harness.storage.engine, study_id_of(harness.study)
    stop.check()
    with scripted_accuracies(lambda _: next(left)):
        _work_through(harness.study, harness.config, harness.data, harness.queue(), stop, harness.fallback, wait=False)
    return stop


def complete(harness: Harness) -> int:
    return sum(trial.state == TrialState.COMPLETE for trial in harness.study.get_trials())


def states_of_list(harness: Harness) -> dict[str, str]:
    """Study to state, as `study list` has them."""
    table = status.summaries_table(status.summaries(harness.storage.engine))
    names, states = (list(table.columns[place].cells) for place in (0, 1))
    return dict(zip(map(str, names), map(str, states), strict=True))


def test_a_target_ends_the_study_and_a_resume_continues(url: str) -> None:
    harness = Harness(url, config(target=0.5))
    engine, study_id = harness.storage.engine, study_id_of(harness.study)
    stop = work(harness, [0.2, 0.5])
    assert (complete(harness), stop.exit_code) == (2, exit_codes.OK)
    assert stop.reason == "the target 0.5 is reached: trial 1 has 0.5000"
    shown = status.read(engine, "s")
    assert shown.ended_early == stop.reason
    assert f"ended early: {stop.reason}" in status.heading(shown)
    assert states_of_list(harness) == {"s": "ended early"}
    assert work(harness, []).reason == stop.reason  # another worker begins nothing
    early_end.set_rules(engine, study_id, early_end.parse_rules(Rules(0.5), "0.8", None))
    assert work(harness, [0.1, 0.9]).exit_code == exit_codes.OK
    assert complete(harness) == 4
    assert states_of_list(harness) == {"s": "ended early"}
    early_end.set_rules(engine, study_id, early_end.parse_rules(Rules(0.8), "none", None))
    assert states_of_list(harness) == {"s": "paused"}
    work(harness, [0.3] * 4)
    assert states_of_list(harness) == {"s": "finished"}
    assert complete(harness) == 8
    assert stop_requests.read_controls(engine, study_id).early_end == Rules()


def test_patience_counts_the_trials_after_the_best(url: str) -> None:
    harness = Harness(url, config(patience=2))
    engine, study_id = harness.storage.engine, study_id_of(harness.study)
    stop = work(harness, [0.2, 0.1, 0.3, 0.3, 0.25])
    assert stop.reason == "no trial was better than trial 2 (0.3000) for 2 trials"
    assert complete(harness) == 5
    exclusions.exclude(engine, study_id, [3], "a test")  # it counts no longer
    assert early_end.reason_to_end(engine, study_id, Rules(patience=2)) is None
    exclusions.exclude(engine, study_id, [2], "a test")
    assert early_end.reason_to_end(engine, study_id, Rules(target=0.3)) is None


@pytest.mark.parametrize(
    ("target", "patience"), [("1.5", None), ("x", None), ("nan", None), (None, "0"), (None, "2.5")]
)
def test_malformed_limits_are_refused(target: str | None, patience: str | None) -> None:
    with pytest.raises(UserError, match="must be a"):
        early_end.parse_rules(Rules(), target, patience)


def test_a_confirming_study_runs_all_of_its_trials(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config(target=0.1, patience=1))
    work(harness, [0.2])
    confirming, _ = confirmation(harness.study, harness.config, 1, 1)
    assert (confirming.search.target, confirming.search.patience) == (None, None)


@pytest.mark.parametrize(
    "stored",
    [
        {"target": "0.1"},
        {"target": True},
        {"patience": 0.5},
        {"target": -1, "patience": [1]},
        [],
        "x",
        {"target": None},
    ],
)
def test_what_is_no_rule_in_a_database_ends_nothing_and_breaks_no_list(stored: object) -> None:
    assert early_end.rules_of({"early_end": stored}) == Rules()
    assert early_end.rules_of({"config": {"search": stored}}) == Rules()
    assert early_end.rules_of({"config": stored}) == Rules()
