"""The verbs that show: status, logs, list, report, compare, dashboard, presets."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from storage.errors import UserError
from study.cli.options import Name, Storage, option_for, out, read_study, shown, storage_url

logger = logging.getLogger(__name__)

Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write it here as JSON; -: to standard output.", show_default=False),
]
STANDARD_OUTPUT = Path("-")


def status(
    name: Annotated[str | None, typer.Argument(help="Name of the study. Default: the only one.")] = None,
    storage: Storage = None,
    to_json: Json = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until it has finished, and show every change.")] = False,
) -> None:
    """Show the progress of a study and who works on it.

    Example: study status quick --watch
    """
    import json

    from dashboards import status as statuses
    from storage.engine import open_engine

    url = storage_url(storage)
    engine = open_engine(url)
    if name is None:
        names = [summary.name for summary in statuses.summaries(engine)]
        if len(names) != 1:
            list_(storage, to_json)
            return
        name = names[0]
    if watch:
        statuses.watch(engine, name, out, option_for(url))
    elif to_json is not None:
        _write(to_json, json.dumps(statuses.document(statuses.read(engine, name)), indent=2))
    else:
        page = statuses.page(statuses.read(engine, name), option_for(url), out.width)
        out.print(page, soft_wrap=not out.is_terminal)


def logs(
    name: Name,
    trial: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Of this trial only.", show_default=False)
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay until it has finished, and show what is logged.")
    ] = False,
    storage: Storage = None,
) -> None:
    """Show what workers logged about the trials of a study: when, which attempt, by which worker.

    Example: study logs quick --trial 3
    """
    from dashboards import logs as trial_logs
    from storage.engine import open_engine

    engine = open_engine(storage_url(storage))
    empty = True
    for line in (trial_logs.follow if follow else trial_logs.read)(engine, name, trial):
        out.print(trial_logs.text(line), soft_wrap=True)
        empty = False
    if empty:
        logger.info("workers have logged nothing yet about %s", f"trial {trial}" if trial is not None else repr(name))


def list_(storage: Storage = None, to_json: Json = None) -> None:
    """List all studies of a storage: state, progress, best value, last activity.

    Example: study list --storage sqlite:///study.db
    """
    import json
    from dataclasses import asdict

    from dashboards import status as statuses
    from storage.engine import open_engine

    url = storage_url(storage)
    summaries = statuses.summaries(open_engine(url))
    if to_json is not None:
        _write(to_json, json.dumps([asdict(summary) for summary in summaries], indent=2))
    elif summaries:
        out.print(statuses.summaries_table(summaries), soft_wrap=True)
    else:
        logger.info("no studies in %s; start one with: study launch quick", shown(url))


def report(
    names: Annotated[list[str], typer.Argument(help="Names of the studies.")],
    storage: Storage = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one self-contained page with all figures here.", show_default=False),
    ] = None,
    to_json: Json = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FOLDER",
            help="Write trials.csv, epochs.csv, attempts.csv and settings.csv here.",
            show_default=False,
        ),
    ] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Write figures and notes for optuna-dashboard.")] = False,
) -> None:
    """Show the tables of one or several studies; write their figures as a page, their numbers as JSON or CSV.

    Example: study report quick --html report.html
    """
    from dashboards.reports import console
    from dashboards.reports import csv as csv_report
    from dashboards.reports import html as html_report
    from dashboards.reports import json as json_report
    from storage.engine import open_storage

    _check_folders(html, to_json, csv)
    studies = [read_study(name, storage) for name in names]
    if STANDARD_OUTPUT not in (html, to_json):
        for study in studies:
            out.print(console.report_text(study, out.width))
    for file, text in ((html, html_report.page), (to_json, json_report.text)):
        if file is not None:
            _write(file, text(studies))
    if csv is not None:
        for file in csv_report.write(studies, csv):
            logger.info("wrote %s", file)
    if publish:
        from dashboards.server.publish import publish as publish_study  # optuna-dashboard takes a second to load

        target = open_storage(storage_url(storage), create=False)
        for study in studies:
            publish_study(study, target)
            logger.info("published the figures of %r", study.name)


def compare(
    names: Annotated[list[str], typer.Argument(help="Names of the studies: each other one against the first.")],
    storage: Storage = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one self-contained page with figures here.", show_default=False),
    ] = None,
    to_json: Json = None,
) -> None:
    """Compare studies on the same validation images: whose best setting is better, and setting by setting.

    Example: study compare quick wider --html compared.html
    """
    from dashboards.comparison import compare_studies
    from dashboards.reports import console
    from dashboards.reports import html as html_report
    from dashboards.reports import json as json_report

    _check_folders(html, to_json)
    compared = compare_studies([read_study(name, storage) for name in names])
    if STANDARD_OUTPUT not in (html, to_json):
        out.print(console.comparison_text(compared, out.width), soft_wrap=not out.is_terminal)
    for file, text in ((html, html_report.comparison_page), (to_json, json_report.comparison_text)):
        if file is not None:
            _write(file, text(compared))


def dashboard(
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8080,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's own it demands one of the next two.")
    ] = "127.0.0.1",
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse everything that writes.")] = False,
    password_file: Annotated[
        Path | None,
        typer.Option(help="File with the login's password. Default: $STUDY_DASHBOARD_PASSWORD.", show_default=False),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name that it is reached by, as a proxy's. Repeatable."),
    ] = None,
    trusted_proxy: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A proxy whose X-Forwarded-For names the visitors' addresses, for the login's lock.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve optuna-dashboard for a storage, with a login or read-only on request.

    Example: study dashboard --port 8080
    """
    from dashboards.server.serve import PASSWORD_VARIABLE, check_names, check_open, check_proxy, password_from, serve
    from storage.engine import open_storage

    url = storage_url(storage)
    password = password_from(password_file, os.environ.get(PASSWORD_VARIABLE))
    check_open(host, password, read_only)
    check_names(allow_host or ())
    check_proxy(trusted_proxy)
    how = "".join([", with a login" * (password is not None), ", read-only" * read_only])
    serve(
        open_storage(url, create=False, reading=True, may_write=not read_only),
        host,
        port,
        lambda at: logger.info("optuna-dashboard on %s shows %s%s; Ctrl-C ends it", at, shown(url), how),
        password=password,
        read_only=read_only,
        allowed=allow_host or (),
        trusted_proxy=trusted_proxy,
    )


def presets(name: Annotated[str | None, typer.Argument(help="Show this preset's file.")] = None) -> None:
    """List the presets, or show one.

    Example: study presets tpe
    """
    from study.config.loading import load_config, preset_names, preset_text

    if name is not None:
        typer.echo(preset_text(name), nl=False)
        return
    width = max(map(len, preset_names()))
    for preset in preset_names():
        typer.echo(f"{preset:<{width}}  {load_config(preset).description}")


def _check_folders(*files: Path | None) -> None:
    """Raises:
    UserError: no folder for one of the files.
    """
    for file in files:
        if file is not None and file != STANDARD_OUTPUT and not file.parent.is_dir():
            raise UserError(f"no folder {file.parent} for {file.name}; create it or name another")


def _write(file: Path, text: str) -> None:
    """Raises:
    UserError: it cannot be written.
    """
    if file == STANDARD_OUTPUT:
        typer.echo(text)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    logger.info("wrote %s", file)
