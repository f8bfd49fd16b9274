"""Faster forms of two layers on a processor: same parameters and buffers, the same results up to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FEW_CHANNELS = 16
MANY_VALUES = 2**18
"""Batch norm of images with so few channels and at least so many values is taken to `_BatchNorm`. PyTorch's loops run
over the channels of a pixel, which are then too few for vector instructions."""
ROW = 256
"""About how many values `_BatchNorm` treats at once."""


def use_cpu_layers(network: nn.Module) -> None:
    """Replace, in place, the layers that have a faster form. Only PyTorch's own, not classes derived from them."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d
        elif type(module) is nn.Conv2d:
            module.__class__ = Conv2d


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`; training on few channels in fp32, it looks at many pixels at once."""

    def forward(self, images: Tensor) -> Tensor:
        usual = self.affine and self.track_running_stats and self.momentum is not None
        if not (self.training and usual and _is_wide(images)):
            return super().forward(images)
        self.num_batches_tracked.add_(1)  # type: ignore[operator]
        normalised: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
            images, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps
        )
        return normalised


def _is_wide(images: Tensor) -> bool:
    return (
        images.device.type == "cpu"
        and images.dtype == torch.float32
        and images.ndim == 4
        and images.shape[1] <= FEW_CHANNELS
        and images.numel() >= MANY_VALUES
        and images.is_contiguous(memory_format=torch.channels_last)
    )


def _rows(images: Tensor) -> Tensor:
    """Images of shape [N, C, H, W] in channels_last as rows of several pixels, shape [rows, pixels * C]: a view."""
    channels = images.shape[1]
    pixels, count = 1, images.numel() // channels
    while pixels * channels < ROW and count % (2 * pixels) == 0:
        pixels *= 2
    return images.permute(0, 2, 3, 1).reshape(count // pixels, pixels * channels)


class _BatchNorm(torch.autograd.Function):
    """Batch norm by rows of several pixels: sums of each column, then of the columns of a channel."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, rate: float, eps: float
    ) -> Tensor:
        rows, channels = _rows(images), images.shape[1]
        count, pixels = images.numel() // channels, rows.shape[1] // channels
        means, variances = (
            each.view(pixels, channels) for each in torch.batch_norm_update_stats(rows, None, None, 0.0)
        )
        ours = means.mean(0)
        spread = variances.mean(0) + (means - ours).square_().mean(0)
        mean.lerp_(ours, rate)
        variance.lerp_(spread * (count / (count - 1)), rate)
        inverse = (spread + eps).rsqrt_()
        factor = weight * inverse
        normalised = torch.addcmul((bias - ours * factor).repeat(pixels), rows, factor.repeat(pixels))
        ctx.save_for_backward(images, weight, ours, inverse)
        return _as_images(normalised, images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        images, weight, mean, inverse = ctx.saved_tensors
        rows, gradients = _rows(images), _rows(gradient.contiguous(memory_format=torch.channels_last))
        channels = len(mean)
        count, pixels = images.numel() // channels, rows.shape[1] // channels
        means, inverses = mean.repeat(pixels), inverse.repeat(pixels)
        _, *sums = torch.ops.aten.native_batch_norm_backward(
            gradients, rows, None, means, inverses, means, inverses, True, 0.0, [False, True, True]
        )
        of_weight, of_bias = (each.view(pixels, channels).sum(0) for each in sums)
        factor = weight * inverse
        slope = -(factor * inverse * of_weight) / count
        offset = -(factor * of_bias) / count - slope * mean
        of_rows = torch.addcmul(offset.repeat(pixels), rows, slope.repeat(pixels))
        of_rows.addcmul_(gradients, factor.repeat(pixels))
        return _as_images(of_rows, images), of_weight, of_bias, None, None, None, None


def _as_images(rows: Tensor, images: Tensor) -> Tensor:
    n, channels, height, width = images.shape
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`; where each output pixel sees the whole input map, it is one product of matrices.

    A 3x3 kernel on a map of 1x1 pixels multiplies padding eight times out of nine, on one of 2x2 five times.
    """

    def forward(self, images: Tensor) -> Tensor:
        windows = self._windows(images)
        if windows is None:
            return super().forward(images)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        seen: Tensor = _WholeMap.apply(images.to(dtype), self.weight, windows)  # type: ignore[no-untyped-call]
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
        return [(row, column) for row in sides[0] for column in sides[1]]


class _WholeMap(torch.autograd.Function):
    """[N, C, H, W] by the kernel's windows to [N, outputs, H', W'], all maps in channels_last."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, windows: list[tuple[slice, slice]]) -> Tensor:  # type: ignore[override]
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
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
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
