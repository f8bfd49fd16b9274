"""The verbs that move studies, put failed trials back, and delete."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from storage.errors import UserError
from study.cli.options import Name, NewName, Storage, app, say, shown, storage_url, view


@app.command()
def copy(
    name: Name,
    source: Annotated[str, typer.Option("--from", help="Database URL of the study.")],
    target: Annotated[str, typer.Option("--to", help="Database URL of the copy.")],
    new_name: NewName = None,
) -> None:
    """Copy a study, finished or not, to another database: SQLite or PostgreSQL."""
    from storage.engine import open_storage
    from storage.transfer import copy as copy_study

    count = copy_study(open_storage(source, create=False, reading=True), open_storage(target), name, new_name)
    say(f"copied {count} trials of {name!r} to {shown(target)}; go on with: study resume {new_name or name}")


@app.command()
def export(
    name: Name, file: Annotated[Path, typer.Argument(help="A file that is not there yet.")], storage: Storage = None
) -> None:
    """Write a study with its checkpoints into one file, to take elsewhere or to keep."""
    from storage.engine import open_storage
    from storage.transfer import copy as copy_study

    if file.exists():
        raise UserError(f"the file {file} is there already; name another")
    source = open_storage(storage_url(storage), create=False, reading=True)
    target = open_storage(f"sqlite:///{file}")
    try:
        count = copy_study(source, target, name)
    except BaseException:
        target.engine.dispose()
        file.unlink(missing_ok=True)
        raise
    target.engine.dispose()  # the last connection to close folds SQLite's log into the file
    say(f"wrote {count} trials of {name!r} to {file}; back with: study import {file}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file that `study export` wrote.")],
    storage: Storage = None,
    new_name: NewName = None,
) -> None:
    """Bring an exported study into a storage."""
    import optuna

    from storage.engine import open_storage
    from storage.transfer import copy as copy_study

    source = open_storage(f"sqlite:///{file}", create=False, reading=True)
    names = optuna.get_all_study_names(source)
    if len(names) != 1:
        raise UserError(
            f"{file} holds {len(names)} studies, not one; use: study copy NAME --from sqlite:///{file} --to …"
        )
    url = storage_url(storage)
    count = copy_study(source, open_storage(url), names[0], new_name)
    say(f"brought {count} trials of {names[0]!r} into {shown(url)}; go on with: study resume {new_name or names[0]}")


@app.command()
def requeue(
    name: Name,
    storage: Storage = None,
    failed: Annotated[bool, typer.Option("--failed", help="All failed trials.")] = False,
    trial: Annotated[list[int] | None, typer.Option(help="The number of one failed trial. Repeatable.")] = None,
) -> None:
    """Put failed trials back, to be run again from their start."""
    from storage.engine import open_storage
    from storage.transfer import requeue as put_back

    if failed == bool(trial):
        raise UserError("requeue takes --failed or --trial N, one of them")
    numbers = put_back(open_storage(storage_url(storage), create=False), name, trials=None if failed else trial)
    say(f"put back {len(numbers)} trials of {name!r}; run them with: study resume {name}")


@app.command()
def delete(
    name: Name,
    storage: Storage = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even while workers hold trials of it.")] = False,
) -> None:
    """Delete a study and everything of it. Asks first."""
    from storage.engine import open_storage
    from storage.transfer import delete as delete_study

    found = view(name, storage)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("delete asks before it deletes, and nobody is here to answer; say --yes")
        if not typer.confirm(f"Delete {name!r} with its {len(found.rows)} trials from {shown(storage_url(storage))}?"):
            return
    delete_study(open_storage(storage_url(storage), create=False), name, force=force)
    say(f"deleted {name!r}")


@app.command()
def init(storage: Storage = None) -> None:
    """Make the tables of a storage, if they are missing: for a database that others only read or join."""
    from storage.engine import open_storage

    url = storage_url(storage)
    open_storage(url)
    say(f"the tables are there: {shown(url)}")
