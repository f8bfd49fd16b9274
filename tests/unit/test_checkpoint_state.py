"""A checkpoint from a database or a file is loaded whole or refused with ValueError, whatever somebody made of it."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from study.training.data.placement import DeviceData
from study.training.policies import make_policy
from study.training.trainer import FORMAT, Diverged, Trainer
from study.trial.checkpoint import State, from_bytes, on_host, to_bytes
from tests.support.training import make_trainer

IDENTITY = {"study": "u", "config": "c", "parameters": "p", "seed": 3, "data": "d"}
POLICIES: dict[str, dict[str, Any]] = {
    "dynamic": {"alpha": 20, "beta": 0.4},
    "static": {"alpha": 20},
    "fresh": {"alpha": 20},
    "full": {},
    "infobatch": {},
}
IMAGES = 40
STEPS = (0, 1, 3, 8)
"""After which a state is taken: before the first epoch, within it, between two epochs, within a later one."""


@pytest.fixture(scope="module")
def data() -> DeviceData:
    draws = torch.Generator().manual_seed(0)

    def images(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 32, 32, 3), generator=draws, dtype=torch.uint8)

    def labels(count: int) -> torch.Tensor:
        return torch.arange(count) % 2

    mean, std = torch.full((3,), 127.0), torch.full((3,), 60.0)
    whole = DeviceData(images(IMAGES), labels(IMAGES), images(12), labels(12), 2, mean, std)
    return dataclasses.replace(whole, test_images=images(4), test_labels=labels(4))


def make(data: DeviceData, policy: str = "dynamic", **options: Any) -> Trainer:
    given = make_policy(policy, IMAGES, 3, **POLICIES[policy])
    return make_trainer(data, given, 3, **{"epochs": 6, "batch_size": 10, "width": 0.05, "augment": True} | options)


def state_after(trainer: Trainer, steps: int) -> State:
    running = trainer.run()
    for _ in range(steps):
        next(running)
    return on_host(trainer.state_dict())


@pytest.fixture(scope="module")
def good(data: DeviceData) -> dict[tuple[str, int], bytes]:
    """Checkpoints of trials with every policy at several steps."""
    return {
        (name, steps): to_bytes(state_after(make(data, name), steps), IDENTITY) for name in POLICIES for steps in STEPS
    }


def loaded(payload: bytes, data: DeviceData, policy: str = "dynamic") -> Trainer | None:
    """What `restore` makes of it: a trainer that has loaded it, or None where it is refused."""
    trainer = make(data, policy)
    try:
        state = from_bytes(payload, IDENTITY, trainer)
    except ValueError:
        return None
    trainer.load_state_dict(state)
    return trainer


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("steps", STEPS)
def test_what_a_trial_stored_is_loaded(
    policy: str, steps: int, data: DeviceData, good: dict[tuple[str, int], bytes]
) -> None:
    """The control: the checks refuse nothing that a trainer writes."""
    trainer = loaded(good[policy, steps], data, policy)
    assert trainer is not None
    expected = torch.load(io.BytesIO(good[policy, steps]), weights_only=True)["state"]
    assert len(trainer.history) == len(expected["history"])
    assert trainer.step == expected["step"]


@pytest.mark.parametrize("steps", [0, 1, 3, 11])
def test_a_trial_counted_in_images_is_loaded(steps: int, data: DeviceData) -> None:
    payload = to_bytes(state_after(make(data, images=75, augment=False), steps), IDENTITY)
    assert from_bytes(payload, IDENTITY, make(data, images=75, augment=False))["step"] >= 0


def edited(payload: bytes, edit: Callable[[State], Any]) -> bytes:
    state = torch.load(io.BytesIO(payload), weights_only=True)["state"]
    edit(state)
    return to_bytes(state, IDENTITY)


def put(*path: Any, value: Any) -> Callable[[State], None]:
    def edit(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return edit


def last_row(key: str, value: Any) -> Callable[[State], None]:
    return lambda state: state["history"][-1].__setitem__(key, value)


def first_weight(value: Any) -> Callable[[State], None]:
    return lambda state: state["network"].__setitem__(next(iter(state["network"])), value)


HOSTILE: dict[str, Callable[[State], Any]] = {
    "a key is missing": lambda state: state.pop("best"),
    "a key too many": put("more", value=1),
    "weights of another shape": first_weight(torch.zeros(3)),
    "weights of another dtype": lambda s: s["network"].update({k: v.double() for k, v in s["network"].items()}),
    "weights that are NaN": lambda s: next(iter(s["network"].values())).fill_(math.nan),
    "sparse weights": lambda s: s["network"].update({k: v.to_sparse() for k, v in list(s["network"].items())[:1]}),
    "no optimizer": put("optimizer", value={}),
    "an optimizer that is infinite": lambda s: s["optimizer"]["state"][0]["exp_avg"].fill_(math.inf),
    "a generator of another size": put("shuffles", value=torch.zeros(16, dtype=torch.uint8)),
    "a generator of zeros": lambda s: s["augmentation"].zero_(),
    "a policy's generator of ones": lambda s: s["policy"]["draws"].fill_(255),
    "an index out of range": lambda s: s["order"].__setitem__(0, IMAGES),
    "a negative index": lambda s: s["order"].__setitem__(0, -1),
    "an index twice": lambda s: s["order"].__setitem__(0, int(s["order"][1])),
    "a plan of other images": lambda s: s.update(order=torch.tensor(complement(s["policy"]["active"]))[:20]),
    "a plan that is too short": lambda s: s.update(order=s["order"][:5], jitter=s["jitter"][:5]),
    "a plan that is too long to exist": put("order", value=torch.zeros(1, dtype=torch.int64).expand(10**9)),
    "an active set of another size": lambda s: s["policy"].update(active=s["policy"]["active"][:3], best_active=None),
    "a best set that is sparse": lambda s: s["policy"].update(best_active=s["policy"]["best_active"].to_sparse()),
    "a policy's accuracy of 7": put("policy", "best", value=7.0),
    "no plan in mid-epoch": put("order", value=None),
    "jitter beyond the padding": lambda s: s["jitter"].fill_(100),
    "no jitter": put("jitter", value=None),
    "weights that the policy has not": lambda s: s.update(weights=torch.ones(len(s["order"]))),
    "a step beyond the epoch": put("step", value=99),
    "a step of True": put("step", value=True),
    "a step that is a tensor": put("step", value=torch.tensor([1, 2])),
    "seen as one element": put("seen", value=torch.zeros(1, dtype=torch.bool).expand(IMAGES)),
    "more right answers than images": lambda s: s["hits"].fill_(10**9),
    "fewer than no right answers": lambda s: s["hits"].fill_(-1),
    "a loss that is infinite": lambda s: s["loss_sum"].fill_(math.inf),
    "a best accuracy that nobody had": put("best", value=0.987),
    "a best accuracy that is a tensor": put("best", value=torch.tensor([0.5, 0.5])),
    "no best network": put("best_network", value=None),
    "an unknown precision": put("precision", value="int4"),
    "seconds before the start": put("train_seconds", value=-1.0),
    "seconds without end": put("train_seconds", value=10**400),
    "joules that are text": put("joules", value="1"),
    "NaN in the history": last_row("accuracy", math.nan),
    "an accuracy above 1": last_row("accuracy", 1.5),
    "an infinite loss": last_row("loss", math.inf),
    "an epoch that is a tensor": last_row("epoch", torch.tensor([1, 2])),
    "an epoch that is True": lambda s: s.update(history=[s["history"][0] | {"epoch": True}]),
    "images by the quintillion": last_row("images", 10**30),
    "seen by the quintillion": last_row("seen", 10**30),
    "a resampling by the quintillion": lambda s: s["history"][-1]["resampling"].update(k=10**30),
    "an unknown resampling": lambda s: s["history"][-1]["resampling"].update(kind="type9"),
    "a history longer than the trial": lambda s: s.update(
        history=[s["history"][-1] | {"epoch": n} for n in range(1, 100)]
    ),
    "a history that is a mapping": put("history", value={}),
    "a history that misses an epoch": lambda s: s["history"].pop(0),
}


def complement(index: torch.Tensor) -> list[int]:
    return sorted(set(range(IMAGES)) - set(index.tolist()))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_checkpoint_that_does_not_fit_is_refused(
    case: str, data: DeviceData, good: dict[tuple[str, int], bytes]
) -> None:
    """Each is damaged in the middle of a later epoch, where it has a plan, a history and a best network."""
    assert loaded(edited(good["dynamic", 8], HOSTILE[case]), data) is None


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"format": FORMAT},
        {"format": torch.tensor([1, 2]), "identity": IDENTITY, "state": {}},
        {"format": FORMAT, "identity": IDENTITY, "state": []},
        {"format": FORMAT, "identity": [], "state": {}},
        {"format": FORMAT, "identity": IDENTITY | {"seed": torch.tensor([3, 3])}, "state": {}},
        {"format": FORMAT, "identity": {1: "x", "study": "u"}, "state": {}},
        {"format": FORMAT + 1, "identity": IDENTITY, "state": {}},
        torch.zeros(3),
        "text",
        None,
    ],
    ids=repr,
)
def test_other_objects_are_refused(content: Any, data: DeviceData) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    assert loaded(buffer.getvalue(), data) is None


@pytest.mark.parametrize("key", IDENTITY)
def test_another_trial_s_is_refused_by_the_name_of_what_differs(
    key: str, data: DeviceData, good: dict[tuple[str, int], bytes]
) -> None:
    with pytest.raises(ValueError, match=rf"belongs to another trial \(different: {key}\)"):
        from_bytes(good["dynamic", 8], IDENTITY | {key: "other"}, make(data))


def test_a_refusal_repeats_nothing_of_the_checkpoint(data: DeviceData) -> None:
    payload = to_bytes({}, IDENTITY | {"\x1b]0;owned\x07": 1})
    with pytest.raises(ValueError, match="which trial") as refusal:
        from_bytes(payload, IDENTITY, make(data))
    assert str(refusal.value).isprintable()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a state, of the mappings and lists too."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, below in value.items():
            yield from leaves(below, (*path, key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from leaves(below, (*path, number))


tensors = st.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(()),
        torch.tensor([0, 0]),
        torch.tensor([math.nan]),
        torch.arange(20),
        torch.arange(20) * 10**12,
        torch.ones(IMAGES, dtype=torch.bool),
        torch.zeros(20, 3, dtype=torch.int8),
        torch.zeros(5056, dtype=torch.uint8),
        torch.zeros(1).expand(1000),
        torch.zeros(4).to_sparse(),
        torch.zeros(3, dtype=torch.complex64),
    ]
)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**40), max_value=10**40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    tensors,
)


def mutate(state: Any, path: tuple[Any, ...], how: str, value: Any) -> None:
    for key in path[:-1]:
        state = state[key]
    here = state[path[-1]]
    match how:
        case "remove":
            del state[path[-1]]
        case "add" if isinstance(here, dict):
            here["more"] = value
        case "reshape" if isinstance(here, torch.Tensor):
            state[path[-1]] = here.reshape(-1)[: here.numel() // 2]
        case "cast" if isinstance(here, torch.Tensor):
            state[path[-1]] = here.to(torch.float64 if here.dtype == torch.float32 else torch.int32)
        case "fill" if isinstance(here, torch.Tensor):
            here.fill_(value if isinstance(value, int) and abs(value) < 100 else 77)
        case _:
            state[path[-1]] = value


def ends(trainer: Trainer) -> bool:
    """Train to the end: every epoch has an accuracy that a database takes, and the best network can be tested."""
    for _ in trainer.run():
        pass
    assert all(0.0 <= result.accuracy <= 1.0 and math.isfinite(result.loss) for result in trainer.history)
    assert 0.0 <= trainer.test().accuracy <= 1.0
    return trainer.over


EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
"""Without it the same examples each time."""
SEEDED: Any = {"deadline": None, "derandomize": EXAMPLES is None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=int(EXAMPLES or 40), **SEEDED)
@given(random=st.data())
def test_mutated_states_are_refused_or_train_to_their_end(
    random: st.DataObject, data: DeviceData, good: dict[tuple[str, int], bytes]
) -> None:
    policy = random.draw(st.sampled_from(list(POLICIES)))
    payload = good[policy, random.draw(st.sampled_from(STEPS))]
    state = torch.load(io.BytesIO(payload), weights_only=True)["state"]
    within = [path for path in leaves(state) if path[0] not in ("network", "optimizer", "best_network")]
    weights = [path for path in leaves(state) if path[0] in ("network", "optimizer", "best_network")]
    changes_weights = False
    for _ in range(random.draw(st.integers(1, 2))):
        path = random.draw(st.sampled_from(within) | st.sampled_from(weights))
        changes_weights |= path in weights
        how = random.draw(st.sampled_from(["remove", "add", "reshape", "cast", "fill", "replace"]))
        try:
            mutate(state, path, how, copy.deepcopy(random.draw(values)))
        except (KeyError, IndexError, TypeError):  # the first mutation took away what the second meant
            continue
    trainer = loaded(to_bytes(state, IDENTITY), data, policy)
    if trainer is None:
        return
    try:
        assert ends(trainer)
    except Diverged:
        assert changes_weights  # whose values only training can produce


@settings(max_examples=int(EXAMPLES or 40), **SEEDED)
@given(random=st.data())
def test_damaged_bytes_are_refused_or_loaded_whole(
    random: st.DataObject, data: DeviceData, good: dict[tuple[str, int], bytes]
) -> None:
    content = bytearray(good["dynamic", 8])
    kind = random.draw(st.sampled_from(["cut", "flip", "garbage", "insert"]))
    match kind:
        case "cut":
            del content[random.draw(st.integers(0, len(content) - 1)) :]
        case "flip":
            for _ in range(random.draw(st.integers(1, 5))):
                content[random.draw(st.integers(0, len(content) - 1))] = random.draw(st.integers(0, 255))
        case "garbage":
            content = bytearray(random.draw(st.binary(max_size=300)))
        case _:
            position = random.draw(st.integers(0, len(content)))
            content[position:position] = random.draw(st.binary(min_size=1, max_size=50))
    loaded(bytes(content), data)


def test_a_zip_of_something_else_is_refused(data: DeviceData) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    assert loaded(buffer.getvalue(), data) is None
