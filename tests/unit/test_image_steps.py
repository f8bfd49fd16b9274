"""Trials compared at equal images trained on: what is reported at which step, and what pruners make of it."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.pruners import HyperbandPruner
from optuna.trial import TrialState

from storage.errors import UserError
from study.search.pruners import make_pruner
from study.search.space import most_steps, step_images
from study.training.policies import KEEP
from study.training.trainer import EpochResult, Trainer
from study.trial.runner import reports
from tests.support.harness import Harness, StopAfter, config_of, scripted_accuracies


def history(accuracies: list[float], images: list[int]) -> list[EpochResult]:
    return [
        EpochResult(n, accuracy, 0.0, count, 0.0, 0.0, 0.0, count, None, KEEP, 0.0, 0.0, 0.0)
        for n, (accuracy, count) in enumerate(zip(accuracies, images, strict=True), 1)
    ]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        # An epoch a step: as with epochs.
        ([10, 10, 10], [{1: 0.5}, {2: 0.5}, {3: 0.7}]),
        # Epochs of two steps and a half: at step 2 nothing had ended, at step 5 the second had; 0.7 never is in time.
        ([25, 25, 24], [{}, {3: 0.5, 4: 0.5, 5: 0.5}, {6: 0.5, 7: 0.5}]),
        # Less than a step an epoch.
        ([5, 5, 5], [{}, {1: 0.5}, {}]),
        # One large epoch: measured at its end alone.
        ([30, 10, 10], [{3: 0.5}, {4: 0.5}, {5: 0.7}]),
    ],
)
def test_an_epoch_counts_once_all_its_images_were_trained_on(
    images: list[int], expected: list[dict[int, float]]
) -> None:
    whole = history([0.5, 0.4, 0.7], images)
    assert [reports(whole[: n + 1], 10) for n in range(3)] == expected


def test_a_step_in_epochs_reports_every_epoch() -> None:
    whole = history([0.5, 0.4, 0.7], [25, 25, 25])
    assert [reports(whole[: n + 1], None) for n in range(3)] == [{1: 0.5}, {2: 0.5}, {3: 0.7}]


FIXED = {"alpha": 60, "beta": 0.5}
MEDIAN = {"kind": "median", "step": "images", "n_startup_trials": 2}


def test_trials_meet_at_equal_images_and_survive_interruption(url: str) -> None:
    config = config_of(
        policy={"name": ["static", "full"], "alpha": [100, 50, 25]},
        training={"images": 600},
        pruning=MEDIAN,
        search={"replicates": 2},
    )
    assert step_images(config) == 25

    def by_size(trainer: Trainer) -> float:
        """Larger epochs do better, so the smaller ones that come after them fall below the median."""
        return 0.001 * len(trainer.policy.active) + 0.0001 * trainer.trained

    quiet = Harness(url, config, "quiet")
    with scripted_accuracies(by_size):
        quiet.work()
    trials = optuna.load_study(study_name="quiet", storage=quiet.storage).trials  # with all of their reports
    assert {state.name for state in (t.state for t in trials)} == {"COMPLETE", "PRUNED"}
    for trial in trials:
        step = {"static": trial.params.get("alpha", 0) // 25, "full": 8}[trial.params["policy"]]
        assert min(trial.intermediate_values) == step
        assert max(trial.intermediate_values) <= 24
    disturbed = Harness(url, config, "disturbed")
    with scripted_accuracies(by_size):
        for steps in (3, 5, 9, 2, 7, 4, 6):
            disturbed.work(StopAfter(steps), most=1)
        disturbed.work()
    assert disturbed.outcome() == quiet.outcome()


def test_hyperband_knows_the_last_step() -> None:
    def last(**sections: Any) -> int:
        config = config_of(pruning={"kind": "hyperband", "step": "images"}, **sections)
        pruner = make_pruner(config, 200)
        assert isinstance(pruner, HyperbandPruner)
        assert pruner._max_resource == most_steps(config, 200)
        return most_steps(config, 200)

    assert last(policy={"alpha": [60, 90]}) == 3 * 90 // 60
    assert last(policy={"alpha": 50, "name": ["static", "full"]}) == 3 * 200 // 50
    assert last(policy={"alpha": [50, 60]}, training={"images": 1000}) == 20


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"training": {"images": 100}, "pruning": {"kind": "median"}}, 'pruning.step must be "images"'),
        ({"policy": {"name": "full", "alpha": None, "beta": 0.5}, "pruning": MEDIAN}, "which is not given"),
        ({"search": {"objective": "accuracy,images"}, "pruning": {"kind": "median"}}, 'needs pruning "none"'),
        ({"training": {"images": 100, "epochs": [2, 3]}}, "epochs cannot be searched"),
        ({"data": {"protocol": "paper", "test": True}}, "test needs the holdout protocol"),
        ({"policy": {"name": "infobatch", "ratio": 1.0}}, "policy.ratio"),
        ({"search": {"cells": [{"alpha": 60}]}}, "search.cells takes the place of lists"),
        (
            {"policy": FIXED, "search": {"cells": [{"alpha": 0}]}},
            "search.cells: alpha: must be a whole number from 1",
        ),
        ({"policy": FIXED, "search": {"cells": [{"depth": 3}]}}, "search.cells: no parameter 'depth'"),
        ({"policy": FIXED, "search": {"cells": [{"lr": -1.0}]}}, "search.cells: lr: must be a number above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError) as refused:
        config_of(**sections)
    assert fault in str(refused.value)


def test_infobatch_studies_run_and_resume(url: str) -> None:
    config = config_of(policy={"name": "infobatch", "alpha": None, "beta": 0.5}, training={"epochs": 4})
    quiet, disturbed = Harness(url, config, "quiet"), Harness(url, config, "disturbed")
    quiet.work()
    for steps in (3, 5, 9, 6):
        disturbed.work(StopAfter(steps), most=1)
    disturbed.work()
    assert disturbed.outcome() == quiet.outcome()
    assert quiet.study.trials[0].state == TrialState.COMPLETE
    (rows,) = (row[-1] for row in quiet.outcome())
    assert rows[0]["kind"] == "soft"
    assert rows[1]["images"] == 200 - rows[0]["k"] < 200
    assert next(row["kind"] for row in reversed(rows)) == "keep"  # annealed
