"""Optuna's sampler and pruner for a config."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import optuna
from optuna import samplers
from optuna.trial import FrozenTrial

from storage.optuna_internals import PlainCmaEsSampler
from study.config.models import StudyConfig


def sampler_seed(config: StudyConfig, number: int) -> int:
    """Of what is drawn for trial `number`."""
    digest = hashlib.sha256(f"{config.search.seed}/sampler/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def make_sampler(
    config: StudyConfig, number: int, cma_es_trials: Sequence[FrozenTrial] | None = None
) -> samplers.BaseSampler:
    """The sampler that fills the blanks of trial `number`.

    Seeded by the study's seed and the trial, not by a worker's history: what a trial draws depends on the trials
    finished before it and on nothing else. QMC walks one sequence for the whole study, so its seed is the study's.

    Args:
        cma_es_trials: of another study, from which CMA-ES takes its first distribution.
    """
    search = config.search
    options = search.sampler.model_dump(exclude={"kind"})
    seed = sampler_seed(config, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match search.sampler.kind:
            case "tpe":
                return samplers.TPESampler(seed=seed, **options)
            case "gp":
                return samplers.GPSampler(seed=seed, **options)
            case "cma-es":
                if cma_es_trials is not None:
                    options["source_trials"] = list(cma_es_trials)
                return PlainCmaEsSampler(seed=seed, **options)
            case "qmc":
                return samplers.QMCSampler(
                    seed=search.seed, independent_sampler=samplers.RandomSampler(seed=seed), **options
                )
            case _:  # a grid's queued trials leave nothing to sample
                return samplers.RandomSampler(seed=seed)
