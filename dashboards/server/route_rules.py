"""What is checked before a route of optuna-dashboard runs: who may write what, and that it is well-formed.

The checks are a plugin of Bottle's, so they see the route and the ids that Bottle has read from the path: an odd
spelling of it (encoded slashes, other scripts' digits, invalid UTF-8) cannot get around them by being read twice.
A route that changes something and is not named here is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import bottle
import sqlalchemy as sa
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from storage.engine import database_time, reader
from storage.errors import UserError
from storage.object_store import MODEL
from storage.optuna_internals import DashboardRoute as Route
from storage.schema import FINISHED, LEASES, STUDIES, TRIALS
from storage.text import command
from storage.transfer import delete

MAX_ID = 2**31 - 1  # PostgreSQL's INTEGER
MAX_NAME = 512  # characters, of Optuna's columns
MAX_DEPTH = 50  # of lists and objects in each other
ARTIFACT_POLICY = "sandbox; default-src 'none'"

REFUSED: dict[str, str] = {
    Route.RENAME: "rename a study with: study copy NAME --from URL --to URL --name NEW, then: study delete NAME",
    Route.UPLOAD_STUDY_ARTIFACT: "files are not uploaded through the dashboard",
    Route.UPLOAD_TRIAL_ARTIFACT: "files are not uploaded through the dashboard",
    Route.DELETE_STUDY_ARTIFACT: "files are not deleted through the dashboard",
    Route.DELETE_TRIAL_ARTIFACT: "a model goes with its study, or when others become better",
    Route.MIGRATE: "migrate the database with: study init",
}

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class _Study:
    id: int
    name: str
    objectives: int


@dataclass(frozen=True)
class _Trial:
    number: int
    state: TrialState


class RouteRules:
    """Install it on the Bottle application that `optuna_dashboard.wsgi` returns.

    Args:
        storage: the database that the application shows.
    """

    name, api = "route_rules", 2  # of Bottle's plugin interface

    def __init__(self, storage: RDBStorage) -> None:
        self.storage, self.engine = storage, storage.engine

    def apply(self, view: Callable[..., Any], route: Any) -> Callable[..., Any]:
        """Bottle calls this once for each of its routes; `view` is what answers."""
        rule = f"{route.method} {route.rule}"

        def checked(**arguments: Any) -> Any:
            study, trial = self._located(arguments)
            if route.method == "GET":
                return self._read(rule, view, arguments, study, trial)
            return self._write(rule, view, arguments, study, trial)

        return checked

    def _read(
        self, rule: str, view: Callable[..., Any], arguments: dict[str, Any], study: _Study | None, trial: _Trial | None
    ) -> Any:
        match rule:
            case Route.STUDY:
                _check_after(bottle.request.query.get("after", "0"))
            case Route.PLOT if arguments["plot_type"] == "pareto_front" and study and study.objectives < 2:
                _refuse(400, "a Pareto front needs a study with several objectives")
            case Route.CSV if study and _CONTROLS.search(study.name):
                _refuse(400, "the study's name has control characters, which no file name may have; copy it first")
            case Route.STUDY_ARTIFACT | Route.TRIAL_ARTIFACT:
                return _as_download(view, arguments, trial)
        return view(**arguments)

    def _write(
        self,
        rule: str,
        view: Callable[..., Any],
        arguments: dict[str, Any],
        study: _Study | None,
        trial: _Trial | None,
    ) -> Any:
        match rule:
            case Route.CREATE:
                _check_new_study(_body())
            case Route.STUDY_NOTE | Route.TRIAL_NOTE:
                _check_note(_body())
            case Route.TELL:
                assert study is not None
                assert trial is not None
                self._check_unleased(study, arguments["trial_id"], "ending a trial")
                _check_unfinished(trial)
                _check_tell(_body(), study.objectives)
            case Route.USER_ATTRIBUTES:
                assert study is not None
                assert trial is not None
                self._check_unleased(study, arguments["trial_id"], "changing a trial")
                _check_unfinished(trial)
                _check_user_attributes(_body())
            case Route.DELETE:
                assert study is not None
                _body(required=False)
                self._check_unleased(study, None, "deleting a study")
                return self._delete(study, view, arguments)
            case _:
                _refuse(403, REFUSED.get(rule, "the dashboard does not offer this"))
        return view(**arguments)

    def _located(self, arguments: dict[str, Any]) -> tuple[_Study | None, _Trial | None]:
        """The study and the trial that the path names.

        Raises:
            bottle.HTTPResponse: 404, one of them does not exist.
        """
        study_id, trial_id = arguments.get("study_id"), arguments.get("trial_id")
        for value in (study_id, trial_id):
            if value is not None and not 0 <= value <= MAX_ID:
                _refuse(404, "no study or trial has this id")
        trial = None
        with reader(self.engine).connect() as connection:
            if trial_id is not None:
                query = sa.select(TRIALS.c.study_id, TRIALS.c.number, TRIALS.c.state)
                row = connection.execute(query.where(TRIALS.c.trial_id == trial_id)).one_or_none()
                if row is None or study_id not in (None, row.study_id):
                    _refuse(404, f"no trial has the id {trial_id}")
                study_id, trial = row.study_id, _Trial(row.number, row.state)
            if study_id is None:
                return None, None
            name = connection.scalar(sa.select(STUDIES.c.study_name).where(STUDIES.c.study_id == study_id))
        if name is None:
            _refuse(404, f"no study has the id {study_id}")
        return _Study(study_id, name, len(self.storage.get_study_directions(study_id))), trial

    def _check_unleased(self, study: _Study, trial_id: int | None, action: str) -> None:
        """Refuse what changes a trial that a worker holds, or a study of which workers hold trials."""
        leased = sa.select(TRIALS.c.number).join(LEASES, TRIALS.c.trial_id == LEASES.c.trial_id)
        leased = leased.where(TRIALS.c.study_id == study.id, LEASES.c.expires_at > database_time(self.engine))
        if trial_id is not None:
            leased = leased.where(TRIALS.c.trial_id == trial_id)
        with reader(self.engine).connect() as connection:
            numbers = connection.scalars(leased.order_by(TRIALS.c.number)).all()
        if numbers:
            some = ", ".join(map(str, numbers[:5])) + ", …" * (len(numbers) > 5)
            trials = f"trial{'s' * (len(numbers) > 1)} {some} of {study.name!r}"
            _refuse(409, f"{action} needs it at rest, but workers hold {trials}; first: {_stop(study)}")

    def _delete(self, study: _Study, view: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Delete our tables' rows too, in one transaction that sees whether a worker claimed a trial meanwhile."""
        try:
            delete(self.storage, study.name)
        except UserError:
            _refuse(409, f"deleting a study needs it at rest, but workers hold trials of it; first: {_stop(study)}")
        # Its models are gone already; optuna-dashboard would look for them in a study that is no longer there.
        bottle.request.environ["bottle.request.json"] = {"remove_associated_artifacts": False}
        view(**arguments)  # removes it from Optuna's cache, and then reports that the database does not have it
        bottle.response.status = 204
        return {}


def _stop(study: _Study) -> str:
    return command("stop", study.name)


def _refuse(status: int, reason: str) -> NoReturn:
    raise bottle.HTTPResponse(json.dumps({"reason": reason}), status, {"Content-Type": "application/json"})


def _as_download(view: Callable[..., Any], arguments: dict[str, Any], trial: _Trial | None) -> Any:
    """An artifact is saved, not shown: its type is whatever its author wrote, and a page would run on our origin."""
    try:
        response = view(**arguments)
    except (ArtifactNotFound, KeyError, OSError, TypeError, ValueError):
        _refuse(404, "this artifact cannot be read: it is damaged, or no longer among the best")
    if isinstance(response, bottle.HTTPResponse):
        for header in ("Access-Control-Allow-Origin", "Content-Encodings"):
            response.headers.pop(header, None)
        name = "" if trial is None else f'; filename="trial-{trial.number}.{MODEL}"'
        response.set_header("Content-Disposition", f"attachment{name}")
        response.set_header("Content-Type", "application/octet-stream")
        response.set_header("Content-Security-Policy", ARTIFACT_POLICY)
    return response


def _body(*, required: bool = True) -> dict[str, Any]:
    """The request's JSON object. Bottle keeps what it has parsed, so the route then reads the same."""
    if not required and bottle.request.content_length <= 0:  # -1: there is no such header
        return {}
    try:
        body = bottle.request.json
        if body is not None:
            _check_values(body)
    except (bottle.HTTPError, RecursionError):
        _refuse(400, "the body is not JSON")
    if not isinstance(body, dict):
        _refuse(400, "the body must be a JSON object, with Content-Type: application/json")
    return body


def _check_values(value: Any, depth: int = 0) -> None:
    """Refuse what cannot be stored, or what a browser cannot read again."""
    if depth > MAX_DEPTH:
        _refuse(400, f"at most {MAX_DEPTH} lists and objects may be in each other")
    if isinstance(value, dict):
        for key, below in value.items():
            _check_values(key, depth + 1)
            _check_values(below, depth + 1)
    elif isinstance(value, list):
        for below in value:
            _check_values(below, depth + 1)
    elif isinstance(value, str):
        if "\0" in value or not _encodable(value):
            _refuse(400, "a text must be UTF-8 without NUL")
    elif isinstance(value, float) and not math.isfinite(value):
        _refuse(400, f"a number must be finite, got {value}")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_integer(value: Any, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _check_after(text: str) -> None:
    try:
        after = int(text)
    except ValueError:
        after = -1
    if after < 0:
        _refuse(400, f"after must be a whole number of at least 0, got {text!r}")


def _check_new_study(body: dict[str, Any]) -> None:
    name, directions = body.get("study_name"), body.get("directions")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or _CONTROLS.search(name):
        _refuse(400, f"study_name must be a text of 1 to {MAX_NAME} characters without control characters")
    if not isinstance(directions, list) or not all(isinstance(direction, str) for direction in directions):
        _refuse(400, "directions must be a list of minimize and maximize")


def _check_note(body: dict[str, Any]) -> None:
    if not _is_integer(body.get("version"), 0, MAX_ID) or not isinstance(body.get("body"), str):
        _refuse(400, "a note has a version, a whole number, and a body, a text")


def _check_unfinished(trial: _Trial) -> None:
    if trial.state in FINISHED:
        _refuse(409, f"trial {trial.number} is finished, and a finished trial does not change")


def _check_tell(body: dict[str, Any], objectives: int) -> None:
    state, values = body.get("state"), body.get("values")
    if not isinstance(state, str) or state.upper() not in ("COMPLETE", "FAIL"):
        _refuse(400, f"state must be Complete or Fail, got {state!r:.200}")
    if state.upper() == "FAIL":
        return
    numbers = isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300 for value in values
    )
    if not numbers or len(values or ()) != objectives:
        _refuse(400, f"values must be {objectives} finite number{'s' * (objectives > 1)}, got {values!r:.200}")


def _check_user_attributes(body: dict[str, Any]) -> None:
    attributes = body.get("user_attrs")
    if not isinstance(attributes, dict) or not all(1 <= len(key) <= MAX_NAME for key in attributes):
        _refuse(400, f"user_attrs must be an object with keys of 1 to {MAX_NAME} characters")
