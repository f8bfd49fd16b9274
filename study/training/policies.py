"""Which images the next epoch trains on: the paper's `dynamic` policy, its controls, or a policy from own code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from study.training.data.dataset import DataError
from study.training.rng import generator

# Accuracies are multiples of 1/V for V validation images: differences closer than this are rounding, not images.
ROUNDING = 1e-9

Kind = Literal["type1", "type2", "fresh", "soft", "keep", "own"]


@dataclass(frozen=True)
class Resampling:
    """What was done to the active set after an epoch: k images exchanged, with the beta that gave k.

    For `soft` (infobatch): k images left out of the next epoch, a part beta of those below the mean loss. `own` is for
    policies from own code.
    """

    kind: Kind
    k: int = 0
    beta: float = 0.0


KEEP = Resampling("keep")


class Policy(Protocol):
    """A data policy. State has an owner: everything that later draws depend on is in `state_dict`, as tensors, numbers,
    text, lists and dicts (what `torch.load(weights_only=True)` reads).

    One from own code is a class that is called with the number of training images, the trial's seed and its own
    parameters by keyword; `Static` is a base with an active set and a generator.
    """

    observes: Literal["loss", "error"]
    """What `observe` gets: the cross entropy, or the length of the error vector softmax(logits) - onehot(label)."""

    @property
    def active(self) -> Tensor:
        """The images of the next epoch: int64 indices, shape [alpha], none twice."""

    @property
    def weights(self) -> Tensor | None:
        """What each image of `active` counts in the loss, float32, shape [alpha]; None: all the same."""

    def observe(self, index: Tensor, values: Tensor) -> None:
        """Take note of what the images `index` gave in a step, shape [batch]; called each step if there are weights.

        Both tensors are on the training device and may be overwritten afterwards.
        """

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        """Choose the next active set after `epoch` (from 1) ended with validation `accuracy` in [0, 1].

        `done` is the part of the whole run that is over, in (0, 1].
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def first_subset(total: int, alpha: int, draws: torch.Generator) -> Tensor:
    """alpha of `total` indices, uniform; for one generator state a smaller alpha gives a prefix of a larger one."""
    return torch.randperm(total, generator=draws)[:alpha]


def exchange(base: Tensor, total: int, k: int, draws: torch.Generator) -> Tensor:
    """Equation 1: keep |base| - k indices of `base`, add k of its complement in range(total), all uniform.

    Raises:
        ValueError: the complement has fewer than k indices, or base fewer than k.
    """
    if not 0 <= k <= min(len(base), total - len(base)):
        raise ValueError(f"cannot exchange {k} of {len(base)} indices with {total - len(base)} others")
    outside = torch.ones(total, dtype=torch.bool)
    outside[base] = False
    complement = outside.nonzero().squeeze(1)
    kept = base[torch.randperm(len(base), generator=draws)[: len(base) - k]]
    added = complement[torch.randperm(len(complement), generator=draws)[:k]]
    return torch.cat([kept, added])


def decide(accuracy: float, previous: float, delta: float) -> Literal["type1", "type2", "keep"]:
    """The branch of section 3: no gain is type I, a gain of at most delta type II, more keeps the active set."""
    gain = accuracy - previous
    if gain <= ROUNDING:
        return "type1"
    return "type2" if gain <= delta + ROUNDING else "keep"


class _Unweighted:
    weights: Tensor | None = None
    observes: Literal["loss", "error"] = "loss"

    def observe(self, index: Tensor, values: Tensor) -> None:
        pass


class Full(_Unweighted):
    """All images, every epoch."""

    def __init__(self, total: int, seed: int) -> None:
        self.active = torch.arange(total)

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        return KEEP

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Static(_Unweighted):
    """A random alpha of the images, the same in every epoch: the control for `less data`."""

    def __init__(self, total: int, seed: int, *, alpha: int) -> None:
        if not 1 <= alpha <= total:
            raise ValueError(f"alpha must be from 1 to the {total} training images, got {alpha}")
        self.total, self.draws = total, generator(seed, "policy")
        self.active = first_subset(total, alpha, self.draws)

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        return KEEP

    def state_dict(self) -> dict[str, Any]:
        return {"active": self.active, "draws": self.draws.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active = state["active"]
        self.draws.set_state(state["draws"])


class Fresh(Static):
    """A new random alpha every epoch (RS2): the control for `is it the rule, or just fresh data?`."""

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        before = self.active
        self.active = first_subset(self.total, len(before), self.draws)
        k = len(before) - int(torch.isin(self.active, before).sum())
        return Resampling("fresh", k, 1.0)


class Dynamic(Static):
    """Dynamic training: exchange a fraction of the active set when validation accuracy stalls (equations 1 to 3).

    Type I (no gain) exchanges round(beta * alpha) images of the active set. Type II (a gain of at most delta) exchanges
    round(beta_n * alpha), beta_n = beta * gamma**n after epoch n, of the best set so far. With decay = "both", type I
    uses beta_n too. Never more than there are images outside.
    """

    def __init__(
        self,
        total: int,
        seed: int,
        *,
        alpha: int,
        beta: float = 0.5,
        delta: float = 0.01,
        gamma: float = 0.97,
        decay: Literal["type2", "both"] = "type2",
    ) -> None:
        super().__init__(total, seed, alpha=alpha)
        self.beta, self.delta, self.gamma, self.decay = beta, delta, gamma, decay
        self.previous = self.best = float("-inf")
        self.best_active = self.active

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        kind = decide(accuracy, self.previous, self.delta)
        if accuracy > self.best + ROUNDING:  # ties keep the earlier set
            self.best, self.best_active = accuracy, self.active
        self.previous = accuracy
        if kind == "keep":
            return KEEP
        decayed = kind == "type2" or self.decay == "both"
        beta = self.beta * self.gamma**epoch if decayed else self.beta
        base = self.active if kind == "type1" else self.best_active
        k = min(round(beta * len(base)), self.total - len(base))
        self.active = exchange(base, self.total, k, self.draws)
        return Resampling(kind, k, beta)

    def state_dict(self) -> dict[str, Any]:
        own = {"previous": self.previous, "best": self.best, "best_active": self.best_active}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.previous, self.best, self.best_active = state["previous"], state["best"], state["best_active"]


class _Observer:
    """Keeps what the images of an epoch gave on the device until the epoch is over."""

    def __init__(self, total: int) -> None:
        self.values = torch.ones(total)
        """The last value of each image: float32, shape [total]."""
        self._observed: list[tuple[Tensor, Tensor]] = []

    def observe(self, index: Tensor, values: Tensor) -> None:
        self._observed.append((index.clone(), values.detach().float().clone()))

    def _note_observed(self) -> None:
        if self._observed:
            index, values = (torch.cat(parts).cpu() for parts in zip(*self._observed, strict=True))
            self.values[index] = values
            self._observed.clear()


class InfoBatch(_Observer):
    """Soft pruning (Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning", ICLR 2024).

    Of the images whose last loss is below the mean of all last losses, a random `ratio` is left out of the next epoch;
    those that stay in count 1 / (1 - ratio) in the loss, so that the expected gradient is the full one. From the part
    `anneal` of the run on, all images are trained on, unweighted.
    """

    observes: Literal["loss", "error"] = "loss"

    def __init__(self, total: int, seed: int, *, ratio: float = 0.5, anneal: float = 0.875) -> None:
        super().__init__(total)
        self.total, self.ratio, self.anneal = total, ratio, anneal
        self.draws = generator(seed, "policy")
        self._all()

    def _all(self) -> None:
        self.active, self.weights = torch.arange(self.total), torch.ones(self.total)

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        self._note_observed()
        if done >= self.anneal:
            self._all()
            return KEEP
        losses = self.values
        easy = losses < losses.mean()
        candidates = easy.nonzero().squeeze(1)
        k = round(self.ratio * len(candidates))
        left_out = candidates[torch.randperm(len(candidates), generator=self.draws)[:k]]
        stays = torch.ones(self.total, dtype=torch.bool)
        stays[left_out] = False
        self.active = stays.nonzero().squeeze(1)
        self.weights = torch.where(easy, 1 / (1 - self.ratio), 1.0)[self.active]
        return Resampling("soft", k, self.ratio)

    def state_dict(self) -> dict[str, Any]:
        self._note_observed()
        return {
            "active": self.active,
            "weights": self.weights,
            "losses": self.values,
            "draws": self.draws.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active, self.weights, self.values = state["active"], state["weights"], state["losses"]
        self._observed.clear()
        self.draws.set_state(state["draws"])


class El2n(_Observer):
    """A static coreset scored early (Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021).

    Trains on all images for `score_epochs` epochs, then to the end on the alpha images whose error vector
    softmax(logits) - onehot(label) was longest in the last of them. The paper averages the scores of ten networks after
    20 epochs and trains another one; here the trial's own network scores, and its epochs count as trained on.
    """

    observes: Literal["loss", "error"] = "error"

    def __init__(self, total: int, seed: int, *, alpha: int, score_epochs: int = 20) -> None:
        if not 1 <= alpha <= total:
            raise ValueError(f"alpha must be from 1 to the {total} training images, got {alpha}")
        super().__init__(total)
        self.alpha, self.score_epochs, self.total = alpha, score_epochs, total
        self.active, self.weights = torch.arange(total), torch.ones(total)

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        self._note_observed()
        if epoch != self.score_epochs:
            return KEEP
        hardest = torch.argsort(self.values, descending=True, stable=True)[: self.alpha]
        self.active = hardest.sort().values
        self.weights = torch.ones(self.alpha)
        return Resampling("soft", self.total - self.alpha, 0.0)

    def state_dict(self) -> dict[str, Any]:
        self._note_observed()
        return {"active": self.active, "weights": self.weights, "errors": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active, self.weights, self.values = state["active"], state["weights"], state["errors"]
        self._observed.clear()


POLICIES: dict[str, Callable[..., Policy]] = {
    "dynamic": Dynamic,
    "static": Static,
    "full": Full,
    "fresh": Fresh,
    "infobatch": InfoBatch,
    "el2n": El2n,
}
"""Each is called with the number of training images, the seed, and its own parameters by keyword."""


def make_policy(
    name: str, total: int, seed: int, *, make: Callable[..., Policy] | None = None, **parameters: Any
) -> Policy:
    """The policy `name` over `total` training images.

    Args:
        make: own code whose import path `name` is, in the place of the table.

    Raises:
        ValueError: an unknown name, or an alpha outside 1..total.
        DataError: own code that fails or has no such active set.
    """
    if make is None:
        if name not in POLICIES:
            raise ValueError(f"no policy {name!r}; policies: {', '.join(POLICIES)}")
        return POLICIES[name](total, seed, **parameters)
    try:
        policy = make(total, seed, **parameters)
        fault = active_fault(policy, total) or _state_fault(policy)
    except Exception as error:
        raise DataError(f"policy {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if fault:
        raise DataError(f"policy {name!r}: {fault}")
    return policy


def _state_fault(policy: Policy) -> str:
    """Why a checkpoint with the policy's state could not be read back; empty: it could."""
    rule = "state_dict() must hold tensors, numbers, text, lists and dicts alone, for checkpoints to be read back"
    state = policy.state_dict()
    if not isinstance(state, dict):
        return f"{rule}, in a dict, and is of type {type(state).__name__}"
    wrong = [f"{name!r} ({type(value).__name__})" for name, value in state.items() if not _can_be_read_back(value)]
    return f"{rule}; others: {', '.join(wrong)}" if wrong else ""


def _can_be_read_back(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, TypeError, AttributeError):
        return False
    return True


def active_fault(policy: Policy, total: int) -> str:
    """What is wrong with a policy's active set and weights; empty: nothing."""
    index, weights = policy.active, policy.weights
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1 or index.device.type != "cpu":
        return "active must be a tensor of int64 indices of shape [n] in the processor's memory"
    if not 1 <= len(index) <= total or bool((index < 0).any()) or bool((index >= total).any()):
        return f"active must hold 1 to {total} indices from 0 to {total - 1}"
    if len(torch.unique(index)) != len(index):
        return "active must hold no index twice"
    if weights is not None and not (
        isinstance(weights, Tensor)
        and weights.dtype == torch.float32
        and weights.shape == index.shape
        and bool((torch.isfinite(weights) & (weights > 0)).all())
    ):
        return "weights must be None or a float32 tensor above 0 of the shape of active"
    return ""
