"""Adam, by PyTorch's own function for a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam:
    """`torch.optim.Adam` of one group of parameters: the same bits and the same state.

    Its class imports all of torch.compile when it is made, which nothing here uses: 1.3 s and 160 MB of each worker.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float = 0.0) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.fused = device.type in ("cuda", "cpu")
        # PyTorch wants the count of steps beside the parameters if one kernel does all, else in the processor's memory.
        where = device if self.fused else torch.device("cpu")
        self.steps = [torch.zeros((), dtype=torch.float32, device=where) for _ in self.parameters]
        self.means = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]
        self.squares = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters by their gradients."""
        gradients = [p.grad for p in self.parameters]
        assert all(gradient is not None for gradient in gradients)
        adam(
            self.parameters,
            gradients,  # type: ignore[arg-type]
            self.means,
            self.squares,
            [],
            self.steps,
            fused=self.fused,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
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
