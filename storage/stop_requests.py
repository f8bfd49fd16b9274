"""Requests to stop that hold for all workers of a study, wherever they run, and the reasons for which workers stop."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from storage.budgets import BUDGETS, budgets_of, spending
from storage.early_end import EARLY_END, Rules, rules_of
from storage.study_attributes import read_attributes, set_attribute

STOP = "stop"
"""Key of the study's user attribute."""
STOP_REQUESTED = "stopped by `study stop`"


def request_stop(engine: sa.Engine, study_id: int) -> None:
    """Ask all workers to release their trials and end. Holds until `withdraw_stop`."""
    set_attribute(engine, study_id, STOP, True)


def withdraw_stop(engine: sa.Engine, study_id: int) -> None:
    """Withdraw a request to stop, if there is one."""
    if read_attributes(engine, study_id, [STOP]).get(STOP):
        set_attribute(engine, study_id, STOP, False)


@dataclass(frozen=True)
class Controls:
    """What people ask of a study's workers."""

    stop: bool
    budgets: dict[str, float]
    """Unit to limit; see `storage.budgets.UNITS`."""
    early_end: Rules


def read_controls(engine: sa.Engine, study_id: int) -> Controls:
    attributes = read_attributes(engine, study_id, [STOP, BUDGETS, EARLY_END, "config"])
    return Controls(bool(attributes.get(STOP)), budgets_of(attributes.get(BUDGETS)), rules_of(attributes))


def reason_to_stop(engine: sa.Engine, study_id: int) -> str | None:
    """Why no worker should start or continue: a request to stop, or a spent budget. None: nothing speaks against it."""
    controls = read_controls(engine, study_id)
    if controls.stop:
        return STOP_REQUESTED
    return spending(engine, study_id).reason_to_stop(controls.budgets) if controls.budgets else None
