"""A study's past as samplers and pruners look at it: read in columns, cached, and after that only what is new.

Optuna's own way loads every report of every trial through its ORM before the first suggestion: see
docs/measurements/overhead.md.
"""

from __future__ import annotations

import builtins
import copy
import functools
import json
import threading
from array import array
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from sys import intern
from typing import Any

import numpy as np
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.types import ARRAY

from storage.engine import reader
from storage.errors import Unreadable
from storage.exclusions import parse, stored_text
from storage.garbage import no_garbage_search
from storage.optuna_internals import OptunaCachedStorage
from storage.schema import REPORTS, TRIAL_ATTRS, TRIAL_PARAMS, TRIAL_SYSTEM_ATTRS, TRIAL_VALUES, TRIALS

FINAL = (TrialState.COMPLETE, TrialState.PRUNED)
"""States that no trial leaves; what has failed may be put back into the queue."""
BATCH = 500
"""Trials that are read at a time: 100,000 reports of 200 epochs each."""
STEP_BATCH = 5000
"""The same, where one report of each is read."""
SINGLE_STEPS = 30
"""Steps that are read one by one, as a pruner asks about them; then all are read. On a busy machine one step of 100,000
trials took 0.7 s and all 200 took 27 s: a trial that is pruned before the 30th pays for what it asks, one that runs to
its end for at most twice the whole."""

Stamp = tuple[TrialState, datetime | None]


@dataclass
class _Past:
    """What is known of one study."""

    trials: dict[int, FrozenTrial] = field(default_factory=dict)
    """By trial id."""
    stamps: dict[int, Stamp] = field(default_factory=dict)
    ordered: list[FrozenTrial] = field(default_factory=list)
    """By number."""
    complete: int = 0
    last_final: int = -1
    """The largest id of a trial in a final state."""
    open: list[int] = field(default_factory=list)
    """Trials to look at again each time; those WAITING beyond `last_final` are looked at once they no longer are."""
    at_work: list[int] = field(default_factory=list)
    """Trials that are RUNNING."""
    excluded_text: str = "{}"
    """The study's attribute as it was when `columns` were read."""
    excluded: frozenset[int] = frozenset()
    """Numbers of the trials that a person has left out."""
    columns: dict[int, array[float]] = field(default_factory=dict)
    """Step to its reports by COMPLETE trials, in no particular order; the steps that somebody has asked for, or all."""
    all_columns: bool = False


class CachedStorage(OptunaCachedStorage):
    """Optuna's storage with a fast way to read; what is written goes to the database as ever.

    Trials that a person has left out (`storage.exclusions`) are not among those of `get_all_trials` and `reports_at`,
    so no sampler, pruner or table sees them; `all_trials` has them.

    Of reports, the trials of `get_all_trials` have their last one only, which is what samplers and successive halving
    look at. Percentile pruners look at one step of all COMPLETE trials: `reports_at`. `get_trial` has all of its trial.
    """

    def __init__(self, backend: RDBStorage, *, lean: bool = False) -> None:
        """Args:
        lean: for workers: the trials of `get_all_trials` come without user attributes, which no sampler or pruner looks
            at, and which are more than half of what there is to read. `get_trial` has them.
        """
        super().__init__(backend)
        self._lean = lean
        self._engine = reader(backend.engine)
        self._pasts: dict[int, _Past] = defaultdict(_Past)
        self._turn = threading.Lock()  # the training thread asks for trials, the writer's for decisions
        self._looked = threading.local()

    @property
    def engine(self) -> sa.Engine:
        """Of the database, for reading."""
        return self._engine

    @contextmanager
    def one_look(self) -> Iterator[None]:
        """In it, this thread reads what is new of a study once, for the first question, and not again."""
        self._looked.at = set()
        try:
            yield
        finally:
            self._looked.at = None

    @contextmanager
    def _fresh(self, study_id: int, *, running: bool) -> Iterator[_Past]:
        """Bring what is known of a study up to date, and keep it from other threads meanwhile."""
        looked: set[tuple[int, bool]] | None = getattr(self._looked, "at", None)
        with self._turn:
            past = self._pasts[study_id]
            if looked is None or not looked & {(study_id, True), (study_id, running)}:
                with self._engine.connect() as connection:
                    _refresh(connection, study_id, past, running=running, lean=self._lean)
                if looked is not None:
                    looked.add((study_id, running))
            yield past

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        with self._fresh(study_id, running=states is None or TrialState.RUNNING in states) as past:
            trials = [
                trial
                for trial in past.ordered
                if (states is None or trial.state in states) and trial.number not in past.excluded
            ]
        return copy.deepcopy(trials) if deepcopy else trials

    def all_trials(self, study_id: int, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """By number, the excluded ones too; not copied."""
        with self._fresh(study_id, running=states is None or TrialState.RUNNING in states) as past:
            return [trial for trial in past.ordered if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        with self._engine.connect() as connection:
            trials = _read(connection, [trial_id], _ALL_REPORTS)
        if not trials:
            raise KeyError(f"no trial with the id {trial_id}")
        return trials[trial_id]

    def reports_at(self, study_id: int, step: int) -> tuple[int, np.ndarray[Any, np.dtype[np.float64]]]:
        """How many trials are COMPLETE, and what those that reported at `step` reported there."""
        with self._fresh(study_id, running=False) as past:
            if step not in past.columns and not past.all_columns:
                complete = sorted(
                    id
                    for id, trial in past.trials.items()
                    if trial.state == TrialState.COMPLETE and trial.number not in past.excluded
                )
                with self._engine.connect() as connection:
                    if len(past.columns) < SINGLE_STEPS:
                        past.columns[step] = _reports_at(connection, complete, step)
                    else:
                        past.columns, past.all_columns = defaultdict(lambda: array("d")), True
                        _add_reports(connection, complete, past)
            return past.complete, np.array(past.columns.get(step, ()), dtype=float)

    def set_trial_param(self, trial_id: int, name: str, value: float, distribution: BaseDistribution) -> None:
        self._backend.set_trial_param(trial_id, name, value, distribution)


def _refresh(connection: sa.Connection, study_id: int, past: _Past, *, running: bool, lean: bool) -> None:
    """Bring `past` up to date; of running trials their states only, unless `running`."""
    text = stored_text(connection, study_id)
    if text != past.excluded_text:
        past.excluded_text, past.excluded = text, frozenset(parse(text))
        past.columns, past.all_columns = {}, False
        past.complete = _complete(past)
    last = max(past.stamps, default=-1)
    known = {"study": study_id, "last": last, "last_final": past.last_final, "open": past.open}
    known["at_work"] = [] if running else past.at_work
    rows = connection.execute(_changed(connection.dialect.name), known)
    stamps: dict[int, Stamp] = {id: (state, done) for id, state, done in rows}
    stale = sorted(
        id
        for id, stamp in stamps.items()
        if past.stamps.get(id) != stamp or (running and stamp[0] == TrialState.RUNNING)
    )
    if not stale:
        return
    with no_garbage_search():
        news = _read(connection, stale, _LAST_REPORTS, lean=lean)
    if past.columns or past.all_columns:
        done = [id for id, trial in news.items() if trial.state == TrialState.COMPLETE]
        _add_reports(connection, sorted(done), past)
    past.trials.update(news)
    past.stamps.update((id, (news[id].state, stamps[id][1])) for id in news)
    past.ordered = sorted(past.trials.values(), key=lambda trial: trial.number)
    past.complete = _complete(past)
    past.last_final = max((id for id, (state, _) in past.stamps.items() if state in FINAL), default=-1)
    past.open = [
        id
        for id, (state, _) in past.stamps.items()
        if state not in FINAL and (state != TrialState.WAITING or id < past.last_final)
    ]
    past.at_work = [id for id, (state, _) in past.stamps.items() if state == TrialState.RUNNING]


def _complete(past: _Past) -> int:
    return sum(trial.state == TrialState.COMPLETE and trial.number not in past.excluded for trial in past.ordered)


def _read(
    connection: sa.Connection, ids: Sequence[int], reported: _OfTrials, *, lean: bool = False
) -> dict[int, FrozenTrial]:
    """The trials with these ids, in ascending order, that exist, with their reports as `reported` has them.

    Raises:
        Unreadable: and of which trial.
    """
    try:
        return _read_rows(connection, ids, reported, lean=lean)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        if len(ids) > 1:  # one of the halves has it
            half = len(ids) // 2
            first = _read(connection, ids[:half], reported, lean=lean)
            return first | _read(connection, ids[half:], reported, lean=lean)
        raise Unreadable(
            f"the trial with the id {ids[0]} has a stored value that cannot be read ({type(error).__name__}: {error}); "
            "correct it, or use a copy of the study from before"
        ) from None


def _read_rows(
    connection: sa.Connection, ids: Sequence[int], reported: _OfTrials, *, lean: bool
) -> dict[int, FrozenTrial]:
    trials: dict[int, FrozenTrial] = {}
    spaces: dict[tuple[object, ...], dict[str, BaseDistribution]] = {}
    for batch in (ids[start : start + BATCH] for start in range(0, len(ids), BATCH)):

        def rows(query: _OfTrials, batch: Sequence[int] = batch) -> Sequence[Any]:
            return query.rows(connection, batch)

        # Their states first: on PostgreSQL each query sees a moment of its own, and what has ended stays as it is.
        trials |= _without_content(rows(_TRIALS), rows(_VALUES))
        # A driver makes each text anew. Names that are kept once are 50 MB less in 100,000 trials, spaces 20 MB.
        for id, name, value, text in rows(_PARAMS):
            distribution = _distribution(text)
            trials[id].distributions[intern(name)] = distribution
            trials[id].params[intern(name)] = distribution.to_external_repr(value)
        for trial in filter(None, map(trials.get, batch)):
            space = trial.distributions
            identity = (*space, *(builtins.id(distribution) for distribution in space.values()))
            trial.distributions = spaces.setdefault(identity, space)
        for id, key, text in () if lean else rows(_USER_ATTRS):
            trials[id].user_attrs[intern(key)] = _value(text)
        for id, key, text in rows(_SYSTEM_ATTRS):
            trials[id].system_attrs[intern(key)] = json.loads(text)
        for id, step, value, kind in rows(reported):
            trials[id].intermediate_values[step] = _number(value, kind)
    return trials


def _without_content(trials: Sequence[Any], values: Sequence[Any]) -> dict[int, FrozenTrial]:
    """Trials with their results only. One that has ended since its state was read has none yet."""
    results: dict[int, list[float]] = defaultdict(list)
    for id, value, kind in values:
        results[id].append(_number(value, kind))
    made = {}
    for id, number, state, start, end in trials:
        if number is None:
            raise ValueError("it has no number")
        result = results.get(id) if state.is_finished() else None
        made[id] = FrozenTrial(number, state, None, _local(start), _local(end), {}, {}, {}, {}, {}, id, values=result)
    return made


def _add_reports(connection: sa.Connection, ids: Sequence[int], past: _Past) -> None:
    """To the columns of the steps that it has, or of all."""
    columns = past.columns
    for start in range(0, len(ids), BATCH):
        for _, step, value, kind in _ALL_REPORTS.rows(connection, ids[start : start + BATCH]):
            if past.all_columns or step in columns:
                columns[step].append(value if value is not None else _number(value, kind))


def _reports_at(connection: sa.Connection, ids: Sequence[int], step: int) -> array[float]:
    column = array("d")
    for start in range(0, len(ids), STEP_BATCH):
        rows = _REPORTS_AT.rows(connection, ids[start : start + STEP_BATCH], step=step)
        column.extend(_number(value, kind) for value, kind in rows)
    return column


def _number(value: float | None, kind: str) -> float:
    return value if value is not None else {"INF_POS": np.inf, "INF_NEG": -np.inf, "NAN": np.nan}[kind]


def _local(utc: datetime | None) -> datetime | None:
    """A time as Optuna's trials have it: naive, in the zone of this machine."""
    return utc and utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


_distribution = functools.lru_cache(json_to_distribution)
"""A study has a handful of distributions, however many trials."""
_value = functools.lru_cache(1024)(json.loads)
"""And a handful of devices, hosts and versions."""


class _OfTrials:
    """A query for rows of some trials: of all from one id to another where they have no gap, which costs drivers and
    databases less than a list (a third of the processor time of reading 20,000 trials from PostgreSQL).
    """

    def __init__(self, query: sa.Select[Any], id: sa.ColumnElement[int]) -> None:
        self.between = query.where(id.between(sa.bindparam("first"), sa.bindparam("last")))
        self.among = query.where(id.in_(sa.bindparam("ids", expanding=True)))

    def rows(self, connection: sa.Connection, ids: Sequence[int], **more: object) -> Sequence[Any]:
        """Args:
        ids: in ascending order.
        """
        if ids and ids[-1] - ids[0] == len(ids) - 1:
            return connection.execute(self.between, {"first": ids[0], "last": ids[-1], **more}).all()
        return connection.execute(self.among, {"ids": ids, **more}).all()


@functools.cache
def _changed(dialect: str) -> sa.Select[Any]:
    """All trials that are new, or may have changed since they were read, without those that are `at_work` as they were:
    each of a thousand workers would read every second that all the others are.
    """
    ids, state = TRIALS.c.trial_id, TRIALS.c.state

    def among(name: str) -> sa.ColumnElement[bool]:
        if dialect == "postgresql":  # one parameter, and so one statement, however many they are
            return ids == sa.any_(sa.bindparam(name, type_=ARRAY(sa.Integer)))
        return ids.in_(sa.bindparam(name, expanding=True))

    return sa.select(ids, state, TRIALS.c.datetime_complete).where(
        TRIALS.c.study_id + 0 == sa.bindparam("study"),  # + 0: not by the index on it, which leads to all of the study
        sa.or_(
            ids > sa.bindparam("last"),
            sa.and_(ids > sa.bindparam("last_final"), state != TrialState.WAITING),
            among("open"),
        ),
        sa.not_(sa.and_(state == TrialState.RUNNING, among("at_work"))),
    )


_TRIALS = _OfTrials(
    sa.select(TRIALS.c.trial_id, TRIALS.c.number, TRIALS.c.state, TRIALS.c.datetime_start, TRIALS.c.datetime_complete),
    TRIALS.c.trial_id,
)
# The kinds as text: SQLAlchemy's conversion to an enum costs more than all the rest of a row.
_VALUES = _OfTrials(
    sa.select(
        TRIAL_VALUES.c.trial_id, TRIAL_VALUES.c.value, sa.type_coerce(TRIAL_VALUES.c.value_type, sa.String)
    ).order_by(TRIAL_VALUES.c.objective),
    TRIAL_VALUES.c.trial_id,
)
_PARAMS = _OfTrials(
    sa.select(
        TRIAL_PARAMS.c.trial_id,
        TRIAL_PARAMS.c.param_name,
        TRIAL_PARAMS.c.param_value,
        TRIAL_PARAMS.c.distribution_json,
    ).order_by(TRIAL_PARAMS.c.param_id),
    TRIAL_PARAMS.c.trial_id,
)
_USER_ATTRS, _SYSTEM_ATTRS = (
    _OfTrials(sa.select(table.c.trial_id, table.c.key, table.c.value_json), table.c.trial_id)
    for table in (TRIAL_ATTRS, TRIAL_SYSTEM_ATTRS)
)
_REPORT = (
    REPORTS.c.trial_id,
    REPORTS.c.step,
    REPORTS.c.intermediate_value,
    sa.type_coerce(REPORTS.c.intermediate_value_type, sa.String),
)
_ALL_REPORTS = _OfTrials(sa.select(*_REPORT), REPORTS.c.trial_id)
_REPORTS_AT = _OfTrials(sa.select(*_REPORT[2:]).where(REPORTS.c.step == sa.bindparam("step")), REPORTS.c.trial_id)
_OTHERS = REPORTS.alias()
_LAST_STEP = sa.select(sa.func.max(_OTHERS.c.step)).where(_OTHERS.c.trial_id == TRIALS.c.trial_id).scalar_subquery()
_LAST_REPORTS = _OfTrials(
    sa.select(*_REPORT)
    # + 0: else SQLite looks through all reports of a range of trials, not from each trial for its last one
    .select_from(TRIALS.join(REPORTS, TRIALS.c.trial_id + 0 == REPORTS.c.trial_id))
    .where(REPORTS.c.step == _LAST_STEP),
    TRIALS.c.trial_id,
)
