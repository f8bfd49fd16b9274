"""Lets a sampler learn from finished trials of another study, beside its own; nothing else sees them."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.search_space import intersection_search_space
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from storage.optuna_internals import forget_cached_trials, storage_of, study_id_of, with_storage
from study.config.models import StudyConfig
from study.search import space

LEARNING = ("tpe", "gp", "cma-es")
"""The samplers that learn from trials."""
CMA_TRIALS = 10
"""Complete trials below which Optuna's warm start of CMA-ES has nothing to go by: it takes the best tenth."""
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
LONG_AGO = datetime(1970, 1, 2)
"""When the others finished; no sampler asks."""


def can_learn(config: StudyConfig) -> bool:
    """Whether the study's sampler learns from trials."""
    return config.search.sampler.kind in LEARNING


def fits(config: StudyConfig, stored: Mapping[str, Any]) -> bool:
    """Whether a stored trial (`storage.origins.Informed`) lies in the study's space, with one value an objective."""
    params, objectives = stored["params"], config.search.objective.count(",") + 1
    needed = {name for name in config.searched() if space.relevant(config, params, name)}
    return (
        len(stored["values"]) == objectives
        and params.keys() == needed
        and all(space.contains(config, name, params[name]) for name in needed)
    )


def informing_trials(config: StudyConfig, stored: Sequence[Mapping[str, Any]]) -> list[FrozenTrial]:
    """The stored trials as a sampler of Optuna's reads them; those that do not fit the study are left out.

    Their numbers are fractions between -1 and 0: TPE orders trials by number, and these are older than the study's
    own; Optuna's search spaces leave out numbers below -1.
    """
    if not can_learn(config):
        return []
    distributions = {name: space.distribution(config, name) for name in config.searched()}
    fitting = [each for each in stored if fits(config, each)]
    trials = []
    for i, each in enumerate(fitting, 1):
        params = each["params"]
        trials.append(
            FrozenTrial(
                number=i / (len(fitting) + 1) - 1,  # type: ignore[arg-type]
                state=STATES[each["state"]],
                value=None,
                values=list(map(float, each["values"])),
                datetime_start=LONG_AGO,
                datetime_complete=LONG_AGO,
                params={name: params[name] for name in distributions if name in params},
                distributions={name: distributions[name] for name in distributions if name in params},
                user_attrs={},
                system_attrs={},
                intermediate_values={} if each["step"] is None else {each["step"]: float(each["values"][0])},
                trial_id=-i,
            )
        )
    return trials


def informed(study: optuna.Study, others: Sequence[FrozenTrial]) -> optuna.Study:
    """The study as a sampler sees it that learns from `others` too. What is written goes to the study."""
    if not others:
        return study
    forget_cached_trials(study)
    return with_storage(study, _WithOthers(storage_of(study), others), study.study_name)  # type: ignore[arg-type]


class _WithOthers:
    """A storage whose trials are the study's and before them those of another."""

    def __init__(self, storage: BaseStorage, others: Sequence[FrozenTrial]) -> None:
        self._storage, self._others = storage, others

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        others = [trial for trial in self._others if states is None or trial.state in states]
        own = self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [*(copy.deepcopy(others) if deepcopy else others), *own]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def cma_es_trials(study: optuna.Study, others: Sequence[FrozenTrial]) -> list[FrozenTrial] | None:
    """The trials from which CMA-ES takes its first distribution, reduced to the parameters that it samples now.

    None: too few, or it has none yet.
    """
    own = storage_of(study).get_all_trials(study_id_of(study), deepcopy=False, states=(TrialState.COMPLETE,))
    sampled = {
        name: distribution
        for name, distribution in intersection_search_space(own).items()
        if not isinstance(distribution, CategoricalDistribution) and not distribution.single()
    }
    reduced = []
    for trial in others:
        if trial.state == TrialState.COMPLETE and sampled and sampled.keys() <= trial.params.keys():
            other = copy.copy(trial)
            other.distributions = sampled
            other.params = {name: trial.params[name] for name in sampled}
            reduced.append(other)
    return reduced if len(reduced) >= CMA_TRIALS else None
