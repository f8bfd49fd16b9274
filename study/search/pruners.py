"""Optuna's pruner for a config."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import optuna
from optuna import pruners
from optuna.trial import FrozenTrial

from storage.optuna_internals import is_first_in_interval_step, storage_of, study_id_of
from study.config.models import StudyConfig
from study.search.space import most_steps


def make_pruner(config: StudyConfig, train_images: int) -> pruners.BasePruner:
    pruning = config.pruning
    options = pruning.model_dump(exclude={"kind", "step"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match pruning.kind:
            case "none":
                return pruners.NopPruner()
            case "median":
                return Percentile(50.0, **options)
            case "percentile":
                return Percentile(**options)
            case "successive-halving":
                return pruners.SuccessiveHalvingPruner(**options)
            case "hyperband":
                return pruners.HyperbandPruner(max_resource=most_steps(config, train_images), **options)
            case "patient":
                return Patient(**options)


class Percentile(pruners.PercentilePruner):
    """Optuna's rule for a study that is maximised, on the one step of the other trials that it looks at.

    The study's storage must be a `CachedStorage`.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        step, steps = trial.last_step, trial.intermediate_values.keys()
        if step is None or step < self._n_warmup_steps:
            return False
        if not is_first_in_interval_step(step, steps, self._n_warmup_steps, self._interval_steps):
            return False
        storage: Any = storage_of(study)
        complete, reports = storage.reports_at(study_id_of(study), step)
        if complete == 0 or complete < self._n_startup_trials:
            return False
        best = np.nanmax(list(trial.intermediate_values.values()))
        if np.isnan(best):
            return True
        # Fewer than n_min_trials, which is at least 1, or none but NaN: nothing to compare with.
        return len(reports) >= self._n_min_trials and bool(best < np.nanpercentile(reports, 100 - self._percentile))


class Patient(pruners.BasePruner):
    """Early stopping: prunes once the best accuracy has risen by no more than `min_delta` in `patience` epochs.

    Optuna's PatientPruner waits until the best of the last epochs is below that of the earlier ones, which a best
    accuracy so far (what our trials report) never is.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        self.patience, self.min_delta = patience, min_delta

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        reports = [value for _, value in sorted(trial.intermediate_values.items())]
        return len(reports) > self.patience and reports[-1] - reports[-1 - self.patience] <= self.min_delta
