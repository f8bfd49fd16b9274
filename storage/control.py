"""What holds for all workers of a study, wherever they are: a request to stop, and budgets that they share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from storage.errors import UserError
from storage.queue import now, retrying, upsert
from storage.tables import ATTEMPTS, LEASES, STUDY_ATTRS, TRIALS

STOP, BUDGETS = "stop", "budgets"
"""Keys of the study's user attributes."""
UNITS = {
    "gpu-hours": ("gpu-hour", "gpu-hours", "gpu-h"),
    "hours": ("h", "hour", "hours"),
    "images": ("image", "images"),
    "kWh": ("kwh",),
}
"""What can be budgeted: hours of workers at trials (a worker counts as one GPU), hours in which any was, images trained
on, energy of the GPUs."""


def parse_budgets(texts: Iterable[str]) -> dict[str, float]:
    """`20 gpu-hours`, `2 h`, `500000000 images`, `3 kWh`; `none` alone: no budget.

    Raises:
        UserError: not an amount above 0 and a unit, or a unit twice.
    """
    given = list(texts)
    if [text.strip().lower() for text in given] == ["none"]:
        return {}
    budgets: dict[str, float] = {}
    for text in given:
        match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z-]+)", text.strip().lower())
        unit = next((unit for unit, names in UNITS.items() if match and match[2] in names), None)
        amount = float(re.sub("[_,]", "", match[1])) if match else 0.0
        if unit is None or not 0 < amount < float("inf"):
            raise UserError(
                f'a budget is an amount and a unit, such as "20 gpu-hours", "2 h", "500000000 images" or "3 kWh", '
                f"or none; got {text!r}"
            )
        if unit in budgets:
            raise UserError(f"two budgets in {unit}: give one")
        budgets[unit] = amount
    return budgets


def request_stop(engine: sa.Engine, study_id: int) -> None:
    """Ask all workers to give their trials back and end. Holds until `go_on`."""
    _set(engine, study_id, STOP, True)


def go_on(engine: sa.Engine, study_id: int, budgets: Mapping[str, float] | None = None) -> None:
    """Take a request to stop back; `budgets` replace those that the study has."""
    if budgets is not None:
        _set(engine, study_id, BUDGETS, dict(budgets))
    if _attributes(engine, study_id).get(STOP):
        _set(engine, study_id, STOP, False)


def reason_to_stop(engine: sa.Engine, study_id: int) -> str | None:
    """Why no worker should go on, if so: somebody asked, or a budget is spent."""
    found = _attributes(engine, study_id)
    if found.get(STOP):
        return "asked to stop by `study stop`"
    budgets: dict[str, float] = found.get(BUDGETS) or {}
    if not budgets:
        return None
    used = spent(engine, study_id)
    for unit, limit in budgets.items():
        if used[unit] >= limit:
            return f"the budget is spent: {used[unit]:,.4g} of {limit:,.4g} {unit}"
    return None


def budgets_of(engine: sa.Engine, study_id: int) -> dict[str, float]:
    return _attributes(engine, study_id).get(BUDGETS) or {}


def spent(engine: sa.Engine, study_id: int) -> dict[str, float]:
    """What the study has used so far, in every unit."""
    clock = now(engine)
    lease = sa.and_(LEASES.c.trial_id == ATTEMPTS.c.trial_id, LEASES.c.token == ATTEMPTS.c.token)
    # At work until now, or, if it vanished, at most until its lease ran out.
    open_end = sa.case((LEASES.c.expires_at < clock, LEASES.c.expires_at), else_=clock)
    query = (
        sa.select(
            ATTEMPTS.c.started_at,
            sa.func.coalesce(ATTEMPTS.c.ended_at, open_end),
            sa.func.coalesce(ATTEMPTS.c.images, 0),
            sa.func.coalesce(ATTEMPTS.c.joules, 0.0),
        )
        .select_from(TRIALS.join(ATTEMPTS, TRIALS.c.trial_id == ATTEMPTS.c.trial_id).outerjoin(LEASES, lease))
        .where(TRIALS.c.study_id == study_id)
        .order_by(ATTEMPTS.c.started_at)
    )
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    worked = elapsed = images = joules = 0.0
    reached = float("-inf")
    for start, end, trained, energy in rows:
        end = max(end, start)
        worked += end - start
        elapsed += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        images += trained
        joules += energy
    return {"gpu-hours": worked / 3600, "hours": elapsed / 3600, "images": images, "kWh": joules / 3.6e6}


def _attributes(engine: sa.Engine, study_id: int) -> dict[str, Any]:
    query = sa.select(STUDY_ATTRS.c.key, STUDY_ATTRS.c.value_json)
    query = query.where(STUDY_ATTRS.c.study_id == study_id, STUDY_ATTRS.c.key.in_((STOP, BUDGETS)))
    with engine.connect() as connection:
        return {key: json.loads(value) for key, value in connection.execute(query)}


def _set(engine: sa.Engine, study_id: int, key: str, value: Any) -> None:
    def once() -> None:
        with engine.begin() as connection:
            insert = upsert(engine, STUDY_ATTRS).values(study_id=study_id, key=key, value_json=json.dumps(value))
            again = {"value_json": insert.excluded.value_json}
            connection.execute(insert.on_conflict_do_update(index_elements=["study_id", "key"], set_=again))

    retrying(once, 30.0)
