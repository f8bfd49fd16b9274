"""A faster form of a layer on a processor: same parameters, the same results up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_TIMES = 4
"""How much larger than the kernel the matrix may be: 1.8 times for 3x3 on 2x2 pixels, 65 times for 31x31 on 16x16."""


def use_cpu_layers(network: nn.Module) -> None:
    """Replace PyTorch's own convolutions in place; classes derived from them stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`; where each output pixel sees the whole input map, it is one product of matrices.

    A 3x3 kernel on a map of 1x1 pixels multiplies padding eight times out of nine, on one of 2x2 five times, and
    oneDNN's gradient of the weights is slow there: docs/measurements/performance.md. It is made of PyTorch's own
    differentiable operations, so that whatever an own network does with a convolution works.
    """

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > self.kernel_size[-1]:  # nearly always, and the rest takes 10 µs
            return super().forward(images)
        windows = self._windows(images)
        if windows is None:
            return super().forward(images)
        height, width = images.shape[2:]
        maps = images.permute(0, 2, 3, 1).flatten(1)
        seen = functional.linear(maps, self._matrix(windows, height * width * self.in_channels))
        high = len({rows.start for rows, _ in windows})
        # The batch's size by `shape`: `len` of it is fixed when an own network is traced.
        seen = seen.view(images.shape[0], high, len(windows) // high, self.out_channels).permute(0, 3, 1, 2)
        return seen if self.bias is None else seen + self.bias.to(seen.dtype)[:, None, None]

    def _matrix(self, windows: list[tuple[slice, slice]], inputs: int) -> Tensor:
        """A row for each output pixel and channel, [windows * outputs, inputs]: copied a kernel's pixel, all of its
        input channels, at a time, which takes as long as a backward pass of our own did.
        """
        pixels = math.prod(self.kernel_size)
        kernel = torch.arange(pixels).view(self.kernel_size)
        under_map = torch.stack([kernel[rows, columns].flatten() for rows, columns in windows])
        places = under_map[:, None] + pixels * torch.arange(self.out_channels)[:, None]
        by_pixel = self.weight.permute(0, 2, 3, 1).reshape(-1, self.in_channels)
        return by_pixel.index_select(0, places.flatten()).view(-1, inputs)

    def _windows(self, images: Tensor) -> list[tuple[slice, slice]] | None:
        """The part of the kernel that lies on the map for each output pixel; None: for one it does not cover it."""
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if images.ndim != 4 or images.device.type != "cpu" or not plain or isinstance(self.padding, str):
            return None
        if self.kernel_size == (1, 1) or images.shape[1] != self.in_channels:  # the error is PyTorch's
            return None
        sides = []
        for size, kernel, padding, stride in zip(
            images.shape[2:], self.kernel_size, self.padding, self.stride, strict=True
        ):
            starts = range(padding, padding - (size + 2 * padding - kernel) // stride * stride - 1, -stride)
            if not starts or starts[-1] < 0 or padding + size > kernel:
                return None
            sides.append([slice(start, start + size) for start in starts])
        values = math.prod(images.shape[2:]) * len(sides[0]) * len(sides[1])
        if values > MOST_TIMES * math.prod(self.kernel_size):
            return None
        return [(row, column) for row in sides[0] for column in sides[1]]
