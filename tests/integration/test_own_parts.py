"""Own networks, data, policies, optimizers and augmentation: what runs, and that a killed trial resumes bit for bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.samplers import RandomSampler
from optuna.trial import TrialState, create_trial
from rich.console import Console

from dashboards import status
from storage import queries
from storage.errors import UserError
from storage.optuna_internals import study_id_of
from storage.queue import Queue
from study import exit_codes
from study.config import extensions
from study.create import check_code, prepare
from study.search import space
from study.training.data.dataset import DataError
from study.training.trainer import Trainer
from study.trial.runner import InvalidParameters, ask
from study.worker.stop_monitor import StopMonitor
from study.worker.worker import MOST_SAME_ERRORS, WorkerBroken, _work_through
from tests.support import own_code
from tests.support.command import study
from tests.support.harness import Harness, StopAfter, config_of
from tests.support.made_studies import made

CODE = Path(own_code.__file__).parent


@pytest.fixture(autouse=True)
def _code_is_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(extensions.VARIABLE, str(CODE))
    path = list(sys.path)
    yield
    sys.path[:] = path


ONE_TRIAL: dict[str, Any] = {"policy": {"alpha": 60, "beta": 0.5}, "training": {"epochs": 3, "batch_size": 25}}
PARTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "torchvision with dropout": {"network": {"name": "torchvision:mobilenet_v3_small"}},
    "own network with dropout": {"network": {"name": "own_code:make", "arguments": {"dropout": 0.4}}},
    "sgd, one-cycle": {
        "training": {
            **ONE_TRIAL["training"], "optimizer": "sgd", "nesterov": True, "lr": 0.05, "schedule": "one-cycle",
            "label_smoothing": 0.1, "clip": 1.0,
        },
    },
    "adamw, cosine, average": {
        "training": {**ONE_TRIAL["training"], "optimizer": "adamw", "schedule": "cosine", "warmup": 0.1, "ema": 0.9},
    },
    "host": {"data": {"placement": "host", "augment": True}},
    "augmentation list": {"data": {"augment": ["flip", "RandAugment", "ColorJitter(brightness=0.4)"]}},
    "own policy": {"policy": {"name": "own_code:Hardest", "alpha": 60, "arguments": {"keep": 0.25}}},
    "el2n": {"policy": {"name": "el2n", "alpha": 60, "score_epochs": 1}},
    "macro F1": {"search": {"metric": "macro_f1"}},
}  # fmt: skip


def harness(url: str, part: str, name: str = "s") -> Harness:
    return Harness(url, config_of(**ONE_TRIAL | PARTS[part]), name)


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_trial_resumes_bit_for_bit(part: str, sqlite_url: str) -> None:
    whole = harness(sqlite_url, part)
    whole.work()
    assert len(whole.outcome()[0][-1]) == 3  # epochs
    killed = harness(sqlite_url, part, "killed")
    for _ in range(2):  # in mid epoch, each time by another worker
        killed.work(StopAfter(4))
        torch.rand(7)  # another process has other generators
    killed.work()
    assert killed.outcome() == whole.outcome()


@pytest.mark.parametrize("part", ["torchvision with dropout", "own network with dropout", "augmentation list"])
def test_without_the_generators_in_the_checkpoint_it_would_not(
    part: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    whole = harness(sqlite_url, part)
    whole.work()
    loads = Trainer.load_state_dict

    def without(trainer: Trainer, state: dict[str, Any]) -> None:
        fresh = [each.clone() for each in trainer.random or []]
        loads(trainer, state)
        trainer.random = fresh

    monkeypatch.setattr(Trainer, "load_state_dict", without)
    killed = harness(sqlite_url, part, "killed")
    killed.work(StopAfter(4))
    killed.work()
    assert killed.outcome() != whole.outcome()


def test_host_and_device_compute_the_same_bits(sqlite_url: str) -> None:
    outcomes = []
    for placement in ("host", "device"):
        run = Harness(sqlite_url, config_of(**ONE_TRIAL, data={"placement": placement, "augment": True}), placement)
        run.work()
        outcomes.append(run.outcome())
    assert outcomes[0] == outcomes[1]


def test_a_table_trains_a_network_of_ones_own(sqlite_url: str) -> None:
    config = config_of(
        data={"name": "own_code:table", "train_images": None, "holdout": 0.2},
        network={"name": "own_code:mlp"},
        policy={"alpha": "50 %", "beta": 0.5},
        training={"epochs": 12, "batch_size": 10, "lr": 0.05},
    )
    run = Harness(sqlite_url, config)
    assert run.config.policy.alpha == 36  # half of the 72 rows that neither validate nor test
    run.work()
    assert run.study.best_value > 0.8


def test_arguments_are_searched(sqlite_url: str) -> None:
    config = config_of(
        **ONE_TRIAL,
        network={"name": ["paper", "own_code:make"], "arguments": {"hidden": [8, 12]}, "width": [0.05, 0.125]},
    )
    run = Harness(sqlite_url, config)
    run.work()
    assert [trial.params for trial in run.study.trials] == [
        {"network": "paper", "width": 0.05},
        {"network": "paper", "width": 0.125},
        {"network": "own_code:make", "network.hidden": 8},
        {"network": "own_code:make", "network.hidden": 12},
    ]


def test_a_model_that_prefers_what_a_constraint_forbids_gives_way_to_random_draws(sqlite_url: str) -> None:
    """TPE after many trials whose values rise towards the forbidden side, up to its edge."""
    policy = {"alpha": 60, "beta": {"low": 0.001, "high": 1.0}, "delta": {"low": 0.0, "high": 1.0}}
    search = {"sampler": "tpe", "trials": 2}
    config = config_of(policy=policy, search=search | {"constraints": ["beta + delta <= 0.02"]})
    harness = Harness(sqlite_url, config)
    study, spaces = harness.study, {name: space.distribution(config, name) for name in config.searched()}
    for i in range(60):
        params = {"beta": 0.9 + i / 600, "delta": 0.9 + i / 600}
        study.add_trial(create_trial(params=params, distributions=spaces, value=i / 60))
    queue = Queue(harness.storage.engine, study_id_of(study))
    lease = queue.claim()
    assert lease is not None
    with pytest.raises(InvalidParameters, match="none of 200 draws"):  # one in 5,000 draws at random satisfies it
        ask(study, config, lease, 1000)
    wider = config_of(policy=policy, search=search | {"constraints": ["beta + delta <= 0.6"]})
    chosen, _ = ask(study, wider, lease, 1000)
    assert chosen["beta"] + chosen["delta"] <= 0.6
    assert isinstance(study.sampler, RandomSampler)  # TPE alone would have failed


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_no_sampler_draws_what_a_constraint_forbids(sampler: str, sqlite_url: str) -> None:
    config = config_of(
        policy={"alpha": {"low": 20, "high": 100}, "beta": 0.5},
        training={"epochs": [1, 2], "batch_size": 50},
        search={"sampler": sampler, "trials": 8, "constraints": ["alpha * epochs <= 60"]},
    )
    run = Harness(sqlite_url, config)
    run.work()
    assert len(run.study.trials) == 8
    assert all(trial.params["alpha"] * trial.params["epochs"] <= 60 for trial in run.study.trials)


@pytest.mark.parametrize(
    ("network", "fault"),
    [
        ({"name": "torchvision:resnet81"}, "did you mean"),
        ({"name": "torchvision:resnet18", "arguments": {"colour": "red"}}, "cannot be made"),
        ({"name": "torchvision:resnet18", "arguments": {"weights": "NONE"}}, "no weights 'NONE'"),
        ({"name": "own_code:not_logits"}, r"logits of shape \[batch, classes\]"),
        ({"name": "own_code:nothing"}, "has no function or class 'nothing'"),
        ({"name": "elsewhere:make"}, "in no allowed folder"),
        ({"name": "own_code:Dataset"}, "must be defined in"),
    ],
)
def test_a_network_that_cannot_be_is_refused_before_the_launch(network: dict[str, Any], fault: str) -> None:
    with pytest.raises((UserError, DataError), match=fault):
        prepare(config_of(**ONE_TRIAL, network=network), None)


def test_a_policy_whose_checkpoint_could_not_be_read_is_refused_before_the_launch() -> None:
    with pytest.raises(DataError, match=r"numbers, text, lists and dicts alone.*: 'losses' \(ndarray\)"):
        prepare(config_of(**ONE_TRIAL | {"policy": {"name": "own_code:InNumpy", "alpha": 60}}), None)


def test_a_policy_that_returns_no_resampling_fails_with_the_rule(sqlite_url: str) -> None:
    run = Harness(sqlite_url, config_of(**ONE_TRIAL | {"policy": {"name": "own_code:Forgetful", "alpha": 60}}))
    with pytest.raises(ValueError, match="update must return a Resampling, got NoneType"):
        run.work()


@pytest.mark.parametrize(
    ("augment", "fault"),
    [
        (["RandomRotation"], "degrees"),
        (["flip", "ColorJitter(colour=1)"], "colour"),
        (["RandAugment(num_ops='x')"], "x"),
    ],
)
def test_an_augmentation_that_cannot_be_is_refused_before_the_launch(augment: list[str], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        prepare(config_of(**ONE_TRIAL, data={"augment": augment}), None)


def test_other_code_than_the_studys_is_refused(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my_network_of_a_test.py"
    source = Path(own_code.__file__).read_text()
    file.write_text(source)
    monkeypatch.setenv(extensions.VARIABLE, str(tmp_path))
    config = config_of(**ONE_TRIAL, network={"name": "my_network_of_a_test:make"})
    run = Harness(sqlite_url, config)
    file.write_text(source + "\n# changed\n")
    with pytest.raises(UserError, match="is not that of the study"):
        check_code(run.study, run.config)
    monkeypatch.delenv(extensions.VARIABLE)
    with pytest.raises(UserError, match="--code"):
        check_code(run.study, run.config)


def test_a_single_image_that_is_left_over_joins_the_batch_before(sqlite_url: str) -> None:
    """Batch norm over one value a channel cannot train."""
    config = config_of(
        policy={"alpha": 51, "beta": 0.5},
        training={"epochs": 1, "batch_size": 25},
        network={"name": "torchvision:resnet18"},
    )
    run = Harness(sqlite_url, config)
    run.work()
    assert run.study.trials[0].user_attrs["images"] == 51


def line_of(text: str) -> int:
    lines = Path(own_code.__file__).read_text(encoding="utf-8").splitlines()
    return 1 + next(number for number, line in enumerate(lines) if text in line)


def test_an_error_names_its_line_of_own_code(sqlite_url: str, tmp_path: Path) -> None:
    shared = ["--code", str(Path(own_code.__file__).parent), "--storage", sqlite_url, "--device", "cpu"]
    refused = study("launch", "quick", "--set", "network.name=own_code:never_made", *shared, cwd=tmp_path)
    assert refused.returncode == exit_codes.BAD_INPUT
    assert f"my bug (own_code.py:{line_of('raise RuntimeError')})" in refused.stderr

    harness = Harness(sqlite_url, config_of(network={"name": "own_code:broken", "width": 1.0}))
    with pytest.raises(KeyError, match="oops") as raised:
        harness.work(most=1)
    assert extensions.place_of(raised.value) == f" (own_code.py:{line_of('raise KeyError')})"


def work_through(run: Harness) -> bool:
    stop = StopMonitor(lambda: False)
    return _work_through(run.study, run.config, run.data, run.queue(max_attempts=3), stop, run.fallback, wait=False)


def test_own_code_that_raises_the_same_again_does_not_cost_its_worker(sqlite_url: str) -> None:
    """It would raise in any process. The attempts of each trial are counted as ever."""
    policy = {"alpha": 60, "beta": [0.3, 0.6]}
    run = Harness(sqlite_url, config_of(network={"name": "own_code:broken", "width": 1.0}, policy=policy))
    assert work_through(run)
    assert [trial.state for trial in run.study.trials] == [TrialState.FAIL] * 2
    assert len(queries.attempts(run.storage.engine, study_id_of(run.study))) == 2 * 3
    assert (
        run.messages.count(f"trial 0: attempt failed: KeyError: 'oops' (own_code.py:{line_of('raise KeyError')})") == 3
    )


def test_own_code_that_raises_in_every_trial_ends_the_launch_at_last(sqlite_url: str) -> None:
    """A study of a thousand trials must not try each of them five times."""
    policy = {"alpha": [60, 90], "beta": [0.2, 0.4, 0.6, 0.8]}
    run = Harness(sqlite_url, config_of(network={"name": "own_code:broken", "width": 1.0}, policy=policy))
    with pytest.raises(UserError, match=r"12 attempts in a row .* KeyError: 'oops' \(own_code.py:\d+\); correct it"):
        work_through(run)
    assert len(queries.attempts(run.storage.engine, study_id_of(run.study))) == MOST_SAME_ERRORS


def test_own_code_that_raises_something_else_may_be_the_processs_fault(sqlite_url: str) -> None:
    run = Harness(sqlite_url, config_of(network={"name": "own_code:unsteady", "width": 1.0}))
    with pytest.raises(WorkerBroken, match="ValueError: after"):
        work_through(run)
    assert len(queries.attempts(run.storage.engine, study_id_of(run.study))) == 2


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({}, False),
        ({"network": {"name": "torchvision:resnet18"}}, False),
        ({"network": {"name": ["paper", "own_code:make"]}}, True),
        ({"policy": {"name": "own_code:Hardest", "alpha": 60}}, True),
        ({"data": {"name": "own_code:table", "train_images": 90}, "network": {"name": "own_code:mlp"}}, True),
        ({"search": {"cells": [{"network": "own_code:make"}, {"network": "paper"}]}}, True),
    ],
)
def test_a_status_says_that_own_code_needs_its_folder(
    sections: dict[str, Any], named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(**{"policy": {"alpha": 60, "beta": 0.5}} | sections)
    assert bool(config.own_code()) == named
    stored = made({"dynamic": [0.5]}, config_of(policy={"alpha": 60, "beta": 0.5}), waiting=1).status
    page = status.page(replace(stored, config=json.loads(config.model_dump_json())))
    Console(width=200).print(page)
    command = f"continue with: study resume made{' --code FOLDER' if named else ''}"
    assert capsys.readouterr().out.strip().endswith(command)
    assert not extensions.named_in({"data": None, "network": {"name": 3}, "policy": [], "search": {"cells": [1]}})
