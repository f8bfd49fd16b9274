"""Queues one more trial of a study, with parameters that a person chose; the sampler fills in the others."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable

from optuna.trial import TrialState, create_trial

from storage.enqueue import add_trial
from storage.errors import UserError
from study.config.models import CHOICES, StudyConfig, means_something
from study.create import OpenStudy
from study.search import space

ENQUEUED = "enqueued"
"""User attribute of a trial that a person queued: it is none of those that the config asks for."""
MOST_SEED = 2**31 - 1


def parse_parameters(assignments: Iterable[str]) -> space.Parameters:
    """`alpha=5000`, `policy=static`: name to value.

    Raises:
        UserError: not NAME=VALUE, or a name twice.
    """
    chosen: space.Parameters = {}
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not (name and equals and text):
            raise UserError(f"a parameter is NAME=VALUE, such as alpha=5000; got {assignment[:200]!r}")
        if name in chosen:
            raise UserError(f"{name} is given twice")
        try:
            chosen[name] = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            chosen[name] = text  # a bare word: policy=static
    return chosen


def enqueue(study: OpenStudy, chosen: space.Parameters, seed: int | None = None) -> int:
    """Queue a trial with the parameters `chosen`; its number.

    Args:
        seed: None: that of a grid's first replicate, so that comparisons stay paired; with a sampler the study's seed
            plus the trial's number.

    Raises:
        UserError: parameters that the study does not search, or values outside its space; all faults in one sentence.
    """
    config = study.config
    if seed is not None and not 0 <= seed <= MOST_SEED:
        raise UserError(f"--seed must be a whole number from 0 to {MOST_SEED}, got {seed}")
    faults = _faults(config, chosen, study.study.user_attrs.get("images", {}).get("train"))
    if faults:
        raise UserError(f"the trial does not fit the study {study.name!r}: {'; '.join(faults)}")
    distributions = {name: space.distribution(config, name) for name in chosen}
    grid = config.search.sampler.kind == "grid"
    trial = create_trial(
        state=TrialState.WAITING,
        params={name: chosen[name] for name in config.searched() if name in chosen},
        distributions=distributions,
        user_attrs={ENQUEUED: True, "seed": config.search.seed if seed is None else seed},
    )
    return add_trial(study.engine, study.id, trial, seed_by_number=seed is None and not grid)


def _faults(config: StudyConfig, chosen: space.Parameters, train_images: int | None) -> list[str]:
    searched = config.searched()
    faults = [f"{name} is not searched (searched: {', '.join(searched)})" for name in chosen if name not in searched]
    if faults:
        return faults
    fixed = config.searchable()
    choices = {name: chosen.get(name, fixed[name]) for name in CHOICES}
    if all(isinstance(value, str) for value in choices.values()):
        decides = [str(value) for name, value in choices.items() if name in searched] or [str(choices["policy"])]
        faults += [
            f"{name} means nothing to {', '.join(decides)}" for name in chosen if not means_something(name, choices)
        ]
    faults += config.faults_of(chosen) or [
        f"{name} must be within {space.shown_limits(config, name)}, got {value!r}"
        for name, value in chosen.items()
        if not space.contains(config, name, value)
    ]
    if config.search.sampler.kind == "grid":
        missing = [name for name in searched if name not in chosen and means_something(name, choices)]
        faults += [f"a grid has no sampler that could fill in {', '.join(missing)}"] if missing else []
    alpha = chosen.get("alpha")
    if train_images is not None and isinstance(alpha, int) and alpha > train_images:
        faults.append(f"alpha must be at most the {train_images} training images, got {alpha}")
    return faults
