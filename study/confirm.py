"""Runs the best settings of a study again, on fresh seeds, with the last word of the untouched test split."""

from __future__ import annotations

import statistics
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from storage.errors import UserError
from study.config.models import GridSamplerConfig, NoPrunerConfig, StudyConfig
from study.config.values import first
from study.search import space

FAR = 1_000_000
"""From a study's first seed to the first of its confirmation: no search gets that far."""


def confirmation(study: optuna.Study, config: StudyConfig, top: int, seeds: int) -> tuple[StudyConfig, dict[str, Any]]:
    """The config of the confirming study, and where its settings come from: the study's name, their values in it.

    A setting's value in the search is the mean over its complete trials (one, unless the search had replicates).

    Raises:
        UserError: fewer than `top` settings have a complete trial.
    """
    by_setting: dict[tuple[tuple[str, Any], ...], list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        chosen = {name: value for name, value in trial.params.items() if space.relevant(config, trial.params, name)}
        by_setting.setdefault(tuple(chosen.items()), []).append(trial)
    if len(by_setting) < top:
        count = len(by_setting)
        raise UserError(
            f"--top must be at most the {count} settings of {study.study_name!r} with a complete trial, got {top}"
        )
    means = {cell: statistics.fmean(trial.values[0] for trial in trials) for cell, trials in by_setting.items()}
    best = sorted(by_setting, key=lambda cell: (-means[cell], min(trial.number for trial in by_setting[cell])))[:top]
    tree = config.model_dump()
    # Placeholders: every cell brings its own.
    placeholders = {name: first(value) for name, value in config.searchable().items()} | dict(best[0])
    for section, keys in config.placed(placeholders).items():
        tree[section] |= keys
    tree["search"] |= {
        "sampler": GridSamplerConfig(),
        "trials": None,
        "target": None,
        "patience": None,
        "replicates": seeds,
        "seed": (config.search.seed + FAR) % 2**31,
        "objective": "accuracy",
        "constraints": (),
        "cells": [dict(cell) for cell in best],
    }
    tree["pruning"] = NoPrunerConfig()
    tree["data"]["test"] = config.data.protocol == "holdout"
    tree["description"] = f"The best {top} settings of {study.study_name!r} again, on {seeds} fresh seeds"
    origin = {"study": study.study_name, "values": [means[cell] for cell in best]}
    return StudyConfig.model_validate(tree), {"confirms": origin}
