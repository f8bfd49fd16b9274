"""Steps that are replayed: the same bits as steps that are executed as they are written, or no replays at all.

With STUDY_TEST_DEVICE=cuda by CUDA graphs; without a GPU by a recorder that dispatches again what was dispatched.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from study.training import cuda_graphs
from study.training import trainer as trainer_module
from study.training.cuda_graphs import WARM_UPS, Step
from study.training.data import sources
from study.training.data.placement import DeviceData
from study.training.data.split import split_dataset
from study.training.device import be_deterministic
from study.training.trainer import Trainer
from study.trial.checkpoint import on_host
from tests.support.recorder import Recorder
from tests.unit.test_training import DEVICE, epochs, interrupted, numbers, trainer

BATCH = 64
"""Of the trainers here; their epochs of 300 images end with a batch of 44."""


@pytest.fixture(scope="module")
def digits() -> DeviceData:
    be_deterministic(True)
    split = split_dataset(sources.load("digits"), "holdout", holdout=0.05, train_images=400)
    return DeviceData.from_split(split, DEVICE, test=True)


class Counting:
    """A recorder that counts what its recordings replay."""

    def __init__(self) -> None:
        real = cuda_graphs.recorder(DEVICE)
        self.inner: Any = Recorder() if real is None else real
        self.replays: list[int] = []
        self.plainly = self.inner.plainly

    def record(self, call: Any) -> Any:
        recording, result = self.inner.record(call)
        self.replays.append(0)
        number = len(self.replays) - 1

        class Counted:
            def replay(_) -> None:
                self.replays[number] += 1
                recording.replay()

        return Counted(), result


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """All trainers made from now on replay."""
    counting = Counting()
    monkeypatch.setattr(trainer_module, "recorder", lambda _: counting)
    return counting


@pytest.fixture(scope="module")
def whole_trainers() -> dict[str, Trainer]:
    """Those that were not stopped, by policy: each is trained once."""
    return {}


def plain(digits: DeviceData, policy: str, **options: Any) -> Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "recorder", lambda _: None)
        return trainer(digits, policy, **options)


def same(ours: Trainer, theirs: Trainer) -> bool:
    tensors = (one.network.state_dict().values() for one in (ours, theirs))
    return numbers(ours.history) == numbers(theirs.history) and all(map(torch.equal, *tensors))


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("policy", ["full", "static", "fresh", "dynamic", "infobatch"])
def test_replays_compute_the_same_bits(digits: DeviceData, replaying: Counting, policy: str, augment: bool) -> None:
    options: dict[str, Any] = {"augment": augment, "epochs": 6, "width": 0.0625}
    by_steps, by_replays = plain(digits, policy, **options), trainer(digits, policy, **options)
    epochs(by_steps)
    epochs(by_replays)
    assert same(by_replays, by_steps)
    full_steps = sum(result.images // BATCH for result in by_steps.history)
    # Each recording's first replay is the one that is held against the step itself.
    assert full_steps - WARM_UPS in replaying.replays
    # Full batches, last batches (infobatch's are of another size each time), validation.
    assert len(replaying.replays) == (2 if policy == "infobatch" else 3)
    assert by_replays.test() == by_steps.test()


@pytest.mark.parametrize("policy", ["dynamic", "infobatch"])
@pytest.mark.parametrize("steps", [2, 5, 9, 16, 23])
def test_a_resumed_trial_replays_into_the_same_bits(
    digits: DeviceData, replaying: Counting, whole_trainers: dict[str, Trainer], policy: str, steps: int
) -> None:
    """Stopped while warming up, after a recording, in validation; the resumed one warms up anew."""
    options: dict[str, Any] = {"augment": True, "width": 0.0625, "images": 1500}
    if policy not in whole_trainers:
        whole_trainers[policy] = plain(digits, policy, **options)
        epochs(whole_trainers[policy])
    stopped, other = (trainer(digits, policy, seed=seed, **options) for seed in (0, 99))
    resumed = interrupted(stopped, steps, other)
    assert replaying.replays
    assert same(resumed, whole_trainers[policy])


def test_a_trial_without_batch_norm_and_in_fp32_replays(digits: DeviceData, replaying: Counting) -> None:
    options: dict[str, Any] = {"norm": "none", "precision": "fp32", "weight_decay": 0.1, "width": 0.125}
    by_steps, by_replays = plain(digits, "static", **options), trainer(digits, "static", **options)
    epochs(by_steps)
    epochs(by_replays)
    assert replaying.replays
    assert same(by_replays, by_steps)


def eight_calls(step: Step, call: Any, state: Tensor) -> list[float]:
    state.zero_()
    sums = []
    for number in range(8):
        step(call, torch.full((2,), float(number), device=DEVICE))
        sums.append(state.sum().item())
    return sums


def test_a_step_that_is_all_tensors_is_replayed() -> None:
    be_deterministic(True)
    state, recorder = torch.zeros(2, device=DEVICE), Counting()
    assert eight_calls(Step(recorder, [state]), state.add_, state) == eight_calls(
        Step(None, [state]), state.add_, state
    )
    assert recorder.replays == [8 - WARM_UPS]


def test_what_is_not_a_number_is_replayed_too() -> None:
    be_deterministic(True)
    state = torch.full((2,), float("nan"), device=DEVICE)
    step = Step(Counting(), [state])
    for _ in range(WARM_UPS + 2):
        step(state.add_, torch.ones(2, device=DEVICE))
    assert len(step.recorded) == 1


def test_a_step_that_waits_for_a_number_is_not_replayed() -> None:
    be_deterministic(True)
    state = torch.zeros(2, device=DEVICE)

    def waits(x: Tensor) -> None:
        state.add_(x * x.max().item())

    step = Step(Counting(), [state])
    with pytest.warns(RuntimeWarning, match="not permitted|during CUDA graph capture"):
        executed = eight_calls(step, waits, state)
    assert not step.recorded
    assert executed == eight_calls(Step(None, [state]), waits, state)


def test_a_step_that_counts_outside_its_tensors_is_not_replayed() -> None:
    """The control for the comparison of bits: this can be recorded, but a replay would not count."""
    be_deterministic(True)
    state, calls, recorder = torch.zeros(2, device=DEVICE), iter(range(100)), Counting()

    def counts(x: Tensor) -> None:
        state.add_(x * next(calls))

    step = Step(recorder, [state])
    with pytest.warns(RuntimeWarning, match="other bits"):
        eight_calls(step, counts, state)
    assert not step.recorded
    assert recorder.replays == [1]


def test_a_trial_whose_steps_cannot_be_recorded_trains_all_the_same(
    digits: DeviceData, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Counting):
        def record(self, call: Any) -> Any:
            call()  # what a graph that is out of memory at its end has left behind
            raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(trainer_module, "recorder", lambda _: Broken())
    by_steps = plain(digits, "dynamic", width=0.0625)
    epochs(by_steps)
    broken = trainer(digits, "dynamic", width=0.0625)
    with pytest.warns(RuntimeWarning, match="steps are not replayed: CUDA error: out of memory$"):
        epochs(broken)
    assert same(broken, by_steps)


def test_the_environment_switches_replays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_graphs.SWITCH, "0")
    assert cuda_graphs.recorder(torch.device("cuda")) is None
    assert cuda_graphs.recorder(torch.device("cpu")) is None


def test_a_trainer_is_freed_with_its_recordings(digits: DeviceData, replaying: Counting) -> None:
    """No cycle of references: a GPU's memory must not wait for Python's search for garbage."""
    import gc
    import weakref

    gc.disable()
    try:
        used = trainer(digits, "static", width=0.0625)
        epochs(used)
        assert replaying.replays
        freed = weakref.ref(used)
        del used
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", ["dynamic", "infobatch"])
def test_a_checkpoint_is_a_copy_in_the_processors_memory(digits: DeviceData, replaying: Counting, policy: str) -> None:
    """Taken in mid-epoch after replays, unharmed by the steps that follow."""
    options: dict[str, Any] = {"augment": True, "width": 0.0625}
    whole = trainer(digits, policy, **options)
    copied, before = None, []
    for number, _ in enumerate(whole.run()):
        if number == 20:
            copied = on_host(whole.state_dict())
            before = [leaf.clone() for leaf in tree_leaves(copied) if isinstance(leaf, Tensor)]
    after = [leaf for leaf in tree_leaves(copied) if isinstance(leaf, Tensor)]
    assert all(leaf.device.type == "cpu" for leaf in after)
    assert all(map(torch.equal, before, after))
    assert copied is not None
    resumed = trainer(digits, policy, seed=99, **options)
    resumed.load_state_dict(copied)
    epochs(resumed)
    assert same(resumed, whole)
