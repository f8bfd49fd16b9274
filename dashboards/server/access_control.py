"""What stands before optuna-dashboard, which has none of it: whose names it answers to, a login, a read-only mode."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable
from html import escape
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from storage.optuna_internals import DASHBOARD_RENAME_ROUTE

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})
SESSION_SECONDS = 12 * 3600
LONGEST_FORM = 4096  # bytes

SECURITY = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),  # beside optuna-dashboard's own: both hold
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Referrer-Policy", "same-origin"),  # with no-referrer, browsers send forms with "Origin: null"
]
OWN_PAGE = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'"

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::\d{1,5})?")
_PATH = re.compile(r"/(?![/\\])[^\\\x00-\x20]*|/")


class Throttle:
    """How long an address has to wait after wrong passwords: five are free, then twice as long each time."""

    FREE, LONGEST, FORGOTTEN, MOST = 5, 300.0, 3600.0, 10_000

    def __init__(self) -> None:
        self.wrong: dict[str, tuple[int, float]] = {}  # how often, and when last

    def wait(self, address: str, now: float) -> float:
        count, last = self.wrong.get(_client(address), (0, now))
        if count < self.FREE:
            return 0.0
        return max(0.0, last + min(2.0 ** (count - self.FREE), self.LONGEST) - now)

    def note(self, address: str, now: float) -> None:
        client = _client(address)
        count, last = self.wrong.pop(client, (0, now))
        self.wrong[client] = (1 if now - last > self.FORGOTTEN else count + 1, now)
        if len(self.wrong) > self.MOST:
            del self.wrong[next(iter(self.wrong))]


class Guard:
    """A WSGI application before another.

    Args:
        hosts: names and addresses, without ports, that a request may have in its Host header. A page that an attacker
            has rebound to this address (DNS rebinding) comes with a name of his own.
        password: what a visitor must know; None: no login.
        read_only: whether everything that writes is refused.
    """

    def __init__(
        self,
        application: WSGIApplication,
        hosts: Collection[str],
        *,
        password: str | None = None,
        read_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.application, self.read_only, self.clock = application, read_only, clock
        self.hosts = {host.lower().strip("[]") for host in hosts}
        self.password = None if password is None else _digest(password)
        self.sessions: dict[bytes, float] = {}  # digest of the token to its end
        self.throttle = Throttle()
        self.lock = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        respond = _Responder(environ, start_response)
        if path == "/healthz" and method in READING:  # for probes, which come with any Host
            return respond("200 OK", "ok\n")
        host = environ.get("HTTP_HOST", "").lower()
        named = _HOST.fullmatch(host)
        if named is None or (named[1] or named[2]) not in self.hosts:
            name = (named[1] or named[2]) if named else "that"
            return respond.refuse(
                "403 Forbidden",
                f"this dashboard does not answer to the name {name}; start it with --allow-host {name} if it should",
            )
        if method not in READING and not _same_origin(environ, host):
            return respond.refuse("403 Forbidden", "the request comes from another site's page")
        if self.password is not None:
            if path == "/login" and method == "POST":
                return self._log_in(environ, respond)
            token = _token(environ)
            if not self._logged_in(token):
                if method == "GET" and "text/html" in environ.get("HTTP_ACCEPT", ""):
                    asked = path if _PATH.fullmatch(path) and path != "/logout" else "/"
                    return respond.page("401 Unauthorized", login_page(asked))
                return respond.refuse("401 Unauthorized", "log in first: open the dashboard in a browser")
            if path == "/logout":
                return self._log_out(environ, respond, token)
        if self.read_only and method not in READING:
            return respond.refuse("403 Forbidden", "this dashboard is read-only")
        if method not in READING and DASHBOARD_RENAME_ROUTE.fullmatch(path):
            return respond.refuse(
                "403 Forbidden", "a study is renamed with: study copy NAME --name NEW, then study delete NAME"
            )
        return self.application(environ, respond.started)

    def _log_in(self, environ: WSGIEnvironment, respond: _Responder) -> Iterable[bytes]:
        form = _form(environ)
        asked = form.get("next", "/")
        if not _PATH.fullmatch(asked):
            asked = "/"
        address, now = environ.get("REMOTE_ADDR", ""), self.clock()
        with self.lock:  # so that attempts made at the same time count one after the other
            wait = self.throttle.wait(address, now)
            if wait > 0:
                seconds = int(wait) + 1
                return respond.page(
                    "429 Too Many Requests",
                    login_page(asked, f"Too many wrong attempts. Wait {seconds} s."),
                    ("Retry-After", str(seconds)),
                )
            assert self.password is not None
            if not hmac.compare_digest(_digest(form.get("password", "")), self.password):
                self.throttle.note(address, now)
                return respond.page("401 Unauthorized", login_page(asked, "Wrong password."))
            token = secrets.token_urlsafe(32)
            self.sessions = {key: end for key, end in self.sessions.items() if end > now}
            self.sessions[_digest(token)] = now + SESSION_SECONDS
        secure = "; Secure" if environ.get("HTTP_ORIGIN", "").startswith("https:") else ""  # a proxy speaks TLS for us
        cookie = f"{_cookie_name(environ)}={token}; Path=/; HttpOnly; SameSite=Strict{secure}"
        return respond.page("303 See Other", "", ("Location", asked), ("Set-Cookie", cookie))

    def _logged_in(self, token: str) -> bool:
        with self.lock:
            return self.sessions.get(_digest(token), 0.0) > self.clock()

    def _log_out(self, environ: WSGIEnvironment, respond: _Responder, token: str) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "POST":  # a link to it must not log anybody out
            return respond.page("200 OK", logout_page())
        with self.lock:
            self.sessions.pop(_digest(token), None)
        gone = f"{_cookie_name(environ)}=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict"
        return respond.page("303 See Other", "", ("Location", "/"), ("Set-Cookie", gone))


class _Responder:
    """Our own answers to one request, and the headers that all answers get."""

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse) -> None:
        self.environ, self.start_response = environ, start_response

    def __call__(self, status: str, text: str, kind: str = "text/plain", *more: tuple[str, str]) -> list[bytes]:
        body = text.encode()
        headers = [("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body))), *more]
        self.started(status, headers)
        return [] if self.environ["REQUEST_METHOD"] == "HEAD" else [body]

    def refuse(self, status: str, reason: str) -> list[bytes]:
        return self(status, json.dumps({"reason": reason}), "application/json")

    def page(self, status: str, html: str, *more: tuple[str, str]) -> list[bytes]:
        return self(status, html, "text/html", ("Content-Security-Policy", OWN_PAGE), *more)

    def started(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        # Bottle redirects to http://HOST/…, which would leave the proxy's https; all redirects stay on this site.
        headers = [(key, _local(value) if key.lower() == "location" else value) for key, value in headers]
        if not self.environ.get("PATH_INFO", "").startswith("/static/"):
            headers = [(key, value) for key, value in headers if key.lower() != "cache-control"]
            headers.append(("Cache-Control", "no-store"))
        return self.start_response(status, [*headers, *SECURITY], exc_info)


def _same_origin(environ: WSGIEnvironment, host: str) -> bool:
    """Whether a page of ours sent this, or no browser at all: those send at least one of the two headers."""
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
        return False
    origin = environ.get("HTTP_ORIGIN")
    return origin is None or urlsplit(origin.lower()).netloc == host


def _form(environ: WSGIEnvironment) -> dict[str, str]:
    length = environ.get("CONTENT_LENGTH") or "0"
    if not length.isascii() or not length.isdigit() or int(length) > LONGEST_FORM:
        return {}
    fields = parse_qs(environ["wsgi.input"].read(int(length)).decode(errors="replace"), keep_blank_values=True)
    return {key: values[0] for key, values in fields.items()}


def _cookie_name(environ: WSGIEnvironment) -> str:
    return f"study_session_{environ['SERVER_PORT']}"  # cookies know no ports, and a machine may have two dashboards


def _token(environ: WSGIEnvironment) -> str:
    try:
        cookie = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(_cookie_name(environ))
    except CookieError:
        return ""
    return cookie.value if cookie is not None else ""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _client(address: str) -> str:
    """The address, or of IPv6 the network: one host has a whole one to choose from."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else address


def _local(location: str) -> str:
    return urlsplit(location)._replace(scheme="", netloc="").geturl() or "/"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 22rem; margin: 20vh auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } input, button { font: inherit; padding: .4rem .7rem; box-sizing: border-box; width: 100%; }
button { margin-top: .7rem; } .wrong { color: #D55E00; }
"""


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def login_page(asked: str, complaint: str = "") -> str:
    said = f'<p class="wrong" role="alert">{escape(complaint)}</p>' if complaint else ""
    return _page(
        "Studies",
        f"""{said}<form method="post" action="/login"><input type="hidden" name="next" value="{escape(asked)}">
<label>Password <input type="password" name="password" autocomplete="current-password" autofocus required></label>
<button>Log in</button></form>""",
    )


def logout_page() -> str:
    return _page("Studies", '<form method="post" action="/logout"><button>Log out</button></form>')
