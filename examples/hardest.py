"""An own data policy: each epoch trains on the images whose last loss was largest, `hardest:Hardest`.

In the spirit of Loshchilov and Hutter, "Online Batch Selection for Faster Training of Neural Networks" (2016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from study.training.policies import Resampling, Static


class Hardest(Static):
    """A part `random` of the active set is drawn at random, so that every image is seen again some time."""

    def __init__(self, total: int, seed: int, *, alpha: int, random: float = 0.3) -> None:
        super().__init__(total, seed, alpha=alpha)
        self.random, self.weights = random, torch.ones(alpha)
        self.losses = torch.full((total,), torch.finfo(torch.float32).max)  # unseen images come first

    def observe(self, index: Tensor, values: Tensor) -> None:
        self.losses[index.cpu()] = values.float().cpu()

    def update(self, epoch: int, accuracy: float, done: float = 0.0) -> Resampling:
        before, alpha = self.active, len(self.active)
        order = torch.argsort(self.losses, descending=True, stable=True)
        hard, others = order[: round(alpha * (1 - self.random))], order[round(alpha * (1 - self.random)) :]
        drawn = others[torch.randperm(len(others), generator=self.draws)[: alpha - len(hard)]]
        self.active = torch.cat([hard, drawn])
        return Resampling("own", alpha - int(torch.isin(self.active, before).sum()), self.random)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.losses = state["losses"]
