"""Adam, AdamW and SGD, by PyTorch's own functions for a step.

PyTorch's optimizer classes import all of torch.compile when one is made, which nothing here uses: 1.3 s and 160 MB of
each worker. The functions compute the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

OptimizerName = Literal["adam", "adamw", "sgd"]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """An optimizer and its parameters; those that mean nothing to it are without effect."""

    name: OptimizerName = "adam"
    lr: float = 0.001
    weight_decay: float = 0.0
    """Added to the gradient (adam, sgd), or of the parameters themselves (adamw)."""
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.0
    nesterov: bool = False


class Optimizer:
    """One group of parameters, with the state that `torch.optim` keeps, changed in place.

    Args:
        scheduled: the rate changes during the run. Where steps are replayed (CUDA), it is then a tensor on the device.
    """

    def __init__(self, parameters: Iterable[Tensor], options: OptimizerOptions, *, scheduled: bool = False) -> None:
        self.options = options
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        device = self.parameters[0].device
        self.fused = device.type in ("cuda", "cpu")
        on_device = scheduled and device.type == "cuda"
        self.rate: float | Tensor = torch.tensor(options.lr, device=device) if on_device else options.lr

    @property
    def state(self) -> list[Tensor]:
        """All tensors that a step changes beside the parameters."""
        raise NotImplementedError

    def scale_rate(self, factor: float) -> None:
        """Make the learning rate `factor` times the options'."""
        if isinstance(self.rate, Tensor):
            self.rate.fill_(self.options.lr * factor)
        else:
            self.rate = self.options.lr * factor

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Of all parameters; zeros for those that the loss does not depend on."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def step(self) -> None:
        """Update the parameters by their gradients."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Adam(Optimizer):
    """`torch.optim.Adam`, or `torch.optim.AdamW` where the options name it."""

    def __init__(self, parameters: Iterable[Tensor], options: OptimizerOptions, *, scheduled: bool = False) -> None:
        super().__init__(parameters, options, scheduled=scheduled)
        # PyTorch wants the count of steps beside the parameters if one kernel does all, else in the processor's memory.
        where = self.parameters[0].device if self.fused else torch.device("cpu")
        self.steps = [torch.zeros((), dtype=torch.float32, device=where) for _ in self.parameters]
        self.means = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]
        self.squares = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]

    @property
    def state(self) -> list[Tensor]:
        return [*self.steps, *self.means, *self.squares]

    @torch.no_grad()
    def step(self) -> None:
        adam(
            self.parameters,
            self.gradients(),
            self.means,
            self.squares,
            [],
            self.steps,
            fused=self.fused,
            amsgrad=False,
            beta1=self.options.beta1,
            beta2=self.options.beta2,
            lr=self.rate,
            weight_decay=self.options.weight_decay,
            eps=1e-8,
            maximize=False,
            decoupled_weight_decay=self.options.name == "adamw",
        )

    def state_dict(self) -> dict[str, Any]:
        kept = zip(self.steps, self.means, self.squares, strict=True)
        return {
            "state": {i: {"step": n, "exp_avg": mean, "exp_avg_sq": square} for i, (n, mean, square) in enumerate(kept)}
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, (step, mean, square) in enumerate(zip(self.steps, self.means, self.squares, strict=True)):
            stored = state["state"][i]
            step.copy_(stored["step"])
            mean.copy_(stored["exp_avg"])
            square.copy_(stored["exp_avg_sq"])


class SGD(Optimizer):
    """`torch.optim.SGD` with momentum, Nesterov's or plain, without dampening."""

    def __init__(self, parameters: Iterable[Tensor], options: OptimizerOptions, *, scheduled: bool = False) -> None:
        super().__init__(parameters, options, scheduled=scheduled)
        # Zeros, where PyTorch begins with the first gradient: without dampening that is the same step.
        self.buffers = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]

    @property
    def state(self) -> list[Tensor]:
        return list(self.buffers)

    @torch.no_grad()
    def step(self) -> None:
        sgd(
            self.parameters,
            self.gradients(),
            list(self.buffers),
            fused=self.fused,
            weight_decay=self.options.weight_decay,
            momentum=self.options.momentum,
            lr=self.rate,
            dampening=0.0,
            nesterov=self.options.nesterov,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"state": {i: {"momentum_buffer": buffer} for i, buffer in enumerate(self.buffers)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, buffer in enumerate(self.buffers):
            buffer.copy_(state["state"][i]["momentum_buffer"])


def make_optimizer(parameters: Iterable[Tensor], options: OptimizerOptions, *, scheduled: bool = False) -> Optimizer:
    """The optimizer that the options name."""
    kind = SGD if options.name == "sgd" else Adam
    return kind(parameters, options, scheduled=scheduled)
