"""What a GPU has consumed, where it tells (NVML)."""

from __future__ import annotations

from contextlib import suppress

import torch


class EnergyMeter:
    """The energy counter of one device; silent for devices without one (CPUs, Apple GPUs, GPUs before Volta).

    It counts all that the GPU consumes, whichever process caused it.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle = None
        if device.type != "cuda":
            return
        with suppress(Exception):  # no driver library, no permission, no counter: then there is nothing to tell
            import pynvml

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

            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000.0
        return None
