"""Runs the best settings of a study again, on fresh seeds, and asks the test split once for them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from storage import queries
from storage.errors import UserError
from storage.study_attributes import read_attributes, set_attribute
from study.config.models import GridSamplerConfig, NoPrunerConfig, StudyConfig
from study.config.values import first
from study.search import space

if TYPE_CHECKING:
    from study.create import OpenStudy

FAR = 1_000_000
"""From a study's first seed to the first of its confirmation: no search gets that far."""
TEST_ASKED = "test_asked"
"""User attribute of a searched study: the confirmations that asked the test split, in their order."""
ASKED_AGAIN = "asked_again"
"""User attribute of a confirming study that asked the test split though it had been asked before."""


def confirmation(
    study: optuna.Study, config: StudyConfig, top: int, seeds: int, earlier: int = 0
) -> tuple[StudyConfig, dict[str, Any]]:
    """The config of the confirming study, and where its settings come from: the study's name, their values in it.

    Args:
        earlier: confirmations before this one, whose seeds are not fresh any more.

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
        "seed": (config.search.seed + FAR * (1 + earlier)) % 2**31,
        "objective": "accuracy",
        "constraints": (),
        "cells": [dict(cell) for cell in best],
    }
    tree["pruning"] = NoPrunerConfig()
    tree["data"]["test"] = config.data.protocol == "holdout"
    tree["description"] = f"The best {top} settings of {study.study_name!r} again, on {seeds} fresh seeds"
    origin = {"study": study.study_name, "values": [means[cell] for cell in best]}
    return StudyConfig.model_validate(tree), {"confirms": origin}


@dataclass(frozen=True)
class Confirmation:
    """What the study that confirms another is created with."""

    searched: OpenStudy
    config: StudyConfig
    attributes: dict[str, Any]
    """Further user attributes of the confirming study."""
    again: bool
    """Whether it asks the test split again."""

    def record(self, confirming: OpenStudy) -> None:
        """Record in both studies, once the confirming one is there, that it asks the test split."""
        record_test_split(self.searched, confirming, again=self.again)


def plan(searched: OpenStudy, confirming: str, top: int, seeds: int, *, again: bool) -> Confirmation:
    """The confirmation of the `top` best settings on `seeds` fresh seeds by a study of the name `confirming`.

    Raises:
        UserError: fewer than `top` settings have a complete trial, or the test split has been asked and `again` is
            false.
    """
    earlier = earlier_confirmations(searched, confirming)
    config, origin = confirmation(searched.study, searched.config, top, seeds, earlier)
    return Confirmation(searched, config, origin, ask_test_split(searched, confirming, config, again=again))


def earlier_confirmations(searched: OpenStudy, confirming: str) -> int:
    """How many confirmations of the study have been recorded before the one of this name."""
    names = [one["study"] for one in _asked(searched)]
    return names.index(confirming) if confirming in names else len(names)


def ask_test_split(searched: OpenStudy, confirming: str, config: StudyConfig, *, again: bool) -> bool:
    """Whether the test split has been asked for the searched study before, and may be asked again.

    Continuing a confirmation of the same settings and seeds is not asking again.

    Raises:
        UserError: it has been asked, and `again` is false.
    """
    if not config.data.test:
        return False
    entry = _entry(confirming, config)
    uses = queries.test_split_uses(searched.engine, searched.study.user_attrs["data_fingerprint"])
    asked = {use.study: use.evaluations for use in uses}
    earlier = []
    if asked.get(searched.name):
        earlier.append(f"by {searched.name!r} itself, once a trial")
    names = queries.study_names(searched.engine)
    for one in _asked(searched):
        # A confirmation that is there and has evaluated nothing yet has asked nothing yet.
        if {**one, "again": False} == entry:
            return False
        if one["study"] not in names or asked.get(one["study"]):
            earlier.append(f"by {one['study']!r} (settings: {one['settings']}, seeds: {one['seeds']})")
    if earlier and not again:
        raise UserError(
            f"the test split was asked for {searched.name!r} already: {', '.join(earlier)}; the more often it is "
            "asked, the more the best answer is luck; ask it again with --again, which is recorded"
        )
    return bool(earlier)


def record_test_split(searched: OpenStudy, confirming: OpenStudy, *, again: bool) -> None:
    """Record in both studies that the confirming one asks the test split, and whether again."""
    if not confirming.config.data.test:
        return
    entry, earlier = _entry(confirming.name, confirming.config), _asked(searched)
    if any({**one, "again": False} == entry for one in earlier):
        return
    set_attribute(searched.engine, searched.id, TEST_ASKED, [*earlier, {**entry, "again": again}])
    if again:
        set_attribute(confirming.engine, confirming.id, ASKED_AGAIN, True)


def _entry(confirming: str, config: StudyConfig) -> dict[str, Any]:
    cells = config.search.cells or ()
    return {"study": confirming, "settings": len(cells), "seeds": config.search.replicates, "again": False}


def _asked(searched: OpenStudy) -> list[dict[str, Any]]:
    """Entries of other shapes come from a file that somebody made, and are left out."""
    stored = read_attributes(searched.engine, searched.id, [TEST_ASKED]).get(TEST_ASKED, [])
    keys = {"study", "settings", "seeds", "again"}
    return [one for one in stored if isinstance(one, dict) and one.keys() == keys and isinstance(one["study"], str)]
