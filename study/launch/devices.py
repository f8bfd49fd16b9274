"""The devices of this machine, one a worker."""

from __future__ import annotations

import os

from storage.errors import UserError

MOST_WORKERS_A_CORE = 16


def local_devices(wanted: str, workers: int | None) -> list[str]:
    """One device a worker: all CUDA devices for `auto` and `cuda` (CUDA_VISIBLE_DEVICES counts), else the one there is.

    Raises:
        UserError: a device that this machine does not have.
    """
    most = MOST_WORKERS_A_CORE * (os.cpu_count() or 1)
    if (workers or 1) > most:
        raise UserError(f"--workers must be at most {most} here ({MOST_WORKERS_A_CORE} a core), got {workers}")
    if wanted == "cpu":
        return ["cpu"] * (workers or 1)
    from study.training.device import pick_device  # 3 s, so only where torch is asked

    try:
        device = pick_device(wanted)
    except ValueError as error:
        raise UserError(str(error)) from None
    if device.type == "cuda" and device.index is None:
        import torch

        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    else:
        found = [str(device)]
    return [found[i % len(found)] for i in range(workers or len(found))]
