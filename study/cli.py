"""The command `study`: one function a verb, no logic; exceptions become exit codes in one place.

Heavy modules are imported by the verbs that need them: `study --help` loads neither torch nor Optuna.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from storage.errors import UserError

if TYPE_CHECKING:
    from dashboards.tables import View

app = typer.Typer(
    name="study",
    help="Hyperparameter studies of dynamic training on Optuna: launch, watch, kill, move and resume them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# A file or a pipe has no width: tables are as wide as they are.
out = Console(width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True)

Storage = Annotated[
    str | None,
    typer.Option(help="Database URL. Default: $STUDY_STORAGE, else sqlite:///study.db here.", show_default=False),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder of images (imagefolder) or of torchvision's downloads. Default: $STUDY_DATA_ROOT, else a cache.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker processes. Default: one a device.", show_default=False)
]
Name = Annotated[str, typer.Argument(help="Name of the study.")]
NewName = Annotated[str | None, typer.Option("--name", help="Another name for the copy.", show_default=False)]


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="Show this preset's file.")] = None) -> None:
    """List the presets, or show one."""
    from study.parsing import load_config, preset_names, preset_text

    if name is not None:
        typer.echo(preset_text(name), nl=False)
        return
    width = max(map(len, preset_names()))
    for preset in preset_names():
        typer.echo(f"{preset:<{width}}  {load_config(preset).description}")


@app.command()
def launch(
    preset: Annotated[str, typer.Argument(help="A preset; `study presets` lists them.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the study. Default: the preset's.", show_default=False)
    ] = None,
    storage: Storage = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides the preset: --set training.epochs=5. Repeatable."),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Short for --set search.trials=N.", show_default=False)] = None,
    device: Device = "auto",
    workers: Workers = None,
    data_root: DataRoot = None,
) -> None:
    """Start a study, or go on with it where it stopped."""
    from storage.connect import open_storage
    from study import launch as launching
    from study.parsing import load_config
    from study.plan import lay_down, prepare

    more = [] if trials is None else [f"search.trials={trials}"]
    config = load_config(preset, [*(assignments or []), *more])
    url, root = _storage(storage), _data_root(data_root)
    devices = launching.devices_here(device, workers)
    # Everything that can be wrong is found before the database is touched.
    dataset = prepare(config, root, _say)
    new = lay_down(open_storage(url), name or preset, preset, config, dataset)
    _say(f"{'starting' if new else 'going on with'} study {name or preset!r} in {_shown(url)}")
    _work(name or preset, url, devices, root)


@app.command()
def worker(
    name: Name,
    storage: Storage = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    wait: Annotated[bool, typer.Option(help="Wait while others work, in case they die.")] = True,
) -> None:
    """Join a study from this machine with one process on one device."""
    from study.launch import AWAY, STOPPED
    from study.objective import DatabaseAway
    from study.worker import work

    try:
        settled = work(name, _storage(storage), device, _data_root(data_root), wait=wait)
    except DatabaseAway as away:
        _say(str(away))
        raise typer.Exit(AWAY) from None
    if not settled:
        raise typer.Exit(STOPPED)


@app.command()
def resume(
    name: Name,
    storage: Storage = None,
    device: Device = "auto",
    workers: Workers = None,
    data_root: DataRoot = None,
) -> None:
    """Go on with a study with this machine's devices; it needs nothing but its name and its database."""
    from study import launch as launching
    from study.plan import check_here

    url, root = _storage(storage), _data_root(data_root)
    devices = launching.devices_here(device, workers)
    check_here(url, name, root, _say)
    _work(name, url, devices, root)


@app.command()
def status(
    name: Name,
    storage: Storage = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How far a study is."""
    from dashboards import tables

    view = _view(name, storage)
    if as_json:
        typer.echo(json.dumps(tables.status(view), indent=2))
    else:
        out.print(tables.status_text(view), soft_wrap=True)


@app.command()
def report(
    name: Name,
    storage: Storage = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.", show_default=False)] = None,
) -> None:
    """A study's tables on the terminal, and its figures as a page."""
    from dashboards import report as page
    from dashboards import tables

    if html is not None and not html.parent.is_dir():
        raise UserError(f"no folder {html.parent} for the page {html.name}; create it or name another")
    view = _view(name, storage)
    out.print(tables.report_text(view))
    if html is not None:
        try:
            page.write(view, html)
        except OSError as error:
            raise UserError(f"cannot write {html}: {error.strerror}") from None
        _say(f"wrote {html}")


@app.command()
def dashboard(
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine's loopback.")] = 8080,
) -> None:
    """Watch the studies of a storage in optuna-dashboard."""
    from dashboards.serve import serve
    from storage.connect import open_storage

    url = _storage(storage)
    serve(
        open_storage(url, create=False, reading=True),
        "127.0.0.1",
        port,
        lambda at: _say(f"optuna-dashboard on {at} shows {_shown(url)}; Ctrl-C ends it"),
    )


@app.command()
def copy(
    name: Name,
    source: Annotated[str, typer.Option("--from", help="Database URL of the study.")],
    target: Annotated[str, typer.Option("--to", help="Database URL of the copy.")],
    new_name: NewName = None,
) -> None:
    """Copy a study, finished or not, to another database: SQLite or PostgreSQL."""
    from storage.connect import open_storage
    from storage.transfer import copy as copy_study

    count = copy_study(open_storage(source, create=False, reading=True), open_storage(target), name, new_name)
    _say(f"copied {count} trials of {name!r} to {_shown(target)}; go on with: study resume {new_name or name}")


@app.command()
def export(
    name: Name, file: Annotated[Path, typer.Argument(help="A file that is not there yet.")], storage: Storage = None
) -> None:
    """Write a study with its checkpoints into one file, to take elsewhere or to keep."""
    from storage.connect import open_storage
    from storage.transfer import copy as copy_study

    if file.exists():
        raise UserError(f"the file {file} is there already; name another")
    source = open_storage(_storage(storage), create=False, reading=True)
    target = open_storage(f"sqlite:///{file}")
    try:
        count = copy_study(source, target, name)
    except BaseException:
        target.engine.dispose()
        file.unlink(missing_ok=True)
        raise
    target.engine.dispose()  # the last connection to close folds SQLite's log into the file
    _say(f"wrote {count} trials of {name!r} to {file}; back with: study import {file}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file that `study export` wrote.")],
    storage: Storage = None,
    new_name: NewName = None,
) -> None:
    """Bring an exported study into a storage."""
    import optuna

    from storage.connect import open_storage
    from storage.transfer import copy as copy_study

    source = open_storage(f"sqlite:///{file}", create=False, reading=True)
    names = optuna.get_all_study_names(source)
    if len(names) != 1:
        raise UserError(
            f"{file} holds {len(names)} studies, not one; use: study copy NAME --from sqlite:///{file} --to …"
        )
    url = _storage(storage)
    count = copy_study(source, open_storage(url), names[0], new_name)
    _say(f"brought {count} trials of {names[0]!r} into {_shown(url)}; go on with: study resume {new_name or names[0]}")


@app.command()
def requeue(
    name: Name,
    storage: Storage = None,
    failed: Annotated[bool, typer.Option("--failed", help="All failed trials.")] = False,
    trial: Annotated[list[int] | None, typer.Option(help="The number of one failed trial. Repeatable.")] = None,
) -> None:
    """Put failed trials back, to be run again from their start."""
    from storage.connect import open_storage
    from storage.transfer import requeue as put_back

    if failed == bool(trial):
        raise UserError("requeue takes --failed or --trial N, one of them")
    numbers = put_back(open_storage(_storage(storage), create=False), name, trials=None if failed else trial)
    _say(f"put back {len(numbers)} trials of {name!r}; run them with: study resume {name}")


@app.command()
def delete(
    name: Name,
    storage: Storage = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even while workers hold trials of it.")] = False,
) -> None:
    """Delete a study and everything of it. Asks first."""
    from storage.connect import open_storage
    from storage.transfer import delete as delete_study

    view = _view(name, storage)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("delete asks before it deletes, and nobody is here to answer; say --yes")
        if not typer.confirm(f"Delete {name!r} with its {len(view.rows)} trials from {_shown(_storage(storage))}?"):
            return
    delete_study(open_storage(_storage(storage), create=False), name, force=force)
    _say(f"deleted {name!r}")


def _say(text: str) -> None:
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def _work(name: str, url: str, devices: list[str], root: str | None) -> None:
    """Work on a study, then show its table, or how to go on."""
    from dashboards import tables
    from study import launch as launching

    try:
        launching.run(name, url, devices, root, err)
    except KeyboardInterrupt:
        _say(f"stopped; nothing is lost: the same command goes on with study {name!r}")
        raise
    out.print(tables.report_text(_view(name, url)))


def _view(name: str, storage: str | None) -> View:
    from dashboards import tables
    from storage.connect import open_storage

    return tables.read(open_storage(_storage(storage), create=False, reading=True), name)


def _storage(option: str | None) -> str:
    from storage.url import DEFAULT

    return option or os.environ.get("STUDY_STORAGE") or DEFAULT


def _shown(url: str) -> str:
    from storage.url import parse, redact

    return redact(parse(url))


def _data_root(option: Path | None) -> str | None:
    root = option or os.environ.get("STUDY_DATA_ROOT")
    return str(Path(root).expanduser().resolve()) if root else None


def run() -> None:
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
