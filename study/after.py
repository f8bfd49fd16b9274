"""The finished trials of another study that inform the sampler of a new one (`study launch --after`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from storage.errors import UserError
from storage.origins import MOST_INFORMING, Informed
from storage.queries import study_names
from study.create import PreparedData, load_study
from study.search import warm_start
from study.search.compatibility import fit, fixed_differences, informing_differences

logger = logging.getLogger(__name__)

FINISHED = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}


def informing(storage: RDBStorage, name: str, other: str, data: PreparedData) -> Informed:
    """What `other` tells the sampler of the study `name` with this config and data.

    A study that exists keeps what it was created with, also when `other` has gone on or is deleted.

    Raises:
        UserError: no such study as `other`, or it differs in data, protocol, network or length; a sampler that does
            not learn from trials; none of its trials fits.
    """
    if name in study_names(storage.engine):
        return Informed(other, ())  # `create_study` compares the names
    config = data.config
    kind = config.search.sampler.kind
    if not warm_start.can_learn(config):
        raise UserError(
            f"sampler {kind!r} does not learn from trials, so --after has no use for it; "
            f"samplers that do: {', '.join(warm_start.LEARNING)}"
        )
    if getattr(config.search.sampler, "sigma0", None) is not None:
        raise UserError("--after gives cma-es its first distribution, so it does not go with search.sampler.sigma0")
    study, theirs = load_study(storage, other)
    differences = informing_differences(config, theirs) + _data_differences(data, study.user_attrs)
    if differences:
        raise UserError(
            f"the trials of {other!r} cannot inform this study (this != {other!r}): {'; '.join(differences)}; "
            "launch it without --after"
        )
    trials, reasons = [], {}
    for trial in study.get_trials(deepcopy=False, states=tuple(FINISHED)):
        params, faults = fit(config, theirs, trial.params)
        each = _stored(trial, params)
        if faults or not warm_start.fits(config, each):
            reasons[trial.number] = "; ".join(faults) or "it has no value"
        else:
            trials.append(each)
    trials = trials[:: -(-len(trials) // MOST_INFORMING) or 1]
    if not trials:
        why = f", such as trial {min(reasons)}: {reasons[min(reasons)]}" if reasons else ": none has finished"
        raise UserError(f"no trial of {other!r} lies in this study's space{why}; launch it without --after")
    complete = sum(each["state"] == "complete" for each in trials)
    if kind == "cma-es" and complete < warm_start.CMA_TRIALS:
        raise UserError(
            f"cma-es learns from at least {warm_start.CMA_TRIALS} complete trials of another study; {complete} of "
            f"{other!r} lie in this study's space: launch it without --after, or use another sampler"
        )
    for text in fixed_differences(config, theirs):
        logger.warning("the trials of %r had another setting: %s", other, text)
    return Informed(other, tuple(trials))


def _data_differences(data: PreparedData, theirs: Mapping[str, Any]) -> list[str]:
    differences = []
    if data.fingerprint != theirs["data_fingerprint"]:
        differences.append(f"data fingerprint: {data.fingerprint[:16]} != {str(theirs['data_fingerprint'])[:16]}")
    code = theirs.get("code_sha256")
    if data.code and code and data.code != code:
        differences.append(f"SHA-256 of own code: {data.code[:16]} != {str(code)[:16]}")
    return differences


def _stored(trial: FrozenTrial, params: Mapping[str, Any]) -> dict[str, Any]:
    """As `storage.origins.Informed` has it."""
    return {
        "number": trial.number,
        "state": FINISHED[trial.state],
        "params": dict(params),
        "values": list(trial.values or ()),
        "step": trial.last_step,
    }
