"""Learning-rate schedules over the part of a run that is over: the same for policies with different alpha."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["constant", "cosine", "one-cycle", "step"]

ONE_CYCLE_RISE = 0.3
"""Part of the run in which the rate rises, as in `torch.optim.lr_scheduler.OneCycleLR`; `warmup` replaces it."""
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 25e4
"""Factors of the rate at the start and the end of the run, as there."""
MILESTONES = (0.5, 0.75)
"""Parts of the run at which `step` divides the rate by ten (He et al., 2016, section 4.2: CIFAR-10)."""


@dataclass(frozen=True)
class Schedule:
    """A factor of the learning rate."""

    name: ScheduleName = "constant"
    warmup: float = 0.0
    """Part of the run, in [0, 1), over which the rate rises linearly before the schedule begins."""

    @property
    def is_constant(self) -> bool:
        return self.name == "constant" and self.warmup == 0

    def factor(self, done: float) -> float:
        """Of the learning rate, for the step that starts when `done` in [0, 1] of the run is over: images trained on
        of images in all, or where epochs are counted epochs of epochs in all.
        """
        if self.name == "one-cycle":
            rise = self.warmup or ONE_CYCLE_RISE
            if done < rise:
                return _cosine(ONE_CYCLE_START, 1.0, done / rise)
            return _cosine(1.0, ONE_CYCLE_END, (done - rise) / (1 - rise))
        if done < self.warmup:
            # Never zero: the first step of a run trains.
            return max(done / self.warmup, 0.001)
        left = (done - self.warmup) / (1 - self.warmup)
        match self.name:
            case "cosine":
                return _cosine(1.0, 0.0, left)
            case "step":
                return 0.1 ** sum(left >= milestone for milestone in MILESTONES)
            case _:
                return 1.0


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(part, 1.0))) / 2
