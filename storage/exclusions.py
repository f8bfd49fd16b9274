"""Trials that a person has left out of a study: no sampler, pruner or table looks at them, and every report names them.

They are an attribute of the study, trial number to reason, so a copy keeps them and nothing of the trial is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

import sqlalchemy as sa
from optuna.trial import TrialState

from storage.engine import upsert
from storage.errors import UserError
from storage.retry import retry
from storage.schema import STUDIES, STUDY_ATTRS, TRIALS
from storage.study_attributes import PATIENCE_SECONDS

EXCLUDED = "excluded"
"""Key of the study's user attribute."""
MOST_REASON = 1000
"""Characters of a reason."""
NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")


def excluded(connection: sa.Connection, study_id: int) -> dict[int, str]:
    """Trial number to reason, by number."""
    return parse(stored_text(connection, study_id))


def parse(text: str) -> dict[int, str]:
    """The attribute as it is stored. What has another form than this program writes excludes nothing."""
    try:
        stored = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    if not isinstance(stored, dict):
        return {}
    whole = {int(number): why for number, why in stored.items() if is_exclusion(number, why)}
    return {number: whole[number] for number in sorted(whole)}


def is_exclusion(number: str, why: object) -> bool:
    """Whether a key and a value of the attribute are a trial's number and a reason."""
    return bool(NUMBER.fullmatch(number)) and isinstance(why, str) and len(why) <= MOST_REASON and "\0" not in why


def stored_text(connection: sa.Connection, study_id: int) -> str:
    """The attribute as it is stored: to see with one small query whether it has changed."""
    query = sa.select(STUDY_ATTRS.c.value_json)
    return connection.scalar(query.where(STUDY_ATTRS.c.study_id == study_id, STUDY_ATTRS.c.key == EXCLUDED)) or "{}"


def exclude(engine: sa.Engine, study_id: int, numbers: Collection[int], why: str) -> None:
    """Leave out trials that are complete or pruned; a new reason replaces an old one.

    Raises:
        UserError: no reason, or a trial that is not there or has no result. Nothing was changed.
    """
    reason = why.strip()
    if not 0 < len(reason) <= MOST_REASON:
        raise UserError(f"--why must be a reason of 1 to {MOST_REASON:,} characters, got {len(reason):,}")

    def once() -> None:
        with engine.begin() as connection:
            left_out = _locked(connection, study_id)
            query = sa.select(TRIALS.c.number).where(TRIALS.c.study_id == study_id)
            if missing := sorted(set(numbers) - set(connection.scalars(query))):
                raise UserError(
                    f"the study has no trial {', '.join(map(str, missing))}; `study report` lists its trials"
                )
            with_result = query.where(TRIALS.c.state.in_((TrialState.COMPLETE, TrialState.PRUNED)))
            wrong = sorted(set(numbers) - set(connection.scalars(with_result)))
            if wrong:
                raise UserError(
                    f"only trials that are complete or pruned can be excluded, got {', '.join(map(str, wrong))}"
                )
            _store(engine, connection, study_id, left_out | dict.fromkeys(numbers, reason))

    retry(once, PATIENCE_SECONDS)


def include(engine: sa.Engine, study_id: int, numbers: Collection[int]) -> None:
    """Undo `exclude`.

    Raises:
        UserError: a trial that is not excluded. Nothing was changed.
    """

    def once() -> None:
        with engine.begin() as connection:
            left_out = _locked(connection, study_id)
            wrong = sorted(set(numbers) - left_out.keys())
            if wrong:
                there = ", ".join(map(str, left_out)) or "none"
                raise UserError(f"not excluded: {', '.join(map(str, wrong))}; excluded trials: {there}")
            _store(engine, connection, study_id, {n: why for n, why in left_out.items() if n not in set(numbers)})

    retry(once, PATIENCE_SECONDS)


def _locked(connection: sa.Connection, study_id: int) -> dict[int, str]:
    connection.execute(sa.select(STUDIES.c.study_id).where(STUDIES.c.study_id == study_id).with_for_update()).one()
    return excluded(connection, study_id)


def _store(engine: sa.Engine, connection: sa.Connection, study_id: int, left_out: dict[int, str]) -> None:
    text = json.dumps({str(number): left_out[number] for number in sorted(left_out)})
    insert = upsert(engine, STUDY_ATTRS).values(study_id=study_id, key=EXCLUDED, value_json=text)
    again = {"value_json": insert.excluded.value_json}
    connection.execute(insert.on_conflict_do_update(index_elements=["study_id", "key"], set_=again))
