"""The verbs that run studies: launch, check, resume, stop, worker, confirm, bench."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from storage.errors import UserError
from study import exit_codes, logs
from study.cli.options import (
    Address,
    AllowFailures,
    Assignments,
    Budget,
    Code,
    Cpus,
    DataRoot,
    Detach,
    Device,
    Force,
    Gpus,
    LauncherOption,
    Name,
    OnEvent,
    Storage,
    Threads,
    Workers,
    command_for,
    data_root,
    option_for,
    out,
    shown,
    storage_url,
)

if TYPE_CHECKING:
    from study.create import OpenStudy
    from study.launchers.launcher import Launcher, LaunchOptions

logger = logging.getLogger(__name__)

Trials = Annotated[int | None, typer.Option(help="Short for --set search.trials=N.", show_default=False)]
Objective = Annotated[
    str | None,
    typer.Option(help="accuracy, or accuracy,images: short for --set search.objective=…", show_default=False),
]
Source = Annotated[str, typer.Argument(help="A preset (`study presets` lists them) or a config file: my.toml.")]


def launch(
    source: Source,
    name: Annotated[
        str | None, typer.Option(help="Name of the study. Default: the preset's or the file's.", show_default=False)
    ] = None,
    storage: Storage = None,
    assignments: Assignments = None,
    trials: Trials = None,
    objective: Objective = None,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER",
            help="A study of the same storage, data, network and length whose finished trials inform the sampler.",
            show_default=False,
        ),
    ] = None,
    budget: Budget = None,
    device: Device = "auto",
    workers: Workers = None,
    threads: Threads = None,
    root: DataRoot = None,
    code: Code = None,
    allow_failures: AllowFailures = 0,
    force: Force = False,
    launcher: LauncherOption = "local",
    address: Address = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    detach: Detach = False,
    on_event: OnEvent = None,
) -> None:
    """Start a study from a preset or a config file, or continue it where it stopped.

    Example: study launch quick --set training.epochs=6
    """
    from study.launchers.launcher import LaunchOptions

    url = storage_url(storage)
    options = LaunchOptions(
        launcher=launcher, device=device, workers=workers, threads=threads, address=address,
        gpus_per_worker=gpus, cpus_per_worker=cpus, detach=detach, storage_option=storage,
    )  # fmt: skip
    # A local one begins to import what workers need; to join a cluster takes seconds.
    early = _launcher(options, url, budget) if launcher == "local" else None

    from storage.engine import open_storage
    from storage.study_name import check_study_name
    from study.after import informing
    from study.config.loading import load
    from study.create import OpenStudy, config_warnings, create_study, load_study, prepare

    loaded = load(source, _with_shorts(assignments, trials, objective))
    _allow_code(code, loaded.folder)
    study_name = loaded.name if name is None else name
    check_study_name(study_name)
    images = data_root(root) or loaded.data_root
    workforce, budgets = early or _launcher(options, url, budget)
    hook = _event_command(on_event, detach)
    # Everything that can be wrong is found before the database is touched.
    data = prepare(loaded.config, images)
    opened = open_storage(url)
    informed = None if after is None else informing(opened, study_name, after, data)
    is_new = create_study(opened, study_name, loaded.name, data.config, data, informed=informed)
    study = OpenStudy(url, opened, *load_study(opened, study_name))
    with _resumable(study, images):
        _refuse_if_copied(study, force)
        _set_budgets(study, budgets)
        _refuse_if_stopped(study)
        logger.info("%s study %r in %s", "starting" if is_new else "resuming", study_name, shown(url))
        if is_new:
            if informed is not None:
                logger.info("%s", informed)
            for sentence in config_warnings(data.config, data):
                logger.warning("%s", sentence)
        _log_estimate(study, workforce, data.sizes)
        _run(study, workforce, images, allow_failures, hook)


def check(
    source: Source,
    assignments: Assignments = None,
    trials: Trials = None,
    objective: Objective = None,
    device: Device = "auto",
    root: DataRoot = None,
    code: Code = None,
) -> None:
    """Validate a config and say what it will run, without touching a database.

    Example: study check quick
    """
    import math

    from study import estimate
    from study.config.loading import load
    from study.create import config_warnings, prepare
    from study.launchers.worker_count import local_devices
    from study.search import space
    from study.trial import components

    loaded = load(source, _with_shorts(assignments, trials, objective))
    _allow_code(code, loaded.folder)
    data = prepare(loaded.config, data_root(root) or loaded.data_root)
    config = data.config
    queued = space.queued_trials(config)
    typer.echo(f"{loaded.name}: {len(queued)} trials, sampler {config.search.sampler.kind}")
    for name in config.searched():
        typer.echo(f"  {name}: {space.shown(config.searched()[name])}")
    train, validation, test = data.sizes
    what = f"images of {' x '.join(map(str, data.shape))}" if len(data.shape) == 3 else f"rows of {data.shape}"
    if len(data.shape) == 1:
        what = f"rows of {data.shape[0]:,} features"
    typer.echo(
        f"data: {config.data.name}, {len(data.classes)} classes, {what}; "
        f"{train:,} train, {validation:,} validate, {test:,} test ({config.data.protocol} protocol)"
    )
    for name in config.networks():
        parameters = components.first_parameters(config, network=name)
        network = components.make_network(parameters, data.shape, len(data.classes), config.search.seed)
        count = sum(math.prod(each.shape) for each in network.parameters())
        typer.echo(f"network: {name}, {count:,} parameters")
    text = estimate.recalled(config, local_devices(device, None), data.sizes)
    typer.echo(f"time: {text or f'not measured on this machine; study bench {source}'}")
    for sentence in config_warnings(config, data):
        logger.warning("%s", sentence)


def resume(
    name: Name,
    storage: Storage = None,
    budget: Budget = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="X|none", help="In the place of search.target from now on.", show_default=False),
    ] = None,
    patience: Annotated[
        str | None,
        typer.Option(metavar="N|none", help="In the place of search.patience from now on.", show_default=False),
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
    threads: Threads = None,
    root: DataRoot = None,
    code: Code = None,
    allow_failures: AllowFailures = 0,
    force: Force = False,
    launcher: LauncherOption = "local",
    address: Address = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    detach: Detach = False,
    on_event: OnEvent = None,
) -> None:
    """Continue a study; it needs nothing but its name and its database.

    Example: study resume quick --workers 2
    """
    from study.launchers.launcher import LaunchOptions

    url = storage_url(storage)
    options = LaunchOptions(
        launcher=launcher, device=device, workers=workers, threads=threads, address=address,
        gpus_per_worker=gpus, cpus_per_worker=cpus, detach=detach, storage_option=storage,
    )  # fmt: skip
    workforce, budgets = _launcher(options, url, budget)  # first: it begins to import what workers need

    from storage import early_end
    from storage.stop_requests import withdraw_stop
    from study.create import check_data, open_study

    _allow_code(code)
    hook = _event_command(on_event, detach)
    study = open_study(url, name)
    with _resumable(study, data_root(root)):
        present = early_end.read_rules(study.engine, study.id)
        rules = early_end.parse_rules(present, target, patience)
        if launcher == "local":  # elsewhere the workers check theirs
            check_data(study, data_root(root))
        _refuse_if_copied(study, force)
        _set_budgets(study, budgets)
        if rules != present:
            early_end.set_rules(study.engine, study.id, rules)
        withdraw_stop(study.engine, study.id)
        _refuse_if_stopped(study)
        _log_estimate(study, workforce)
        _run(study, workforce, data_root(root), allow_failures, hook)


def stop(name: Name, storage: Storage = None) -> None:
    """Ask all workers of a study, wherever they run, to release their trials and end.

    Example: study stop quick
    """
    from storage.stop_requests import request_stop
    from study.create import open_study

    url = storage_url(storage)
    study = open_study(url, name)
    request_stop(study.engine, study.id)
    logger.info("the workers of %r will stop; continue with: %s", name, command_for(url, "resume", name))


def worker(
    name: Name,
    storage: Storage = None,
    device: Device = "auto",
    threads: Threads = None,
    root: DataRoot = None,
    code: Code = None,
    wait: Annotated[bool, typer.Option(help="Wait while others work, in case they die.")] = True,
) -> None:
    """Add one worker process on one device of this machine to a study.

    Example: study worker quick --device cuda:1
    """
    from storage.garbage import no_garbage_search
    from study.launchers.worker_count import may_have_gpu, worker_threads

    if device == "cpu" or (device == "auto" and not may_have_gpu()):
        # As `study launch` does for its workers; before torch is imported, which reads it once.
        os.environ["OMP_NUM_THREADS"] = str(worker_threads(threads))
    with no_garbage_search():
        from study.trial.runner import DatabaseUnavailable
        from study.worker.supervisor import supervisor_pid
        from study.worker.worker import WorkerBroken, work

    _allow_code(code)
    logs.ConsoleHandler.shows_finished = supervisor_pid() == 0
    url = storage_url(storage)
    try:
        exit_code = work(name, url, device, data_root(root), wait=wait)
    except WorkerBroken as error:
        # What is to be read is the traceback, which each attempt has stored.
        logger.error("%s; traceback: %s", error, command_for(url, "logs", name))
        raise typer.Exit(exit_codes.UNEXPECTED) from None
    except DatabaseUnavailable as error:
        logger.error("%s", error)
        raise typer.Exit(exit_codes.DATABASE_UNAVAILABLE) from None
    raise typer.Exit(exit_code)


def confirm(
    name: Name,
    top: Annotated[int, typer.Option(min=1, help="How many of the best settings.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Fresh seeds for each.")] = 5,
    new_name: Annotated[
        str | None, typer.Option("--name", help="Name of the confirming study. Default: NAME-confirmed.")
    ] = None,
    storage: Storage = None,
    device: Device = "auto",
    workers: Workers = None,
    threads: Threads = None,
    root: DataRoot = None,
    code: Code = None,
    allow_failures: AllowFailures = 0,
    again: Annotated[
        bool, typer.Option("--again", help="Ask the test split again although a confirmation has; it is recorded.")
    ] = False,
) -> None:
    """Run the best settings again on fresh seeds, and evaluate each of these trials once on the test split.

    Example: study confirm tpe --top 3 --seeds 5
    """
    from study.launchers.launcher import LaunchOptions

    url = storage_url(storage)
    # First: it begins to import what workers need.
    workforce, _ = _launcher(LaunchOptions(device=device, workers=workers, threads=threads), url, None)

    from study.confirm import plan
    from study.create import OpenStudy, create_study, load_study, open_study, prepare

    _allow_code(code)
    searched = open_study(url, name)
    confirming = new_name or f"{name}-confirmed"
    confirmation = plan(searched, confirming, top, seeds, again=again)
    data = prepare(confirmation.config, data_root(root))
    if data.fingerprint != searched.study.user_attrs["data_fingerprint"]:
        raise UserError(f"the data here are not those of the study {name!r}; use the same images (--data-root)")
    create_study(searched.storage, confirming, f"confirm {name}", data.config, data, confirmation.attributes)
    study = OpenStudy(url, searched.storage, *load_study(searched.storage, confirming))
    confirmation.record(study)
    with _resumable(study, data_root(root)):
        _refuse_if_stopped(study)
        logger.info("confirming %d settings of %r as %r in %s", top, name, confirming, shown(url))
        _run(study, workforce, data_root(root), allow_failures)


def bench(
    source: Annotated[
        str | None, typer.Argument(help="A preset or a config file. Default: all presets.", show_default=False)
    ] = None,
    assignments: Assignments = None,
    device: Device = "auto",
    code: Code = None,
) -> None:
    """Measure this machine for some seconds and say how long a preset will take on it.

    Example: study bench paper-grid
    """
    from study import estimate
    from study.config.loading import load, preset_names
    from study.launchers.worker_count import local_devices, worker_threads

    configs = {}
    for each in [source] if source else preset_names():
        loaded = load(each, assignments or [])
        _allow_code(code, loaded.folder)
        configs[loaded.name] = loaded.config
    devices = local_devices(device, None)
    paces: dict[tuple[object, ...], estimate.Pace] = {}
    for name, config in configs.items():
        key = estimate.key(config)
        if key not in paces:
            paces[key] = estimate.measure(config, devices[0], worker_threads())
            estimate.remember(config, devices[0].partition(":")[0], paces[key])
        typer.echo(f"{name}: {estimate.estimate(config, paces[key], estimate.parallel(devices))}")


def _with_shorts(assignments: list[str] | None, trials: int | None, objective: str | None) -> list[str]:
    """The assignments of `--set`, `--trials` and `--objective`."""
    shorts = {"search.trials": trials, "search.objective": objective}
    return [*(assignments or []), *(f"{key}={value}" for key, value in shorts.items() if value is not None)]


def _allow_code(folders: list[Path] | None, config_folder: Path | None = None) -> None:
    """Allow own code: in the folders of `--code`, and in that of the config file that a person launches."""
    from study.config.extensions import allow

    allow([*(folders or []), *([] if config_folder is None else [config_folder])])


def _launcher(options: LaunchOptions, url: str, budget: list[str] | None) -> tuple[Launcher, dict[str, float] | None]:
    """The launcher, and the new budgets that its workers can measure; None: budgets stay as they are."""
    from study.launchers.launcher import make_launcher

    launcher = make_launcher(options, url)
    if budget is None:
        return launcher, None
    from storage.budgets import parse_budgets

    budgets = parse_budgets(budget)
    launcher.check_budgets(budgets)
    return launcher, budgets


def _event_command(text: str | None, detach: bool) -> list[str] | None:
    from study.launchers.hooks import parse_command

    if text is not None and detach:
        raise UserError("--on-event is run by the launcher, which --detach ends; give one of them")
    return None if text is None else parse_command(text)


def _set_budgets(study: OpenStudy, budgets: dict[str, float] | None) -> None:
    from storage.budgets import set_budgets

    if budgets is not None:
        set_budgets(study.engine, study.id, budgets)


def _refuse_if_stopped(study: OpenStudy) -> None:
    """A request to stop holds while there is work left: only `resume` withdraws it."""
    from storage.queries import progress
    from storage.stop_requests import STOP_REQUESTED, read_controls

    if read_controls(study.engine, study.id).stop:
        now = progress(study.engine, study.id)
        if now.finished < now.total:
            how = command_for(study.url, "resume", study.name)
            logger.warning("study %r was %s; continue with: %s", study.name, STOP_REQUESTED, how)
            raise typer.Exit(exit_codes.STOPPED)


def _refuse_if_copied(study: OpenStudy, force: bool) -> None:
    """Raises:
    UserError: the study was copied and has work left: its copy and it would diverge.
    """
    from storage.queries import progress
    from storage.transfer import forget_copy, refuse_if_copied

    now = progress(study.engine, study.id)
    if now.finished == now.total:
        return
    if force:
        forget_copy(study.engine, study.name)
    else:
        refuse_if_copied(study.engine, study.name, "resume the copy, or this one with --force")


@contextmanager
def _resumable(study: OpenStudy, root: str | None) -> Iterator[None]:
    """Once its database was open, a study that cannot connect to it any more has met an outage, not bad input."""
    from storage.errors import Unreachable
    from storage.retry import is_transient

    try:
        yield
    except Exception as error:
        if not (isinstance(error, Unreachable) or is_transient(error)):
            raise
        logger.error("%s", error if isinstance(error, Unreachable) else getattr(error, "orig", None) or error)
        logger.warning("%s", _how_to_continue(study, exit_codes.DATABASE_UNAVAILABLE, root))
        raise typer.Exit(exit_codes.DATABASE_UNAVAILABLE) from None


def _log_estimate(study: OpenStudy, workforce: Launcher, sizes: tuple[int, int, int] | None = None) -> None:
    """What the study will take: from its own trials, else from what `study bench` has measured on this machine.

    Args:
        sizes: images that train, that validate, and of the test split, of a new study.
    """
    from study import estimate
    from study.launchers.local import LocalLauncher
    from study.launchers.worker_count import load_warning

    if not isinstance(workforce, LocalLauncher):
        return
    text = estimate.time_left(study.engine, study.id, study.config, workforce.devices)
    if text is None and sizes is not None:
        text = estimate.recalled(study.config, workforce.devices, sizes)
    if text:
        logger.info("%s", text)
    if warning := load_warning(workforce.devices, int(workforce.threads)):
        logger.warning("%s", warning)


def _run(
    study: OpenStudy, workforce: Launcher, root: str | None, allow_failures: int, on_event: list[str] | None = None
) -> None:
    """Run the study, then print its report, or how to continue; exits with the study's exit code."""
    from dashboards import study_data
    from dashboards.reports import console
    from storage.retry import retry
    from study.launchers.loop import run_study

    def refresh(data: study_data.StudyData | None = None) -> None:
        from dashboards.server.publish import publish

        try:
            publish(data or study_data.read(study.storage, study.name), study.storage)
        except Exception as error:  # noqa: BLE001 — figures must not end a study
            logger.warning("the dashboard's figures were not renewed: %s: %s", type(error).__name__, error)

    try:
        code = run_study(workforce, study, root, refresh, on_event)
    except KeyboardInterrupt:
        code = exit_codes.INTERRUPTED
    if code is None:
        status = command_for(study.url, "status", study.name)
        logger.info("the workers keep running without this launcher; progress: %s", status)
        return
    if code != exit_codes.OK:
        logger.warning("%s", _how_to_continue(study, code, root))
        raise typer.Exit(code)
    data = retry(lambda: study_data.read(study.storage, study.name, option_for(study.url)))
    refresh(replace(data, storage_option=None))  # others read the dashboard, who have another address
    if data.status.ended_early:
        how = command_for(study.url, "resume", study.name, "--target", "none", "--patience", "none")
        logger.info("ended early: %s; run the other trials with: %s", data.status.ended_early, how)
    out.print(console.report_text(data, out.width))
    failed, total = data.status.states["failed"], data.status.progress.total
    if failed > allow_failures or failed == total > 0:
        logger.warning("%d of %d trials failed; run them again with: %s (their tracebacks: %s)", failed, total,
                       command_for(study.url, "requeue", study.name, "--failed"),
                       command_for(study.url, "logs", study.name))  # fmt: skip
        raise typer.Exit(exit_codes.TRIALS_FAILED)


def _how_to_continue(study: OpenStudy, code: int, root: str | None) -> str:
    from study.config.extensions import allowed_folders

    words = ["resume", study.name]
    if root is not None and os.environ.get("STUDY_DATA_ROOT") != root:
        words += ["--data-root", root]
    for folder in allowed_folders() if study.config.own_code() else []:
        words += ["--code", str(folder)]
    resume = command_for(study.url, *words)
    if code == exit_codes.BUDGET_SPENT:
        return f"the budget is spent; continue with: {resume} --budget …"
    if code == exit_codes.DATABASE_UNAVAILABLE:
        return f"the database was unavailable for too long; when it is back: {resume}"
    reason = "stopped by `study stop`" if code == exit_codes.STOPPED else "interrupted"
    return f"{reason}; nothing is lost; continue with: {resume}"
