"""Every private part of Optuna and optuna-dashboard that this program uses: the first test to fail after an upgrade."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import cmaes
import numpy as np
import optuna
import optuna_dashboard
import pytest
from optuna.storages import RDBStorage
from optuna.storages._rdb.storage import _VersionManager
from optuna.trial import TrialState
from optuna_dashboard._app import create_app

from storage import optuna_internals as internals
from storage.study_attributes import set_system_attributes

COLUMNS: dict[str, set[str]] = {
    "StudyModel": {"study_id", "study_name"},
    "StudyDirectionModel": {"study_direction_id", "direction", "study_id", "objective"},
    "StudyUserAttributeModel": {"study_user_attribute_id", "study_id", "key", "value_json"},
    "StudySystemAttributeModel": {"study_system_attribute_id", "study_id", "key", "value_json"},
    "TrialModel": {"trial_id", "number", "study_id", "state", "datetime_start", "datetime_complete"},
    "TrialUserAttributeModel": {"trial_user_attribute_id", "trial_id", "key", "value_json"},
    "TrialSystemAttributeModel": {"trial_system_attribute_id", "trial_id", "key", "value_json"},
    "TrialParamModel": {"param_id", "trial_id", "param_name", "param_value", "distribution_json"},
    "TrialValueModel": {"trial_value_id", "trial_id", "objective", "value", "value_type"},
    "TrialIntermediateValueModel": {
        *("trial_intermediate_value_id", "trial_id", "step", "intermediate_value", "intermediate_value_type"),
    },
    "TrialHeartbeatModel": {"trial_heartbeat_id", "trial_id", "heartbeat"},
    "VersionInfoModel": {"version_info_id", "schema_version", "library_version"},
}


@pytest.fixture
def storage(tmp_path: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")


def test_this_file_names_them_all() -> None:
    text = Path(__file__).read_text()
    assert all(f"internals.{name}" in text for name in internals.__all__)


def test_installed_versions_are_within_the_bounds() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for module, name in ((optuna, "optuna"), (optuna_dashboard, "optuna-dashboard")):
        match = re.search(rf'"{name}>=([\d.]+),<([\d.]+)"', project)
        assert match is not None, f"{name} has no bounds"
        low, high = (tuple(map(int, bound.split("."))) for bound in match.groups())
        installed = tuple(map(int, re.findall(r"\d+", module.__version__)[:3]))
        assert low <= installed < high


@pytest.mark.parametrize("model", COLUMNS)
def test_tables_have_these_columns_and_no_others(model: str) -> None:
    """A new one has to be copied, exported and checked too."""
    table = getattr(internals.models, model).__table__
    assert {column.name for column in table.c} == COLUMNS[model]


def test_there_are_no_other_tables() -> None:
    mapped = {getattr(internals.models, model).__table__.name for model in COLUMNS}
    assert set(internals.models.BaseModel.metadata.tables) == mapped


def test_enumerations() -> None:
    values = internals.models.TrialValueModel.TrialValueType
    reports = internals.models.TrialIntermediateValueModel.TrialIntermediateValueType
    assert [kind.name for kind in values] == ["FINITE", "INF_POS", "INF_NEG"]
    assert [kind.name for kind in reports] == ["FINITE", "INF_POS", "INF_NEG", "NAN"]
    assert {state.name for state in TrialState} == {"RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING"}


def test_schema_versions(storage: RDBStorage) -> None:
    assert isinstance(internals.models.SCHEMA_VERSION, int)
    manager = storage._version_manager
    assert isinstance(manager, _VersionManager)
    assert internals.schema_revisions() == manager.get_all_versions()[::-1]
    assert internals.schema_revisions()[-1] == manager.get_head_version() == manager.get_current_version()


def test_rdb_storage_takes_what_the_engine_gives_it() -> None:
    parameters = inspect.signature(RDBStorage).parameters
    assert {"url", "engine_kwargs", "skip_compatibility_check", "skip_table_creation"} <= parameters.keys()


def test_the_cached_storage(storage: RDBStorage) -> None:
    wrapped = optuna.storages.get_storage(storage)
    assert type(wrapped) is internals.OptunaCachedStorage
    assert wrapped._backend is storage
    expected = {
        "get_all_trials": ["self", "study_id", "deepcopy", "states"],
        "get_trial": ["self", "trial_id"],
        "set_trial_param": ["self", "trial_id", "param_name", "param_value_internal", "distribution"],
    }
    for method, names in expected.items():
        assert list(inspect.signature(getattr(internals.OptunaCachedStorage, method)).parameters) == names


def test_the_steps_at_which_a_percentile_pruner_looks() -> None:
    function: Any = internals.is_first_in_interval_step
    assert list(inspect.signature(function).parameters) == [
        *("step", "intermediate_steps", "n_warmup_steps", "interval_steps"),
    ]
    assert function(3, [1, 2, 3], 1, 2)
    assert not function(2, [1, 2], 1, 2)


def test_studies_and_trials(storage: RDBStorage) -> None:
    study = optuna.create_study(study_name="s", storage=storage)
    study_id = storage.get_study_id_from_name("s")
    assert internals.study_id_of(study) == study_id
    assert isinstance(internals.storage_of(study), internals.OptunaCachedStorage)
    other = internals.with_storage(study, storage, "original")
    assert internals.storage_of(other) is storage
    assert (other.study_name, study.study_name) == ("original", "s")
    assert internals.storage_of(study) is not storage
    study._thread_local.cached_all_trials = []
    internals.forget_cached_trials(study)
    assert study._thread_local.cached_all_trials is None
    trial = study.ask()
    drawn = trial.suggest_float("x", 0, 1)
    resumed = optuna.Trial(study, trial._trial_id)  # as another process does
    assert resumed.suggest_float("x", 0, 1) == drawn


def test_the_state_of_cma_es() -> None:
    """What is stored of it, and where CmaEsSampler writes and reads it; test_cma_es.py compares suggestions."""
    optuna_own = optuna.samplers.CmaEsSampler
    assert optuna_own()._attr_prefix == "cma:"
    assert issubclass(internals.PlainCmaEsSampler, optuna_own)
    for method, argument in (("_split_optimizer_str", "optimizer_str"), ("_restore_optimizer", "completed_trials")):
        assert list(inspect.signature(getattr(optuna_own, method)).parameters) == ["self", argument]
    state = cmaes.CMA(mean=np.zeros(2), sigma=1.0).__getstate__()
    changing = {"_mean", "_p_sigma", "_pc", "_c_1d", "_sigma", "_g"}
    ending = {"_funhist_values", "_Emean", "_ESigma", "_Vmean", "_VSigma", "_eta_mean", "_eta_Sigma"}
    """When to end, and the learning rate's adaptation: CmaEsSampler uses neither as `make_sampler` makes it."""
    computed = {"_B", "_D"}
    assert changing <= state.keys()
    other = cmaes.CMA(mean=np.zeros(2), sigma=1.0)
    other.tell([(np.array([x, 0.1]), x) for x in np.linspace(0, 0.5, other.population_size)])
    changed = {key for key, value in other.__getstate__().items() if not np.array_equal(value, state[key])}
    assert changed - ending - computed == changing


def test_the_dashboards_notes(storage: RDBStorage) -> None:
    study = optuna.create_study(study_name="s", storage=storage)
    trial = study.ask()
    optuna_dashboard.save_note(trial, "a note")
    keys = storage.get_study_system_attrs(internals.study_id_of(study))
    assert set(keys) == set(internals.trial_note_keys(trial._trial_id))
    assert optuna_dashboard._note.SYSTEM_ATTR_MAX_LENGTH == internals.PART_LENGTH
    for key in keys:
        assert key.startswith(internals.DASHBOARD)
        match = internals.DASHBOARD_NOTE.match(key)
        assert match is not None
        assert int(match[1]) == trial._trial_id


def test_the_dashboards_routes(storage: RDBStorage) -> None:
    """One that is new and changes something has to be looked at: may a visitor do that to a study of ours?"""
    routes = {f"{route.method} {route.rule}" for route in create_app(storage).routes}
    named = {str(route) for route in internals.DashboardRoute}
    assert named <= routes
    assert {route for route in routes if not route.startswith("GET ")} <= named


@pytest.mark.parametrize("lengths", [(0, 1), (5000, 10), (2045, 2046), (10, 9000)])
def test_notes_and_figures_are_those_of_optuna_dashboard(storage: RDBStorage, lengths: tuple[int, int]) -> None:
    """A text takes the place of another: the same attributes as by its own functions, which read what it was."""
    study, other = (optuna.create_study(study_name=name, storage=storage) for name in ("ours", "theirs"))
    version, note = internals.STUDY_NOTE
    figure = f"{internals.FIGURE}a-figure:"
    for turn, length in enumerate(lengths, 1):
        text = json.dumps("ä" * length)
        optuna_dashboard.save_note(other, text)
        optuna_dashboard._custom_plot_data.save_graph_object_json(storage, other._study_id, figure, text)
        stored = storage.get_study_system_attrs(study._study_id)
        new = internals.parts(note, text, stored) | internals.parts(figure, text, stored) | {version: turn}
        set_system_attributes(storage.engine, study._study_id, new)
        attributes = storage.get_study_system_attrs(study._study_id)
        assert attributes == storage.get_study_system_attrs(other._study_id)
        assert optuna_dashboard.get_note(study) == text
        assert optuna_dashboard._custom_plot_data.get_plotly_graph_objects(attributes) == {"a-figure": text}


def test_keys_of_cma_es() -> None:
    ours, optunas = internals.CMA_ES_STATE
    assert optuna.samplers.CmaEsSampler()._attr_prefix == optunas
    assert internals.PlainCmaEsSampler()._attr_prefix == ours
