"""optuna-dashboard on a study database, behind access control and a production server."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import resource
import shlex
import signal
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import optuna
import optuna_dashboard
import sqlalchemy as sa
import waitress
from optuna.storages import RDBStorage
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer

from dashboards.server.access_control import LOOPBACK, MAX_FORM_BYTES, AccessControl
from dashboards.server.route_rules import RouteRules
from storage.artifacts import DatabaseArtifactStore
from storage.errors import UserError

PASSWORD_VARIABLE = "STUDY_DASHBOARD_PASSWORD"
MIN_PASSWORD = 12  # characters
MAX_PASSWORD = MAX_FORM_BYTES // 16  # characters: a form must hold them, percent-encoded, each of up to four bytes
MAX_HEADER_BYTES = 2**15
MAX_BODY_BYTES = 2**20  # notes and attributes
MAX_CONNECTIONS = 500
REQUEST_SECONDS = 20
"""A connection is closed when it has not sent a whole request after these seconds, or is idle for as long."""
CONTAINER_SECRETS = Path("/run/secrets")

logger = logging.getLogger(__name__)


def password_from(file: Path | None, variable: str | None) -> str | None:
    """The password in the first line of `file`, else the environment variable's value.

    A byte order mark at the start of the file is ignored. A file that all users of the machine can read gives one
    warning, but not below /run/secrets, where a container runtime puts files for one container.

    Raises:
        UserError: it cannot be read, or is too short or too long.
    """
    password, source = variable, f"${PASSWORD_VARIABLE}"
    if file is not None:
        password, source = _first_line(file), str(file)
    if password is not None and not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise UserError(
            f"a dashboard's password has {MIN_PASSWORD} to {MAX_PASSWORD} characters, the one in {source} has "
            f"{len(password)}; make one with: openssl rand -base64 24"
        )
    return password


def _first_line(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            line = opened.readline(4 * MAX_PASSWORD + 16)  # not all of it: a device has no end
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"cannot read the password file {file}: {reason}") from None
    if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IROTH and file.parent != CONTAINER_SECRETS:
        fix = f"chmod 600 {shlex.quote(str(file))}"
        logger.warning("all users of this machine can read the password in %s; run: %s", file, fix)
    return text


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
    UserError: a name that no request can have in its Host header.
    """
    for name in names:
        if not re.fullmatch(r"[\w.-]+|\[?[0-9a-f:.]*:[0-9a-f:.]*:[0-9a-f:.]*\]?", name, re.ASCII | re.IGNORECASE):
            raise UserError(f"--allow-host takes a name or an address, without scheme and port, got {name!r}")


def check_proxy(address: str | None) -> None:
    """Raises:
    UserError: not the address of one host.
    """
    if address is not None:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise UserError(f"--trusted-proxy takes one IP address, as 127.0.0.1 or ::1, got {address!r}") from None


def serve(
    storage: RDBStorage,
    host: str,
    port: int,
    ready: Callable[[str], None],
    *,
    password: str | None = None,
    read_only: bool = False,
    allowed: Sequence[str] = (),
    trusted_proxy: str | None = None,
) -> None:
    """Serve until interrupted or terminated.

    The storage is cached: uncached, 10,000 trials take 75 s a poll instead of 0.5 s.

    Args:
        ready: called once with the dashboard's URL, when it accepts connections.
        allowed: names and addresses that requests may have in their Host header, besides `host` and loopback.
        trusted_proxy: the IP address of a reverse proxy. Of requests from it, and from no other address, the client is
            the last address in X-Forwarded-For; wrong passwords lock the login for that client only.

    Raises:
        UserError: the address cannot be listened on, or is open to all, or an argument is malformed.
    """
    check_open(host, password, read_only)
    check_names(allowed)
    check_proxy(trusted_proxy)
    if read_only:
        make_read_only(storage.engine)
    models = DatabaseArtifactStore(storage.engine)
    dashboard = optuna_dashboard.wsgi(optuna.storages.get_storage(storage), artifact_store=models)
    dashboard.install(RouteRules(storage))
    names = {*LOOPBACK, *allowed} | (set() if is_any(host) else {host})
    application = AccessControl(dashboard, names, password=password, read_only=read_only)
    try:
        server = waitress.create_server(application, host=host, port=port, **_server_settings(trusted_proxy))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from None
    # A name with several addresses gets a server each, behind one.
    several = hasattr(server, "effective_listen")
    for listener in server.map.values() if several else [server]:
        if isinstance(listener, TcpWSGIServer):
            listener.channel_class = _Channel
    listening = server.effective_listen[0][1] if several else server.effective_port
    shown = "localhost" if is_any(host) else f"[{host}]" if ":" in host else host
    signal.signal(signal.SIGTERM, _end)
    ready(f"http://{shown}:{listening}")
    server.run()  # SystemExit and KeyboardInterrupt end it; it then waits 5 s for requests under way
    server.close()


class _Parser(HTTPRequestParser):  # type: ignore[misc]
    """waitress's, which lets a ValueError of urlsplit (GET http://[) escape into its log as a traceback."""

    def parse_header(self, header: bytes) -> None:
        try:
            super().parse_header(header)
        except ValueError:
            raise ParsingError("malformed request line or header") from None


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection whose time for a whole request runs from its first byte; waitress's starts again at every byte."""

    parser_class = _Parser
    last_activity: float

    def handle_read(self) -> None:
        unfinished, since = self.request, self.last_activity
        super().handle_read()
        if unfinished is not None and self.request is unfinished:
            self.last_activity = since


def _server_settings(trusted_proxy: str | None) -> dict[str, Any]:
    """waitress's: half-sent requests must not keep others, and /healthz, from being answered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * MAX_CONNECTIONS  # a connection may have a file for what it receives and one for what it sends
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    settings: dict[str, Any] = {
        "ident": None,
        "threads": 8,
        "max_request_header_size": MAX_HEADER_BYTES,
        "max_request_body_size": MAX_BODY_BYTES,
        "connection_limit": MAX_CONNECTIONS,
        "channel_timeout": REQUEST_SECONDS,
        "cleanup_interval": max(1, REQUEST_SECONDS // 4),
        "asyncore_use_poll": True,  # select() knows no descriptor above 1023
        "log_socket_errors": False,  # a client that goes away is no fault
        "clear_untrusted_proxy_headers": True,
    }
    if trusted_proxy is not None:
        settings |= {
            "trusted_proxy": str(ipaddress.ip_address(trusted_proxy)),
            "trusted_proxy_count": 1,
            "trusted_proxy_headers": {"x-forwarded-for"},
        }
    return settings


def make_read_only(engine: sa.Engine) -> None:
    """Let the database refuse all writes through this engine, in case a route of optuna-dashboard tries one."""

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
    """Whether the address stands for all addresses of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host in ("", "*")


def _end(_: int, __: FrameType | None) -> NoReturn:
    raise SystemExit(0)
