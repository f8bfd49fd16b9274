"""A faster form of a layer on a processor: same parameters, the same results up to rounding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

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
    oneDNN's gradient of the weights is slow there: docs/measurements/performance.md.
    """

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > self.kernel_size[-1]:  # nearly always, and the rest takes 10 µs
            return super().forward(images)
        windows = self._windows(images)
        if windows is None:
            return super().forward(images)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        seen: Tensor = _WholeMap.apply(images.to(dtype), self.weight, windows)
        return seen if self.bias is None else seen + self.bias.to(dtype)[:, None, None]

    def _windows(self, images: Tensor) -> list[tuple[slice, slice]] | None:
        """The part of the kernel that lies on the map for each output pixel; None: for one it does not cover it."""
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if images.ndim != 4 or images.device.type != "cpu" or not plain or isinstance(self.padding, str):
            return None
        if self.kernel_size == (1, 1):
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


class _WholeMap(torch.autograd.Function):
    """[N, C, H, W] by the kernel's windows to [N, outputs, H', W'], all maps in channels_last."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, windows: list[tuple[slice, slice]]) -> Tensor:
        maps = images.permute(0, 2, 3, 1).reshape(len(images), -1)
        matrix = images.new_empty(len(windows), len(weight), *images.shape[2:], images.shape[1])
        for part, (rows, columns) in zip(matrix, windows, strict=True):
            part.copy_(weight[:, :, rows, columns].permute(0, 2, 3, 1))
        matrix = matrix.view(-1, maps.shape[1])
        ctx.save_for_backward(maps, matrix, weight)
        ctx.windows, ctx.shape = windows, images.shape
        high = len({rows.start for rows, _ in windows})
        return (maps @ matrix.T).view(len(images), high, len(windows) // high, len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        maps, matrix, weight = ctx.saved_tensors
        n, channels, height, width = ctx.shape
        gradients = gradient.permute(0, 2, 3, 1).reshape(n, -1)
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = (gradients @ matrix).view(n, height, width, channels).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            parts = (gradients.T @ maps).view(len(ctx.windows), len(weight), height, width, channels)
            of_weight = torch.zeros_like(weight)
            for part, (rows, columns) in zip(parts, ctx.windows, strict=True):
                of_weight[:, :, rows, columns] += part.permute(0, 3, 1, 2)
        return of_images, of_weight, None
