"""How many workers start on this machine, and the device of each."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from storage.errors import UserError

MOST_WORKERS_A_CORE = 16
WORKER_BYTES = 5 * 2**28
"""Memory that a worker on a CPU is taken to need: 0.24 GB for the paper's network at quarter width, 1.1 GB at full
width and batch 512 (docs/measurements/performance.md)."""


def local_devices(spec: str, workers: int | None) -> list[str]:
    """One device a worker: all CUDA devices for `auto` and `cuda` (CUDA_VISIBLE_DEVICES counts), else the one there is.

    Args:
        spec: auto, cpu, cuda, cuda:N or mps.
        workers: None: one a GPU; on a CPU one a core, as far as memory goes.

    Raises:
        UserError: a device that this machine does not have, or too many workers.
    """
    most = MOST_WORKERS_A_CORE * usable_cores()
    if (workers or 1) > most:
        raise UserError(f"--workers must be at most {most} here ({MOST_WORKERS_A_CORE} a core), got {workers}")
    if spec == "cpu" or (spec == "auto" and not may_have_gpu()):
        return ["cpu"] * (workers or cpu_workers())
    from study.training.device import pick_device  # 3 s, so only where torch is asked

    try:
        device = pick_device(spec)
    except ValueError as error:
        raise UserError(str(error)) from None
    if device.type == "cpu":
        return ["cpu"] * (workers or cpu_workers())
    if device.type == "cuda" and device.index is None:
        import torch

        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    else:
        names = [str(device)]
    return [names[i % len(names)] for i in range(workers or len(names))]


def may_have_gpu() -> bool:
    """False only where no driver has made a device that torch could find: NVIDIA's (Jetsons and WSL too), AMD's."""
    if sys.platform != "linux":
        return True
    return any(any(Path("/dev").glob(name)) for name in ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg"))


def cpu_workers() -> int:
    """One a core, each with one thread, but no more than memory holds.

    A second thread adds nothing at quarter width (990 images/s with one and with two), both threads wait for each other
    when one core is busy, and one thread computes the same bits on any number of cores.
    """
    return max(1, min(usable_cores(), available_memory() // WORKER_BYTES))


def worker_threads(option: int | None = None) -> int:
    """Threads of a worker on a CPU: the option, else $OMP_NUM_THREADS, else 1."""
    variable = os.environ.get("OMP_NUM_THREADS", "")
    return option or (int(variable) if variable.isdecimal() and int(variable) else 1)


def usable_cores() -> int:
    """The cores that this process may run on, and a container's limit of processor time lets it use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


LOAD_SLACK = 1.0
"""Of a core, that may be in use before a launch mentions it."""


def load_warning(devices: list[str], threads: int) -> str | None:
    """A sentence where workers on CPUs would have to share their cores with what runs on the machine already."""
    if devices[0] != "cpu" or not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if len(devices) * threads + load <= cores + LOAD_SLACK:
        return None
    return (
        f"the load average of the last minute is {load:.1f} on {cores} cores, and the workers want "
        f"{len(devices) * threads}: if the load stays, trials take longer"
    )


def available_memory() -> int:
    """Bytes that processes can have without swapping, where the system says so (Linux); else a large number."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 2**62
    with suppress(OSError, ValueError):  # a container's limit
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return available
