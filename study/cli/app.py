"""The command `study`: one function a verb, no logic; exceptions become exit codes in one place.

Heavy modules are imported by the verbs that need them: `study --help` loads neither torch nor Optuna.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from storage.errors import UserError
from study.cli import manage, run, show  # noqa: F401 — their verbs
from study.cli.options import app


def main() -> None:
    """Run the command line.

    Exit codes: 0 done; 2 bad input, with one line on stderr; 130 interrupted; 1 anything else.
    """
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except USAGE_ERROR as error:
        _refuse(error.format_message())  # type: ignore[attr-defined]
    except Exception as error:
        if isinstance(error, UserError) or type(error).__name__ == "DataError":
            _refuse(str(error))
        raise
    sys.exit(code or 0)


# Typer keeps its own copy of click; this is UsageError in either.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"study: {' '.join(message.split())}\n")
    sys.exit(2)
