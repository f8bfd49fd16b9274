"""Budgets that all workers of a study share, wherever they are, and what they have spent."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from storage.engine import database_time, live_lease, reader, upsert
from storage.errors import UserError
from storage.origins import is_finite
from storage.schema import ATTEMPTS, LEASES, SPENDING, TRIALS
from storage.study_attributes import set_attribute

MOST_AGE_SECONDS = 60.0
"""Of stored sums that are still used: whoever was to renew them may have died."""
BUDGETS = "budgets"
"""Key of the study's user attribute."""
UNITS = {
    "gpu-hours": ("gpu-hour", "gpu-hours", "gpu-h"),
    "hours": ("h", "hour", "hours"),
    "images": ("image", "images"),
    "kWh": ("kwh",),
}
"""What can be budgeted, and how it is spelled. gpu-hours: time that workers held trials, each counted with its share of
a GPU (on a CPU: 1). hours: time in which at least one worker held a trial. images: trained on. kWh: of the GPUs."""
AMOUNT = re.compile(r"((?:[0-9][0-9_]*|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z-]+)")
"""A number, which may be written 1_000 or 1,000, and a unit."""


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
        match = AMOUNT.fullmatch(text.strip().lower())
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


def budgets_of(stored: object) -> dict[str, float]:
    """From a study's attribute; what is no budget there is none."""
    if not isinstance(stored, Mapping):
        return {}
    return {unit: limit for unit, limit in stored.items() if unit in UNITS and is_finite(limit)}


def set_budgets(engine: sa.Engine, study_id: int, budgets: Mapping[str, float]) -> None:
    """These and no others."""
    set_attribute(engine, study_id, BUDGETS, dict(budgets))


@dataclass(frozen=True)
class Spending:
    """What a study has used so far."""

    amounts: dict[str, float]
    """In every unit."""
    workers: int
    """At work now."""
    seconds_worked: float
    """By all workers together, whatever their shares."""
    at: float = 0.0
    """Seconds since 1970 on the database's clock."""

    def reason_to_stop(self, budgets: Mapping[str, float]) -> str | None:
        for unit, limit in budgets.items():
            if self.amounts[unit] >= limit:
                digits = ",.0f" if unit == "images" else ",.4g"
                return f"the budget is spent: {self.amounts[unit]:{digits}} of {limit:{digits}} {unit}"
        return None

    def seconds_left(self, budgets: Mapping[str, float], before: Spending | None = None) -> float:
        """Until the first budget is spent, if the live workers continue at the pace so far; 0 if there is none yet.

        Args:
            before: what had been used earlier; if the pace since then is the faster one, that counts.
        """
        seconds = [math.inf]
        for unit, limit in budgets.items():
            each = self.amounts[unit] / self.seconds_worked if self.seconds_worked else 0.0
            pace = 1 / 3600 if unit == "hours" else self.workers * each
            if before is not None and self.at > before.at:
                pace = max(pace, (self.amounts[unit] - before.amounts[unit]) / (self.at - before.at))
            seconds.append((limit - self.amounts[unit]) / pace if pace else 0.0)
        return max(0.0, min(seconds))


def recent_spending(engine: sa.Engine, study_id: int, part: float = 0.1) -> Spending:
    """What `spending` returns, or what it returned to another process a moment ago.

    Adding up takes longer the more attempts there were, and every worker asks. So one at a time adds up, for all.

    Args:
        part: of the time that is spent adding up, at most; the result is about 1 / part times as old as that takes.
    """
    clock = database_time(engine)
    stored = sa.select(SPENDING.c.spent, SPENDING.c.took, (clock - SPENDING.c.at).label("age"))
    with reader(engine).connect() as connection:
        row = connection.execute(stored.where(SPENDING.c.study_id == study_id)).one_or_none()
    known = None if row is None or not is_finite(row.took) else _spending_of(row.spent)
    if row is not None and known is not None and 0 <= row.age < MOST_AGE_SECONDS:  # unless the clock was put back
        if row.age < row.took / part:
            return known
        mine = sa.and_(SPENDING.c.study_id == study_id, SPENDING.c.at < clock - SPENDING.c.took / part)
        with engine.begin() as connection:
            if connection.execute(sa.update(SPENDING).where(mine).values(at=clock)).rowcount == 0:
                return known  # another process adds up now
    began = time.monotonic()
    latest = spending(engine, study_id)
    insert = upsert(engine, SPENDING).values(
        study_id=study_id, at=latest.at, took=time.monotonic() - began, spent=json.dumps(asdict(latest))
    )
    newest = {name: insert.excluded[name] for name in ("at", "took", "spent")}
    with engine.begin() as connection:
        connection.execute(insert.on_conflict_do_update(index_elements=["study_id"], set_=newest))
    return latest


def _spending_of(text: str) -> Spending | None:
    """From the table's row; None: it has another form than this program writes."""
    try:
        known = Spending(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    amounts = known.amounts if isinstance(known.amounts, dict) else {}
    numbers = (*amounts.values(), known.workers, known.seconds_worked, known.at)
    return known if amounts.keys() == UNITS.keys() and all(map(is_finite, numbers)) else None


def spending(engine: sa.Engine, study_id: int) -> Spending:
    clock = database_time(engine)
    lease = sa.and_(LEASES.c.trial_id == ATTEMPTS.c.trial_id, LEASES.c.token == ATTEMPTS.c.token)
    # At work until now; if it vanished, at most until its lease ran out; nothing, if its trial was taken from it, or if
    # its lease ends in a future that only a wrong clock saw.
    live = sa.and_(ATTEMPTS.c.ended_at.is_(None), live_lease(engine))
    expired = LEASES.c.expires_at <= clock
    open_end = sa.case((live, clock), (expired, LEASES.c.expires_at), else_=0.0)
    last_sign = sa.func.coalesce(ATTEMPTS.c.ended_at, open_end)
    start = ATTEMPTS.c.started_at
    each = (
        sa.select(
            start,
            sa.case((last_sign > start, last_sign), else_=start).label("end"),
            ATTEMPTS.c.images,
            ATTEMPTS.c.joules,
            sa.case((live, 1), else_=0).label("live"),
            sa.func.coalesce(ATTEMPTS.c.share, 1.0).label("share"),
        )
        .select_from(TRIALS.join(ATTEMPTS, TRIALS.c.trial_id == ATTEMPTS.c.trial_id).outerjoin(LEASES, lease))
        .where(TRIALS.c.study_id == study_id)
        .cte()
    )
    # Of each attempt what no earlier one covers: together the time in which anybody worked.
    covered = sa.func.max(each.c.end).over(order_by=(each.c.started_at, each.c.end), rows=(None, -1))
    apart = sa.select(each, sa.func.coalesce(covered, each.c.started_at).label("covered")).cte()
    begin = sa.case((apart.c.covered > apart.c.started_at, apart.c.covered), else_=apart.c.started_at)
    new = sa.case((apart.c.end > begin, apart.c.end - begin), else_=0.0)
    lasted = apart.c.end - apart.c.started_at
    sums = (lasted, lasted * apart.c.share, new, apart.c.images, apart.c.joules, apart.c.live)
    with reader(engine).connect() as connection:
        at = connection.scalar(sa.select(clock)) or 0.0
        row = connection.execute(sa.select(*(sa.func.coalesce(sa.func.sum(column), 0) for column in sums))).one()
    worked, by_share, elapsed, images, joules, workers = row
    amounts = {"gpu-hours": by_share / 3600, "hours": elapsed / 3600, "images": int(images), "kWh": joules / 3.6e6}
    return Spending(amounts, int(workers), worked, at)
