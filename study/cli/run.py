"""The verbs that run studies: launch, resume, worker, stop, confirm, bench."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from storage.errors import UserError
from storage.optuna_internals import study_id_of
from study.cli.options import (
    Address,
    Assignments,
    Budget,
    Cpus,
    DataRoot,
    Detach,
    Device,
    Gpus,
    Name,
    On,
    Storage,
    Workers,
    app,
    err,
    out,
    root_of,
    say,
    shown,
    storage_url,
)

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from study.launch.launcher import Workforce


@app.command()
def launch(
    preset: Annotated[str, typer.Argument(help="A preset; `study presets` lists them.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the study. Default: the preset's.", show_default=False)
    ] = None,
    storage: Storage = None,
    assignments: Assignments = None,
    trials: Annotated[int | None, typer.Option(help="Short for --set search.trials=N.", show_default=False)] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="accuracy, or accuracy,images: short for --set search.objective=…", show_default=False),
    ] = None,
    budget: Budget = None,
    device: Device = "auto",
    workers: Workers = None,
    data_root: DataRoot = None,
    on: On = "here",
    address: Address = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    detach: Detach = False,
) -> None:
    """Start a study, or go on with it where it stopped."""
    from storage.budgets import set_budgets
    from storage.engine import open_storage
    from study import estimate
    from study.config.loading import load_config
    from study.create import create_study, noise_warning, prepare
    from study.launch.devices import local_devices
    from study.launch.launcher import placed

    more = [] if trials is None else [f"search.trials={trials}"]
    more += [] if objective is None else [f"search.objective={objective}"]
    config = load_config(preset, [*(assignments or []), *more])
    url, root = storage_url(storage), root_of(data_root)
    budgets = _budgets(budget)
    workforce = placed(url, device, workers, on, address, gpus, cpus, detach, storage, budgets)
    # Everything that can be wrong is found before the database is touched.
    data = prepare(config, root, say)
    new = create_study(open_storage(url), name or preset, preset, config, data)
    engine, study_id = _heed_stop(name or preset, url)
    if budgets is not None:
        set_budgets(engine, study_id, budgets)
    say(f"{'starting' if new else 'going on with'} study {name or preset!r} in {shown(url)}")
    # Only what `study bench` has measured here: measuring now would keep the study waiting.
    if new and (warning := noise_warning(config, data.images["validation"])):
        say(warning)
    if new and on == "here":
        devices = local_devices(device, workers)
        if pace := estimate.recall(config, devices[0].partition(":")[0]):
            told = estimate.estimate(config, pace, len(set(devices)), data.sizes)
            say(f"{told} (paced by `study bench` on {pace.on})")
    _work(name or preset, url, workforce, root)


@app.command()
def bench(
    preset: Annotated[str | None, typer.Argument(help="A preset. Default: all of them.", show_default=False)] = None,
    assignments: Assignments = None,
    device: Device = "auto",
) -> None:
    """Measure this machine for some seconds and say how long a preset will take on it."""
    from study import estimate
    from study.config.loading import load_config, preset_names
    from study.launch import devices

    configs = {name: load_config(name, assignments or []) for name in ([preset] if preset else preset_names())}
    here = devices.local_devices(device, None)
    paces: dict[tuple[object, ...], estimate.Pace] = {}
    for name, config in configs.items():
        key = estimate.key(config)
        if key not in paces:
            paces[key] = estimate.measure(config, here[0])
            estimate.remember(config, here[0].partition(":")[0], paces[key])
        typer.echo(f"{name}: {estimate.estimate(config, paces[key], len(here))}")


@app.command()
def worker(
    name: Name,
    storage: Storage = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    wait: Annotated[bool, typer.Option(help="Wait while others work, in case they die.")] = True,
) -> None:
    """Join a study from this machine with one process on one device."""
    from study.exit_codes import DATABASE_UNAVAILABLE, INTERRUPTED
    from study.trial.runner import DatabaseUnavailable
    from study.worker.worker import work

    try:
        settled = work(name, storage_url(storage), device, root_of(data_root), wait=wait)
    except DatabaseUnavailable as away:
        say(str(away))
        raise typer.Exit(DATABASE_UNAVAILABLE) from None
    if not settled:
        raise typer.Exit(INTERRUPTED)


@app.command()
def resume(
    name: Name,
    storage: Storage = None,
    budget: Budget = None,
    device: Device = "auto",
    workers: Workers = None,
    data_root: DataRoot = None,
    on: On = "here",
    address: Address = None,
    gpus: Gpus = None,
    cpus: Cpus = None,
    detach: Detach = False,
) -> None:
    """Go on with a study with this machine's devices or a cluster's; it needs nothing but its name and database."""
    from storage.budgets import set_budgets
    from study.create import check_here
    from study.launch.launcher import placed

    url, root = storage_url(storage), root_of(data_root)
    budgets = _budgets(budget)
    workforce = placed(url, device, workers, on, address, gpus, cpus, detach, storage, budgets)
    if on == "here":  # elsewhere the workers look at theirs
        check_here(url, name, root, say)
    engine, study_id = _found(name, url)
    if budgets is not None:
        set_budgets(engine, study_id, budgets)
    from storage.stop_requests import withdraw_stop

    withdraw_stop(engine, study_id)
    _work(name, url, workforce, root)


def _budgets(texts: list[str] | None) -> dict[str, float] | None:
    from storage.budgets import parse_budgets

    return None if texts is None else parse_budgets(texts)


def _found(name: str, url: str) -> tuple[Engine, int]:
    """An existing study: its database and its id there."""
    from storage.engine import open_storage
    from study.create import load_study

    opened = open_storage(url, create=False)
    return opened.engine, study_id_of(load_study(opened, name)[0])


@app.command()
def stop(name: Name, storage: Storage = None) -> None:
    """Ask all workers of a study, wherever they are, to give their trials back and end."""
    from storage.stop_requests import request_stop

    request_stop(*_found(name, storage_url(storage)))
    say(f"asked the workers of {name!r} to stop; go on with: study resume {name}")


@app.command()
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
    data_root: DataRoot = None,
) -> None:
    """Run the best settings of a study again on fresh seeds, then ask the untouched test split, once."""
    from storage.engine import open_storage
    from study.confirm import confirmation
    from study.create import create_study, load_study, prepare
    from study.launch.launcher import placed

    url, root = storage_url(storage), root_of(data_root)
    opened = open_storage(url, create=False)
    study, config = load_study(opened, name)
    again, origin = confirmation(study, config, top, seeds)
    workforce = placed(url, device, workers)
    data = prepare(again, root, say)
    if data.fingerprint != study.user_attrs["data_fingerprint"]:
        raise UserError(f"the data here are not those of the study {name!r}; use the same images (--data-root)")
    called = new_name or f"{name}-confirmed"
    create_study(opened, called, f"confirm {name}", again, data, origin)
    say(f"confirming {top} settings of {name!r} as {called!r} in {shown(url)}")
    _work(called, url, workforce, root)


def _heed_stop(name: str, url: str) -> tuple[Engine, int]:
    """The study, unless somebody asked its workers to stop and there is work left: only `resume` takes that back."""
    from storage.queries import progress
    from storage.stop_requests import STOP_REQUESTED, how_to_resume, read_controls
    from study.exit_codes import INTERRUPTED

    engine, study_id = _found(name, url)
    if read_controls(engine, study_id).stop:
        now = progress(engine, study_id)
        if now.settled < now.total:
            say(f"study {name!r} was {STOP_REQUESTED}; {how_to_resume(name, STOP_REQUESTED)}")
            raise typer.Exit(INTERRUPTED)
    return engine, study_id


def _work(name: str, url: str, workforce: Workforce, root: str | None) -> None:
    """Work on a study, then show its table, or how to go on."""
    from sqlalchemy.exc import SQLAlchemyError

    from dashboards import study_data
    from dashboards.reports import console
    from dashboards.server.publish import publish
    from storage.engine import open_storage
    from storage.stop_requests import how_to_resume, reason_to_stop
    from study.exit_codes import DATABASE_UNAVAILABLE, INTERRUPTED

    reading, writing = open_storage(url, create=False, reading=True), open_storage(url, create=False)
    engine, study_id = _heed_stop(name, url)

    def renew() -> None:
        try:
            publish(study_data.read(reading, name), writing)
        except Exception as error:  # noqa: BLE001 — pictures must not end a study
            say(f"the dashboard's figures were not renewed: {type(error).__name__}: {error}")

    try:
        code = workforce(name, root, err, renew)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        reason = None
        with suppress(SQLAlchemyError):  # the database may be what was waited for
            reason = reason_to_stop(engine, study_id)
        how = how_to_resume(name, reason) if reason else f"the same command goes on with study {name!r}"
        say(f"stopped{f': {reason}' if reason else ''}; nothing is lost; {how}")
        raise
    if code == DATABASE_UNAVAILABLE:
        say(f"the database was away for too long; when it is back: study resume {name}")
        raise typer.Exit(DATABASE_UNAVAILABLE)
    if code is None:
        say(f"the workers go on without this launcher: study status {name}; the same command without --detach attaches")
        return
    renew()
    out.print(console.report_text(study_data.read(reading, name)))
