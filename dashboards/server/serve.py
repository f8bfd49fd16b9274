"""optuna-dashboard on a study database, behind a guard and a production server."""

from __future__ import annotations

import ipaddress
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import optuna
import optuna_dashboard
import sqlalchemy as sa
import waitress
from optuna.storages import RDBStorage

from dashboards.server.access_control import LOOPBACK, Guard
from storage.errors import UserError

PASSWORD_VARIABLE = "STUDY_DASHBOARD_PASSWORD"
SHORTEST_PASSWORD = 12
LARGEST_REQUEST = 2**20  # bytes; what is sent here is notes and attributes


def password_from(file: Path | None, variable: str | None) -> str | None:
    """The password in the first line of `file`, else the environment variable's value.

    Raises:
        UserError: it cannot be read, or is too short.
    """
    password, where = variable, f"${PASSWORD_VARIABLE}"
    if file is not None:
        where = str(file)
        try:
            password = next(iter(file.read_text(encoding="utf-8").splitlines()), "")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UserError(f"cannot read the password file {file}: {reason}") from None
    if password is not None and len(password) < SHORTEST_PASSWORD:
        raise UserError(
            f"a dashboard's password has at least {SHORTEST_PASSWORD} characters, the one in {where} has "
            f"{len(password)}; make one with: openssl rand -base64 24"
        )
    return password


def check_open(host: str, password: str | None, read_only: bool) -> None:
    """Raises:
    UserError: other machines could reach the dashboard and write through it without a password.
    """
    if not (is_loopback(host) or password is not None or read_only):
        raise UserError(
            f"beyond this machine (--host {host or repr('')}) anybody could delete studies; set a password "
            f"(--password-file FILE or ${PASSWORD_VARIABLE}), or --read-only"
        )


def check_names(names: Sequence[str]) -> None:
    """Raises:
    UserError: one that no request could come with.
    """
    for name in names:
        if not re.fullmatch(r"[\w.-]+|\[?[0-9a-f:.]*:[0-9a-f:.]*:[0-9a-f:.]*\]?", name, re.ASCII | re.IGNORECASE):
            raise UserError(f"--allow-host takes a name or an address, without scheme and port, got {name!r}")


def serve(
    storage: RDBStorage,
    host: str,
    port: int,
    ready: Callable[[str], None],
    *,
    password: str | None = None,
    read_only: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Serve until interrupted or terminated; `ready` gets the address once it is listened on.

    The storage is cached: uncached, 10,000 trials take 75 s a poll instead of 0.5 s.

    Raises:
        UserError: the address cannot be listened on, or is open to all.
    """
    check_open(host, password, read_only)
    check_names(allowed)
    if read_only:
        write_nothing(storage.engine)
    dashboard = optuna_dashboard.wsgi(optuna.storages.get_storage(storage))
    names = {*LOOPBACK, *allowed} | (set() if is_any(host) else {host})
    guard = Guard(dashboard, names, password=password, read_only=read_only)
    try:
        server = waitress.create_server(
            guard, host=host, port=port, ident=None, max_request_body_size=LARGEST_REQUEST, threads=8
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from None
    # A name with several addresses gets a server each, behind one.
    chosen = server.effective_listen[0][1] if hasattr(server, "effective_listen") else server.effective_port
    shown = "localhost" if is_any(host) else f"[{host}]" if ":" in host else host
    signal.signal(signal.SIGTERM, _end)
    ready(f"http://{shown}:{chosen}")
    server.run()  # SystemExit and KeyboardInterrupt end it; it then waits 5 s for requests under way
    server.close()


def write_nothing(engine: sa.Engine) -> None:
    """The second wall of read-only mode: what a route of optuna-dashboard should write, the database refuses."""

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _: Any) -> None:
        if engine.dialect.name == "sqlite":
            connection.execute("PRAGMA query_only = ON")
        else:  # for each transaction: set for a session, it stays with one of a pgbouncer's that workers get next
            connection.read_only = True

    engine.dispose()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_any(host: str) -> bool:
    """Whether the address means all of this machine's."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host in ("", "*")


def _end(_: int, __: FrameType | None) -> NoReturn:
    raise SystemExit(0)
