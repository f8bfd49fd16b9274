"""Checkpoints that cannot be used cost a trial the epochs they held, and neither an attempt nor its outcome."""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.engine import close
from storage.queries import attempts
from storage.schema import CHECKPOINTS
from study.trial.checkpoint import read_fallback, write_fallback
from tests.support.harness import Harness, StopAfter, config_of, writers_have_ended

Outcome = list[tuple[Any, ...]]
Content = dict[str, Any]


def another_interrupted(url: str, **sections: Any) -> Harness:
    """A study whose first trial was stopped in its second epoch, after the first of its two steps."""
    harness = Harness(url, config_of(**sections))
    harness.work(StopAfter(4), most=1)
    harness.messages.clear()
    return harness


def interrupted(url: str) -> Harness:
    """Such a study, the same each time."""
    Path(url.removeprefix("sqlite:///")).write_bytes(interrupted_once())
    return Harness(url, config_of())


@functools.cache
def interrupted_once() -> bytes:
    """Its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "study.db")
        harness = another_interrupted(f"sqlite:///{path}")
        writers_have_ended()
        close(harness.storage.engine)
        return path.read_bytes()


def resumed_to_its_end(harness: Harness) -> Outcome:
    """Of its first trial, the only one that had begun."""
    harness.work(most=1)
    return harness.outcome()[:1]


def payload_of(harness: Harness) -> bytes:
    with harness.storage.engine.connect() as connection:
        payload = connection.scalar(sa.select(CHECKPOINTS.c.payload))
    assert isinstance(payload, bytes)
    return payload


def store(harness: Harness, payload: bytes) -> None:
    """Put it in the place of the checkpoint, with a right checksum: what whoever can write to the database can do."""
    row = {"payload": payload, "sha256": hashlib.sha256(payload).hexdigest()}
    with harness.storage.engine.begin() as connection:
        assert connection.execute(sa.update(CHECKPOINTS).values(row)).rowcount == 1


def changed(payload: bytes, change: Callable[[Content], Any]) -> bytes:
    content = torch.load(io.BytesIO(payload), weights_only=True)
    change(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def is_dropped(harness: Harness) -> bool:
    """One line says so, and nothing was resumed."""
    lines = [line for line in harness.messages if "its checkpoint is not used" in line]
    assert all("\n" not in line and line.isprintable() for line in lines)
    return len(lines) == 1 and not any("resumes" in line for line in harness.messages)


def no_attempt_failed(harness: Harness) -> bool:
    ends = attempts(harness.storage.engine, harness.study._study_id)
    return {attempt.outcome for attempt in ends} <= {"finished", "released"} and not any(a.error for a in ends)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "garbage": lambda _: b"garbage" * 1000,
    "nothing": lambda _: b"",
    "truncated": lambda payload: payload[: len(payload) // 2],
    "a list": lambda _: saved([1, 2, 3]),
    "code": lambda _: b"cposix\nsystem\n(S'exit 1'\ntR.",
    "another version": lambda payload: changed(payload, lambda c: c.update(format=1)),
    "a missing key": lambda payload: changed(payload, lambda c: c["state"].pop("optimizer")),
    "another network": lambda payload: changed(payload, lambda c: c["state"].update(network={"x": torch.zeros(1)})),
    "a generator of zeros": lambda payload: changed(payload, lambda c: c["state"]["shuffles"].zero_()),
    "a short generator": lambda payload: changed(payload, lambda c: c["state"].update(shuffles=torch.zeros(8))),
    "an index out of range": lambda payload: changed(payload, lambda c: c["state"]["order"].fill_(10**6)),
    "NaN in the history": lambda payload: changed(
        payload, lambda c: c["state"]["history"][0].update(accuracy=math.nan)
    ),
    "an epoch of 10**30 images": lambda payload: changed(
        payload, lambda c: c["state"]["history"][0].update(images=10**30)
    ),
    "a step beyond the epoch": lambda payload: changed(payload, lambda c: c["state"].update(step=10**6)),
    "seen as one element": lambda payload: changed(
        payload, lambda c: c["state"].update(seen=torch.zeros(1, dtype=torch.bool).expand(200))
    ),
}


def test_a_checkpoint_is_used(sqlite_url: str, undisturbed: Outcome) -> None:
    """The control of all that follow: written back as it was, the trial resumes from it."""
    harness = interrupted(sqlite_url)
    store(harness, changed(payload_of(harness), lambda content: None))
    outcome = resumed_to_its_end(harness)
    assert any("trial 0 resumes after epoch 1" in line for line in harness.messages)
    assert not any("not used" in line for line in harness.messages)
    assert outcome == undisturbed[:1]


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unusable_checkpoint_is_dropped_and_the_trial_starts_anew(
    damage: str, sqlite_url: str, undisturbed: Outcome
) -> None:
    harness = interrupted(sqlite_url)
    store(harness, DAMAGE[damage](payload_of(harness)))
    outcome = resumed_to_its_end(harness)
    assert is_dropped(harness), harness.messages
    assert no_attempt_failed(harness)
    assert outcome == undisturbed[:1]


EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
"""Without it the same examples each time."""
SEEDED: Any = {"deadline": None, "derandomize": EXAMPLES is None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=int(EXAMPLES or 8), **SEEDED)
@given(random=st.data())
def test_random_damage_never_fails_an_attempt(
    random: st.DataObject, tmp_path_factory: pytest.TempPathFactory, undisturbed: Outcome
) -> None:
    harness = interrupted(f"sqlite:///{tmp_path_factory.mktemp('damaged') / 'study.db'}")
    payload = payload_of(harness)
    whole = torch.load(io.BytesIO(payload), weights_only=True)["state"]
    key = random.draw(st.sampled_from(sorted(set(whole) - {"step"})))  # another step of the epoch is a possible one
    other = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({}))
    value = random.draw(other | st.just(torch.zeros(2)))
    kind = random.draw(st.sampled_from(["cut", "replace", "remove"]))
    match kind:
        case "cut":
            store(harness, payload[: random.draw(st.integers(0, len(payload) - 1))])
        case "replace":
            store(harness, changed(payload, lambda content: content["state"].update({key: value})))
        case _:
            store(harness, changed(payload, lambda content: content["state"].pop(key)))
    outcome = resumed_to_its_end(harness)
    assert no_attempt_failed(harness)
    if kind in ("remove", "cut"):
        assert is_dropped(harness)
    # A number of seconds may be any: all else is either dropped or what it was.
    assert outcome == undisturbed[:1]


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "beta": ({"policy": {"alpha": [60, 90], "beta": [0.4, 0.6]}}, "parameters"),
    "seed": ({"search": {"seed": 1}}, "seed"),
    "a setting": ({"training": {"weight_decay": 0.1}}, "config"),
    "study": ({}, "study"),
    "data": ({}, "data"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_checkpoint_of_another_trial_is_dropped(what: str, sqlite_url: str, undisturbed: Outcome) -> None:
    sections, key = FOREIGN[what]
    harness = interrupted(sqlite_url)
    if what == "data":  # what a checkpoint of other images is like
        identity = {"data": "f" * 64}
        payload = changed(payload_of(harness), lambda content: content["identity"].update(identity))
    else:
        other = another_interrupted(sqlite_url.replace("study.db", "other.db"), **sections)
        payload = payload_of(other)
    harness.messages.clear()
    store(harness, payload)
    outcome = resumed_to_its_end(harness)
    assert is_dropped(harness)
    (line,) = [line for line in harness.messages if "not used" in line]
    assert key in line.partition("different: ")[2]
    assert no_attempt_failed(harness)
    assert outcome == undisturbed[:1]


def test_a_fallback_checkpoint_is_used_by_its_own_trial_only(sqlite_url: str, undisturbed: Outcome) -> None:
    """The study is deleted, and another of its name is made: the file on this machine's disk is the first one's."""
    first = interrupted(sqlite_url)
    file = first.fallback / "trial-0.checkpoint"
    write_fallback(file, payload_of(first))
    second = Harness(sqlite_url.replace("study.db", "again.db"), first.config)
    second.fallback = first.fallback
    second.messages.clear()
    outcome = resumed_to_its_end(second)
    assert is_dropped(second)
    assert outcome == undisturbed[:1]


def test_a_fallback_checkpoint_alone_is_enough(sqlite_url: str, undisturbed: Outcome) -> None:
    harness = interrupted(sqlite_url)
    write_fallback(harness.fallback / "trial-0.checkpoint", payload_of(harness))
    with harness.storage.engine.begin() as connection:
        connection.execute(sa.delete(CHECKPOINTS))
    outcome = resumed_to_its_end(harness)
    assert any("trial 0 resumes after epoch 1" in line for line in harness.messages)
    assert outcome == undisturbed[:1]


def test_a_usable_file_makes_up_for_an_unusable_row(sqlite_url: str, undisturbed: Outcome) -> None:
    harness = interrupted(sqlite_url)
    write_fallback(harness.fallback / "trial-0.checkpoint", payload_of(harness))
    store(harness, b"garbage")
    outcome = resumed_to_its_end(harness)
    assert any("trial 0 resumes after epoch 1" in line for line in harness.messages)
    assert sum("not used" in line for line in harness.messages) == 1
    assert outcome == undisturbed[:1]


def test_a_fallback_file_is_its_users_alone(tmp_path: Path) -> None:
    file = tmp_path / "unsaved" / "study" / "trial-0.checkpoint"
    write_fallback(file, b"payload")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [each.name for each in file.parent.iterdir()] == ["trial-0.checkpoint"]
    assert read_fallback(file) == b"payload"
    file.write_bytes(file.read_bytes()[:-1])
    assert read_fallback(file) is None
    assert read_fallback(file.parent) is None
