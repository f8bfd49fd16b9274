"""Presets, overrides, and refusals that name the rule, the value and the fix."""

from __future__ import annotations

import pytest

from storage.errors import UserError
from study.config.loading import differences, load_config, parse_config, preset_names, preset_text
from study.config.models import StudyConfig
from study.config.values import Range
from study.search import space
from tests.support import harness


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_name_their_command(name: str) -> None:
    config = load_config(name)
    assert config.description
    assert preset_text(name).startswith(f"# study launch {name}")
    assert parse_config(config.model_dump(mode="json")) == config
    # Numbers selected on the test split are for comparison with the paper alone.
    assert (config.data.protocol == "paper") == name.startswith("paper-")


def test_paper_grid_is_the_papers() -> None:
    config = load_config("paper-grid")
    queued = space.queued_trials(config)
    assert len(queued) == 21
    assert {t.params["alpha"] for t in queued} == {15000, 20000, 25000}
    assert {t.params["beta"] for t in queued} == {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7}
    training, policy = config.training, config.policy
    assert (training.epochs, training.batch_size, training.lr) == (200, 512, 0.001)
    assert (policy.delta, policy.gamma, policy.decay) == (0.01, 0.97, "type2")
    assert (config.pruning.kind, config.data.augment, config.network.width) == ("none", False, 1.0)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("training.epochs=5", "training.epochs", 5),
        ("policy.beta=[0.1, 0.2]", "policy.beta", (0.1, 0.2)),
        ("data.name=imagefolder", "data.name", "imagefolder"),
        ('data.name="cifar10"', "data.name", "cifar10"),
        ("search.sampler=grid", "search.sampler.kind", "grid"),
        ("pruning=none", "pruning.kind", "none"),
        ("pruning.kind=hyperband", "pruning.kind", "hyperband"),
        ("network.norm=none", "network.norm", "none"),
        ("data.augment=true", "data.augment", True),
    ],
)
def test_set_overrides(assignment: str, path: str, value: object) -> None:
    value_set: object = load_config("quick", [assignment])
    for key in path.split("."):
        value_set = getattr(value_set, key)
    assert value_set == value


def test_set_makes_a_search_of_any_number() -> None:
    config = load_config(
        "tpe", ["training.lr={low=1e-4, high=1e-2, log=true}", "training.batch_size=[128, 512]", "policy.alpha=9000"]
    )
    searched = config.searched()
    assert searched["lr"] == Range(low=1e-4, high=1e-2, log=True)
    assert searched["batch_size"] == (128, 512)
    assert "alpha" not in searched


@pytest.mark.parametrize(
    ("assignments", "faults"),
    [
        (["training.epoch=5"], ["unknown key training.epoch", "did you mean 'epochs'"]),
        (["nothing.here=1"], ["unknown key nothing"]),
        (["training.epochs=many"], ["training.epochs: must be a whole number from 1 to 1,000,000,000, got 'many'"]),
        (["training.epochs=2.5"], ["whole number", "got 2.5"]),
        (["policy.alpha=0"], ["policy.alpha", "from 1 to 1,000,000,000, got 0"]),
        (["policy.beta=0"], ["policy.beta: must be a number in (0, 1], got 0"]),
        (["policy.beta=[0.5, 1.5]"], ["(0, 1], got 1.5"]),
        (["policy.beta=[0.5, 0.5]"], ["no value twice"]),
        (["policy.beta=[]"], ["at least one value"]),
        (["policy.delta=-0.1"], ["policy.delta: must be a number of at least 0, got -0.1"]),
        (["policy.delta=-1", "policy.beta=2"], ["policy.delta", "policy.beta"]),  # all faults at once
        (["policy.gamma=nan"], ["policy.gamma"]),
        (["policy.name=magic"], ["one of dynamic, static, full, fresh"]),
        (["policy.beta={low=0.1, high=0.5}"], ["a grid needs lists of values, not ranges: beta"]),
        (["policy.beta={low=0.5, high=0.1}"], ["low must be below high"]),
        (["search.trials=5"], ["search.trials does not go with a grid"]),
        (["search.sampler=tpe"], ["search.trials is needed"]),
        (["search.sampler=annealing"], ["must be one of grid, random, tpe, gp, cma-es, qmc, got 'annealing'"]),
        (["pruning.kind=medain"], ["must be one of none, median"]),
        (["pruning.patience=3"], ["unknown key pruning.patience"]),
        (["hyperband=3"], ["unknown key hyperband"]),
        (["lr=0.1"], ["unknown key lr (did you mean 'training.lr'?)"]),
        (["training.lr={low=0.1}"], ["training.lr.high is missing"]),
        (["pruning.hyperband=3"], ["unknown key pruning.hyperband"]),
        (["data.holdout=1"], ["data.holdout", "less than 1"]),
        (["network.width=-1"], ["network.width", "a number above 0 and at most 8, got -1"]),
        (["epochs"], ["--set takes section.key=value, got 'epochs'"]),
        (["policy.beta.x=1"], ["beta is a value, not a section"]),
        ([f"policy.beta={'[' * 100_000}"], ["policy.beta: its value is nested too deeply"]),
        ([f"{'.'.join('a' * 5000)}=1"], ["--set takes section.key=value"]),
        ([f"policy.alpha={'9' * 5000}"], ["policy.alpha"]),
    ],
)
def test_bad_values_are_refused_in_one_sentence(assignments: list[str], faults: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        load_config("quick", assignments)
    for fault in faults:
        assert fault in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_preset_is_answered_with_the_known() -> None:
    with pytest.raises(UserError, match=r"did you mean 'quick'.*paper-grid"):
        load_config("quik")


def test_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        load_config("quick").training.epochs = 3


def test_differences_name_what_differs() -> None:
    assert differences(load_config("quick", ["training.epochs=5"]), load_config("quick")) == [
        "training.epochs: 5 != 12"
    ]
    assert differences(load_config("quick"), load_config("quick")) == []


def config_of(**policy: object) -> StudyConfig:
    return parse_config({"policy": {"alpha": [10, 20], **policy}, "search": {"replicates": 2, "seed": 5}})


def test_cells_merge_where_a_parameter_means_nothing() -> None:
    """`full` has no alpha, and only `dynamic` a beta: 1 + 2 + 2 x 2 cells."""
    cells = space.cells(config_of(name=["full", "static", "dynamic"], beta=[0.1, 0.2]))
    assert len(cells) == 7
    assert cells.count({"policy": "full"}) == 1
    assert {"policy": "static", "alpha": 10} in cells


def test_replicates_of_all_cells_come_in_rounds_with_paired_seeds() -> None:
    queued = space.queued_trials(config_of(beta=[0.1, 0.2]))
    assert [t.user_attrs["seed"] for t in queued] == [5] * 4 + [6] * 4
    assert [t.user_attrs["cell"] for t in queued] == [0, 1, 2, 3] * 2
    assert [t.user_attrs["queue_position"] for t in queued] == list(range(8))


def test_blank_queued_trials_are_as_many_as_trials() -> None:
    queued = space.queued_trials(load_config("tpe", ["search.trials=7"]))
    assert len(queued) == 7
    assert all(not t.params for t in queued)
    assert len({t.user_attrs["seed"] for t in queued}) == 7


def test_alpha_must_fit_the_data() -> None:
    for alpha in (101, [10, 101], {"low": 10, "high": 101}):
        sampler = {"search": {"sampler": "random", "trials": 3}} if isinstance(alpha, dict) else {}
        config = parse_config({"policy": {"alpha": alpha}, **sampler})
        space.check_alpha(config, 101)
        with pytest.raises(UserError, match=r"at most the 100 training images of 'digits'.*got 101"):
            space.check_alpha(config, 100)


def test_cells_are_run_as_written_and_filled_from_the_config() -> None:
    chosen = [
        {"policy": "static", "alpha": 60},
        {"policy": "dynamic", "alpha": 90, "beta": 0.3, "epochs": 5},
        {"lr": 0.1},
    ]
    config = harness.config_of(policy={"alpha": 30, "beta": 0.7}, search={"cells": chosen, "replicates": 2})
    rest = {"epochs": 3, "lr": 0.005}
    assert space.cells(config) == [
        {"policy": "static", "alpha": 60, **rest},
        {"policy": "dynamic", "alpha": 90, "beta": 0.3, **rest, "epochs": 5},
        {"policy": "dynamic", "alpha": 30, "beta": 0.7, "epochs": 3, "lr": 0.1},
    ]
    assert [t.params for t in space.queued_trials(config)] == space.cells(config) * 2
    assert config.policies() == ("static", "dynamic")
    assert (space.largest_alpha(config), space.most_epochs(config)) == (90, 5)
    assert parse_config(config.model_dump(mode="json")) == config
