"""What a worker knows of the launcher that started it, and which signals end both."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

SUPERVISOR_VARIABLE = "STUDY_SUPERVISED"
"""Environment variable of a launcher's workers: the process id of their parent. They end when it does."""
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C, and what Slurm and spot instances send."""


def launcher_ended() -> Callable[[], bool]:
    """Whether the launcher that started this process has ended, if one did."""
    parent = supervisor_pid()
    return lambda: parent != 0 and os.getppid() != parent


def supervisor_pid() -> int:
    """The process id of the launcher that started this process; 0: none did."""
    return int(os.environ.get(SUPERVISOR_VARIABLE, 0))
