"""Epochs as an iterator: the training engine, whose state can be taken at any step and continued anywhere."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from study.training.augment import Augmentation, gather
from study.training.cpu_layers import use_cpu_layers
from study.training.cuda_graphs import Step, recorder
from study.training.data.placement import DeviceData, HostImages, Stored, batches
from study.training.device import pick_precision
from study.training.energy import EnergyMeter
from study.training.networks import CNN, draws_random_numbers
from study.training.optimizers import OptimizerOptions, make_optimizer
from study.training.policies import Policy, Resampling, active_fault
from study.training.rng import generator, global_generators, seeded_state
from study.training.schedules import Schedule

logger = logging.getLogger(__name__)

VALIDATION_BATCH = 1000
FORMAT = 4
"""Of `state_dict`; grows when what it holds changes."""


class Diverged(Exception):
    """The training loss or the network's output on validation images is no longer a finite number."""


Metric = Literal["accuracy", "balanced_accuracy", "macro_f1"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a trial trains."""

    epochs: int = 200
    """How long to train; without effect if `images` is given."""
    images: int | None = None
    """Train until exactly this many images have been trained on, counted with repetition; the last epoch ends short
    where they are used up."""
    batch_size: int = 512
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: Schedule = field(default_factory=Schedule)
    label_smoothing: float = 0.0
    clip: float = 0.0
    """Largest norm of all gradients together; 0: no limit."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is validated; 0: none."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    """Train through `torch.compile`."""
    metric: Metric = "accuracy"
    """What the policy and the choice of the best epoch go by."""
    keep_best: bool = False
    """Keep the best epoch's network also where there is no test split to evaluate it on."""


@dataclass(frozen=True)
class Scores:
    """What a network reaches on validation or test images."""

    accuracy: float
    balanced_accuracy: float
    """Mean of the accuracies of the classes that there are images of."""
    macro_f1: float
    """Mean of the F1 scores of those classes."""
    loss: float
    """Mean cross entropy, nats."""


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
    balanced_accuracy: float
    """Mean validation accuracy of the classes, in [0, 1]."""
    macro_f1: float
    """Mean F1 score of the classes on the validation images, in [0, 1]."""
    validation_loss: float
    """Mean cross entropy of the validation images, in nats."""

    def score(self, metric: Metric) -> float:
        """The value of a metric, in [0, 1]."""
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
        }[metric]


class Trainer:
    """Trains a network under a policy.

    `run` yields after every step (None) and after every epoch (its EpochResult); whoever iterates decides when to stop.
    Between two yields `state_dict` is everything there is to know: a Trainer made with the same arguments that loads it
    continues with the very numbers that this one would have produced, also where the network or the augmentation
    draws from PyTorch's global generators. Those of Python and numpy are left alone.

    Args:
        network: images of `data` to logits; moved to the device of the data.
        policy: chooses each epoch's images.
        seed: of everything that is drawn.
        options: how to train.
    """

    def __init__(
        self, data: DeviceData, network: nn.Module, policy: Policy, seed: int, options: TrainingOptions
    ) -> None:
        self.data, self.policy, self.options = data, policy, options
        self.epochs, self.images, self.batch_size = options.epochs, options.images, options.batch_size
        self.device = data.device
        self.precision = pick_precision(options.precision, self.device)
        # Channels last is the layout of the images (one gather, no transpose) and of the fast kernels.
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.device.type == "cpu" and not options.compile:
            use_cpu_layers(self.network)
        self.evaluated: nn.Module = copy.deepcopy(self.network) if options.ema else self.network
        """The network that is validated: the one that is trained, or the average of its weights."""
        self._forward: Callable[[Tensor], Tensor] = torch.compile(self.network) if options.compile else self.network
        self.optimizer = make_optimizer(
            self.network.parameters(), options.optimizer, scheduled=not options.schedule.is_constant
        )
        self.shuffles, self.augmentation = generator(seed, "shuffle"), generator(seed, "augment")
        self.history: list[EpochResult] = []
        self.seen = torch.zeros(len(data.train_labels), dtype=torch.bool)
        self.best = -1.0
        self.best_network: dict[str, Tensor] | None = None
        self.meter = EnergyMeter(self.device)
        self.loss_sum = torch.zeros((), device=self.device)
        self.validation_loss = torch.zeros((), device=self.device)
        self.hits = torch.zeros(data.classes, dtype=torch.int64, device=self.device)  # right answers, by class
        self.answers = torch.zeros_like(self.hits)  # all answers, by class
        self.invalid = torch.zeros((), dtype=torch.int64, device=self.device)  # images with outputs that are not finite
        # Of a row of pixels where there are some: three channels are too few for vector instructions.
        self._mean, self._std = (each.expand(data.shape[-2:]).contiguous() for each in (data.mean, data.std))
        self.random = self._random_state(seed)
        """Of PyTorch's global generators during a step, where it draws from them."""
        recording = recorder(self.device)
        if recording is not None and self.random is not None and not options.augmentation.transforms:
            logger.info("the network draws random numbers: its steps are not recorded as CUDA graphs")
        changed = [*self.network.parameters(), *self.network.buffers(), *self.optimizer.state, self.loss_sum]
        if options.ema:
            changed += [*self.evaluated.parameters(), *self.evaluated.buffers()]
        self._training_step = Step(recording if self.random is None else None, changed)
        self._validation_step = Step(recording, [self.hits, self.answers, self.invalid, self.validation_loss])
        self._rest()

    def _random_state(self, seed: int) -> list[Tensor] | None:
        if isinstance(self.network, CNN) and not self.options.augmentation.transforms:
            return None  # known not to draw: nothing is tried and no generator is exchanged in each step
        state = seeded_state(seed, "network", self.device)
        if self.options.augmentation.transforms:
            return state
        images = torch.zeros((4, *self.data.shape), device=self.device)
        with self._autocast():
            return state if draws_random_numbers(self.network, self._normalised(images)) else None

    def _rest(self) -> None:
        """Between epochs: no plan, nothing counted."""
        self.order: Tensor | None = None
        self.weights: Tensor | None = None
        self.jitter: Tensor | None = None
        self.step = 0
        self.loss_sum.zero_()
        self._forget_scores()
        self.train_seconds = self.validation_seconds = self.selection_seconds = 0.0
        self.joules: float | None = 0.0
        self._metered = self.meter.joules()

    def _forget_scores(self) -> None:
        for count in (self.hits, self.answers, self.invalid, self.validation_loss):
            count.zero_()

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
            train_steps = self.train_steps(len(order))
            validation_steps = math.ceil(len(self.data.validation_labels) / VALIDATION_BATCH)

            self.network.train()
            assert self.order is not None
            parts = [self._batch(step, len(order)) for step in range(self.step, train_steps)]
            ahead = self._gathered(self.data.train_images, [self.order[part] for part in parts])
            while self.step < train_steps:
                batch = self._batch(self.step, len(order))
                self._train(
                    order[batch],
                    next(ahead),
                    weights[batch] if weights is not None else None,
                    jitter[batch] if jitter is not None else None,
                )
                self.step += 1
                self.train_seconds += time.perf_counter() - started
                yield None
                started = time.perf_counter()

            self.evaluated.eval()
            ahead = self._gathered(
                self.data.validation_images,
                _in_order(len(self.data.validation_labels))[self.step - train_steps :],
            )
            while self.step < train_steps + validation_steps:
                if self.step == train_steps:
                    if not math.isfinite(self.loss_sum.item()):  # the one wait for the device that training needs
                        raise Diverged(f"the training loss is not finite in epoch {len(self.history) + 1}")
                    self.train_seconds += time.perf_counter() - started
                    started = time.perf_counter()
                done = (self.step - train_steps) * VALIDATION_BATCH
                part = slice(done, done + VALIDATION_BATCH)
                images = next(ahead)
                if images is None:
                    assert isinstance(self.data.validation_images, Tensor)
                    images = self.data.validation_images[part]
                self._validation_step(self._count, images, self.data.validation_labels[part])
                self.step += 1
                if self.step < train_steps + validation_steps:
                    self.validation_seconds += time.perf_counter() - started
                    yield None
                    started = time.perf_counter()

            scores = self._scores(self.data.validation_labels)
            self.validation_seconds += time.perf_counter() - started
            started = time.perf_counter()
            yield self._ended(scores, started)

    def train_steps(self, images: int) -> int:
        """Steps of an epoch on so many images. A single image that is left over joins the batch before: batch norm
        cannot train on it. The paper's network can, and keeps its batches.
        """
        steps = math.ceil(images / self.batch_size)
        is_alone = images > 1 and images % self.batch_size == 1 and self.batch_size > 1
        return steps - 1 if is_alone and steps > 1 and not isinstance(self.network, CNN) else steps

    def _batch(self, step: int, images: int) -> slice:
        """Where the images of a step are in the epoch's order."""
        end = images if step + 1 == self.train_steps(images) else (step + 1) * self.batch_size
        return slice(step * self.batch_size, end)

    def _gathered(self, images: Stored, parts: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """The batches of images on the host, by their indices, on the device; None for those that are there."""
        if isinstance(images, HostImages):
            yield from batches(images, parts, self.device)
        else:
            yield from [None] * len(parts)

    def _scores(self, labels: Tensor) -> Scores:
        """Of the images counted since the last epoch's end.

        Raises:
            Diverged: the network's output on some of them is not finite; argmax would count those as class 0.
        """
        invalid, loss = self.invalid.item(), self.validation_loss.item()
        if invalid:
            epoch = len(self.history) + 1
            raise Diverged(f"the network's output is not finite on {invalid} of {len(labels)} images in epoch {epoch}")
        images = torch.bincount(labels.cpu(), minlength=self.data.classes)
        return scores_of(self.hits.cpu(), self.answers.cpu(), images, loss / len(labels))

    def _ended(self, scores: Scores, started: float) -> EpochResult:
        assert self.order is not None
        epoch, images = len(self.history) + 1, len(self.order)
        done = epoch / self.epochs if self.images is None else (self.trained + images) / self.images
        self.seen[self.order] = True
        score: float = getattr(scores, self.options.metric)
        resampling = self.policy.update(epoch, score, done)
        if not isinstance(resampling, Resampling):
            raise ValueError(f"the policy's update must return a Resampling, got {type(resampling).__name__}")
        if fault := active_fault(self.policy, len(self.seen)):
            raise ValueError(f"the policy after epoch {epoch}: {fault}")
        if (self.options.keep_best or self.data.test_labels is not None) and score > self.best:
            self.best_network = {name: tensor.clone() for name, tensor in self.evaluated.state_dict().items()}
        self.best = max(self.best, score)
        result = EpochResult(
            epoch=epoch,
            accuracy=scores.accuracy,
            balanced_accuracy=scores.balanced_accuracy,
            macro_f1=scores.macro_f1,
            validation_loss=scores.loss,
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

    def test(self) -> Scores:
        """Of the best epoch's network on the test split."""
        assert self.data.test_images is not None and self.data.test_labels is not None  # noqa: PT018
        assert self.best_network is not None
        self.evaluated.load_state_dict(self.best_network)
        self.evaluated.eval()
        self._forget_scores()
        labels, images = self.data.test_labels, self.data.test_images
        for number, batch in enumerate(self._gathered(images, _in_order(len(labels)))):
            part = slice(number * VALIDATION_BATCH, (number + 1) * VALIDATION_BATCH)
            if batch is None:
                assert isinstance(images, Tensor)
                batch = images[part]
            self._validation_step(self._count, batch, labels[part])
        return self._scores(labels)

    def _plan(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The epoch's images in their order, their weights and jitters: drawn once, kept for who resumes in it."""
        if self.order is None:
            active, weights = self.policy.active, self.policy.weights
            drawn = torch.randperm(len(active), generator=self.shuffles)
            if self.images is not None:
                drawn = drawn[: self.images - self.trained]
            self.order = active[drawn]
            self.weights = weights[drawn] if weights is not None else None
            self.jitter = self.options.augmentation.draw(len(drawn), self.augmentation)
        plan = self.order, self.weights, self.jitter
        order, weights, jitter = (x.to(self.device, non_blocking=True) if x is not None else None for x in plan)
        assert order is not None
        return order, weights, jitter

    def _train(self, index: Tensor, images: Tensor | None, weights: Tensor | None, jitter: Tensor | None) -> None:
        if not self.options.schedule.is_constant:
            self.optimizer.scale_rate(self.options.schedule.factor(self._done()))
        with nullcontext() if self.random is None else global_generators(self.random, self.device):
            if images is not None and jitter is not None:
                images, jitter = gather(images, torch.arange(len(index), device=self.device), jitter), None
            if self.options.augmentation.transforms:
                if images is None:
                    assert isinstance(self.data.train_images, Tensor)
                    images, jitter = gather(self.data.train_images, index, jitter), None
                images = self.options.augmentation.transform(images)
            # With weights, a last batch whose size will not come again is not worth recording.
            plain = weights is not None and len(index) != self.batch_size
            step = self._training_step.plainly if plain else self._training_step
            values = step(self._learn, index, images, weights, jitter)
        if weights is not None:
            assert values is not None
            self.policy.observe(index, values)

    def _done(self) -> float:
        """The part of the run that is over when the next step starts, in [0, 1]."""
        assert self.order is not None
        if self.images is not None:
            return (self.trained + self.step * self.batch_size) / self.images
        return (len(self.history) + self.step * self.batch_size / len(self.order)) / self.epochs

    def _learn(
        self, index: Tensor, images: Tensor | None, weights: Tensor | None, jitter: Tensor | None
    ) -> Tensor | None:
        """One step of the optimizer; with weights what the policy observes of the images, shape [batch]."""
        if images is None:
            assert isinstance(self.data.train_images, Tensor)
            images = gather(self.data.train_images, index, jitter)
        labels, smoothing = self.data.train_labels[index], self.options.label_smoothing
        losses = None
        with self._autocast():
            logits = self._forward(self._normalised(images))
            if weights is None:
                loss = plain = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
            else:
                losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
                loss, plain = (losses * weights).mean(), losses.mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.options.clip:
            nn.utils.clip_grad_norm_(self.optimizer.parameters, self.options.clip)
        self.optimizer.step()
        if self.options.ema:
            self._average()
        self.loss_sum += plain.detach() * len(index)
        if losses is None or self.policy.observes == "loss":
            return losses.detach() if losses is not None else None
        with torch.no_grad():
            errors = functional.softmax(logits.float(), 1) - functional.one_hot(labels, self.data.classes)
            lengths: Tensor = errors.norm(dim=1)
            return lengths

    @torch.no_grad()
    def _average(self) -> None:
        ours: list[Tensor] = list(self.evaluated.parameters())
        theirs: list[Tensor] = list(self.network.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - self.options.ema)
        for mean, buffer in zip(self.evaluated.buffers(), self.network.buffers(), strict=True):
            mean.copy_(buffer)

    @torch.no_grad()
    def _count(self, images: Tensor, labels: Tensor) -> None:
        with self._autocast():
            logits = self.evaluated(self._normalised(images))
            self.validation_loss += functional.cross_entropy(logits, labels, reduction="sum")
        answers = logits.argmax(1, keepdim=True)
        classes = torch.arange(self.data.classes, device=self.device)
        answered = answers == classes
        self.answers += answered.sum(0)
        self.hits += (answered & (labels[:, None] == classes)).sum(0)
        self.invalid += (~torch.isfinite(logits)).any(1).sum()

    def _normalised(self, images: Tensor) -> Tensor:
        normalised = (images - self._mean) / self._std
        return normalised.permute(0, 3, 1, 2) if normalised.ndim == 4 else normalised

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def state_dict(self) -> dict[str, Any]:
        """Everything that later numbers depend on, as tensors, numbers and text (loadable with weights_only=True)."""
        return {
            "format": FORMAT,
            "network": self.network.state_dict(),
            "average": self.evaluated.state_dict() if self.options.ema else None,
            "random": self.random,
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
            "validation_loss": self.validation_loss,
            "hits": self.hits,
            "answers": self.answers,
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
        if self.options.ema:
            self.evaluated.load_state_dict(state["average"])
        if self.random is not None:
            self.random = [each.clone() for each in state["random"]]
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy.load_state_dict(state["policy"])
        self.shuffles.set_state(state["shuffles"])
        self.augmentation.set_state(state["augmentation"])
        self.order, self.weights, self.jitter = state["order"], state["weights"], state["jitter"]
        self.step, self.seen, self.best = state["step"], state["seen"], state["best"]
        self.best_network = state["best_network"]
        self.loss_sum.copy_(state["loss_sum"])
        for name in ("validation_loss", "hits", "answers"):
            getattr(self, name).copy_(state[name])
        self.invalid.copy_(state["invalid"])
        self.train_seconds, self.validation_seconds = state["train_seconds"], state["validation_seconds"]
        self.selection_seconds, self.joules = state["selection_seconds"], state["joules"]
        self._metered = self.meter.joules()
        self.history = [
            EpochResult(**(row | {"resampling": Resampling(**row["resampling"])})) for row in state["history"]
        ]


def _in_order(images: int) -> Sequence[Tensor]:
    """Indices of so many images, in batches of VALIDATION_BATCH."""
    return torch.split(torch.arange(images), VALIDATION_BATCH)


def scores_of(hits: Tensor, answers: Tensor, images: Tensor, loss: float) -> Scores:
    """From counts by class, int64, shape [classes]: right answers, all answers, and images that there are."""
    there = images > 0
    hits, answers, images = (count[there].double() for count in (hits, answers, images))
    return Scores(
        # A division of whole numbers: the same bits wherever it is made.
        accuracy=float(int(hits.sum()) / int(images.sum())),
        balanced_accuracy=float((hits / images).mean()),
        macro_f1=float((2 * hits / (answers + images)).mean()),
        loss=loss,
    )
