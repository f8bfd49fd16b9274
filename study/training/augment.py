"""Augmentation of whole batches on the device: flips and shifts an image, and transforms of torchvision a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SHIFT = 4
FLIP, CROP = "flip", "crop"
"""Drawn for each image of an epoch at once, from the trial's own generator, and applied in the gather."""


@dataclass(frozen=True)
class Augmentation:
    """What happens to the images of a training step.

    Transforms of `torchvision.transforms.v2` are called with a batch, so one draw serves all of its images; they draw
    from PyTorch's global generator, which the trainer seeds and stores.
    """

    flip: bool = False
    crop: bool = False
    transforms: tuple[Callable[[Tensor], Tensor], ...] = ()
    """Each takes and returns uint8, shape [batch, channels, height, width]."""

    @property
    def jitters(self) -> bool:
        return self.flip or self.crop

    def draw(self, images: int, generator: torch.Generator) -> Tensor | None:
        """Flips and shifts of so many images: int8, shape [images, 3]; None: neither is wanted."""
        if not self.jitters:
            return None
        draws = Jitter.draw(images, generator).draws
        if not self.flip:
            draws[:, 0] = 0
        if not self.crop:
            draws[:, 1:] = 0
        return draws

    def transform(self, images: Tensor) -> Tensor:
        """The transforms, on uint8 images of shape [batch, height, width, channels]."""
        batch = images.permute(0, 3, 1, 2)
        for transform in self.transforms:
            batch = transform(batch)
        return batch.permute(0, 2, 3, 1)


def make_augmentation(steps: Sequence[tuple[str, Mapping[str, Any]]]) -> Augmentation:
    """From names with their arguments: `flip`, `crop`, or a class of `torchvision.transforms.v2`.

    Raises:
        ValueError: arguments that the class does not take.
    """
    names = [name for name, _ in steps]
    transforms = []
    for name, arguments in steps:
        if name in (FLIP, CROP):
            continue
        from torchvision.transforms import v2

        try:
            transforms.append(getattr(v2, name)(**arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} does not take these arguments: {error}") from None
    return Augmentation(FLIP in names, CROP in names, tuple(transforms))


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
        images: shape [N, height, width, channels]; without `draws` any shape [N, …].
        index: int64, shape [batch].
        draws: int8, shape [batch, 3], or None for the images as they are.

    Returns:
        As `images`, shape [batch, …].
    """
    if draws is None:
        return images[index]
    flip, down, right = draws.long().unbind(1)
    rows = _mirrored(torch.arange(images.shape[1], device=images.device) + down[:, None], images.shape[1])
    columns = torch.arange(images.shape[2], device=images.device)
    columns = torch.where(flip[:, None] == 1, images.shape[2] - 1 - columns, columns)
    columns = _mirrored(columns + right[:, None], images.shape[2])
    if images.device.type != "cpu":
        return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    # The same, twice as fast on a processor: whole rows first, then the columns of each image.
    whole = images[index[:, None], rows]
    gathered = torch.empty_like(whole)
    for source, column, place in zip(whole, columns, gathered, strict=True):
        torch.index_select(source, 1, column, out=place)
    return gathered


def _mirrored(position: Tensor, size: int) -> Tensor:
    """Positions beyond the edge, reflected without repeating the edge pixel."""
    return (size - 1) - (size - 1 - position.abs()).abs()
