"""Access control before optuna-dashboard, which has none: a Host check, a login, a read-only mode, security headers."""

from __future__ import annotations

import hashlib
import hmac
import io
import ipaddress
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable
from html import escape
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
READING = frozenset({"GET", "HEAD", "OPTIONS"})
SESSION_SECONDS = 12 * 3600
KNOWN_BROWSER_SECONDS = 30 * 24 * 3600
MAX_KNOWN_BROWSERS = 1000
MAX_FORM_BYTES = 4096
MAX_DESTINATION = 512  # characters; in a form beside the password

SECURITY_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Content-Security-Policy", "frame-ancestors 'none'"),  # beside optuna-dashboard's own: both hold
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Referrer-Policy", "same-origin"),  # with no-referrer, browsers send forms with "Origin: null"
]
OWN_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'"

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::\d{1,5})?")
_LOCAL_PATH = re.compile(r"/(?![/\\])[^\\\x00-\x20]*|/")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Throttle:
    """How long a client waits after wrong passwords: five attempts are free, then the wait doubles with each."""

    FREE_ATTEMPTS = 5
    MAX_WAIT_SECONDS = 300.0
    FORGET_SECONDS = 3600.0
    MAX_CLIENTS = 10_000

    def __init__(self) -> None:
        self.failures: dict[str, tuple[int, float]] = {}  # count, and the time of the last

    def wait(self, client: str, now: float) -> float:
        """Seconds until the client may try again."""
        count, last = self.failures.get(client, (0, now))
        if count < self.FREE_ATTEMPTS:
            return 0.0
        return max(0.0, last + min(2.0 ** (count - self.FREE_ATTEMPTS), self.MAX_WAIT_SECONDS) - now)

    def record_failure(self, client: str, now: float) -> None:
        count, last = self.failures.pop(client, (0, now))
        self.failures[client] = (1 if now - last > self.FORGET_SECONDS else count + 1, now)
        if len(self.failures) > self.MAX_CLIENTS:
            del self.failures[next(iter(self.failures))]


class AccessControl:
    """WSGI middleware: refuses a request, or passes it to the application and adds security headers to the answer.

    Wrong passwords lock the login for the client's address (for IPv6 its /64 network). A browser that has logged in
    before has a cookie that counts its attempts apart, so it gets in while its address is locked: behind a proxy or
    `ssh -L` all visitors have one address.

    Args:
        hosts: names and addresses, without ports, that a request may have in its Host header. A page that an attacker
            has rebound to this address (DNS rebinding) sends the attacker's name.
        password: the login's; None: no login.
        read_only: refuse all methods but GET, HEAD and OPTIONS.
        clock: seconds, for sessions and waits.
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
        self.known_browsers: dict[bytes, float] = {}  # likewise, until this process ends
        self.throttle = Throttle()
        self.lock = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        respond = _Responder(environ, start_response)
        method, path = environ["REQUEST_METHOD"], _decoded(environ.get("PATH_INFO", ""))
        if path is None:
            return respond.refuse("400 Bad Request", "the path is not UTF-8, or has control characters")
        if path == "/healthz" and method in READING:  # for probes, which send any Host
            return respond("200 OK", "ok\n")
        host = environ.get("HTTP_HOST", "").lower()
        if (reason := self._host_refusal(host)) is not None:
            return respond.refuse("403 Forbidden", reason)
        if method not in READING and not _same_origin(environ, host):
            return respond.refuse("403 Forbidden", "the request comes from another site's page")
        if self.password is not None and (answer := self._authenticate(environ, respond, method, path)) is not None:
            return answer
        if self.read_only and method not in READING:
            return respond.refuse("403 Forbidden", "this dashboard is read-only")
        _normalise(environ, method)
        return self.application(environ, respond.start)

    def _authenticate(
        self, environ: WSGIEnvironment, respond: _Responder, method: str, path: str
    ) -> Iterable[bytes] | None:
        """The answer of the login, the logout, or to a visitor who has not logged in; None: the visitor has."""
        if path == "/login" and method == "POST":
            return self._log_in(environ, respond)
        tokens = _cookies(environ, _session_cookie(environ))
        if self._logged_in(tokens):
            return self._log_out(environ, respond, tokens) if path == "/logout" else None
        if method == "GET" and "text/html" in environ.get("HTTP_ACCEPT", ""):
            return respond.page("401 Unauthorized", login_page(_destination(path)))
        return respond.refuse("401 Unauthorized", "log in first: open the dashboard in a browser")

    def _host_refusal(self, host: str) -> str | None:
        if not host:
            return (
                "the request has no Host header; a proxy before the dashboard must send one (nginx: proxy_set_header)"
            )
        match = _HOST.fullmatch(host)
        if match is None:
            return "the Host header is not NAME, ADDRESS, NAME:PORT or ADDRESS:PORT, so the dashboard does not answer"
        name = match[1] or match[2]
        if name in self.hosts:
            return None
        return f"the dashboard does not answer to the name {name}; if it should, start it with --allow-host {name}"

    def _log_in(self, environ: WSGIEnvironment, respond: _Responder) -> Iterable[bytes]:
        form = _form(environ)
        destination, now = _destination(form.get("next", "/")), self.clock()
        with self.lock:  # attempts made at the same time count one after the other
            client = self._client(environ, now)
            wait = self.throttle.wait(client, now)
            if wait > 0:
                seconds = int(wait) + 1
                return respond.page(
                    "429 Too Many Requests",
                    login_page(destination, f"Too many wrong attempts. Wait {seconds} s."),
                    ("Retry-After", str(seconds)),
                )
            assert self.password is not None
            if not hmac.compare_digest(_digest(form.get("password", "")), self.password):
                self.throttle.record_failure(client, now)
                return respond.page("401 Unauthorized", login_page(destination, "Wrong password."))
            session = _new_token(self.sessions, now, SESSION_SECONDS)
            known = _new_token(self.known_browsers, now, KNOWN_BROWSER_SECONDS)
            while len(self.known_browsers) > MAX_KNOWN_BROWSERS:
                del self.known_browsers[next(iter(self.known_browsers))]
        secure = "; Secure" if environ.get("HTTP_ORIGIN", "").startswith("https:") else ""  # a proxy speaks TLS for us
        flags = f"HttpOnly; SameSite=Strict{secure}"
        return respond.page(
            "303 See Other",
            "",
            ("Location", destination),
            ("Set-Cookie", f"{_session_cookie(environ)}={session}; Path=/; {flags}"),
            ("Set-Cookie", f"{_known_cookie(environ)}={known}; Path=/login; Max-Age={KNOWN_BROWSER_SECONDS}; {flags}"),
        )

    def _client(self, environ: WSGIEnvironment, now: float) -> str:
        """What the throttle counts attempts by: a browser that has logged in before, else the address."""
        for token in _cookies(environ, _known_cookie(environ)):
            if self.known_browsers.get(_digest(token), 0.0) > now:
                return f"known browser {_digest(token).hex()}"
        return _network(environ.get("REMOTE_ADDR", ""))

    def _logged_in(self, tokens: Iterable[str]) -> bool:
        with self.lock:
            return any(self.sessions.get(_digest(token), 0.0) > self.clock() for token in tokens)

    def _log_out(self, environ: WSGIEnvironment, respond: _Responder, tokens: Iterable[str]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "POST":  # a link to it must not log anybody out
            return respond.page("200 OK", logout_page())
        with self.lock:
            for token in tokens:
                self.sessions.pop(_digest(token), None)
        expired = f"{_session_cookie(environ)}=; Path=/; Max-Age=0; HttpOnly; SameSite=Strict"
        return respond.page("303 See Other", "", ("Location", "/"), ("Set-Cookie", expired))


class _Responder:
    """Our own answers to one request, and the headers that all answers get."""

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse) -> None:
        self.environ, self.start_response = environ, start_response

    def __call__(self, status: str, text: str, content_type: str = "text/plain", *more: tuple[str, str]) -> list[bytes]:
        body = text.encode()
        headers = [("Content-Type", f"{content_type}; charset=utf-8"), ("Content-Length", str(len(body))), *more]
        self.start(status, headers)
        return [] if self.environ["REQUEST_METHOD"] == "HEAD" else [body]

    def refuse(self, status: str, reason: str) -> list[bytes]:
        return self(status, json.dumps({"reason": reason}), "application/json")

    def page(self, status: str, html: str, *more: tuple[str, str]) -> list[bytes]:
        return self(status, html, "text/html", ("Content-Security-Policy", OWN_PAGE_POLICY), *more)

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        # Bottle redirects to http://HOST/…, which would leave the proxy's https; all redirects stay on this site.
        headers = [(key, _local(value) if key.lower() == "location" else value) for key, value in headers]
        if not self.environ.get("PATH_INFO", "").startswith("/static/"):
            headers = [(key, value) for key, value in headers if key.lower() != "cache-control"]
            headers.append(("Cache-Control", "no-store"))
        return self.start_response(status, [*headers, *SECURITY_HEADERS], exc_info)


def _decoded(path: str) -> str | None:
    """The path as Bottle reads it, if it is one that all programs read alike: Bottle drops bytes that are not UTF-8."""
    try:
        decoded = path.encode("latin-1").decode()
    except UnicodeError:
        return None
    return None if _CONTROLS.search(decoded) else decoded


def _normalise(environ: WSGIEnvironment, method: str) -> None:
    """Without these, optuna-dashboard answers 500: it parses bodies of GET requests, and Accept-Encoding as UTF-8."""
    environ["HTTP_ACCEPT_ENCODING"] = "gzip" if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", "") else ""
    if method in READING:
        environ |= {"wsgi.input": io.BytesIO(), "CONTENT_LENGTH": "0", "CONTENT_TYPE": ""}


def _destination(path: str) -> str:
    """Where a visitor goes after logging in: the path, percent-encoded, or / if it could lead to another site."""
    if not _LOCAL_PATH.fullmatch(path) or path == "/logout":
        return "/"
    encoded = quote(path, safe="/?#[]@!$&'()*+,;=:%~", errors="replace")
    return encoded if len(encoded) <= MAX_DESTINATION else "/"


def _same_origin(environ: WSGIEnvironment, host: str) -> bool:
    """Whether a page of this dashboard sent the request, or no browser: browsers send at least one of the headers."""
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
        return False
    origin = environ.get("HTTP_ORIGIN")
    try:
        return origin is None or urlsplit(origin.lower()).netloc == host
    except ValueError:
        return False


def _form(environ: WSGIEnvironment) -> dict[str, str]:
    length = environ.get("CONTENT_LENGTH") or "0"
    if not length.isascii() or not length.isdigit() or int(length) > MAX_FORM_BYTES:
        return {}
    text = environ["wsgi.input"].read(int(length)).decode(errors="replace")
    try:
        fields = parse_qs(text, keep_blank_values=True, errors="replace")
    except ValueError:
        return {}
    return {key: values[0] for key, values in fields.items()}


def _session_cookie(environ: WSGIEnvironment) -> str:
    return f"study_session_{environ['SERVER_PORT']}"  # cookies know no ports, and a machine may have two dashboards


def _known_cookie(environ: WSGIEnvironment) -> str:
    return f"study_known_browser_{environ['SERVER_PORT']}"


def _cookies(environ: WSGIEnvironment, name: str) -> list[str]:
    """The values of all cookies of this name: other programs on the host set theirs, in any form and on any path."""
    pairs = (part.strip().partition("=") for part in environ.get("HTTP_COOKIE", "").split(";"))
    return [value for key, _, value in pairs if key == name]


def _new_token(tokens: dict[bytes, float], now: float, seconds: float) -> str:
    """A new token, stored as its digest; expired ones are removed."""
    for digest in [digest for digest, end in tokens.items() if end <= now]:
        del tokens[digest]
    token = secrets.token_urlsafe(32)
    tokens[_digest(token)] = now + seconds
    return token


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _network(address: str) -> str:
    """The address, or for IPv6 its /64 network, all of which one host may use."""
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
button { margin-top: .7rem; } .error { color: #D55E00; }
"""


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def login_page(destination: str, error: str = "") -> str:
    """HTML.

    Args:
        destination: a local path to go to after the login.
        error: shown above the form.
    """
    alert = f'<p class="error" role="alert">{escape(error)}</p>' if error else ""
    return _page(
        "Studies",
        f"""{alert}<form method="post" action="/login">
<input type="hidden" name="next" value="{escape(destination)}">
<label>Password <input type="password" name="password" autocomplete="current-password" autofocus required></label>
<button>Log in</button></form>""",
    )


def logout_page() -> str:
    """HTML."""
    return _page("Studies", '<form method="post" action="/logout"><button>Log out</button></form>')
