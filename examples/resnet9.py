"""A ResNet-9 for 32x32 images, the kind of network that fast CIFAR-10 baselines use: `resnet9:make`.

Residual layers after He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016); 6.6 million parameters at
width 1 and 10 classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """x plus what two blocks make of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(channels, channels), block(channels, channels))

    def forward(self, images: Tensor) -> Tensor:
        changed: Tensor = self.blocks(images)
        return images + changed


class Scaled(nn.Module):
    """Logits times a constant: the networks of fast baselines train better on smaller ones."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor


def block(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def make(classes: int, channels: int, size: int, *, width: float = 1.0, scale: float = 0.125) -> nn.Module:
    """Images of at least 16 pixels to logits."""
    a, b, c, d = (max(8, round(each * width)) for each in (64, 128, 256, 512))
    network = nn.Sequential(
        block(channels, a),
        block(a, b),
        nn.MaxPool2d(2),
        Residual(b),
        block(b, c),
        nn.MaxPool2d(2),
        block(c, d),
        nn.MaxPool2d(2),
        Residual(d),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(d, classes),
        Scaled(scale),
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network
