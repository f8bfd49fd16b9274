"""Derives a study from another one: the other's settings with changes, and its finished trials that fit them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from storage.derive import derive as copy_trials
from storage.engine import reader
from storage.enqueue import QUEUE_POSITION
from storage.errors import UserError
from storage.exclusions import excluded
from storage.optuna_internals import CMA_ES_STATE, storage_of
from storage.origins import AFTER, DERIVED_FROM, ORIGIN_TRIAL, Derived, Informed, informed_by
from study import __version__
from study.config.loading import changed
from study.config.models import StudyConfig
from study.confirm import TEST_ASKED
from study.create import CLASSES, CONFIG_FORMAT, OpenStudy, check_trials, stored_data
from study.enqueue import ENQUEUED
from study.search import space, warm_start
from study.search.compatibility import deciding_differences, fit

OF_DATA = ("data_fingerprint", "images", "protocol", "data_facts", CLASSES, "code_sha256")
"""User attributes of a study that say what its data and its own code are."""
MOST_LINES = 20


@dataclass(frozen=True)
class Derivation:
    """What a study takes over from another, and what it runs itself."""

    config: StudyConfig
    taken: dict[int, FrozenTrial]
    """Number in the other study to the parameters and attributes in the new one."""
    not_taken: dict[int, str]
    """Number of a finished trial of the other study to why it is not taken over."""
    unfinished: int
    """Trials of the other study that had not finished, and stay with it alone."""
    queued: tuple[FrozenTrial, ...]
    """What is left to run."""

    @property
    def finished(self) -> int:
        """Trials of the other study that had finished."""
        return len(self.taken) + len(self.not_taken)

    def lines(self) -> list[str]:
        """The trials that are not taken over, by reason."""
        by_reason: dict[str, list[int]] = {}
        for number, reason in self.not_taken.items():
            by_reason.setdefault(reason, []).append(number)
        lines = [f"not taken over: {_listed(numbers)}: {reason}" for reason, numbers in by_reason.items()]
        if len(lines) > MOST_LINES:
            more = sum(len(numbers) for numbers in list(by_reason.values())[MOST_LINES:])
            lines = [*lines[:MOST_LINES], f"not taken over: {more} more trials for other reasons"]
        if self.unfinished:
            have = "trial that has" if self.unfinished == 1 else "trials that have"
            lines.append(f"not taken over: {self.unfinished} {have} not finished")
        return lines


def derive(
    source: OpenStudy, name: str, file: str | None = None, assignments: Iterable[str] = (), trials: int | None = None
) -> Derivation:
    """Create the study `name` from the settings of `source` with changes, and copy the finished trials that fit them.

    Args:
        file: a preset or config file whose settings take the place of the source's.
        assignments: `section.key=value`, which take the place of both.
        trials: short for the assignment of `search.trials`; the trials that are taken over count among them.

    Raises:
        UserError: the changes concern what decides a trial's numbers; bad settings; a study of that name is there.
            Nothing was changed.
        DataError: a network or augmentation that cannot be made for the study's data.
    """
    more = [] if trials is None else [f"search.trials={trials}"]
    config = _checked(source, changed(source.config, file, [*assignments, *more]))
    derivation = plan(source, config)
    ids = {trial.number: trial._trial_id for trial in _all_trials(source)}
    same_search = (config.searched(), config.search.sampler) == (source.config.searched(), source.config.search.sampler)
    copy_trials(
        source.storage,
        source.name,
        name,
        _attributes(source, derivation),
        {ids[number]: trial for number, trial in derivation.taken.items()},
        derivation.queued,
        replaced=(QUEUE_POSITION, "cell", "replicate", "seed", ENQUEUED, ORIGIN_TRIAL),
        # What CMA-ES has learned is in the old space's units; Hyperband's brackets go by a trial's number and study.
        dropped=[*([] if same_search else list(CMA_ES_STATE)), *(["completed_rung_"] if _brackets(config) else [])],
        keep=config.artifacts.count,
    )
    return derivation


def _checked(source: OpenStudy, config: StudyConfig) -> StudyConfig:
    """The new study's config, once its trials can be those of the source.

    Raises:
        UserError: they cannot, and what differs.
    """
    if "confirms" in source.study.user_attrs:
        raise UserError(f"{source.name!r} is a confirmation; confirm more settings or seeds with: study confirm")
    data = stored_data(source)
    train = data.images.get("train")
    if train is not None:
        config = config.with_counts(train)
        space.check_alpha(config, train)
    if differences := deciding_differences(config, source.config):
        raise UserError(
            f"the trials of {source.name!r} cannot be taken over: what decides their numbers differs (new != stored): "
            f"{'; '.join(differences)}; start a new study with `study launch`, with a sampler also informed by this "
            f"one: --after {source.name}"
        )
    old = source.config
    parts = (StudyConfig.networks, StudyConfig.policies, StudyConfig.augmentations)
    if data.shape and any(part(config) != part(old) for part in parts):
        check_trials(config, data)
    return config


def plan(source: OpenStudy, config: StudyConfig) -> Derivation:
    """Which trials of the source a study with this config takes over, and which it has to run.

    Raises:
        UserError: more trials fit than the config asks for.
    """
    with reader(source.engine).connect() as connection:
        left_out = excluded(connection, source.id)
    fitting: dict[int, FrozenTrial] = {}
    not_taken: dict[int, str] = {}
    unfinished = 0
    distributions = {name: space.distribution(config, name) for name in config.searched()}
    for trial in _all_trials(source):
        if not trial.state.is_finished():
            unfinished += 1
            continue
        chosen, faults = fit(config, source.config, trial.params)
        if trial.state == TrialState.FAIL:
            faults = ["it failed"]
        elif trial.number in left_out:
            faults = [f"it is excluded: {left_out[trial.number]}"]
        elif not isinstance(seed := trial.user_attrs.get("seed", source.config.search.seed), int):
            faults = ["its seed is no whole number"]
        if faults:
            not_taken[trial.number] = "; ".join(faults)
            continue
        fitting[trial.number] = create_trial(
            state=TrialState.WAITING,  # of which only parameters and attributes are used
            params=chosen,
            distributions={name: distributions[name] for name in chosen},
            user_attrs={
                "seed": seed,
                ENQUEUED: QUEUE_POSITION not in trial.user_attrs,
            },
        )
    place = _in_grid if config.search.sampler.kind == "grid" else _in_order
    taken, homeless, queued = place(fitting, space.queued_trials(config))
    for number, trial in taken.items():
        trial.user_attrs[ORIGIN_TRIAL] = number
    reasons = {number: f"{_shown(fitting[number])} is no cell of the new grid" for number in homeless}
    return Derivation(config, taken, dict(sorted((not_taken | reasons).items())), unfinished, tuple(queued))


Placed = tuple[dict[int, FrozenTrial], list[int], list[FrozenTrial]]
"""The trials that are taken over, the numbers of those that have no place, and the queued trials that are left."""


def _in_grid(fitting: dict[int, FrozenTrial], queued: Sequence[FrozenTrial]) -> Placed:
    """Each trial takes the place of the cell and replicate that it has run; what people queued may lie between."""
    places = {_cell(trial): trial for trial in queued}
    taken: dict[int, FrozenTrial] = {}
    for number in sorted(fitting, key=lambda number: (fitting[number].user_attrs[ENQUEUED], number)):
        trial = fitting[number]
        place = places.pop(_cell(trial), None)
        if place is not None:
            trial.user_attrs = dict(place.user_attrs)
        elif not trial.user_attrs[ENQUEUED]:
            continue
        taken[number] = trial
    left = {id(trial) for trial in places.values()}
    homeless = [number for number in fitting if number not in taken]
    return dict(sorted(taken.items())), homeless, [trial for trial in queued if id(trial) in left]


def _in_order(fitting: dict[int, FrozenTrial], queued: Sequence[FrozenTrial]) -> Placed:
    """Each trial takes the place with its seed, else the last that is free, so that seeds stay different."""
    ours = {number: trial for number, trial in fitting.items() if not trial.user_attrs[ENQUEUED]}
    if len(ours) > len(queued):
        raise UserError(
            f"search.trials is {len(queued)}, and {len(ours)} finished trials fit, which count among them: give at "
            f"least {len(ours)}, such as --trials {len(ours) + 10}"
        )
    places = {trial.user_attrs["seed"]: trial for trial in queued}
    others = []
    for number, trial in ours.items():
        place = places.pop(trial.user_attrs["seed"], None)
        if place is None:
            others.append(number)
        else:
            trial.user_attrs = dict(place.user_attrs)
    for number in others:
        _, place = places.popitem()
        ours[number].user_attrs = dict(place.user_attrs) | {"seed": ours[number].user_attrs["seed"]}
    left = {id(trial) for trial in places.values()}
    return fitting, [], [trial for trial in queued if id(trial) in left]


def _cell(trial: FrozenTrial) -> tuple[frozenset[tuple[str, Any]], int]:
    return frozenset(trial.params.items()), trial.user_attrs["seed"]


def _shown(trial: FrozenTrial) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in trial.params.items())
    return f"{parameters}{', ' if parameters else ''}seed {trial.user_attrs['seed']}"


def _attributes(source: OpenStudy, derivation: Derivation) -> dict[str, Any]:
    """Of the new study. That the test split has been asked for the source stays recorded: the trials are the same."""
    stored = source.study.user_attrs
    attributes = {key: stored[key] for key in (*OF_DATA, TEST_ASKED) if key in stored}
    config = derivation.config
    if (informed := informed_by(stored)) is not None and warm_start.can_learn(config):
        trials = tuple(trial for trial in informed.trials if warm_start.fits(config, trial))
        attributes[AFTER] = Informed(informed.study, trials).attribute()
    return attributes | {
        "config": config.model_dump(mode="json"),
        "preset": f"derive {source.name}",
        "uid": uuid.uuid4().hex,
        "program_version": __version__,
        "config_format": CONFIG_FORMAT,
        DERIVED_FROM: Derived(source.name, len(derivation.taken), derivation.finished).attribute(),
    }


def _all_trials(source: OpenStudy) -> list[FrozenTrial]:
    """By number, with those that a person has excluded."""
    storage: Any = storage_of(source.study)
    return storage.all_trials(source.id)  # type: ignore[no-any-return]


def _brackets(config: StudyConfig) -> bool:
    return config.pruning.kind == "hyperband"


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST_LINES]))
    return shown + (f" and {len(numbers) - MOST_LINES} more" if len(numbers) > MOST_LINES else "")
