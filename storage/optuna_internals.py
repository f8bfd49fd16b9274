"""Every part of Optuna and optuna-dashboard that we use although it is private, and what each is for.

`tests/unit/test_optuna_internals.py` names them all and fails first when an upgrade changes one; pyproject.toml has the
upper bounds.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import pickle
import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.pruners._percentile import _is_first_in_interval_step as is_first_in_interval_step
from optuna.storages import BaseStorage
from optuna.storages import _CachedStorage as OptunaCachedStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial

if TYPE_CHECKING:
    import cmaes

logger = logging.getLogger(__name__)

__all__ = [
    "CMA_ES_STATE",
    "DASHBOARD",
    "DASHBOARD_NOTE",
    "FIGURE",
    "PART_LENGTH",
    "STUDY_NOTE",
    "DashboardRoute",
    "OptunaCachedStorage",
    "PlainCmaEsSampler",
    "forget_cached_trials",
    "is_first_in_interval_step",
    "models",
    "parts",
    "schema_revisions",
    "storage_of",
    "study_id_of",
    "trial_note_keys",
    "with_storage",
]

# `models`: Optuna's tables. Claims, reports and decisions are single statements on them, in one transaction with our
# own; Optuna's public storage has no transaction that others could join.
# `OptunaCachedStorage`: what optuna.load_study wraps an RDBStorage in. `CachedStorage` derives from it, so that
# load_study takes it as it is.
# `PlainCmaEsSampler`: overrides how CmaEsSampler stores and reads its optimizer, and reads the state of a cmaes.CMA.
# `is_first_in_interval_step`: at which steps PercentilePruner looks; our faster one must look at the same.

DASHBOARD = "dashboard:"
"""What optuna-dashboard's keys among a study's system attributes begin with: its note, its figures, notes on trials."""
DASHBOARD_NOTE = re.compile(r"dashboard:(0|[1-9][0-9]{0,18}):")
"""optuna-dashboard keeps the note on a trial among the study's system attributes, under the trial's id."""

PART_LENGTH = 2045
"""Characters of a part of a note or figure (SYSTEM_ATTR_MAX_LENGTH in optuna_dashboard)."""
STUDY_NOTE = "dashboard:note_ver", "dashboard:note_str:"
"""Keys of the study's own note: its version, and what those of its parts begin with."""
FIGURE = "dashboard:plot_data:"
"""What keys of a figure's parts begin with, before its name and a colon."""


def parts(prefix: str, text: str, stored: Iterable[str]) -> dict[str, str]:
    """A note or figure as optuna-dashboard keeps it among a study's system attributes, in parts with numbered keys.

    Its own functions do the same, but its import loads scikit-learn (a second), and each part is a transaction.

    Args:
        stored: the keys there are; those of a longer text from before become empty.
    """
    count = math.ceil(len(text) / PART_LENGTH)
    new = {f"{prefix}{i}": text[i * PART_LENGTH : (i + 1) * PART_LENGTH] for i in range(count)}
    return {key: "" for key in stored if key.startswith(prefix)} | new


def trial_note_keys(trial_id: int) -> tuple[str, str]:
    """System attributes of the study with the version and the first part of the note on a trial."""
    return f"dashboard:{trial_id}:note_ver", f"dashboard:{trial_id}:note_str:0"


class DashboardRoute(StrEnum):
    """optuna-dashboard's routes that change something, or need a check of their own: method and Bottle rule."""

    STUDY = "GET /api/studies/<study_id:int>"
    PLOT = "GET /api/studies/<study_id:int>/plot/<plot_type>"
    CSV = "GET /csv/<study_id:int>"
    STUDY_ARTIFACT = "GET /artifacts/<study_id:int>/<artifact_id:re:[0-9a-fA-F-]+>"
    TRIAL_ARTIFACT = "GET /artifacts/<study_id:int>/<trial_id:int>/<artifact_id:re:[0-9a-fA-F-]+>"
    CREATE = "POST /api/studies"
    RENAME = "POST /api/studies/<study_id:int>/rename"
    DELETE = "DELETE /api/studies/<study_id:int>"
    STUDY_NOTE = "PUT /api/studies/<study_id:int>/note"
    TRIAL_NOTE = "PUT /api/studies/<study_id:int>/<trial_id:int>/note"
    TELL = "POST /api/trials/<trial_id:int>/tell"
    USER_ATTRIBUTES = "POST /api/trials/<trial_id:int>/user-attrs"
    PREFER = "POST /api/studies/<study_id:int>/preference"
    PREFERENCE_COMPONENT = "PUT /api/studies/<study_id:int>/preference_feedback_component"
    DELETE_PREFERENCE = "DELETE /api/studies/<study_id:int>/preference/<history_id>"
    RESTORE_PREFERENCE = "POST /api/studies/<study_id:int>/preference/<history_id>"
    SKIP = "POST /api/studies/<study_id:int>/<trial_id:int>/skip"
    UPLOAD_STUDY_ARTIFACT = "POST /api/artifacts/<study_id:int>"
    UPLOAD_TRIAL_ARTIFACT = "POST /api/artifacts/<study_id:int>/<trial_id:int>"
    DELETE_STUDY_ARTIFACT = "DELETE /api/artifacts/<study_id:int>/<artifact_id:re:[0-9a-fA-F-]+>"
    DELETE_TRIAL_ARTIFACT = "DELETE /api/artifacts/<study_id:int>/<trial_id:int>/<artifact_id:re:[0-9a-fA-F-]+>"
    MIGRATE = "POST /incompatible-rdb-schema"
    TRIAL_FILTER = "POST /api/llm/trial_filter_query"
    PLOTLY_GRAPH = "POST /api/llm/generate_plotly_graph_query"
    PLOTLY_GRAPH_AGAIN = "POST /api/llm/re_generate_plotly_graph_query"


@functools.cache
def schema_revisions() -> list[str]:
    """The versions of its schema that the installed Optuna knows, oldest first.

    Optuna asks Alembic for them, which takes longer to load than `study status` takes in all. They are file names.
    """
    folder = Path(models.__file__).parent / "alembic" / "versions"
    names = [file.stem.rstrip("_") for file in folder.glob("v*.py")]
    return sorted(names, key=lambda name: [int(part) if part.isdecimal() else part for part in name[1:].split(".")])


def study_id_of(study: optuna.Study) -> int:
    """The key of the study's row; Optuna's public interface knows studies by name only."""
    return study._study_id


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage that the study reads and writes."""
    return study._storage


def with_storage(study: optuna.Study, storage: BaseStorage, name: str) -> optuna.Study:
    """The same study on another storage object and under another name; pruners take a study and no storage, and
    Hyperband hashes its name.
    """
    other = copy.copy(study)
    other._storage, other.study_name = storage, name
    return other


def forget_cached_trials(study: optuna.Study) -> None:
    """What `Study.ask` does first: samplers must see the trials that have finished since."""
    study._thread_local.cached_all_trials = None


CMA_ES_STATE = ("plain-cma:", "cma:")
"""What keys of trials' system attributes with the state of CMA-ES begin with: ours, and Optuna's own."""
_CMA_VECTORS = ("_mean", "_p_sigma", "_pc", "_c_1d")
_MOST_CMA_NUMBER = 1e32
"""The limit of cmaes for a mean and for a step size."""


class PlainCmaEsSampler(optuna.samplers.CmaEsSampler):
    """Optuna's CmaEsSampler, with the state of its optimizer in the database as JSON.

    Optuna's own stores a pickle there and loads it in every worker: who can write to the database, or made a file that
    somebody imports, could run code on the machines of all others. It suggests what Optuna's own would. States that
    Optuna's own stored are not read: a study that an older version began starts the optimizer again.

    Only what a generation changes is stored. All else follows from the number of parameters.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._attr_prefix = CMA_ES_STATE[0]

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        """Called with the pickle that Optuna has just made of its own optimizer, before it is stored."""
        state = pickle.loads(bytes.fromhex(optimizer_str)).__getstate__()
        plain = {name: state[name].tolist() for name in _CMA_VECTORS}
        plain |= {"_sigma": float(state["_sigma"]), "_g": int(state["_g"])}
        return super()._split_optimizer_str(json.dumps(plain))

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> cmaes.CMA | None:
        for trial in reversed(completed_trials):
            parts = {
                key: value for key, value in trial.system_attrs.items() if key.startswith(self._attr_key_optimizer)
            }
            if parts:
                try:
                    return _cma(json.loads(self._concat_optimizer_attrs(parts)))
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    logger.warning("the CMA-ES state of trial %d is damaged and was not used", trial.number)
        return None


def _cma(state: Any) -> cmaes.CMA:
    """The optimizer with this state.

    Raises:
        ValueError, KeyError, TypeError, OverflowError: it is the state of none.
    """
    import cmaes

    arrays = {name: np.array(state[name], dtype=np.float64) for name in _CMA_VECTORS}
    sigma, generation = state["_sigma"], state["_g"]
    dimensions = len(arrays["_mean"])
    sizes = dict.fromkeys(_CMA_VECTORS, dimensions) | {"_c_1d": dimensions * (dimensions + 1) // 2}
    if dimensions == 0 or not all(
        array.shape == (sizes[name],) and np.all(np.abs(array) < _MOST_CMA_NUMBER) for name, array in arrays.items()
    ):
        raise ValueError("an array has another size, or numbers that no optimizer has")
    if not (isinstance(sigma, float) and 0 < sigma < _MOST_CMA_NUMBER):
        raise ValueError("the step size is not a positive number")
    if type(generation) is not int or not 0 <= generation < 2**31:
        raise ValueError("the generation is not a count")
    bounds = np.tile([0.0, 1.0], (dimensions, 1))  # Optuna maps every parameter to [0, 1]
    optimizer = cmaes.CMA(mean=np.full(dimensions, 0.5), sigma=1.0, bounds=bounds, n_max_resampling=10 * dimensions)
    optimizer.__setstate__(optimizer.__getstate__() | arrays | {"_sigma": sigma, "_g": generation})
    return optimizer
