"""The command `study` in this process: where a process of its own shows nothing more, it only costs the imports."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from storage import engine
from study.cli import app
from study.logs import OURS
from study.worker.supervisor import STOP_SIGNALS


def study(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of the command, without a terminal or standard input; not for workers, whose threads stay.

    Args:
        env: all of its environment; None: this process's.
    """
    out, err = io.StringIO(), io.StringIO()
    writers = set(engine._WRITERS)
    with chdir(cwd), _environment(env), process_state_kept(), redirect_stdout(out), redirect_stderr(err):
        try:
            code = app._run(list(arguments))
        finally:
            for each in set(engine._WRITERS) - writers:  # as at the end of a process
                engine.close(each)
    return subprocess.CompletedProcess(["study", *arguments], code, out.getvalue(), err.getvalue())


def study_process(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "study", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=250)


@contextmanager
def _environment(env: Mapping[str, str] | None) -> Iterator[None]:
    before = dict(os.environ)
    try:
        if env is not None:
            for name in before.keys() - env.keys():
                del os.environ[name]
            os.environ.update(env)
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def process_state_kept() -> Iterator[None]:
    """What the command changes in its process, as it was before: the handlers of signals, log records and warnings."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    loggers = [logging.getLogger(name) for name in (*OURS, "optuna", "py.warnings")]
    loggers.append(logging.getLogger())
    logged = [(each, list(each.handlers), each.level, each.propagate) for each in loggers]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(warnings, "showwarning", warnings.showwarning)
            patch.setattr(sys, "stdin", io.StringIO())
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each, previous, level, propagate in logged:
            each.handlers[:], each.propagate = previous, propagate
            each.setLevel(level)
