"""The images of a study on the device that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.training.data.split import Split


@dataclass(frozen=True)
class DeviceData:
    """A split as tensors on one device, shared by all the trials that a worker trains there."""

    train_images: Tensor
    """uint8 in [0, 255], shape [N, height, width, 3], like the other images."""
    train_labels: Tensor
    """int64, shape [N], like the other labels."""
    validation_images: Tensor
    validation_labels: Tensor
    classes: int
    """Number of classes."""
    mean: Tensor
    """Per channel of the training images, shape [3], in [0, 255]."""
    std: Tensor
    """Per channel of the training images, shape [3], in [0, 255]; 1 for a channel without contrast."""
    test_images: Tensor | None = None
    test_labels: Tensor | None = None

    @staticmethod
    def from_split(split: Split, device: torch.device, *, test: bool = False) -> DeviceData:
        """Copy a split to `device`.

        Args:
            test: the test images too, for one evaluation on them.
        """
        mean, std = _channel_statistics(split.train_images)
        return DeviceData(
            torch.from_numpy(split.train_images).to(device),
            torch.from_numpy(split.train_labels).to(device),
            torch.from_numpy(split.validation_images).to(device),
            torch.from_numpy(split.validation_labels).to(device),
            len(split.classes),
            mean.to(device),
            std.to(device),
            torch.from_numpy(split.test_images).to(device) if test else None,
            torch.from_numpy(split.test_labels).to(device) if test else None,
        )


def _channel_statistics(images: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[Tensor, Tensor]:
    """Exact mean and standard deviation from integer sums, in chunks that stay small."""
    first = second = np.zeros(3, np.int64)
    for start in range(0, len(images), 4096):
        chunk = images[start : start + 4096].reshape(-1, 3).astype(np.uint32)
        first = first + chunk.sum(axis=0, dtype=np.int64)
        second = second + (chunk * chunk).sum(axis=0, dtype=np.int64)
    pixels = images.size // 3
    mean = first / pixels
    std = np.sqrt(np.maximum(second / pixels - mean**2, 0.0))
    # A channel without contrast stays as it is.
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(np.where(std > 0, std, 1.0), dtype=torch.float32)
