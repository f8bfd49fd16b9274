"""The images of a study: on the device that trains, or on the host with a thread that gathers a batch ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from study.training.data.dataset import Images
from study.training.data.split import Split

Placement = Literal["device", "host"]
DEVICE_SHARE = 0.5
"""Of a GPU's free memory, that images may take under `auto`: the rest is the network's."""
CHUNK = 4096


class HostImages:
    """Images in the host's memory or in a memory-mapped file.

    Args:
        array: shape [M, …].
        index: int64, shape [N]: which of them, in their order; None: all.
    """

    def __init__(self, array: Images, index: NDArray[np.int64] | None) -> None:
        self.array, self.index = array, index

    def __len__(self) -> int:
        return len(self.array) if self.index is None else len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.array.shape[1:])

    def rows(self, index: NDArray[np.int64] | slice) -> Images:
        """Shape [batch, …]; a copy."""
        if self.index is not None:
            return self.array[self.index[index]]
        return np.array(self.array[index])

    def gather(self, index: Tensor, *, pin: bool) -> Tensor:
        """The images `index`, in page-locked memory if `pin`: a copy to the GPU from there need not be waited for."""
        batch = torch.from_numpy(self.rows(index.numpy()))
        return batch.pin_memory() if pin else batch


Stored = Tensor | HostImages


@dataclass(frozen=True)
class DeviceData:
    """A split for one device, shared by all the trials that a worker trains there.

    Images are uint8 in [0, 255], or float32; shape [N, height, width, channels], or [N, features]. Labels are int64,
    shape [N], on the device.
    """

    train_images: Stored
    train_labels: Tensor
    validation_images: Stored
    validation_labels: Tensor
    classes: int
    """Number of classes."""
    mean: Tensor
    """Per channel of the training images, shape [channels], in the images' units."""
    std: Tensor
    """Per channel of the training images, shape [channels], in the images' units; 1 for one without contrast."""
    test_images: Stored | None = None
    test_labels: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.train_labels.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image: (height, width, channels), or (features,)."""
        return tuple(self.train_images.shape[1:])

    @property
    def dtype(self) -> Literal["uint8", "float32"]:
        """Of the images."""
        images = self.train_images
        stored = images.array.dtype.name if isinstance(images, HostImages) else str(images.dtype).partition(".")[2]
        return "uint8" if stored == "uint8" else "float32"

    @staticmethod
    def from_split(
        split: Split, device: torch.device, *, test: bool = False, placement: Placement | Literal["auto"] = "auto"
    ) -> DeviceData:
        """Bring a split to `device`.

        Args:
            test: the test images too, for one evaluation on them.
            placement: `device`: copied there. `host`: kept in the host's memory or memory-mapped file. `auto`: on the
                host where they would take more than DEVICE_SHARE of a GPU's free memory.
        """
        parts = [split.train, split.validation, *([split.test] if test else [])]
        if placement == "auto":
            placement = _fitting(sum(len(part) * part.images[:1].nbytes for part in parts), device)
        mean, std = channel_statistics(HostImages(split.train.images, split.train.index))
        stored: list[Stored] = []
        for part in parts:
            images = HostImages(part.images, part.index)
            stored.append(images if placement == "host" else _on_device(images, device))
        labels = [torch.from_numpy(np.ascontiguousarray(part.labels)).to(device) for part in parts]
        return DeviceData(
            stored[0],
            labels[0],
            stored[1],
            labels[1],
            len(split.classes),
            mean.to(device),
            std.to(device),
            stored[2] if test else None,
            labels[2] if test else None,
        )


def _fitting(size: int, device: torch.device) -> Placement:
    if device.type != "cuda":
        return "device"
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if size <= DEVICE_SHARE * free else "host"


def _on_device(images: HostImages, device: torch.device) -> Tensor:
    if device.type == "cpu":
        in_memory = images.index is None and not isinstance(images.array, np.memmap)
        return torch.from_numpy(images.array if in_memory else images.rows(slice(None)))
    whole = torch.empty(images.shape, dtype=torch.from_numpy(images.array[:0]).dtype, device=device)
    for start in range(0, len(images), CHUNK):  # a memory-mapped file larger than the host's memory passes through
        part = slice(start, start + CHUNK)
        whole[part] = torch.from_numpy(images.rows(part)).to(device)
    return whole


def channel_statistics(images: HostImages) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel (the last dimension), in chunks that stay small.

    Exact for uint8, from integer sums; for float32 from sums in double precision.
    """
    channels = images.shape[-1]
    kind: Any = np.int64 if images.array.dtype == np.uint8 else np.float64
    first, second = np.zeros(channels, kind), np.zeros(channels, kind)
    for start in range(0, len(images), CHUNK):
        chunk = images.rows(slice(start, start + CHUNK)).reshape(-1, channels)
        chunk = chunk.astype(np.uint32 if kind is np.int64 else np.float64)
        first = first + chunk.sum(axis=0, dtype=kind)
        second = second + (chunk * chunk).sum(axis=0, dtype=kind)
    values = len(images) * int(np.prod(images.shape[1:-1], dtype=np.int64))
    mean = first / values
    std = np.sqrt(np.maximum(second / values - mean**2, 0.0))
    # A channel without contrast stays as it is.
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(np.where(std > 0, std, 1.0), dtype=torch.float32)


def batches(images: HostImages, parts: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The images of each index in `parts` (int64, in the host's memory) on the device, gathered one batch ahead."""
    pin = device.type == "cuda"
    with ThreadPoolExecutor(1, thread_name_prefix="gather") as pool:
        ahead: Future[Tensor] | None = None
        for position, part in enumerate(parts):
            batch = ahead.result() if ahead is not None else images.gather(part, pin=pin)
            if position + 1 < len(parts):
                ahead = pool.submit(images.gather, parts[position + 1], pin=pin)
            yield batch.to(device, non_blocking=True)
