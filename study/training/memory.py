"""What the C library does with memory that was freed: keep it for the next tensor."""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process reuse its large blocks instead of returning them to the system; whether it could be told.

    glibc maps every block above 32 MB anew and gives it back when it is freed, so that each activation of each step is
    made of fresh pages that the system must clear. See docs/performance.md for what that costs.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
