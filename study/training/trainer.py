"""Epochs as an iterator: the training engine, whose state can be taken at any step and continued anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from study.training.augment import Jitter, gather
from study.training.cuda_graphs import Step, recorder
from study.training.data.placement import DeviceData
from study.training.device import pick_precision
from study.training.energy import EnergyMeter
from study.training.networks import CNN
from study.training.optimizers import Adam
from study.training.policies import Policy, Resampling
from study.training.rng import generator

VALIDATION_BATCH = 1000
FORMAT = 3
"""Of `state_dict`; grows when what it holds changes."""


class Diverged(Exception):
    """The training loss or the network's output on validation images is no longer a finite number."""


@dataclass(frozen=True)
class EpochResult:
    """One epoch: what it trained on, what came of it, and what the policy then did."""

    epoch: int
    """From 1."""
    accuracy: float
    """Validation accuracy after the epoch, in [0, 1]."""
    loss: float
    """Mean training loss over the epoch's images, in nats."""
    images: int
    """Images trained on in this epoch (forward and backward)."""
    train_seconds: float
    validation_seconds: float
    selection_seconds: float
    """Choosing the images: the policy, the shuffle, the augmentation's draws."""
    seen: int
    """Different images trained on so far."""
    joules: float | None
    """Energy of the epoch, where the GPU tells."""
    resampling: Resampling
    """What the policy did after this epoch."""


class Trainer:
    """Trains the CNN under a policy with Adam.

    `run` yields after every step (None) and after every epoch (its EpochResult); whoever iterates decides when to stop.
    Between two yields `state_dict` is everything there is to know: a Trainer made with the same arguments that loads it
    continues with the very numbers that this one would have produced.

    Args:
        epochs: how long to train; without effect if `images` is given.
        images: train until exactly this many images have been trained on, counted with repetition; the last epoch ends
            short where they are used up.
    """

    def __init__(
        self,
        data: DeviceData,
        policy: Policy,
        seed: int,
        *,
        epochs: int = 200,
        images: int | None = None,
        batch_size: int = 512,
        lr: float = 0.001,
        weight_decay: float = 0.0,
        width: float = 1.0,
        norm: Literal["batch", "none"] = "batch",
        augment: bool = False,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
    ) -> None:
        self.data, self.policy = data, policy
        self.epochs, self.images, self.batch_size, self.augment = epochs, images, batch_size, augment
        self.device = data.train_images.device
        self.precision = pick_precision(precision, self.device)
        network = CNN(data.classes, generator(seed, "weights"), width=width, norm=norm)
        # Channels last is the layout of the images (one gather, no transpose) and of the fast kernels.
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = Adam(self.network.parameters(), lr=lr, weight_decay=weight_decay)
        self.shuffles, self.augmentation = generator(seed, "shuffle"), generator(seed, "augment")
        self.history: list[EpochResult] = []
        self.seen = torch.zeros(len(data.train_labels), dtype=torch.bool)
        self.best = -1.0
        self.best_network: dict[str, Tensor] | None = None
        self.meter = EnergyMeter(self.device)
        self.loss_sum = torch.zeros((), device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.invalid = torch.zeros_like(self.correct)  # validation images with outputs that are not finite
        recording, adam = recorder(self.device), self.optimizer
        changed = [*self.network.parameters(), *self.network.buffers(), *adam.steps, *adam.means, *adam.squares]
        self._training_step = Step(recording, [*changed, self.loss_sum])
        self._validation_step = Step(recording, [self.correct, self.invalid])
        self._rest()

    def _rest(self) -> None:
        """Between epochs: no plan, nothing counted."""
        self.order: Tensor | None = None
        self.weights: Tensor | None = None
        self.jitter: Tensor | None = None
        self.step = 0
        self.loss_sum.zero_()
        self.correct.zero_()
        self.invalid.zero_()
        self.train_seconds = self.validation_seconds = self.selection_seconds = 0.0
        self.joules: float | None = 0.0
        self._metered = self.meter.joules()

    @property
    def trained(self) -> int:
        """Images trained on in the epochs done, counted with repetition."""
        return sum(result.images for result in self.history)

    @property
    def over(self) -> bool:
        return len(self.history) >= self.epochs if self.images is None else self.trained >= self.images

    def run(self) -> Iterator[EpochResult | None]:
        """Raises:
        Diverged: the loss of an epoch is not finite.
        """
        while not self.over:
            started = time.perf_counter()
            order, weights, jitter = self._plan()
            self.selection_seconds += time.perf_counter() - started
            started = time.perf_counter()
            train_steps = math.ceil(len(order) / self.batch_size)
            validation_steps = math.ceil(len(self.data.validation_labels) / VALIDATION_BATCH)

            self.network.train()
            while self.step < train_steps:
                batch = slice(self.step * self.batch_size, (self.step + 1) * self.batch_size)
                self._train(
                    order[batch],
                    weights[batch] if weights is not None else None,
                    jitter[batch] if jitter is not None else None,
                )
                self.step += 1
                self.train_seconds += time.perf_counter() - started
                yield None
                started = time.perf_counter()

            self.network.eval()
            while self.step < train_steps + validation_steps:
                if self.step == train_steps:
                    if not math.isfinite(self.loss_sum.item()):  # the one wait for the device that training needs
                        raise Diverged(f"the training loss is not finite in epoch {len(self.history) + 1}")
                    self.train_seconds += time.perf_counter() - started
                    started = time.perf_counter()
                done = (self.step - train_steps) * VALIDATION_BATCH
                part = slice(done, done + VALIDATION_BATCH)
                self._validate(self.data.validation_images[part], self.data.validation_labels[part])
                self.step += 1
                if self.step < train_steps + validation_steps:
                    self.validation_seconds += time.perf_counter() - started
                    yield None
                    started = time.perf_counter()

            accuracy = self._accuracy(len(self.data.validation_labels))
            self.validation_seconds += time.perf_counter() - started
            started = time.perf_counter()
            yield self._ended(accuracy, started)

    def _accuracy(self, images: int) -> float:
        """Of the images counted since the last epoch's end.

        Raises:
            Diverged: the network's output on some of them is not finite; argmax would count those as class 0.
        """
        correct, invalid = torch.stack([self.correct, self.invalid]).tolist()
        if invalid:
            epoch = len(self.history) + 1
            raise Diverged(f"the network's output is not finite on {invalid} of {images} images in epoch {epoch}")
        return float(correct / images)

    def _ended(self, accuracy: float, started: float) -> EpochResult:
        assert self.order is not None
        epoch, images = len(self.history) + 1, len(self.order)
        done = epoch / self.epochs if self.images is None else (self.trained + images) / self.images
        self.seen[self.order] = True
        resampling = self.policy.update(epoch, accuracy, done)
        if self.data.test_labels is not None and accuracy > self.best:
            self.best_network = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.best = max(self.best, accuracy)
        result = EpochResult(
            epoch=epoch,
            accuracy=accuracy,
            loss=self.loss_sum.item() / images,
            images=images,
            train_seconds=self.train_seconds,
            validation_seconds=self.validation_seconds,
            selection_seconds=self.selection_seconds + time.perf_counter() - started,
            seen=int(self.seen.sum()),
            joules=self._energy(),
            resampling=resampling,
        )
        self.history.append(result)
        self._rest()
        return result

    def _energy(self) -> float | None:
        """Joules of the epoch so far, over all the processes that worked on it."""
        now = self.meter.joules()
        if now is None or self._metered is None or self.joules is None:
            return None
        return self.joules + now - self._metered

    def test(self) -> float:
        """Accuracy of the best epoch's network on the test split, in [0, 1]: the last word, asked for once."""
        assert self.data.test_images is not None and self.data.test_labels is not None  # noqa: PT018
        assert self.best_network is not None
        self.network.load_state_dict(self.best_network)
        self.network.eval()
        total = len(self.data.test_labels)
        self.correct.zero_()
        self.invalid.zero_()
        for start in range(0, total, VALIDATION_BATCH):
            part = slice(start, start + VALIDATION_BATCH)
            self._validate(self.data.test_images[part], self.data.test_labels[part])
        return self._accuracy(total)

    def _plan(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The epoch's images in their order, their weights and jitters: drawn once, kept for who resumes in it."""
        if self.order is None:
            active, weights = self.policy.active, self.policy.weights
            drawn = torch.randperm(len(active), generator=self.shuffles)
            if self.images is not None:
                drawn = drawn[: self.images - self.trained]
            self.order = active[drawn]
            self.weights = weights[drawn] if weights is not None else None
            self.jitter = Jitter.draw(len(drawn), self.augmentation).draws if self.augment else None
        plan = self.order, self.weights, self.jitter
        order, weights, jitter = (x.to(self.device, non_blocking=True) if x is not None else None for x in plan)
        assert order is not None
        return order, weights, jitter

    def _train(self, index: Tensor, weights: Tensor | None, jitter: Tensor | None) -> None:
        if weights is None:
            self._training_step(self._learn, index, None, jitter)
            return
        # A last batch whose size will not come again is not worth recording.
        step = self._training_step if len(index) == self.batch_size else self._training_step.plainly
        losses = step(self._learn, index, weights, jitter)
        assert losses is not None
        self.policy.observe(index, losses)

    def _learn(self, index: Tensor, weights: Tensor | None, jitter: Tensor | None) -> Tensor | None:
        """One step of Adam; with weights the images' losses, shape [batch]."""
        images = gather(self.data.train_images, index, jitter)
        labels = self.data.train_labels[index]
        losses = None
        with self._autocast():
            logits = self.network(self._normalised(images))
            if weights is None:
                loss = plain = functional.cross_entropy(logits, labels)
            else:
                losses = functional.cross_entropy(logits, labels, reduction="none")
                loss, plain = (losses * weights).mean(), losses.mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.loss_sum += plain.detach() * len(index)
        return losses.detach() if losses is not None else None

    def _validate(self, images: Tensor, labels: Tensor) -> None:
        self._validation_step(self._count, images, labels)

    @torch.no_grad()
    def _count(self, images: Tensor, labels: Tensor) -> None:
        with self._autocast():
            logits = self.network(self._normalised(images))
        self.correct += (logits.argmax(1) == labels).sum()
        self.invalid += (~torch.isfinite(logits)).any(1).sum()

    def _normalised(self, images: Tensor) -> Tensor:
        return ((images - self.data.mean) / self.data.std).permute(0, 3, 1, 2)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def state_dict(self) -> dict[str, Any]:
        """Everything that later numbers depend on, as tensors, numbers and text (loadable with weights_only=True)."""
        return {
            "format": FORMAT,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "policy": self.policy.state_dict(),
            "shuffles": self.shuffles.get_state(),
            "augmentation": self.augmentation.get_state(),
            "order": self.order,
            "weights": self.weights,
            "jitter": self.jitter,
            "seen": self.seen,
            "best": self.best,
            "best_network": self.best_network,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "correct": self.correct,
            "invalid": self.invalid,
            "train_seconds": self.train_seconds,
            "validation_seconds": self.validation_seconds,
            "selection_seconds": self.selection_seconds,
            "joules": self._energy(),
            "precision": self.precision,
            "history": [asdict(result) for result in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # One trial, one arithmetic: `auto` may mean another on the machine that takes over.
        self.precision = state["precision"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy.load_state_dict(state["policy"])
        self.shuffles.set_state(state["shuffles"])
        self.augmentation.set_state(state["augmentation"])
        self.order, self.weights, self.jitter = state["order"], state["weights"], state["jitter"]
        self.step, self.seen, self.best = state["step"], state["seen"], state["best"]
        self.best_network = state["best_network"]
        self.loss_sum.copy_(state["loss_sum"])
        self.correct.copy_(state["correct"])
        self.invalid.copy_(state["invalid"])
        self.train_seconds, self.validation_seconds = state["train_seconds"], state["validation_seconds"]
        self.selection_seconds, self.joules = state["selection_seconds"], state["joules"]
        self._metered = self.meter.joules()
        self.history = [
            EpochResult(**(row | {"resampling": Resampling(**row["resampling"])})) for row in state["history"]
        ]
