"""The verbs that manage studies: copy, export, import, requeue, delete, init, upgrade, gc."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from storage.errors import UserError
from storage.text import command
from study.cli.options import Force, Name, NewName, Storage, command_for, shown, storage_url

logger = logging.getLogger(__name__)


def copy(
    name: Name,
    source: Annotated[str, typer.Option("--from", help="Database URL of the study.")],
    target: Annotated[str, typer.Option("--to", help="Database URL of the copy.")],
    new_name: NewName = None,
) -> None:
    """Copy a study, finished or not, to another database: SQLite or PostgreSQL.

    Example: study copy quick --from sqlite:///study.db --to postgresql://me@host/studies
    """
    from sqlalchemy.exc import DBAPIError

    from storage.engine import open_storage
    from storage.queries import find
    from storage.study_attributes import set_attribute
    from storage.transfer import COPIED_TO, check_source, is_ours
    from storage.transfer import copy as copy_study

    opened = open_storage(source, create=False, reading=True)
    check_source(opened, name, new_name)  # before the target is made
    count = copy_study(opened, open_storage(target), name, new_name)
    if not is_ours(opened, name):
        logger.info("copied %d trials of %r to %s", count, name, shown(target))
        return
    resume = command_for(target, "resume", new_name or name)
    try:
        engine = open_storage(source, create=False).engine
        set_attribute(engine, find(engine, name)[0], COPIED_TO, f"{new_name or name} in {shown(target)}")
    except (UserError, DBAPIError) as error:
        logger.warning("the source could not be marked as copied, so it can be resumed by mistake: %s", error)
    logger.info("copied %d trials of %r to %s; continue with: %s", count, name, shown(target), resume)


def export(
    name: Name, file: Annotated[Path, typer.Argument(help="A file that is not there yet.")], storage: Storage = None
) -> None:
    """Write a study with its checkpoints and models into one file, to take elsewhere or to keep.

    Example: study export quick quick.study
    """
    from storage.engine import close, open_storage
    from storage.transfer import check_source, is_ours
    from storage.transfer import copy as copy_study
    from storage.url import sqlite_url

    source = open_storage(storage_url(storage), create=False, reading=True)
    check_source(source, name)
    if not is_ours(source, name):
        words = ("copy", name, "--from", shown(storage_url(storage)), "--to", shown(sqlite_url(file)))
        raise UserError(
            f"the study {name!r} was not created by `study launch`, so `study import` would not read it back; "
            f"copy it with: {command(*words)}"
        )
    try:
        file.open("x").close()  # from here on it is this export's, and no other's to remove
    except FileExistsError:
        raise UserError(f"the file {file} is there already; name another") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write {str(file)!r}: {getattr(error, 'strerror', None) or error}; name another file"
        ) from None
    try:
        target = open_storage(sqlite_url(file))
        try:
            count = copy_study(source, target, name)
        finally:
            close(target.engine)
        log = file.with_name(file.name + "-wal")
        if log.exists() and log.stat().st_size:  # the disk is full: the rest of the study is there, not in the file
            raise UserError(f"{file} cannot be completed; make room on its disk")
    except BaseException:
        for beside in ("", "-wal", "-shm"):
            file.with_name(file.name + beside).unlink(missing_ok=True)
        raise
    logger.info("wrote %d trials of %r to %s; read it back with: %s", count, name, file, command("import", str(file)))


def import_(
    file: Annotated[Path, typer.Argument(help="A file that `study export` wrote.")],
    storage: Storage = None,
    new_name: NewName = None,
    checkpoint_store: Annotated[
        str, typer.Option(help="Where its checkpoints go from now on; a folder, a URL or database.")
    ] = "database",
    artifact_store: Annotated[
        str, typer.Option(help="Where its models go from now on; a folder, a URL or database.")
    ] = "database",
) -> None:
    """Import an exported study into a storage. The file is checked first; nothing that it names outside is read.

    Example: study import quick.study
    """
    from storage import object_store
    from storage.transfer import import_study
    from study.config.loading import parse_config

    stores = {"checkpoint": checkpoint_store, "artifacts": artifact_store}
    for section, store in stores.items():
        if store != object_store.DATABASE:
            object_store.probe(store, f"{section}.store")
    url = storage_url(storage)
    name, count = import_study(file, url, new_name, stores=stores, check_config=parse_config)
    resume = command_for(url, "resume", name)
    logger.info("imported %d trials of %r into %s; continue with: %s", count, name, shown(url), resume)


def requeue(
    name: Name,
    storage: Storage = None,
    failed: Annotated[bool, typer.Option("--failed", help="All failed trials.")] = False,
    trial: Annotated[list[int] | None, typer.Option(help="The number of one failed trial. Repeatable.")] = None,
    force: Force = False,
) -> None:
    """Queue failed trials again, to be run from their start.

    Example: study requeue quick --failed
    """
    from storage.engine import open_storage
    from storage.transfer import forget_copy, refuse_if_copied
    from storage.transfer import requeue as requeue_trials

    if failed == bool(trial):
        raise UserError("requeue takes --failed or --trial N, one of them")
    opened = open_storage(storage_url(storage), create=False)
    if not force:
        refuse_if_copied(opened.engine, name, "requeue trials in the copy, or in this one with --force")
    numbers = requeue_trials(opened, name, trials=None if failed else trial)
    if force:
        forget_copy(opened.engine, name)
    resume = command_for(storage_url(storage), "resume", name)
    logger.info("queued %d trials of %r again; run them with: %s", len(numbers), name, resume)


def delete(
    name: Name,
    storage: Storage = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even while workers hold trials of it.")] = False,
) -> None:
    """Delete a study and everything of it. Asks first.

    Example: study delete quick
    """
    from storage.engine import open_storage
    from storage.queries import find, progress
    from storage.transfer import delete as delete_study

    opened = open_storage(storage_url(storage), create=False)
    trials = progress(opened.engine, find(opened.engine, name)[0]).total
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("delete asks before it deletes, and standard input is no terminal; use --yes")
        if not typer.confirm(f"Delete {name!r} with its {trials} trials from {shown(storage_url(storage))}?"):
            return
    delete_study(opened, name, force=force)
    logger.info("deleted %r", name)


def init(storage: Storage = None) -> None:
    """Make the tables of a storage, if they are missing: for a database that others only read or join.

    Example: study init --storage postgresql://me@host/studies
    """
    from storage.engine import open_storage

    url = storage_url(storage)
    open_storage(url)
    logger.info("the tables are there: %s", shown(url))


def upgrade(storage: Storage = None) -> None:
    """Migrate a storage to the present schema, Optuna's tables and ours.

    Example: study upgrade --storage sqlite:///study.db
    """
    from storage.engine import upgrade as upgrade_storage

    url = storage_url(storage)
    done = upgrade_storage(url)
    logger.info("%s: %s", shown(url), "; ".join(done) or "the schema is up to date")


def gc(name: Name, storage: Storage = None) -> None:
    """Remove the checkpoints and models of a study that nothing needs any more: what crashes left in its stores.

    Example: study gc quick
    """
    from storage import artifacts, checkpoints
    from study.create import open_study

    study = open_study(storage_url(storage), name)
    store = study.config.checkpoint.store
    try:
        files = checkpoints.collect_garbage(study.engine, study.id, store)
        store = study.config.artifacts.store
        contents, models = artifacts.collect_garbage(study.engine, study.id, store)
    except OSError as error:
        raise UserError(f"cannot list {store!r}: {error}") from None
    logger.info("removed %d checkpoint files and %d models of %r", len(files), contents + len(models), name)
