"""The command `study`: its verbs in groups, their shared options, and the one place where exceptions become exit codes.

Heavy modules are imported by the verbs that need them: `study --help` loads neither torch nor Optuna.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import platform
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from storage.errors import UserError
from storage.text import one_line, without_passwords
from study import exit_codes, logs
from study.cli import edit, manage, model, publish, run, show
from study.cli.options import storage_url

logger = logging.getLogger(__name__)

EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in exit_codes.MEANINGS.items()) + "."

app = typer.Typer(
    name="study",
    help="Hyperparameter studies of dynamic training on Optuna: launch, watch, kill, move and resume them.",
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    "Run a study": (run.launch, run.check, run.resume, run.stop, run.worker, run.confirm),
    "Look at it": (
        show.status,
        show.logs,
        show.list_,
        show.report,
        show.compare,
        publish.publish,
        show.dashboard,
    ),
    "The model": (model.model, model.predict, model.evaluate),
    "Edit it": (edit.enqueue, edit.exclude, edit.skip, edit.derive),
    "Presets": (show.presets, run.bench),
    "Manage": (
        manage.copy,
        manage.export,
        manage.import_,
        manage.requeue,
        manage.delete,
        manage.init,
        manage.upgrade,
        manage.gc,
    ),
}
"""Panel of the help to its verbs, in the order of a user's day."""


def _with_logging(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the options -v, -q and --log-file."""
    options: dict[str, Any] = {
        "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Log more.", rich_help_panel="Logging")],
        "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only.", rich_help_panel="Logging")],
        "log_file": Annotated[
            Path | None,
            typer.Option(help="Log into this file too.", show_default=False, rich_help_panel="Logging"),
        ],
    }
    hints = typing.get_type_hints(verb, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(verb).parameters.values()]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=options[name])
        for name, default in (("verbose", False), ("quiet", False), ("log_file", None))
    ]

    @functools.wraps(verb)
    def with_logging(*args: Any, verbose: bool, quiet: bool, log_file: Path | None, **kwargs: Any) -> None:
        logs.configure(verbose - quiet, log_file)
        try:
            verb(*args, **kwargs)
        except Exception as error:
            if "storage" in kwargs and (fault := _stored_fault(error, kwargs["storage"])):
                raise UserError(fault) from error
            raise

    with_logging.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    with_logging.__annotations__ = hints | options
    return with_logging


for panel, verbs in VERBS.items():
    for function in verbs:
        app.command(function.__name__.rstrip("_"), rich_help_panel=panel)(_with_logging(function))


def _version(wanted: bool) -> None:
    if wanted:
        from study import __version__

        typer.echo(f"study {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit with one of `study.exit_codes`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal must not end a study
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        return int(app(args=arguments, standalone_mode=False) or exit_codes.OK)
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    except typer.TyperException as error:
        return _fail(error.format_message(), exit_codes.BAD_INPUT)
    except typer.Abort:
        return exit_codes.INTERRUPTED
    except BrokenPipeError:  # `study report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.OK
    except Exception as error:  # noqa: BLE001 — the boundary
        if _is_expected(error):
            return _fail(f"{error}{_place_of(error)}", exit_codes.BAD_INPUT)
        if _is_outage(error):
            return _fail(f"the database does not answer: {error}", exit_codes.DATABASE_UNAVAILABLE)
        return _fail(_report(error, arguments), exit_codes.UNEXPECTED)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"study: {without_passwords(one_line(message))}\n")
    return code


def _is_expected(error: Exception) -> bool:
    """Whether the message is for the user: a sentence with the rule, the value and the fix."""
    # Only a verb that loaded the module can have raised its error: no verb pays for numpy here.
    loaded = sys.modules.get("study.training.data.dataset")
    return isinstance(error, UserError) or (loaded is not None and isinstance(error, loaded.DataError))


def _is_outage(error: Exception) -> bool:
    loaded = sys.modules.get("storage.retry")
    return loaded is not None and bool(loaded.is_transient(error))


def _place_of(error: Exception) -> str:
    """The line of own code that an error comes from."""
    loaded = sys.modules.get("study.config.extensions")
    return "" if loaded is None else str(loaded.place_of(error.__cause__))


def _stored_fault(error: Exception, storage: str | None) -> str | None:
    """What is wrong in the database, for an error that its content may have caused; None: nothing, or not that error.

    Only after such an error, because it reads the whole file; PostgreSQL has no text in a column of numbers.
    """
    database_errors = getattr(sys.modules.get("sqlalchemy.exc"), "DatabaseError", ())
    if not isinstance(error, (TypeError, ValueError, LookupError, ArithmeticError, database_errors)):
        return None
    if _is_expected(error) or _is_outage(error):
        return None
    from storage.import_check import stored_fault
    from storage.url import file_of, parse, redact

    url = parse(storage_url(storage))
    file = file_of(url)
    fault = stored_fault(file) if file is not None and file.is_file() else None
    if fault is None:
        return None
    reason = f"{type(error).__name__}: {getattr(error, 'orig', None) or error}"
    return f"the database {redact(url)} cannot be read: {fault} ({reason}); correct it, or use a copy from before"


def _report(error: Exception, arguments: list[str]) -> str:
    """Write what a bug report needs into a file; the sentence that names it."""
    packages = ("dynamic-training-study", "optuna", "optuna-dashboard", "torch", "torchvision", "sqlalchemy", "plotly")
    versions = {name: _installed(name) for name in packages}
    text = "\n".join(
        [
            f"study {' '.join(arguments)}",
            f"Python {platform.python_version()} on {platform.platform()}",
            *(f"{name} {version}" for name, version in versions.items()),
            "".join(traceback.format_exception(error)),
        ]
    )
    name = f"study-error-{time.strftime('%Y%m%d-%H%M%S')}-"
    summary = f"unexpected {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix=name, suffix=".log", delete=False, encoding="utf-8") as file:
            file.write(without_passwords(text))
    except OSError:
        sys.stderr.write(without_passwords(text))
        return summary
    return f"{summary} — please report it with {file.name}"


def _installed(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
