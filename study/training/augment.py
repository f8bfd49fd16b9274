"""Random horizontal flips and 4-pixel shifts of a whole batch, on the device, in one gather."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHIFT = 4


@dataclass(frozen=True)
class Jitter:
    """One draw an image: flip (0 or 1) and the shifts down and right, -4 to 4 pixels. int8, shape [images, 3]."""

    draws: Tensor

    @staticmethod
    def draw(images: int, generator: torch.Generator) -> Jitter:
        flips = torch.randint(0, 2, (images, 1), generator=generator)
        shifts = torch.randint(-SHIFT, SHIFT + 1, (images, 2), generator=generator)
        return Jitter(torch.cat([flips, shifts], dim=1).to(torch.int8))


def gather(images: Tensor, index: Tensor, draws: Tensor | None) -> Tensor:
    """`images[index]`, jittered by `draws` if given; pixels shifted in from outside mirror the edge.

    Args:
        images: uint8, shape [N, height, width, 3].
        index: int64, shape [batch].
        draws: int8, shape [batch, 3], or None for the images as they are.

    Returns:
        uint8, shape [batch, height, width, 3].
    """
    if draws is None:
        return images[index]
    flip, down, right = draws.long().unbind(1)
    rows = _mirrored(torch.arange(images.shape[1], device=images.device) + down[:, None], images.shape[1])
    columns = torch.arange(images.shape[2], device=images.device)
    columns = torch.where(flip[:, None] == 1, images.shape[2] - 1 - columns, columns)
    columns = _mirrored(columns + right[:, None], images.shape[2])
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def _mirrored(position: Tensor, size: int) -> Tensor:
    """Positions beyond the edge, reflected without repeating the edge pixel."""
    return (size - 1) - (size - 1 - position.abs()).abs()
