"""What a GPU has consumed, where it tells (NVML)."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHARE = "STUDY_GPU_SHARE"
"""Environment variable: the part of a GPU that this process has, if it shares one."""


def gpu_share() -> float:
    return float(os.environ.get(SHARE, 1.0))


class EnergyMeter:
    """The energy counter of one device; silent for devices without one (CPUs, Apple GPUs, GPUs before Volta).

    It counts all that the GPU consumes, whichever process caused it; of that, this process has its share.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle = None
        if device.type != "cuda":
            return
        with suppress(Exception):  # no driver library, no permission, no counter: then there is nothing to tell
            import pynvml
            import torch

            pynvml.nvmlInit()
            # By its UUID: NVML does not know CUDA_VISIBLE_DEVICES.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self._handle = handle

    def joules(self) -> float | None:
        """Joules since the driver was loaded, or None."""
        if self._handle is None:
            return None
        with suppress(Exception):
            import pynvml

            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000.0 * gpu_share()
        return None
