"""The verbs that look: status, report, dashboard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from storage.errors import UserError
from study.cli.options import Name, Storage, app, out, say, shown, storage_url, view


@app.command()
def status(
    name: Name,
    storage: Storage = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until it is settled, and show every change.")] = False,
) -> None:
    """How far a study is, and who works on it."""
    from dashboards import status as of
    from storage.engine import open_engine

    engine = open_engine(storage_url(storage))
    if watch:
        of.watch(engine, name, out)
    elif as_json:
        typer.echo(json.dumps(of.document(of.read(engine, name)), indent=2))
    else:
        out.print(of.page(of.read(engine, name)), soft_wrap=True)


@app.command()
def report(
    names: Annotated[list[str], typer.Argument(help="Names of the studies.")],
    storage: Storage = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.", show_default=False)] = None,
    to_json: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers here, for programs.", show_default=False)
    ] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Write figures and notes for optuna-dashboard.")] = False,
) -> None:
    """The tables of one or several studies on the terminal, their figures as a page, their numbers as JSON."""
    from dashboards.reports import console
    from dashboards.reports import html as html_report
    from dashboards.reports import json as json_report
    from dashboards.server.publish import publish as publish_study
    from storage.engine import open_storage

    for file in (html, to_json):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"no folder {file.parent} for {file.name}; create it or name another")
    views = [view(name, storage) for name in names]
    for found in views:
        out.print(console.report_text(found))
    for file, text in ((html, html_report.page), (to_json, json_report.text)):
        if file is not None:
            try:
                file.write_text(text(views), encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write {file}: {error.strerror}") from None
            say(f"wrote {file}")
    if publish:
        for found in views:
            publish_study(found, open_storage(storage_url(storage), create=False))
            say(f"published the figures of {found.name!r}")


@app.command()
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
) -> None:
    """Watch the studies of a storage in optuna-dashboard, with a login or read-only if wanted."""
    from dashboards.server.serve import PASSWORD_VARIABLE, check_names, check_open, password_from, serve
    from storage.engine import open_storage

    url = storage_url(storage)
    password = password_from(password_file, os.environ.get(PASSWORD_VARIABLE))
    check_open(host, password, read_only)
    check_names(allow_host or ())
    how = "".join([", with a login" * (password is not None), ", read-only" * read_only])
    serve(
        open_storage(url, create=False, reading=True),
        host,
        port,
        lambda at: say(f"optuna-dashboard on {at} shows {shown(url)}{how}; Ctrl-C ends it"),
        password=password,
        read_only=read_only,
        allowed=allow_host or (),
    )


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="Show this preset's file.")] = None) -> None:
    """List the presets, or show one."""
    from study.config.loading import load_config, preset_names, preset_text

    if name is not None:
        typer.echo(preset_text(name), nl=False)
        return
    width = max(map(len, preset_names()))
    for preset in preset_names():
        typer.echo(f"{preset:<{width}}  {load_config(preset).description}")
