"""The verbs that change what a study consists of, each honestly: enqueue, exclude, skip, derive."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from storage.errors import UserError
from study.cli.options import Assignments, Code, Force, Name, Storage, command_for, storage_url

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
    force: Force = False,
) -> None:
    """Queue one more trial, with parameters of your choice.

    Example: study enqueue quick alpha=500 beta=0.3
    """
    from storage.transfer import forget_copy, refuse_if_copied
    from study.create import open_study
    from study.enqueue import enqueue as enqueue_trial
    from study.enqueue import parse_parameters

    chosen = parse_parameters(parameters or [])
    url = storage_url(storage)
    study = open_study(url, name)
    if not force:
        refuse_if_copied(study.engine, name, "queue the trial in the copy, or in this one with --force")
    number = enqueue_trial(study, chosen, seed)
    if force:
        forget_copy(study.engine, name)
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


def derive(
    name: Annotated[str, typer.Argument(help="Name of the new study.", metavar="NEW")],
    source: Annotated[str, typer.Option("--from", metavar="NAME", help="The study whose settings and trials it gets.")],
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A config file or preset, which is laid over NAME's.", show_default=False),
    ] = None,
    assignments: Assignments = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Short for --set search.trials=N, among which the trials that are taken over count.",
            show_default=False,
        ),
    ] = None,
    code: Code = None,
    storage: Storage = None,
) -> None:
    """Create a study from another's settings with another search space, with the finished trials that lie in it.

    Example: study derive wider --from quick --set "policy.alpha=[400,600,800]"
    """
    from study.config.extensions import allow
    from study.create import open_study
    from study.derive import derive as derive_study

    allow(code or [])
    url = storage_url(storage)
    done = derive_study(open_study(url, source), name, config, assignments or [], trials)
    for line in done.lines():
        logger.info("%s", line)
    taken, left = len(done.taken), len(done.queued)
    rest = f"queued {left}; run them with: {command_for(url, 'resume', name)}" if left else "all of its trials"
    logger.info("derived %r from %r: took over %d of %d finished trials, %s", name, source, taken, done.finished, rest)
