"""The network, the batches and the trainer: sizes, exactness of resume, and that it learns."""

from __future__ import annotations

import copy
import io
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from study.config.models import POLICY_PARAMETERS
from study.training.augment import Jitter, gather
from study.training.data import sources
from study.training.data.placement import DeviceData
from study.training.data.split import split_dataset
from study.training.device import be_deterministic, pick_precision
from study.training.networks import CNN
from study.training.optimizers import Adam, OptimizerOptions
from study.training.policies import make_policy
from study.training.rng import generator
from study.training.trainer import Diverged, EpochResult, Trainer
from tests.support.training import make_trainer

DEVICE = torch.device(os.environ.get("STUDY_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="module")
def digits() -> DeviceData:
    be_deterministic(True)
    return DeviceData.from_split(split_dataset(sources.load("digits"), "holdout", holdout=0.25), DEVICE)


@pytest.fixture(scope="module")
def few() -> DeviceData:
    """Of the digits, where it does not matter how well they are learnt: 400 to train on and 72 to validate with."""
    be_deterministic(True)
    split = split_dataset(sources.load("digits"), "holdout", holdout=0.05, train_images=400)
    return DeviceData.from_split(split, DEVICE, test=True)


def trainer(digits: DeviceData, policy: str = "dynamic", seed: int = 0, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 64, "lr": 0.002, "width": 0.25} | options
    parameters: dict[str, Any] = {"alpha": 300} if "alpha" in POLICY_PARAMETERS[policy] else {}
    return make_trainer(digits, make_policy(policy, len(digits.train_labels), seed, **parameters), seed, **settings)


def epochs(trainer: Trainer) -> list[EpochResult]:
    return [result for result in trainer.run() if result is not None]


def numbers(results: list[EpochResult]) -> list[tuple[Any, ...]]:
    """All of a result that is not a time."""
    return [(r.epoch, r.accuracy, r.loss, r.images, r.seen, r.resampling) for r in results]


def interrupted(first: Trainer, steps: int, second: Trainer) -> Trainer:
    """`first` for some steps; then `second`, from its state as it is stored, to the end."""
    for _, _ in zip(range(steps), first.run(), strict=False):
        pass
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    epochs(second)
    return second


def test_network_walks_the_sizes_of_table_1() -> None:
    network = CNN(10, generator(0, "weights"))
    sizes, image = [32], torch.zeros(2, 3, 32, 32)
    for layer in network.features:
        image = layer(image)
        if image.ndim == 4 and image.shape[-1] != sizes[-1]:
            sizes.append(image.shape[-1])
    assert sizes == [32, 16, 8, 4, 2, 1]
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 17
    assert sum(p.numel() for p in network.parameters()) == 1_540_058


def test_network_does_86_million_multiply_adds() -> None:
    network, total = CNN(10, generator(0, "weights")), 0

    def count(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * output[0, 0].numel() if output.ndim == 4 else module.weight.numel()  # type: ignore[operator]

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    network(torch.zeros(1, 3, 32, 32))
    assert round(total / 1e6) == 86


def test_width_and_norm_shape_the_network() -> None:
    half = CNN(10, generator(0, "weights"), width=0.5)
    assert [m.out_channels for m in half.modules() if isinstance(m, nn.Conv2d)][::4] == [16, 32, 32, 72, 72]
    plain = CNN(10, generator(0, "weights"), norm="none")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())


def test_augmentation_flips_and_shifts_as_drawn() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    index = torch.tensor([3, 1, 3])
    draws = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 2, -3]], dtype=torch.int8)
    out = gather(images, index, draws)
    assert torch.equal(out[0], images[3])
    assert torch.equal(out[1], images[1].flip(1))
    assert torch.equal(out[2, :30, 3:], images[3, 2:, :29])
    assert torch.equal(out[2, 31, 3:], images[3, 29, :29])  # row 33 mirrors to 29
    assert torch.equal(gather(images, index, None), images[index])


def test_jitters_cover_every_flip_and_shift() -> None:
    draws = Jitter.draw(5000, generator(0, "augment")).draws
    assert set(draws[:, 0].tolist()) == {0, 1}
    assert set(draws[:, 1].tolist()) == set(draws[:, 2].tolist()) == set(range(-4, 5))


ENOUGH = 40
"""Epochs to learn the digits in: eight seeds took 5 to 8, in bf16 as in fp32."""


def until_learned(trainer: Trainer) -> list[EpochResult]:
    """To an accuracy above 0.7 (guessing gives 0.1), or to the end if it never gets there."""
    results = []
    for result in trainer.run():
        if result is not None:
            results.append(result)
            if result.accuracy > 0.7:
                break
    return results


def test_it_learns(digits: DeviceData) -> None:
    results = until_learned(trainer(digits, epochs=ENOUGH))
    assert results[-1].accuracy > 0.7
    assert results[-1].loss < results[0].loss


@pytest.mark.parametrize("augment", [False, True])
def test_same_seed_same_bits(few: DeviceData, augment: bool) -> None:
    first, second = (trainer(few, augment=augment, width=0.125) for _ in range(2))
    assert numbers(epochs(first)) == numbers(epochs(second))
    other = trainer(few, seed=1, augment=augment, width=0.125)
    assert numbers(epochs(other)) != numbers(first.history)


def test_same_seed_same_start_whatever_the_policy(few: DeviceData) -> None:
    static, dynamic = (trainer(few, policy, epochs=1) for policy in ("static", "dynamic"))
    assert all(map(torch.equal, static.network.state_dict().values(), dynamic.network.state_dict().values()))
    assert numbers(epochs(static))[0][:4] == numbers(epochs(dynamic))[0][:4]


def test_adam_is_pytorchs() -> None:
    """Bit for bit over steps and a resume, with and without weight decay."""
    for decay in (0.0, 0.1):
        ours, theirs = (CNN(10, generator(0, "weights"), width=0.125) for _ in range(2))
        stock = torch.optim.Adam(theirs.parameters(), lr=0.01, weight_decay=decay, fused=True)
        adam = Adam(ours.parameters(), OptimizerOptions(lr=0.01, weight_decay=decay))
        images = torch.randn(16, 3, 32, 32, generator=generator(0, "images"))
        for step in range(4):
            for network in (ours, theirs):
                network(images).square().sum().backward()
            adam.step()
            adam.zero_grad()
            stock.step()
            stock.zero_grad()
            if step == 1:
                state = copy.deepcopy(stock.state_dict())  # also what earlier versions of this program stored
                adam = Adam(ours.parameters(), OptimizerOptions(lr=0.01, weight_decay=decay))
                adam.load_state_dict(state)
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
        states = zip(adam.state_dict()["state"].values(), stock.state_dict()["state"].values(), strict=True)
        assert all(torch.equal(a[name], b[name]) for a, b in states for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.fixture(scope="module")
def whole_trainers() -> dict[Any, Trainer]:
    """Those that were not stopped, by what they train: each is trained once."""
    return {}


@pytest.mark.parametrize("policy", ["full", "static", "fresh", "dynamic", "infobatch"])
# In training, before and after validation, in the third epoch; in the cut-off epoch of a budget.
@pytest.mark.parametrize(("steps", "images"), [(1, None), (5, None), (6, None), (12, None), (15, 750)])
def test_resume_equals_not_stopping(
    few: DeviceData, whole_trainers: dict[Any, Trainer], policy: str, steps: int, images: int | None
) -> None:
    options: dict[str, Any] = {"augment": True, "epochs": 3, "images": images, "width": 0.0625}
    if (policy, images) not in whole_trainers:
        whole_trainers[policy, images] = trainer(few, policy, **options)
        epochs(whole_trainers[policy, images])
    whole = whole_trainers[policy, images]

    # Another seed, so that nothing can come from anywhere but the state.
    stopped, other = (trainer(few, policy, seed=seed, **options) for seed in (0, 99))
    resumed = interrupted(stopped, steps, other)

    assert numbers(resumed.history) == numbers(whole.history)
    ours, theirs = resumed.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("forgotten", "steps"),
    [
        ("shuffles", 6),
        ("augmentation", 6),
        ("optimizer", 3),
        ("network", 3),
        ("policy", 3),
        ("order", 3),
        ("loss_sum", 3),
    ],
)
def test_the_resume_test_can_fail(few: DeviceData, forgotten: str, steps: int) -> None:
    """The control: a state that lacks one thing gives other numbers."""
    options: dict[str, Any] = {"augment": True, "epochs": 3, "width": 0.125}
    whole = trainer(few, **options)
    epochs(whole)
    stopped = trainer(few, **options)
    for _, _ in zip(range(steps), stopped.run(), strict=False):
        pass
    state = stopped.state_dict()
    resumed = trainer(few, seed=99, **options)
    state[forgotten] = resumed.state_dict()[forgotten]
    resumed.load_state_dict(state)
    epochs(resumed)
    assert numbers(resumed.history) != numbers(whole.history)


@pytest.mark.parametrize("policy", ["full", "dynamic", "infobatch"])
@pytest.mark.parametrize("budget", [100, 300, 1000, 3500])
def test_a_budget_of_images_is_met_exactly(few: DeviceData, policy: str, budget: int) -> None:
    trained = trainer(few, policy, images=budget, width=0.0625)
    epochs(trained)
    assert trained.trained == sum(result.images for result in trained.history) == budget
    assert all(len(trained.policy.active) >= result.images for result in trained.history[:1])


def test_what_was_seen_is_counted(few: DeviceData) -> None:
    total = len(few.train_labels)
    static, fresh = (epochs(trainer(few, name, width=0.0625)) for name in ("static", "fresh"))
    assert [result.seen for result in static] == [300] * 4
    exchanged = [result.resampling.k for result in fresh]
    assert 300 < fresh[1].seen == 300 + exchanged[0]
    assert fresh[1].seen < fresh[2].seen < fresh[3].seen <= total


def predictions(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes that its network now gives the validation and the test images."""
    assert trainer.data.test_images is not None
    trainer.network.eval()
    with torch.no_grad(), trainer._autocast():
        parts = (trainer.data.validation_images, trainer.data.test_images)
        classes = [
            trainer.network(trainer._normalised(images)).argmax(1)
            for images in parts
            if isinstance(images, torch.Tensor)
        ]
    return classes[0], classes[1]


def test_the_test_split_is_measured_with_the_best_epochs_network(digits: DeviceData) -> None:
    """The test split is judged by the network of the best epoch, also across a resume, not by the last one's.

    What validates is made for it: the labels are what one of the networks answers, so that epoch is certainly the best.
    """
    split = split_dataset(sources.load("digits"), "holdout", holdout=0.25)
    data = DeviceData.from_split(split, DEVICE, test=True)

    def fresh(count: int) -> Trainer:
        return trainer(data, "static", epochs=count, width=0.125)

    scout = fresh(6)
    answers = [predictions(scout) for result in scout.run() if result is not None]
    last = answers[-1]
    # The first epoch whose network answers unlike all before it and unlike the last.
    best = next(
        n
        for n, (validation, test) in enumerate(answers, 1)
        if not any(torch.equal(validation, other) for other, _ in [*answers[: n - 1], last])
        and not torch.equal(test, last[1])
    )
    data = replace(data, validation_labels=answers[best - 1][0], test_labels=answers[best - 1][1])

    whole = fresh(6)  # "static" looks at no accuracy: the same networks
    assert max(epochs(whole), key=lambda r: (r.accuracy, -r.epoch)).epoch == best < 6
    stopped, resumed, until_best, until_last = fresh(6), fresh(6), fresh(best), fresh(6)
    for result in stopped.run():
        if result is not None and result.epoch == best:
            break
    resumed.load_state_dict(stopped.state_dict())
    epochs(resumed)
    epochs(until_best)
    assert [each.test().accuracy for each in (whole, resumed, until_best)] == [1.0, 1.0, 1.0]
    epochs(until_last)
    until_last.best_network = until_last.network.state_dict()
    assert until_last.test().accuracy < 1.0  # the last network's word would be another


def test_a_diverged_trial_raises(digits: DeviceData) -> None:
    broken = trainer(digits)
    with torch.no_grad():
        next(broken.network.parameters()).fill_(float("inf"))
    with pytest.raises(Diverged, match="not finite in epoch 1"):
        epochs(broken)


def test_a_last_batch_of_one_image_trains(digits: DeviceData) -> None:
    lonely = make_trainer(digits, make_policy("static", 1000, 0, alpha=65), 0, epochs=1, batch_size=64, width=0.125)
    assert epochs(lonely)[0].images == 65


def test_bf16_and_fp32_agree_roughly(digits: DeviceData) -> None:
    """Each path learns, neither computes the other's bits."""
    losses = {}
    for precision in ("bf16", "fp32"):
        results = until_learned(trainer(digits, epochs=ENOUGH, precision=precision))
        assert results[-1].accuracy > 0.7, precision
        losses[precision] = results[0].loss
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)


@pytest.mark.parametrize(
    ("limits", "picked"),
    [
        ({}, "bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, "bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "no such limit"}, "bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "fp32"),
        ({"ONEDNN_MAX_CPU_ISA": "avx2"}, "fp32"),
        ({"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "SSE41"}, "fp32"),
    ],
)
def test_a_limited_processor_is_not_asked_for_bf16(
    limits: dict[str, str], picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 that oneDNN emulates is ten times slower than fp32."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, limit in limits.items():
        monkeypatch.setenv(name, limit)
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert pick_precision("auto", cpu) == picked
    assert pick_precision("bf16", cpu) == "bf16"  # who asks gets it
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert pick_precision("auto", cpu) == "fp32"


def test_normalisation_uses_the_exact_statistics(digits: DeviceData) -> None:
    assert isinstance(digits.train_images, torch.Tensor)
    pixels = digits.train_images.double().reshape(-1, 3)
    assert torch.allclose(digits.mean.double(), pixels.mean(0), rtol=1e-6)
    assert torch.allclose(digits.std.double(), pixels.std(0, correction=0), rtol=1e-6)


@pytest.mark.skipif("STUDY_TEST_IMAGES" not in os.environ, reason="STUDY_TEST_IMAGES names no folder of images")
@pytest.mark.usefixtures("shared_cache")
def test_it_trains_on_real_images() -> None:
    """A few steps on photographs, half as wide: the loss falls, and a resumed copy agrees."""
    dataset = sources.load("imagefolder", os.environ["STUDY_TEST_IMAGES"])
    data = DeviceData.from_split(split_dataset(dataset, "holdout", holdout=0.01, train_images=2000), DEVICE)

    def fresh() -> Trainer:
        policy = make_policy("dynamic", 2000, 0, alpha=256)
        return make_trainer(data, policy, 0, epochs=3, batch_size=64, augment=True, width=0.5)

    whole, stopped, resumed = fresh(), fresh(), fresh()
    results = epochs(whole)
    assert results[-1].loss < results[0].loss
    for _, _ in zip(range(7), stopped.run(), strict=False):
        pass
    resumed.load_state_dict(stopped.state_dict())
    epochs(resumed)
    assert numbers(resumed.history) == numbers(results)
