"""Which device trains, in which precision, and whether to the same bits each time."""

from __future__ import annotations

import ctypes
import os
from typing import Literal

import torch

ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that keep oneDNN, which does the convolutions, from newer instructions; the first that is
set counts."""
WITHOUT_BF16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
"""Their values under which oneDNN emulates bf16."""


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1`, `mps`, or the best there is for `auto`.

    Raises:
        ValueError: not a device name, or not a device of this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and (kind != "cuda" or not number.isdigit())):
        raise ValueError(f"a device is auto, cpu, cuda, cuda:0, cuda:1, … or mps, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"no {name}: torch finds no CUDA device on this machine; use --device cpu")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"no {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("no mps: torch finds no Apple GPU on this machine; use --device cpu")
    return torch.device(name)


def pick_precision(wanted: Literal["auto", "bf16", "fp32"], device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 where the processor multiplies it natively.

    On a 2-core Xeon with AMX: fp32 channels_last 193 images/s, bf16 519 (Table 1 network, batch 512). On an EPYC with
    AVX512_BF16, one thread, a quarter of the width: 0.56 s for 900 images in bf16 and 0.7 s in fp32; limited to AVX2
    by oneDNN's environment variable 6.9 s and 0.7 s.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _processor_multiplies_bf16()
    return "bf16" if native else "fp32"


def _processor_multiplies_bf16() -> bool:
    """Whether the processor can and oneDNN may: torch's question asks the processor alone."""
    limit = next(filter(None, map(os.environ.get, ISA_LIMITS)), "")
    return limit.lower() not in WITHOUT_BF16 and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def be_deterministic(wanted: bool) -> None:
    """Same seed, same kind of device: the same bits. CUDA needs CUBLAS_WORKSPACE_CONFIG in the environment too."""
    # Not `use_deterministic_algorithms`, which sets the same and loads torch.compile.
    torch.set_deterministic_debug_mode("error" if wanted else "default")
    # Filling new memory with NaN finds who reads what nobody wrote, for 6 % of a step. The bits are the same without,
    # and the tests of exact resume hold that.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = not wanted


# Parameters of mallopt, from glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process reuse its large blocks instead of returning them to the system; whether the C library allows it.

    glibc maps every block above 32 MB anew and gives it back when it is freed, so that each activation of each step is
    made of fresh pages that the system must clear. See docs/measurements/performance.md for what that costs.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
