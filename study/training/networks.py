"""The CNN of the paper's Table 1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

# Table 1 contradicts itself in channels; this reading reproduces every spatial size that it prints. Numbers are the
# output channels of 3x3 convolutions with padding 1, "max" a 2x2 max-pool. 32x32 in; the maps leaving the pools are
# 16, 8, 4 and 2 wide; "2 Max Pooling" of the table are the two in a row. Then an average pool to 1x1.
LAYERS: tuple[int | Literal["max"], ...] = (
    *(32, 32, 32, 32), "max", *(64, 64, 64, 64, 64), "max", "max", *(128, 128, 144, 144, 144), "max", *(144, 144, 144),
)  # fmt: skip
HIDDEN = 144


class CNN(nn.Module):
    """[batch, 3, 32, 32] images to [batch, classes] logits (the softmax is in the loss).

    1.54 million parameters and 86 million multiply-adds an image at width 1 and 10 classes. Weights are He-normal from
    `weights`; biases start at zero.
    """

    def __init__(
        self,
        classes: int,
        weights: torch.Generator,
        *,
        width: float = 1.0,
        norm: Literal["batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for layer in LAYERS:
            if layer == "max":
                # Before the ReLU, which then has a quarter to do; the two commute, bit for bit.
                layers.insert(-1, nn.MaxPool2d(2))
                continue
            out = scaled(layer, width)
            # Batch norm has a bias of its own.
            layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=norm == "none"))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(out))
            layers.append(nn.ReLU())
            channels = out
        hidden = scaled(HIDDEN, width)
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=weights)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))
