"""CMA-ES whose state in the database is plain data: it suggests as Optuna's own, and no stored state can run code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.storages import BaseStorage, InMemoryStorage

from storage.optuna_internals import PlainCmaEsSampler, storage_of


class _Bomb:
    """What Optuna's own CmaEsSampler would load from a database, were it made by somebody else."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.file,)


def cma_es_study(storage: BaseStorage, sampler: Callable[[int], BaseSampler], trials: int) -> optuna.Study:
    """Two parameters have a generation of six trials."""
    study = optuna.create_study(storage=storage, direction="maximize")
    for number in range(trials):
        study.sampler = sampler(number)
        trial = study.ask()
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0.001, 1, log=True)
        study.tell(trial, -((x - 0.3) ** 2) - (y - 0.1) ** 2)
    return study


def store_state(study: optuna.Study, key: str, text: str) -> None:
    """On a further trial."""
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.suggest_float("y", 0.001, 1, log=True)
    storage_of(study).set_trial_system_attr(trial._trial_id, key, text)
    study.tell(trial, 0.1)


def test_the_plain_cma_es_suggests_as_optunas_own() -> None:
    mine = cma_es_study(InMemoryStorage(), lambda number: PlainCmaEsSampler(seed=number), 40)
    theirs = cma_es_study(InMemoryStorage(), lambda number: CmaEsSampler(seed=number), 40)
    assert [trial.params for trial in mine.trials] == [trial.params for trial in theirs.trials]
    generations = [trial.system_attrs.get("plain-cma:generation", 0) for trial in mine.trials]
    assert max(generations) >= 5


@pytest.mark.parametrize("trusting", [False, True])
def test_a_cma_es_state_in_the_database_runs_no_code(trusting: bool, tmp_path: Path) -> None:
    """With Optuna's own sampler as the control that shows that the code would run."""
    ran = tmp_path / "ran"
    sampler = CmaEsSampler if trusting else PlainCmaEsSampler
    study = cma_es_study(InMemoryStorage(), lambda number: sampler(seed=number), 8)
    prefix = "cma:" if trusting else "plain-cma:"
    store_state(study, f"{prefix}optimizer:0", pickle.dumps(_Bomb(ran)).hex())
    study.sampler = sampler(seed=9)
    assert 0 <= study.ask().suggest_float("x", 0, 1) <= 1
    assert ran.exists() is trusting


def _state(**changes: Any) -> str:
    good = {"_mean": [0.5, 0.5], "_p_sigma": [0.0, 0.0], "_pc": [0.0, 0.0], "_c_1d": [1.0, 0.0, 1.0]}
    return json.dumps(good | {"_sigma": 0.2, "_g": 1} | changes)


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", "{}", "7", "[" * 5000, '{"_mean": 1}', "00ff"),
        *(_state(**{name: value}) for name in ("_mean", "_c_1d") for value in ([], 1, "x", None, [[1.0]], {"a": 1})),
        *(_state(_mean=[value] * 2) for value in (1e300, 10**400, float("nan"), float("inf"), "a", None)),
        *(_state(_sigma=value) for value in (0.0, -1.0, 1, "1", None, float("nan"), float("inf"), [1.0])),
        *(_state(_g=value) for value in (-1, 1.0, "1", True, None, 2**40)),
        _state(_mean=[0.5] * 200_000),
    ],
)
def test_a_damaged_cma_es_state_is_not_used(text: str, caplog: pytest.LogCaptureFixture) -> None:
    study = cma_es_study(InMemoryStorage(), lambda number: PlainCmaEsSampler(seed=number), 2)
    store_state(study, "plain-cma:optimizer:0", text)
    study.sampler = PlainCmaEsSampler(seed=9)
    assert 0 <= study.ask().suggest_float("x", 0, 1) <= 1
    assert "CMA-ES state of trial 2 is damaged" in caplog.text


def test_a_sound_cma_es_state_is_used(caplog: pytest.LogCaptureFixture) -> None:
    study = cma_es_study(InMemoryStorage(), lambda number: PlainCmaEsSampler(seed=number), 2)
    store_state(study, "plain-cma:optimizer:0", _state(_mean=[0.9, 0.1], _sigma=1e-9))
    study.sampler = PlainCmaEsSampler(seed=9)
    assert study.ask().suggest_float("x", 0, 1) == pytest.approx(0.9)
    assert "damaged" not in caplog.text
