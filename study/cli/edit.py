"""The verbs that change what a study consists of, each honestly: enqueue, exclude, skip."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from storage.errors import UserError
from study.cli.options import Name, Storage, command_for, storage_url

logger = logging.getLogger(__name__)


def enqueue(
    name: Name,
    parameters: Annotated[
        list[str] | None, typer.Argument(help="alpha=5000 beta=0.3; the sampler fills in what is missing.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the trial. Default: a grid's first seed, else the study's plus the number."),
    ] = None,
    storage: Storage = None,
) -> None:
    """Queue one more trial, with parameters of your choice.

    Example: study enqueue quick alpha=900 beta=0.3
    """
    from study.create import open_study
    from study.enqueue import enqueue as enqueue_trial
    from study.enqueue import parse_parameters

    chosen = parse_parameters(parameters or [])
    url = storage_url(storage)
    number = enqueue_trial(open_study(url, name), chosen, seed)
    resume = command_for(url, "resume", name)
    logger.info("queued trial %d of %r; workers that run take it, else: %s", number, name, resume)


def exclude(
    name: Name,
    trial: Annotated[list[int], typer.Option(help="The number of a complete or pruned trial. Repeatable.")],
    why: Annotated[str | None, typer.Option(help="The reason, which every report names.", show_default=False)] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take the trials in again.")] = False,
    storage: Storage = None,
) -> None:
    """Leave trials out of sampler, pruner and tables, with a reason that reports name. Nothing is deleted.

    Example: study exclude quick --trial 3 --why "the disk was full"
    """
    from storage import exclusions
    from storage.engine import open_storage
    from storage.queries import find

    if undo == (why is not None):
        raise UserError('exclude takes --why "REASON" or --undo, one of them')
    engine = open_storage(storage_url(storage), create=False).engine
    study_id, _ = find(engine, name)
    numbers = ", ".join(map(str, sorted(set(trial))))
    if why is None:
        exclusions.include(engine, study_id, trial)
        logger.info("trial %s of %r counts again", numbers, name)
        return
    exclusions.exclude(engine, study_id, trial, why)
    logger.info("trial %s of %r is left out; take it in again with --undo", numbers, name)


def skip(
    name: Name,
    trial: Annotated[int, typer.Option(help="The number of a trial that has begun.")],
    storage: Storage = None,
) -> None:
    """End a trial that has begun, as pruned. Its worker takes the next one within seconds.

    Example: study skip quick --trial 2
    """
    from storage.queue import Queue
    from study.create import open_study

    study = open_study(storage_url(storage), name)
    if study.config.search.objective != "accuracy":
        raise UserError(f"{name!r} has two objectives, and no trial of such a study is pruned; let the trial run")
    Queue(study.engine, study.id, store=study.config.checkpoint.store).skip(trial)
    logger.info("trial %d of %r is pruned", trial, name)
