"""The search space: the cells of a grid, the queued trials of a study, and the only calls of `trial.suggest`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage.errors import UserError
from study.config.models import POLICY_PARAMETERS, StudyConfig
from study.config.values import Range, largest, smallest

WHOLE = ("alpha", "epochs", "batch_size")
POLICY_SPECIFIC = frozenset(name for names in POLICY_PARAMETERS.values() for name in names)
"""Parameters that mean something to some policies only."""

Parameters = dict[str, Any]


def relevant(policy: str, name: str) -> bool:
    """Whether the parameter `name` means something to the policy."""
    return name not in POLICY_SPECIFIC or name in POLICY_PARAMETERS[policy]


def cells(config: StudyConfig) -> list[Parameters]:
    """Every combination of the listed values, the last parameter turning fastest, none twice."""
    searched = config.searched()
    distinct: dict[tuple[tuple[str, Any], ...], Parameters] = {}
    listed: Iterable[Parameters] = (
        dict(zip(searched, values, strict=True)) for values in itertools.product(*searched.values())
    )
    if config.search.cells is not None:  # what a cell leaves out is as the config fixes it
        fixed = config.searchable()
        listed = ({name: cell.get(name, fixed[name]) for name in searched} for cell in config.search.cells)
    for cell in listed:
        policy = cell.get("policy", config.policy.name)
        cell = {name: value for name, value in cell.items() if relevant(policy, name)}
        distinct.setdefault(tuple(cell.items()), cell)
    return list(distinct.values())


def queued_trials(config: StudyConfig) -> list[FrozenTrial]:
    """The study's work, queued before anyone trains: as many WAITING trials as will ever run.

    A grid gets one a cell and replicate, parameters fixed; all cells of the first replicate come first, so that more
    replicates only append. Cells of one replicate share a seed: their comparison is paired. Every other sampler gets
    `search.trials` trials without parameters, each with a seed of its own.
    """
    seed = config.search.seed
    if config.search.sampler.kind != "grid":
        return [_queued_trial(i, {}, {}, {"seed": seed + i}) for i in range(config.search.trials or 0)]
    grid = cells(config)
    distributions = {name: distribution(config, name) for name in config.searched()}
    return [
        _queued_trial(
            replicate * len(grid) + i,
            cell,
            {name: distributions[name] for name in cell},
            {"cell": i, "replicate": replicate, "seed": seed + replicate},
        )
        for replicate in range(config.search.replicates)
        for i, cell in enumerate(grid)
    ]


def _queued_trial(
    number: int, params: Parameters, distributions: dict[str, BaseDistribution], attributes: dict[str, Any]
) -> FrozenTrial:
    user_attrs = {"queue_position": number, **attributes}
    return create_trial(state=TrialState.WAITING, params=params, distributions=distributions, user_attrs=user_attrs)


def distribution(config: StudyConfig, name: str) -> BaseDistribution:
    """Optuna's distribution of a searched parameter.

    A list of numbers in a grid becomes the interval it spans, so that importances and contours see its order.
    """
    value = config.searched()[name]
    whole = name in WHOLE
    if isinstance(value, Range):
        if whole:
            return IntDistribution(int(value.low), int(value.high), log=value.log, step=int(value.step or 1))
        return FloatDistribution(value.low, value.high, log=value.log, step=value.step)
    if isinstance(value[0], str) or config.search.sampler.kind != "grid":
        return CategoricalDistribution(value)
    low, high = float(min(value)), float(max(value))
    return IntDistribution(int(low), int(high)) if whole else FloatDistribution(low, high)


def suggest(trial: optuna.Trial, config: StudyConfig) -> Parameters:
    """The trial's searched parameters: those it has stay, the others are drawn by the study's sampler."""
    chosen: Parameters = {}
    for name in config.searched():
        if not relevant(chosen.get("policy", config.policy.name), name):
            continue
        if name in trial.params:
            chosen[name] = trial.params[name]
            continue
        match distribution(config, name):
            case IntDistribution() as d:
                chosen[name] = trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
            case FloatDistribution() as d:
                chosen[name] = trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)
            case CategoricalDistribution() as d:
                chosen[name] = trial.suggest_categorical(name, d.choices)
    return chosen


def settings(config: StudyConfig, chosen: Parameters) -> Parameters:
    """All parameters of a trial: what was chosen over what the config fixes."""
    fixed = {name: value for name, value in config.searchable().items() if name not in config.searched()}
    return fixed | chosen


def step_images(config: StudyConfig) -> int | None:
    """Images a step of a pruner: the smallest alpha; None: a step is an epoch."""
    alpha = config.policy.alpha
    if config.pruning.kind == "none" or config.pruning.step == "epochs" or alpha is None:
        return None
    return int(smallest(alpha))


def most_steps(config: StudyConfig, train_images: int) -> int:
    """The last step that any trial may report, for pruners that must know."""
    unit = step_images(config)
    if unit is None:
        return most_epochs(config)
    if config.training.images is not None:
        return config.training.images // unit
    whole = any("alpha" not in POLICY_PARAMETERS[name] for name in config.policies())
    return most_epochs(config) * (train_images if whole else largest_alpha(config)) // unit


def largest_alpha(config: StudyConfig) -> int:
    """0: no policy of the study has an alpha."""
    return int(largest(config.searched().get("alpha", config.policy.alpha)) or 0)


def check_alpha(config: StudyConfig, train_images: int) -> None:
    """Raises:
    UserError: an alpha that the data cannot give.
    """
    largest = largest_alpha(config)
    if largest > train_images:
        raise UserError(
            f"policy.alpha must be at most the {train_images} training images of {config.data.name!r} "
            f"({config.data.protocol} protocol), got {largest}"
        )


def most_epochs(config: StudyConfig) -> int:
    return int(largest(config.searched().get("epochs", config.training.epochs)))
