"""The search space: the cells of a grid, the queued trials of a study, and the only calls of `trial.suggest`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from storage.errors import UserError
from study.config import constraints
from study.config.models import CHOICES, POLICY_PARAMETERS, StudyConfig, means_something
from study.config.values import Range, first, largest, smallest

WHOLE = ("alpha", "epochs", "batch_size", "score_epochs")

Parameters = dict[str, Any]


def relevant(config: StudyConfig, chosen: Parameters, name: str) -> bool:
    """Whether the parameter `name` means something to a trial with these parameters."""
    fixed = config.searchable()
    return means_something(name, {choice: chosen.get(choice, fixed[choice]) for choice in CHOICES})


def broken_constraints(config: StudyConfig, chosen: Parameters) -> list[str]:
    """Those of `search.constraints` that a trial with these parameters does not satisfy."""
    if not config.search.constraints:
        return []
    values = {name: value for name, value in settings(config, chosen).items() if relevant(config, chosen, name)}
    return [text for text in config.search.constraints if not constraints.holds(text, values)]


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
        cell = {name: value for name, value in cell.items() if relevant(config, cell, name)}
        if not broken_constraints(config, cell):
            distinct.setdefault(tuple(cell.items()), cell)
    if not distinct:
        raise UserError("search.constraints leave no cell of the grid: loosen one, or list other values")
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
    if "." in name:
        values = () if isinstance(value, Range) else value
        whole = value.is_whole if isinstance(value, Range) else all(type(each) is int for each in values)
    if isinstance(value, Range):
        if whole:
            return IntDistribution(int(value.low), int(value.high), log=value.log, step=int(value.step or 1))
        step = None if value.step is None else float(value.step)
        return FloatDistribution(float(value.low), float(value.high), log=value.log, step=step)
    if any(isinstance(each, str | bool) for each in value) or config.search.sampler.kind != "grid":
        return CategoricalDistribution(value)
    low, high = float(min(value)), float(max(value))
    return IntDistribution(int(low), int(high)) if whole else FloatDistribution(low, high)


def contains(config: StudyConfig, name: str, value: Any) -> bool:
    """Whether a searched parameter can have this value; in a grid of numbers any between the least and the largest."""
    match distribution(config, name):
        case CategoricalDistribution() as each:
            return value in each.choices
        case (IntDistribution() | FloatDistribution()) as each:
            kinds = int if isinstance(each, IntDistribution) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                return False
            steps = (value - each.low) / (each.step or 1)
            on_a_step = each.step is None or abs(steps - round(steps)) < 1e-8
            return each.low <= value <= each.high and on_a_step
    return False


def shown(values: Any) -> str:
    """A list or a range as text."""
    if isinstance(values, tuple):
        return ", ".join(map(str, values))
    how = " (log)" if values.log else f" (step {values.step:g})" if values.step is not None else ""
    return f"{values.low:g} to {values.high:g}{how}"


def shown_limits(config: StudyConfig, name: str) -> str:
    """What `contains` allows a searched parameter, as text: for a grid's numbers the range of its list."""
    values = config.searched()[name]
    match distribution(config, name):
        case (IntDistribution() | FloatDistribution()) as each if isinstance(values, tuple):
            return f"{each.low:g} to {each.high:g}"
    return shown(values)


def labels(chosen: Parameters) -> list[str]:
    """Chosen parameters in a log line: `alpha 60`, `lr 0.001`."""
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in chosen.items()]


def suggest(trial: optuna.Trial, config: StudyConfig) -> Parameters:
    """The trial's searched parameters: those it has stay, the others are drawn by the study's sampler."""
    chosen: Parameters = {}
    # Choices first: they decide which others mean something.
    for name in sorted(config.searched(), key=lambda name: name not in CHOICES):
        if not relevant(config, chosen, name):
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
    return fixed(config) | chosen


def fixed(config: StudyConfig) -> Parameters:
    """The parameters that all trials share."""
    searched = config.searched()
    return {name: value for name, value in config.searchable().items() if name not in searched}


def trial_config(config: StudyConfig, chosen: Parameters, seed: int) -> StudyConfig:
    """A study of one trial with these parameters and this seed: no lists, ranges, pruning or constraints."""
    # What means nothing to the trial keeps its first value.
    values = {name: first(value) for name, value in config.searchable().items()}
    values |= {name: value for name, value in settings(config, chosen).items() if relevant(config, chosen, name)}
    tree = config.model_dump()
    for section, keys in config.placed(values).items():
        tree[section] |= keys
    tree["search"] = {"metric": config.search.metric, "seed": seed}
    tree["pruning"] = {"kind": "none"}
    return type(config).model_validate(tree)


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
    whole = any("alpha" not in POLICY_PARAMETERS.get(name, ()) for name in config.policies())
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
