"""What is recorded of a trial beside its numbers: device, memory, versions."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import optuna
import torch

from study import __version__


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch had reserved of a GPU at most during the trial; elsewhere the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def versions() -> dict[str, str]:
    """Of this program (with its commit, where it runs from a clone) and of what its numbers depend on."""
    found = {"study": __version__, "torch": str(torch.__version__), "optuna": optuna.__version__}
    clone = Path(__file__).parents[2]
    if (clone / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(
                ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                capture_output=True, text=True, timeout=5, check=True,
            )  # fmt: skip
            found["commit"] = told.stdout.strip()
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
