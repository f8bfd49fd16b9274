"""Queries about a study for people: its progress, its workers, the epochs of its trials."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.distributions import json_to_distribution
from optuna.trial import TrialState

from storage import early_end
from storage.engine import database_time, incomplete_copy, live_lease, reader
from storage.errors import UserError
from storage.exclusions import EXCLUDED, excluded
from storage.schema import (
    ATTEMPTS,
    EPOCHS,
    LEASES,
    STUDIES,
    STUDY_ATTRS,
    TRIAL_ATTRS,
    TRIAL_PARAMS,
    TRIAL_VALUES,
    TRIALS,
)
from storage.study_attributes import decoded

MOST_BOUND = 1000
"""Values in one statement; SQLite and PostgreSQL refuse some ten thousand."""
MOST_FETCHED = 10_000
"""Rows in memory at a time."""
STATE_NAMES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Running:
    """A trial that has begun."""

    number: int
    owner: str
    device: str
    epoch: int
    images: int
    """Trained on so far, counted with repetition."""
    seconds: float
    """Training and validation so far."""
    accuracy: float | None
    """The best so far."""
    lease_seconds_left: float
    held_seconds: float
    """Since the worker took it."""


@dataclass(frozen=True)
class Progress:
    states: dict[str, int]
    """Trials by state: waiting, running, complete, pruned, failed."""
    running: tuple[Running, ...]
    """Under a live lease."""
    interrupted: tuple[Running, ...]
    """Begun, and held by nobody: any worker may take them over."""
    epochs: int
    """Epochs stored for all trials that have not finished."""
    images: int
    """Images trained on in them."""
    best: float | None
    """The highest value of a complete trial; of two the lower number."""
    best_trial: int | None

    @property
    def total(self) -> int:
        return sum(self.states.values())

    @property
    def finished(self) -> int:
        return self.states["complete"] + self.states["pruned"] + self.states["failed"]


def find(engine: sa.Engine, name: str) -> tuple[int, dict[str, Any]]:
    """A study of ours: its id and its attributes.

    Raises:
        UserError: no study of that name (with the names there are), or one that `study launch` did not create.
    """
    attributes = sa.select(STUDY_ATTRS.c.key, STUDY_ATTRS.c.value_json).where(
        STUDY_ATTRS.c.study_id == STUDIES.c.study_id
    )
    with reader(engine).connect() as connection:
        study_id = connection.scalar(sa.select(STUDIES.c.study_id).where(STUDIES.c.study_name == name))
        if study_id is None:
            names = connection.scalars(sa.select(STUDIES.c.study_name).order_by(STUDIES.c.study_name)).all()
            there = f"studies there: {', '.join(names)}" if names else "there are none yet"
            raise UserError(f"no study {name!r} in this storage; {there}")
        stored = {
            key: decoded(key, value)
            for key, value in connection.execute(attributes.where(STUDIES.c.study_id == study_id))
        }
        if "config" in stored and _lacks_our_rows(connection, study_id):
            raise UserError(incomplete_copy(name, "this storage"))
    if "config" not in stored:
        raise UserError(
            f"the study {name!r} was not created by `study launch`: it has no config; Optuna's own commands show and "
            "delete it: optuna trials, optuna delete-study"
        )
    return study_id, stored


def trial_state(engine: sa.Engine, study_id: int, number: int) -> TrialState:
    """Raises:
    UserError: no such trial (with the trials there are).
    """
    numbers = sa.select(sa.func.max(TRIALS.c.number)).where(TRIALS.c.study_id == study_id)
    this = sa.select(TRIALS.c.state).where(TRIALS.c.study_id == study_id, TRIALS.c.number == number)
    with reader(engine).connect() as connection:
        state: TrialState | None = connection.scalar(this)
        last = connection.scalar(numbers)
    if state is None:
        there = "there is none yet" if last is None else f"trials there: {'0' if last == 0 else f'0 to {last}'}"
        raise UserError(f"no trial {number} in this study; {there}")
    return state


def clock(engine: sa.Engine) -> float:
    """Seconds since 1970 on the database's clock."""
    with reader(engine).connect() as connection:
        return float(connection.scalar(sa.select(database_time(engine))) or 0.0)


def _lacks_our_rows(connection: sa.Connection, study_id: int) -> bool:
    """Whether trials that this program queued have finished, though none was ever claimed."""
    of_study = TRIALS.c.study_id == study_id
    finished = (
        sa.select(TRIALS.c.trial_id)
        .join(TRIAL_ATTRS, TRIALS.c.trial_id == TRIAL_ATTRS.c.trial_id)
        .where(of_study, TRIALS.c.state.in_((TrialState.COMPLETE, TrialState.PRUNED)))
        .where(TRIAL_ATTRS.c.key.in_(("queue_position", "ticket")))
        .limit(1)
    )
    claimed = sa.select(LEASES.c.trial_id).join(TRIALS, TRIALS.c.trial_id == LEASES.c.trial_id).where(of_study).limit(1)
    return connection.scalar(finished) is not None and connection.scalar(claimed) is None


@dataclass(frozen=True)
class TestSplitUse:
    """A study that has looked at the test split of its data."""

    study: str
    evaluations: int
    """Trials whose best network was evaluated on it."""
    validates: bool
    """Whether it validates there, epoch by epoch (the `paper` protocol)."""


def study_names(engine: sa.Engine) -> set[str]:
    with reader(engine).connect() as connection:
        return set(connection.scalars(sa.select(STUDIES.c.study_name)))


def test_split_uses(engine: sa.Engine, fingerprint: str | None) -> list[TestSplitUse]:
    """The studies on the data with this fingerprint that have evaluated the test split, by name."""
    data = sa.and_(STUDY_ATTRS.c.key == "data_fingerprint", STUDY_ATTRS.c.value_json == json.dumps(fingerprint))
    same = sa.select(STUDY_ATTRS.c.study_id).where(data)
    config = sa.and_(STUDY_ATTRS.c.study_id == STUDIES.c.study_id, STUDY_ATTRS.c.key == "config")
    named = sa.select(STUDIES.c.study_id, STUDIES.c.study_name, STUDY_ATTRS.c.value_json).join(STUDY_ATTRS, config)
    of_trials = TRIALS.join(TRIAL_ATTRS, TRIALS.c.trial_id == TRIAL_ATTRS.c.trial_id)
    evaluated = (
        sa.select(TRIALS.c.study_id, sa.func.count())
        .select_from(of_trials)
        .where(TRIALS.c.study_id.in_(same), TRIAL_ATTRS.c.key == "test_accuracy")
        .group_by(TRIALS.c.study_id)
    )
    begun = sa.select(TRIALS.c.study_id).where(TRIALS.c.study_id.in_(same), TRIALS.c.state != TrialState.WAITING)
    uses = []
    with reader(engine).connect() as connection:
        counts = {study_id: int(number) for study_id, number in connection.execute(evaluated)}
        started = set(connection.scalars(begun.distinct()))
        for study_id, name, text in connection.execute(named.where(STUDIES.c.study_id.in_(same))):
            validates = _protocol(text) == "paper" and study_id in started
            if counts.get(study_id) or validates:
                uses.append(TestSplitUse(name, counts.get(study_id, 0), validates))
    return sorted(uses, key=lambda use: use.study)


def _protocol(config: str) -> object:
    """`data.protocol` of the stored config of any study; None: there is none, or the text is no config."""
    try:
        return json.loads(config)["data"]["protocol"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def progress(engine: sa.Engine, study_id: int) -> Progress:
    """How far a study is, in three small queries."""
    of_study = TRIALS.c.study_id == study_id
    by_state = sa.select(TRIALS.c.state, sa.func.count()).where(of_study).group_by(TRIALS.c.state)
    left = sa.case((live_lease(engine), LEASES.c.expires_at - database_time(engine)), else_=0.0)
    age = database_time(engine) - ATTEMPTS.c.started_at
    attempt = sa.and_(ATTEMPTS.c.trial_id == LEASES.c.trial_id, ATTEMPTS.c.token == LEASES.c.token)
    held = (
        sa.select(
            TRIALS.c.number,
            LEASES.c.owner,
            left.label("left"),
            age.label("age"),
            ATTEMPTS.c.device,
            sa.func.coalesce(sa.func.max(EPOCHS.c.epoch), 0).label("epoch"),
            sa.func.coalesce(sa.func.sum(EPOCHS.c.images), 0).label("images"),
            sa.func.coalesce(sa.func.sum(EPOCHS.c.train_seconds + EPOCHS.c.validation_seconds), 0).label("seconds"),
            sa.func.max(EPOCHS.c.accuracy).label("accuracy"),
        )
        .select_from(
            TRIALS.outerjoin(LEASES, TRIALS.c.trial_id == LEASES.c.trial_id)
            .outerjoin(ATTEMPTS, attempt)
            .outerjoin(EPOCHS, TRIALS.c.trial_id == EPOCHS.c.trial_id)
        )
        .where(of_study, TRIALS.c.state == TrialState.RUNNING)
        .group_by(
            TRIALS.c.number,
            LEASES.c.owner,
            LEASES.c.expires_at,
            LEASES.c.seconds,
            ATTEMPTS.c.device,
            ATTEMPTS.c.started_at,
        )
        .order_by(TRIALS.c.number)
    )
    with reader(engine).connect() as connection:
        counts = dict.fromkeys(STATE_NAMES.values(), 0)
        counts |= {STATE_NAMES[state]: count for state, count in connection.execute(by_state)}
        rows = connection.execute(held).all()
        value, number = best_trial(connection, study_id) or (None, None)
    begun = [
        Running(
            r.number, r.owner, r.device or "", r.epoch, r.images, r.seconds, r.accuracy, r.left or 0.0, r.age or 0.0
        )
        for r in rows
    ]
    live = tuple(trial for trial in begun if trial.lease_seconds_left > 0)
    interrupted = tuple(trial for trial in begun if trial.lease_seconds_left <= 0)
    return Progress(counts, live, interrupted, sum(r.epoch for r in rows), sum(r.images for r in rows), value, number)


def best_trial(connection: sa.Connection, study_id: int) -> tuple[float, int] | None:
    """The highest value of a complete trial that is not excluded, and its number; of two the lower."""
    best = (
        sa.select(TRIAL_VALUES.c.value, TRIALS.c.number)
        .select_from(TRIALS.join(TRIAL_VALUES))
        .where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.COMPLETE, TRIAL_VALUES.c.objective == 0)
        .order_by(TRIAL_VALUES.c.value.desc(), TRIALS.c.number)
    )
    left_out = excluded(connection, study_id)
    rows = connection.execute(best.limit(len(left_out) + 1))
    return next(((row.value, row.number) for row in rows if row.number not in left_out), None)


@dataclass(frozen=True)
class Totals:
    """A trial's epochs, added up."""

    epochs: int
    accuracy: float
    """The best."""
    images: int
    seen: int
    train_seconds: float
    validation_seconds: float
    selection_seconds: float
    joules: float | None
    """None if any epoch has none."""


def epoch_totals(engine: sa.Engine, study_id: int) -> dict[int, Totals]:
    """Number to totals, of every trial of a study that has an epoch."""
    count = sa.func.count(EPOCHS.c.epoch)
    energy = sa.case((sa.func.count(EPOCHS.c.joules) == count, sa.func.sum(EPOCHS.c.joules)))
    query = (
        sa.select(
            TRIALS.c.number,
            count,
            sa.func.max(EPOCHS.c.accuracy),
            sa.func.sum(EPOCHS.c.images),
            sa.func.coalesce(sa.func.max(EPOCHS.c.seen), 0),
            sa.func.sum(EPOCHS.c.train_seconds),
            sa.func.sum(EPOCHS.c.validation_seconds),
            sa.func.coalesce(sa.func.sum(EPOCHS.c.selection_seconds), 0.0),
            energy,
        )
        .select_from(TRIALS.join(EPOCHS, TRIALS.c.trial_id == EPOCHS.c.trial_id))
        .where(TRIALS.c.study_id == study_id)
        .group_by(TRIALS.c.number)
    )
    with reader(engine).connect() as connection:
        return {number: Totals(*values) for number, *values in connection.execute(query)}


@dataclass(frozen=True)
class MeasuredPace:
    """What the last finished trials of a study took on one machine."""

    trials: int
    epochs: int
    images: int
    """Trained on."""
    train_seconds: float
    """Selection included."""
    validation_seconds: float


def measured_pace(engine: sa.Engine, study_id: int, host: str, kind: str, most: int = 50) -> MeasuredPace | None:
    """Args:
    host: as `platform.node()` gives it.
    kind: of the device: cpu, cuda or mps.
    most: trials to look at.

    Returns:
        None if the study has no finished trial of such a device there.
    """
    of_host, of_device = TRIAL_ATTRS.alias(), TRIAL_ATTRS.alias()
    named = [of_device.c.value_json.startswith(f'"{other} (', autoescape=True) for other in ("cpu", "mps")]
    right = sa.not_(sa.or_(*named)) if kind == "cuda" else named[("cpu", "mps").index(kind)]
    last = (
        sa.select(TRIALS.c.trial_id)
        .join(of_host, sa.and_(of_host.c.trial_id == TRIALS.c.trial_id, of_host.c.key == "host"))
        .join(of_device, sa.and_(of_device.c.trial_id == TRIALS.c.trial_id, of_device.c.key == "device"))
        .where(TRIALS.c.study_id == study_id, TRIALS.c.state.in_((TrialState.COMPLETE, TrialState.PRUNED)))
        .where(of_host.c.value_json == json.dumps(host), right)
        .order_by(TRIALS.c.number.desc())
        .limit(most)
        .scalar_subquery()
    )
    query = sa.select(
        sa.func.count(EPOCHS.c.trial_id.distinct()),
        sa.func.count(),
        sa.func.sum(EPOCHS.c.images),
        sa.func.sum(EPOCHS.c.train_seconds + sa.func.coalesce(EPOCHS.c.selection_seconds, 0.0)),
        sa.func.sum(EPOCHS.c.validation_seconds),
    ).where(EPOCHS.c.trial_id.in_(last))
    with reader(engine).connect() as connection:
        trials, epochs, images, train, validation = connection.execute(query).one()
    return MeasuredPace(trials, epochs, int(images), train, validation) if trials else None


def epoch_rows(
    engine: sa.Engine, study_id: int, numbers: Collection[int] | None = None
) -> dict[int, list[dict[str, Any]]]:
    """The stored epochs of the trials of a study (all, or those with these numbers): number to rows, in order."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in each_epoch(engine, study_id, numbers):
        rows.setdefault(row.pop("trial"), []).append(row)
    return rows


def each_epoch(engine: sa.Engine, study_id: int, numbers: Collection[int] | None = None) -> Iterator[dict[str, Any]]:
    """The same epochs one by one, with the number of their `trial`: a study may have millions."""
    query = (
        sa.select(TRIALS.c.number.label("trial"), *[column for column in EPOCHS.c if column.name != "trial_id"])
        .select_from(TRIALS.join(EPOCHS, TRIALS.c.trial_id == EPOCHS.c.trial_id))
        .where(TRIALS.c.study_id == study_id)
        .order_by(TRIALS.c.number, EPOCHS.c.epoch)
    )
    wanted = None if numbers is None else set(numbers)
    if wanted is not None and len(wanted) <= MOST_BOUND:
        query, wanted = query.where(TRIALS.c.number.in_(wanted)), None
    with engine.execution_options(reading=True).connect() as connection:
        if engine.dialect.name == "postgresql":  # a cursor on the server needs a transaction
            connection = connection.execution_options(isolation_level="READ COMMITTED")
        for row in connection.execution_options(yield_per=MOST_FETCHED).execute(query).mappings():
            if wanted is None or row["trial"] in wanted:
                yield dict(row)


def parameters(engine: sa.Engine, study_id: int, number: int) -> dict[str, Any]:
    """What was chosen for a trial."""
    query = (
        sa.select(TRIAL_PARAMS.c.param_name, TRIAL_PARAMS.c.param_value, TRIAL_PARAMS.c.distribution_json)
        .select_from(TRIALS.join(TRIAL_PARAMS))
        .where(TRIALS.c.study_id == study_id, TRIALS.c.number == number)
        .order_by(TRIAL_PARAMS.c.param_id)
    )
    with reader(engine).connect() as connection:
        rows = connection.execute(query).all()
    try:
        return {name: json_to_distribution(text).to_external_repr(value) for name, value, text in rows}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            f"the parameters of trial {number} cannot be read ({error}); correct them in the database"
        ) from None


def failures(engine: sa.Engine, study_id: int) -> dict[int, str]:
    """Trial number to error, of the trials that failed for good."""
    reason = sa.and_(TRIAL_ATTRS.c.trial_id == TRIALS.c.trial_id, TRIAL_ATTRS.c.key == "error")
    query = (
        sa.select(TRIALS.c.number, TRIAL_ATTRS.c.value_json, LEASES.c.last_error)
        .select_from(TRIALS.outerjoin(TRIAL_ATTRS, reason).outerjoin(LEASES, TRIALS.c.trial_id == LEASES.c.trial_id))
        .where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.FAIL)
        .order_by(TRIALS.c.number)
    )
    with reader(engine).connect() as connection:
        return {
            number: str(_or_itself(text)) if text else error or "no reason is known"
            for number, text, error in connection.execute(query)
        }


def _or_itself(text: str) -> object:
    """The JSON's value; of what is none the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def last_errors(engine: sa.Engine, study_id: int) -> dict[int, str]:
    """Trial number to the error of its last failed attempt, where there is one."""
    query = (
        sa.select(TRIALS.c.number, LEASES.c.last_error)
        .select_from(TRIALS.join(LEASES, TRIALS.c.trial_id == LEASES.c.trial_id))
        .where(TRIALS.c.study_id == study_id, LEASES.c.last_error.is_not(None))
        .order_by(TRIALS.c.number)
    )
    with reader(engine).connect() as connection:
        return {row.number: row.last_error for row in connection.execute(query)}


@dataclass(frozen=True)
class Attempt:
    """One worker's time with one trial."""

    number: int
    owner: str
    device: str
    started_at: float
    """Seconds since 1970 on the database's clock."""
    ended_at: float | None
    outcome: str | None
    """finished, released, error or vanished; None: running, or vanished and not taken over yet."""
    error: str | None


def attempts(engine: sa.Engine, study_id: int, *, failed: int | None = None) -> list[Attempt]:
    """All attempts at a study's trials, by their start; or the last `failed` of those that ended in an error."""
    query = (
        sa.select(TRIALS.c.number, *[column for column in ATTEMPTS.c if column.name in Attempt.__annotations__])
        .select_from(TRIALS.join(ATTEMPTS, TRIALS.c.trial_id == ATTEMPTS.c.trial_id))
        .where(TRIALS.c.study_id == study_id)
    )
    if failed is None:
        query = query.order_by(ATTEMPTS.c.started_at)
    else:
        query = query.where(ATTEMPTS.c.error.is_not(None)).order_by(ATTEMPTS.c.started_at.desc()).limit(failed)
    with reader(engine).connect() as connection:
        log = [Attempt(**row) for row in connection.execute(query).mappings()]
    return log if failed is None else log[::-1]


@dataclass(frozen=True)
class StudySummary:
    """One study of a storage, for a list."""

    name: str
    is_ours: bool
    """Whether `study launch` created it."""
    states: dict[str, int]
    """Trials by state."""
    workers: int
    """That hold a live lease."""
    best: float | None
    """The highest value of a complete trial, of studies of ours."""
    last_activity: float | None
    """Seconds since 1970 on the database's clock."""
    stop_requested: bool
    ended_early: str | None = None
    """Why, if its target or patience has ended it before all of its trials have run."""


def study_summaries(engine: sa.Engine) -> list[StudySummary]:
    """All studies of the storage by name, in five small queries, and three more for each that is not finished."""
    clock = database_time(engine)
    studies = sa.select(STUDIES.c.study_id, STUDIES.c.study_name).order_by(STUDIES.c.study_name)
    by_state = sa.select(TRIALS.c.study_id, TRIALS.c.state, sa.func.count()).group_by(TRIALS.c.study_id, TRIALS.c.state)
    attributes = sa.select(STUDY_ATTRS.c.study_id, STUDY_ATTRS.c.key, STUDY_ATTRS.c.value_json).where(
        STUDY_ATTRS.c.key.in_(("preset", "stop", EXCLUDED))
    )
    best = (
        sa.select(TRIALS.c.study_id, sa.func.max(TRIAL_VALUES.c.value))
        .select_from(TRIALS.join(TRIAL_VALUES))
        .where(TRIALS.c.state == TrialState.COMPLETE, TRIAL_VALUES.c.objective == 0)
        .group_by(TRIALS.c.study_id)
    )
    live = sa.and_(ATTEMPTS.c.ended_at.is_(None), LEASES.c.token == ATTEMPTS.c.token, live_lease(engine))
    work = (
        sa.select(
            TRIALS.c.study_id,
            sa.func.sum(sa.case((live, 1), else_=0)),
            sa.func.max(sa.case((live, clock), else_=sa.func.coalesce(ATTEMPTS.c.ended_at, ATTEMPTS.c.started_at))),
        )
        .select_from(
            TRIALS.join(ATTEMPTS, TRIALS.c.trial_id == ATTEMPTS.c.trial_id).outerjoin(
                LEASES, LEASES.c.trial_id == TRIALS.c.trial_id
            )
        )
        .group_by(TRIALS.c.study_id)
    )
    states: dict[int, dict[str, int]] = {}
    with reader(engine).connect() as connection:
        names = connection.execute(studies).all()
        for study_id, state, count in connection.execute(by_state):
            states.setdefault(study_id, {})[STATE_NAMES[state]] = count
        stored = {(study_id, key): text for study_id, key, text in connection.execute(attributes)}
        best_values: dict[int, float | None] = dict(connection.execute(best).all())
        for study_id, key in stored:
            if key == EXCLUDED:
                best_values[study_id] = (best_trial(connection, study_id) or (None,))[0]
        activity = {study_id: (int(workers or 0), at) for study_id, workers, at in connection.execute(work)}
    ended = {
        study_id: early_end.reason_to_end(engine, study_id, early_end.read_rules(engine, study_id))
        for study_id, _ in names
        if (study_id, "preset") in stored and states.get(study_id, {}).keys() & {"waiting", "running"}
    }
    return [
        StudySummary(
            name=name,
            is_ours=(study_id, "preset") in stored,
            states=dict.fromkeys(STATE_NAMES.values(), 0) | states.get(study_id, {}),
            workers=activity.get(study_id, (0, None))[0],
            best=best_values.get(study_id) if (study_id, "preset") in stored else None,
            last_activity=activity.get(study_id, (0, None))[1],
            stop_requested=stored.get((study_id, "stop")) == "true",
            ended_early=ended.get(study_id),
        )
        for study_id, name in names
    ]
