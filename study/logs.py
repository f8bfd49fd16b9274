"""Logging of the command `study`: one logger a module, rich on a terminal, plain lines elsewhere, a file on request."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from storage.errors import UserError
from storage.text import printable

OURS = ("study", "storage", "dashboards")
STYLES = {logging.DEBUG: "dim", logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}
PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: "}
"""Of plain lines, by which a launcher knows the level of what its workers log."""


@cache
def stderr_console() -> Console:
    """The one console for progress and log lines: progress bars stay below the lines."""
    return Console(stderr=True, highlight=False, markup=False)


class ConsoleHandler(logging.Handler):
    """Log records as lines on stderr: coloured by level on a terminal, with a prefix by level elsewhere."""

    shows_finished = False
    """Whether a line of a worker about a trial that has finished is shown: where no launcher has one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console = getattr(record, "console", True)
            if self.level > logging.DEBUG and not (self.shows_finished if console == "finished" else console):
                return
            line = printable(self.format(record))
            console = stderr_console()
            if console.is_terminal:
                console.print(Text(line, style=STYLES.get(record.levelno, "")), soft_wrap=True)
            else:
                sys.stderr.write(f"{PREFIXES.get(record.levelno, '')}{line}\n")
                sys.stderr.flush()
        except OSError:  # whoever read it is gone; the work must go on
            pass
        except Exception:  # noqa: BLE001 — arguments that do not fit the message: as `logging` does
            self.handleError(record)


MOST_SEEN = 10_000
"""Messages that are remembered at a time."""


class OncePerMessage(logging.Filter):
    """Lets each message of a library through a handler once: Optuna repeats some for every trial.

    Of a handler, because a logger's filters do not see the records of the loggers below it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] in OURS:
            return True
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 — the handler meets it again, and says so
            return True
        new = message not in self.seen
        if len(self.seen) >= MOST_SEEN:
            self.seen.clear()
        self.seen.add(message)
        return new


def configure(verbosity: int = 0, file: Path | None = None) -> None:
    """Send our log records, and warnings of Optuna, of Python and of any other logger, to stderr and to a file.

    Args:
        verbosity: below 0 warnings only, 0 also information, above 0 also debugging.
        file: gets every record of at least that level with time, process and module.

    Raises:
        UserError: the file cannot be written.
    """
    level = logging.WARNING if verbosity < 0 else logging.DEBUG if verbosity else logging.INFO
    handlers: list[logging.Handler] = [ConsoleHandler()]
    if file is not None:
        try:
            handlers.append(logging.FileHandler(file, encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            raise UserError(f"cannot write the log file {file}: {error.strerror}; name another") from None
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    for handler in handlers:
        handler.setLevel(level)
        handler.addFilter(OncePerMessage())
    for name in OURS:  # information also where these handlers do not want it: `study logs` shows it
        _attach(logging.getLogger(name), handlers, min(level, logging.INFO))
    for name in ("optuna", "py.warnings"):
        _attach(logging.getLogger(name), handlers, logging.WARNING)
    root = logging.getLogger()  # its level stays: WARNING, unless own code sets another
    for former in [each for each in root.handlers if getattr(each, "of_study", False)]:
        root.removeHandler(former)
    for handler in handlers:
        handler.of_study = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    warnings.showwarning = _log_warning


@contextmanager
def shown_by_default() -> Iterator[None]:
    """Meanwhile our lines are on stderr, from INFO on, in a program that has configured no logging: neither the root
    logger nor `study` has a handler. Other loggers, and warnings of Python, stay as they are.
    """
    if logging.getLogger().handlers or logging.getLogger("study").handlers:
        yield
        return
    handler = ConsoleHandler(logging.INFO)
    loggers = [logging.getLogger(name) for name in OURS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(each.level or logging.INFO)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)


def _attach(logger: logging.Logger, handlers: list[logging.Handler], level: int) -> None:
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = False


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """A Python warning as one line of ours, without the path of the library that raised it."""
    logging.getLogger("py.warnings").warning("%s", " ".join(str(message).split()))
