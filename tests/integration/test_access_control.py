"""Access control before optuna-dashboard: which requests are refused, and which pass."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from wsgiref.types import StartResponse, WSGIEnvironment

import optuna
import optuna_dashboard
import pytest
import sqlalchemy as sa

from dashboards.server.access_control import (
    KNOWN_BROWSER_SECONDS,
    MAX_KNOWN_BROWSERS,
    OWN_PAGE_POLICY,
    SESSION_SECONDS,
    AccessControl,
    Throttle,
)
from dashboards.server.route_rules import RouteRules
from dashboards.server.serve import (
    check_names,
    check_open,
    check_proxy,
    is_any,
    is_loopback,
    make_read_only,
    password_from,
    serve,
)
from storage.engine import open_storage
from storage.errors import UserError
from storage.optuna_internals import DashboardRoute
from tests.e2e.test_command import study
from tests.support.harness import Harness, config_of
from tests.support.served import SECRET, dashboard

HOSTS = ("localhost", "127.0.0.1", "::1", "studies.example")
WRITING = ("POST", "PUT", "DELETE", "PATCH", "MKCOL")


class Browser:
    """Requests to access control in this process, with a clock that the test moves."""

    def __init__(self, **options: Any) -> None:
        self.now, self.reached, self.cookie, self.known = 1000.0, 0, "", ""
        self.control = AccessControl(self._inner, HOSTS, clock=lambda: self.now, **options)

    def _inner(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.reached += 1
        start_response("200 OK", [("Content-Type", "text/plain"), ("Location", "http://localhost:8080/dashboard?a=1")])
        return [b"the dashboard"]

    def __call__(
        self,
        method: str,
        path: str = "/api/studies",
        body: str = "",
        address: str = "192.0.2.7",
        length: str | None = None,
        content_type: str = "",
        query: str = "",
        **headers: str,
    ) -> tuple[int, dict[str, str], str]:
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "SERVER_PORT": "8080",
            "REMOTE_ADDR": address,
            "CONTENT_LENGTH": str(len(body)) if length is None else length,
            "wsgi.input": io.BytesIO(body.encode()),
            "HTTP_HOST": "localhost:8080",
            "HTTP_COOKIE": self.cookie,
            "wsgi.errors": sys.stderr,
            "wsgi.url_scheme": "http",
            "CONTENT_TYPE": content_type,
            "QUERY_STRING": query,
        } | {f"HTTP_{key.upper()}": value for key, value in headers.items()}
        answer: dict[str, Any] = {}

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            assert all(f"{key}{value}".isascii() for key, value in headers)  # others end in a traceback of waitress's
            cookies = [value for key, value in headers if key == "Set-Cookie"]
            self.known = next((value for value in cookies if "known_browser" in value), self.known)
            # The first of several: the session's cookie.
            answer.update(status=int(status.split()[0]), headers={key.lower(): value for key, value in headers[::-1]})

        text = b"".join(self.control(environ, start_response)).decode(errors="replace")
        return answer["status"], answer["headers"], text

    def log_in(self, password: str = SECRET, address: str = "192.0.2.7", **fields: str) -> tuple[int, dict[str, str]]:
        status, headers, _ = self("POST", "/login", urlencode({"password": password} | fields), address=address)
        if status == 303:
            self.cookie = headers["set-cookie"].partition(";")[0]
        return status, headers


@pytest.mark.parametrize(
    "host", ["localhost:8080", "LOCALHOST", "127.0.0.1:9000", "[::1]:8080", "studies.example", "studies.example:443"]
)
def test_answers_to_its_names(host: str) -> None:
    assert Browser()("GET", host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "localhost.",
            "0.0.0.0:8080",
            "",
            "localhost:x",
        ),
        *("localhost:8080, evil.example", "localhost@evil.example", "[::2]", "127.0.0.1.evil.example", "<b>localhost"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/studies", "/login", "/static/bundle.js"])
def test_answers_to_no_other_name(host: str, path: str) -> None:
    browser = Browser(password=SECRET)
    for method in ("GET", "POST"):
        status, headers, text = browser(method, path, f"password={SECRET}", host=host)
        assert (status, headers["content-type"]) == (403, "application/json; charset=utf-8")
        assert re.search("does not answer|no Host header", json.loads(text)["reason"])
    assert browser.reached == 0
    assert not browser.control.sessions


OWN = {"origin": "http://localhost:8080"}


@pytest.mark.parametrize("method", WRITING)
@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),  # no browser
        (OWN, True),
        (OWN | {"sec_fetch_site": "same-origin"}, True),
        ({"origin": "https://studies.example", "host": "studies.example"}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://localhost:9000"}, False),  # another program of this machine's
        ({"origin": "http://localhost"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        (OWN | {"sec_fetch_site": "cross-site"}, False),
        (OWN | {"sec_fetch_site": "same-site"}, False),
        ({"sec_fetch_site": "cross-site"}, False),
    ],
)
def test_writes_come_from_its_own_pages(method: str, headers: dict[str, str], passes: bool) -> None:
    browser = Browser()
    assert browser(method, **headers)[0] == (200 if passes else 403)
    assert browser.reached == passes
    assert browser("GET", **headers)[0] == 200  # a link from elsewhere opens it


@pytest.mark.parametrize("password", [None, SECRET])
def test_read_only_refuses_what_writes(password: str | None) -> None:
    browser = Browser(read_only=True, password=password)
    if password is not None:
        assert browser.log_in()[0] == 303
    for method in WRITING:
        status, _, text = browser(method, "/api/studies/1", **OWN)
        assert (status, json.loads(text)) == (403, {"reason": "this dashboard is read-only"})
    assert browser.reached == 0
    assert [browser(method)[0] for method in ("GET", "HEAD", "OPTIONS")] == [200, 200, 200]


def test_nothing_without_the_password() -> None:
    browser = Browser(password=SECRET)
    for path in ("/", "/dashboard", "/api/studies", "/csv/1", "/static/bundle.js", "/logout", "//login", "/healthz/"):
        for method in ("GET", "HEAD", "OPTIONS", *WRITING):
            status, headers, text = browser(method, path)
            assert status == 401
            assert text == "" or "log in first" in json.loads(text)["reason"]
        status, headers, text = browser("GET", path, accept="text/html,*/*")
        assert (status, headers["content-type"]) == (401, "text/html; charset=utf-8")
        assert 'action="/login"' in text
    assert browser.reached == 0


@pytest.mark.parametrize(
    "cookie",
    [
        *("study_session_8080=", "study_session_8080=x", "study_session_8080=\ud800", "other=1", "=;=", 'a="', "[]=1"),
        *("study_session_8080", ";;;", "study_known_browser_8080=x"),
    ],
)
def test_no_cookie_but_ours(cookie: str) -> None:
    browser = Browser(password=SECRET)
    browser.log_in()
    browser.cookie = cookie
    assert browser("GET")[0] == 401


def test_logging_in_and_out() -> None:
    browser = Browser(password=SECRET)
    for wrong in ("", "x", SECRET[:-1], SECRET + " ", SECRET.upper()):
        assert browser.log_in(wrong)[0] == 401
        browser.now += 600
    status, headers = browser.log_in(next="/dashboard/studies/1?tab=2")
    assert (status, headers["location"]) == (303, "/dashboard/studies/1?tab=2")
    assert re.fullmatch(
        r"study_session_8080=[\w-]{43}; Path=/; HttpOnly; SameSite=Strict", headers["set-cookie"], flags=re.ASCII
    )
    assert browser("GET")[0] == 200
    assert browser("DELETE", **OWN)[0] == 200
    assert browser("DELETE", origin="http://evil.example")[0] == 403

    old = browser.cookie
    browser.log_in()
    assert browser.cookie != old  # two visitors, two sessions
    assert browser("GET", "/logout")[0] == 200
    assert browser("GET")[0] == 200  # looking at the button logs nobody out
    status, headers, _ = browser("POST", "/logout", **OWN)
    assert (status, headers["location"]) == (303, "/")
    assert "Max-Age=0" in headers["set-cookie"]
    assert browser("GET")[0] == 401  # whatever the browser does with its cookie
    browser.cookie = old
    assert browser("GET")[0] == 200
    browser.now += SESSION_SECONDS
    assert browser("GET")[0] == 401
    browser.log_in()
    assert len(browser.control.sessions) == 1  # what ended is forgotten


def test_the_server_keeps_neither_password_nor_tokens() -> None:
    browser = Browser(password=SECRET)
    browser.log_in()
    state = repr(vars(browser.control))
    assert SECRET not in state
    assert browser.cookie.partition("=")[2] not in state


def test_behind_https_the_cookie_is_secure() -> None:
    browser = Browser(password=SECRET)
    body = urlencode({"password": SECRET})
    _, headers, _ = browser("POST", "/login", body, host="studies.example", origin="https://studies.example")
    assert headers["set-cookie"].endswith("; Secure")


@pytest.mark.parametrize(
    "destination", ["//evil.example", "/\\evil.example", "http://evil.example", "/a\r\nb: c", "", "a"]
)
def test_logging_in_leads_nowhere_else(destination: str) -> None:
    assert Browser(password=SECRET).log_in(next=destination)[1]["location"] == "/"


def test_the_login_page_quotes_what_it_is_given() -> None:
    browser = Browser(password=SECRET)
    _, _, text = browser("GET", '/"><script>alert(1)</script>', accept="text/html")
    assert "<script" not in text


def test_another_site_cannot_log_anybody_in() -> None:
    browser = Browser(password=SECRET)
    assert browser("POST", "/login", f"password={SECRET}", origin="http://evil.example")[0] == 403


@pytest.mark.parametrize("length", ["-1", "x", "5000", "²", ""])
def test_a_form_of_no_sensible_length_is_a_wrong_attempt(length: str) -> None:
    browser = Browser(password=SECRET)
    body = urlencode({"password": SECRET, "more": "x" * 5000})
    assert browser("POST", "/login", body, length=length)[0] == 401
    assert browser("POST", "/login", body[:100])[0] == 303


def test_wrong_attempts_are_throttled() -> None:
    browser = Browser(password=SECRET)
    for _ in range(Throttle.FREE_ATTEMPTS):
        assert browser.log_in("wrong")[0] == 401
    status, headers = browser.log_in(SECRET)  # not even the right one, or guessing went on at full speed
    assert (status, headers["retry-after"]) == (429, "2")
    assert browser.log_in(SECRET, address="192.0.2.8")[0] == 303  # others are not held up
    waits = []
    for _ in range(12):
        seconds = int(browser.log_in("wrong")[1].get("retry-after", 0))
        waits.append(seconds)
        browser.now += seconds
        assert browser.log_in("wrong")[0] == 401
    assert waits == [2, 3, 5, 9, 17, 33, 65, 129, 257, 301, 301, 301]
    browser.now += Throttle.MAX_WAIT_SECONDS
    assert browser.log_in(SECRET)[0] == 303


def test_a_browser_that_has_logged_in_before_passes_the_lock_of_its_address() -> None:
    """Behind a proxy or `ssh -L` all visitors have one address, and any of them can lock it."""
    browser = Browser(password=SECRET)
    assert browser.log_in()[0] == 303
    assert re.fullmatch(
        r"study_known_browser_8080=[\w-]{43}; Path=/login; Max-Age=2592000; HttpOnly; SameSite=Strict", browser.known
    )
    known, browser.cookie = browser.known.partition(";")[0], ""
    for _ in range(20):
        browser.log_in("wrong")
    assert browser.log_in()[0] == 429
    browser.now += SESSION_SECONDS
    for _ in range(20):
        browser.log_in("wrong")
    browser.cookie = "study_known_browser_8080=guessed; " + known
    assert browser("GET")[0] == 401  # it is no session
    assert browser.log_in()[0] == 303
    # Its own wrong attempts count, apart from those of the address.
    browser.cookie = known
    for _ in range(Throttle.FREE_ATTEMPTS):
        assert browser.log_in("wrong")[0] == 401
    assert browser.log_in()[0] == 429
    assert browser.log_in(address="192.0.2.99")[0] == 429
    browser.now += KNOWN_BROWSER_SECONDS
    for _ in range(Throttle.FREE_ATTEMPTS):
        browser.log_in("wrong")
    browser.cookie = ""
    assert browser.log_in()[0] == 429  # known no longer: its attempts counted for its address


def test_the_number_of_known_browsers_is_bounded() -> None:
    browser = Browser(password=SECRET)
    for _ in range(MAX_KNOWN_BROWSERS + 3):
        browser.log_in()
        browser.cookie = ""
    assert len(browser.control.known_browsers) == MAX_KNOWN_BROWSERS


def test_other_programs_cookies_do_not_keep_anybody_out() -> None:
    browser = Browser(password=SECRET)
    browser.log_in()
    own = browser.cookie
    for other in ('foo={"a":1}', "a=[1, 2]", "novalue", "=", 'a="b; c"', "a=\x80", "study_session_8080=other"):
        for cookie in (f"{other}; {own}", f"{own}; {other}", f"{other};{own};{other}"):
            browser.cookie = cookie
            assert browser("GET")[0] == 200, cookie


@pytest.mark.parametrize(
    ("destination", "location"),
    [("/日", "/%E6%97%A5"), ("/a%20b?c=%C3%A4#d", "/a%20b?c=%C3%A4#d"), ("/" + "x" * 3000, "/"), ("/\x7f", "/%7F")],
)
def test_destinations_are_percent_encoded_and_bounded(destination: str, location: str) -> None:
    status, headers = Browser(password=SECRET).log_in(next=destination)
    assert (status, headers["location"]) == (303, location)


def test_the_login_page_leads_back_to_any_path() -> None:
    browser = Browser(password=SECRET)
    assert 'value="/%E6%97%A5"' in browser("GET", "/\xe6\x97\xa5", accept="text/html")[2]
    assert 'value="/"' in browser("GET", "/" + "x" * 20_000, accept="text/html")[2]


@pytest.mark.parametrize("origin", ["http://[", "http://[x]y", "//", "\xff", "http://localhost:8080:8080"])
def test_a_malformed_origin_is_another_sites(origin: str) -> None:
    assert Browser()("POST", origin=origin)[0] == 403


@pytest.mark.parametrize(
    "path", ["/api/studies/1/ren\xffame", "/\xc0\xaf", "/a\x00b", "/a\r\nb", "/\xed\xa0\x80", "/\x9b", "/\xc2\x9b"]
)
def test_a_path_that_programs_read_differently_is_refused(path: str) -> None:
    browser = Browser()
    for method in ("GET", "POST"):
        assert browser(method, path)[0] == 400
    assert browser.reached == 0


def test_a_missing_or_malformed_host_is_refused_with_the_fix() -> None:
    browser = Browser()
    assert "a proxy before the dashboard must send one" in browser("GET", host="")[2]
    assert "NAME:PORT" in browser("GET", host="a b")[2]
    assert "--allow-host box" in browser("GET", host="box:1")[2]


def test_one_network_of_ipv6_is_one_address() -> None:
    browser = Browser(password=SECRET)
    for i in range(Throttle.FREE_ATTEMPTS):
        assert browser.log_in("wrong", address=f"2001:db8::{i:x}")[0] == 401
    assert browser.log_in(SECRET, address="2001:db8::ffff")[0] == 429
    assert browser.log_in(SECRET, address="2001:db8:0:1::1")[0] == 303


def test_attempts_are_forgotten_and_their_number_is_bounded() -> None:
    throttle = Throttle()
    for i in range(Throttle.MAX_CLIENTS + 5):
        throttle.record_failure(f"host{i}", 0.0)
    assert len(throttle.failures) == Throttle.MAX_CLIENTS
    for now in (0.0, 0.0, 0.0, 0.0, 0.0, Throttle.FORGET_SECONDS + 1):
        throttle.record_failure("host", now)
    assert throttle.wait("host", Throttle.FORGET_SECONDS + 1) == 0


def test_health_needs_no_login_and_reveals_nothing() -> None:
    browser = Browser(password=SECRET, read_only=True)
    assert browser("GET", "/healthz", host="10.1.2.3:8080")[::2] == (200, "ok\n")
    assert browser("HEAD", "/healthz")[::2] == (200, "")
    assert browser("POST", "/healthz", **OWN)[0] == 401
    assert browser.reached == 0


def test_all_answers_have_the_security_headers() -> None:
    browser = Browser(password=SECRET)
    answers = [browser("GET", "/healthz"), browser("GET"), browser("GET", accept="text/html"), browser("GET", host="x")]
    browser.log_in()
    answers += [browser("GET"), browser("POST", origin="null"), browser("GET", "/logout")]
    for _, headers, _ in answers:
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"] in ("frame-ancestors 'none'", OWN_PAGE_POLICY)
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
    assert answers[4][1]["location"] == "/dashboard?a=1"  # of this site, whatever scheme its proxy speaks


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "box", "2001:db8::1", "localhost.example"])
def test_beyond_loopback_it_is_closed_or_read_only(host: str) -> None:
    with pytest.raises(UserError, match="password"):
        check_open(host, None, False)
    check_open(host, SECRET, False)
    check_open(host, None, True)


def test_names_are_names() -> None:
    check_names(["box", "studies.example", "192.0.2.1", "2001:db8::1", "[::1]"])
    for name in ("box:8080", "https://studies.example", "studies.example/", "", "a b", "192.0.2.1:80"):
        with pytest.raises(UserError, match="without scheme and port"):
            check_names([name])


def test_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST")))
    assert [is_any(host) for host in ("0.0.0.0", "::", "", "*", "box", "127.0.0.1")] == [True] * 4 + [False] * 2


def test_passwords(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\nand a second line\n")
    assert password_from(file, "another from the environment") == SECRET
    assert password_from(None, SECRET) == SECRET
    assert password_from(None, None) is None
    file.write_text("short\n")
    with pytest.raises(UserError, match=r"12 to 256 characters, the one in .* has 5"):
        password_from(file, None)
    for empty in ("", "\n"):
        file.write_text(empty)
        with pytest.raises(UserError, match="has 0"):
            password_from(file, SECRET)
    with pytest.raises(UserError, match="has 0"):  # set, but to nothing: no silent "no login"
        password_from(None, "")
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            password_from(bad, None)
    file.write_bytes(b"\xef\xbb\xbf" + SECRET.encode() + b"\r\n")  # as Windows' editor writes it
    assert password_from(file, None) == SECRET
    with pytest.raises(UserError, match="has 1040"):
        password_from(Path("/dev/zero"), None)
    file.write_bytes(b"\xff\xfe" * 10)
    with pytest.raises(UserError, match="not UTF-8"):
        password_from(file, None)


def test_a_password_file_that_everybody_can_read_gives_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "pass word"
    file.write_text(SECRET)
    for mode in (0o600, 0o640):
        file.chmod(mode)
        password_from(file, None)
    assert not caplog.records
    file.chmod(0o644)
    password_from(file, None)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"chmod 600 '{file}'" in record.getMessage()


@pytest.mark.parametrize("address", ["proxy", "*", "", "10.0.0.0/8", "127.0.0.1:80"])
def test_a_trusted_proxy_is_one_address(address: str) -> None:
    with pytest.raises(UserError, match="--trusted-proxy takes one IP address"):
        check_proxy(address)
    check_proxy(None)
    check_proxy("::1")


def contents(engine: sa.Engine) -> dict[str, list[Any]]:
    with engine.connect() as connection:
        names = sa.inspect(connection).get_table_names()
        return {name: [tuple(row) for row in connection.exec_driver_sql(f"SELECT * FROM {name}")] for name in names}


def test_read_only_with_every_route_of_optuna_dashboard(url: str) -> None:
    """No route that may be reached writes; those that write are refused; and the database would refuse them too."""
    harness = Harness(
        url, config_of(training={"epochs": 2}, policy={"alpha": [60], "beta": [0.3, 0.6]}, pruning="none")
    )
    harness.work()
    before = contents(harness.storage.engine)
    storage = open_storage(url, create=False, reading=True, may_write=True)
    make_read_only(storage.engine)
    application = optuna_dashboard.wsgi(optuna.storages.get_storage(storage))
    browser = Browser(read_only=True)
    browser.control.application = application
    study_id = harness.storage.get_study_id_from_name("s")
    trial_id = harness.storage.get_all_trials(study_id)[0]._trial_id
    values = {"study_id": study_id, "trial_id": trial_id, "history_id": "1", "artifact_id": "0-1", "plot_type": "slice"}
    routes = {(route.method, route.rule) for route in application.routes}
    assert len(routes) > 20
    reading = 0
    for method, rule in routes:
        path = re.sub(r"<(\w*):?[^<>]*(?:\([^)]*\)\?)?>", lambda match: str(values.get(match[1], "")), rule)
        status, _, text = browser(method, path, accept_encoding="", query_string="")
        if method == "GET":
            reading += status == 200
        else:
            assert (status, json.loads(text)["reason"]) == (403, "this dashboard is read-only"), rule
    assert reading >= 8
    for plot in ("contour", "slice", "parallel_coordinate", "rank", "edf", "timeline"):
        assert browser("GET", f"/api/studies/{study_id}/plot/{plot}")[0] == 200
    for write in (
        lambda: storage.delete_study(study_id),
        lambda: storage.set_study_user_attr(study_id, "a", 1),
        lambda: storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "new"),
    ):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - Optuna's, or SQLAlchemy's
            write()
        assert re.search("readonly|read-only", f"{raised.value} {raised.value.__cause__}")
    assert contents(harness.storage.engine) == before


class RealBrowser(Browser):
    """The same, of optuna-dashboard on a database."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(**options)
        storage = open_storage(url, create=False, reading=True, may_write=True)
        self.dashboard = optuna_dashboard.wsgi(optuna.storages.get_storage(storage))
        self.dashboard.install(RouteRules(storage))
        self.control.application = self.dashboard

    def json(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """A write as the page sends it; the status, and the reason if it was refused."""
        text = "" if body is None else json.dumps(body)
        status, _, answer = self(method, path, text, content_type="application/json", **headers)
        return status, json.loads(answer or "{}").get("reason", "")


def test_every_route_that_writes_is_known(sqlite_url: str) -> None:
    """An upgrade of optuna-dashboard that adds or renames one fails here; at run time the new one is refused."""
    Harness(sqlite_url, config_of())
    routes = {f"{route.method} {route.rule}" for route in RealBrowser(sqlite_url).dashboard.routes}
    assert {rule for rule in routes if not rule.startswith("GET ")} <= set(DashboardRoute)
    assert set(DashboardRoute) <= routes


RENAMES = (
    "/api/studies/1/rename",
    "/api/studies/1/rename//",
    "/api/studies/01/rename",
    "/api/studies/\xd9\xa1/rename",  # ARABIC-INDIC DIGIT ONE, which int() reads as 1
    "/api/studies/\xef\xbc\x91/rename",  # FULLWIDTH DIGIT ONE
)


@pytest.mark.parametrize("path", RENAMES)
def test_a_study_is_not_renamed(path: str, sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    status, reason = RealBrowser(sqlite_url).json("POST", path, {"study_name": "other"})
    assert status == 403
    assert "study copy NAME --from URL --to URL --name NEW" in reason
    assert optuna.get_all_study_names(harness.storage) == ["s"]


@pytest.mark.parametrize(
    "path",
    [
        *("/api/studies/1/ren\xffame", "/api/studies/1\xc0\xafrename", "/api//studies/1/rename", "*", ""),
        *("//api/studies/1/rename", "/api/studies/1/./rename", "/api/studies/1/rename;x", "/api/studies/1/RENAME"),
        *("/api/studies/-1/rename", "/api/studies/1/rename\x00", "/api/studies/99999999999999999999/rename"),
        *("/api/studies/\xc2\xb9/rename", "api/studies/1/rename", "/api/studies/1/rename/x", "/api/studies/+1/rename"),
    ],
)
def test_no_other_spelling_renames_it(path: str, sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    browser = RealBrowser(sqlite_url)
    for method in ("POST", "PUT", "PATCH", "DELETE", "PROXY", "ANY"):
        status, _, _ = browser(method, path, '{"study_name": "x"}', content_type="application/json")
        assert status in (400, 403, 404, 405), (method, status)
    assert optuna.get_all_study_names(harness.storage) == ["s"]


def test_what_workers_hold_is_neither_ended_nor_changed_nor_deleted(url: str) -> None:
    harness = Harness(url, config_of(policy={"alpha": [60], "beta": [0.3, 0.6]}))
    queues = harness.queue(owner="here:1"), harness.queue(owner="there:2")
    lease, other = (queue.claim() for queue in queues)
    assert lease is not None
    assert other is not None
    study_id = harness.storage.get_study_id_from_name("s")
    browser = RealBrowser(url)
    writes: list[tuple[str, str, Any]] = [
        ("POST", f"/api/trials/{lease.trial_id}/tell", {"state": "Fail"}),
        ("POST", f"/api/trials/{lease.trial_id}/tell", {"state": "Complete", "values": [0.5]}),
        ("POST", f"/api/trials/{lease.trial_id}/user-attrs", {"user_attrs": {"best_epoch": 7}}),
        ("DELETE", f"/api/studies/{study_id}", None),
        ("DELETE", f"/api/studies/{study_id}", {"remove_associated_artifacts": False}),
    ]
    before = contents(harness.storage.engine)
    for method, path, body in writes:
        status, reason = browser.json(method, path, body)
        assert status == 409, path
        assert "workers hold trial" in reason
        assert reason.endswith("first: study stop s")
        assert len(reason.splitlines()) == 1
    assert contents(harness.storage.engine) == before
    # A note belongs to no worker.
    assert browser.json("PUT", f"/api/studies/{study_id}/note", {"version": 1, "body": "a"})[0] == 204
    assert browser.json("PUT", f"/api/studies/{study_id}/{lease.trial_id}/note", {"version": 1, "body": "a"})[0] == 204

    queues[0].release(lease)
    assert browser.json(*writes[0])[0] == 204
    assert browser.json(*writes[0])[0] == 409  # finished
    assert browser.json(*writes[3])[0] == 409  # the other trial is still held
    queues[1].release(other)
    assert browser.json(*writes[3])[0] == 204
    assert browser.json(*writes[3])[0] == 404
    assert browser.json("GET", f"/api/studies/{study_id}")[0] == 404
    assert not any(rows for name, rows in contents(harness.storage.engine).items() if "version" not in name)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/artifacts/1"),
        ("POST", "/api/artifacts/1/1"),
        ("POST", "/api/artifacts/1/1/"),
        ("DELETE", "/api/artifacts/1/0-0"),
        ("DELETE", "/api/artifacts/1/1/0-0"),
        ("POST", "/incompatible-rdb-schema"),
        ("POST", "/api/llm/trial_filter_query"),
        ("POST", "/api/studies/1/preference"),
        ("DELETE", "/api/studies/1/preference/x"),
    ],
)
def test_what_is_never_offered(method: str, path: str, sqlite_url: str) -> None:
    Harness(sqlite_url, config_of())
    body = {"file": "data:text/html;base64,PHA+", "filename": "a.html"}
    status, reason = RealBrowser(sqlite_url).json(method, path, body)
    assert status == 403
    assert reason


def test_an_artifact_is_saved_and_not_shown(sqlite_url: str, tmp_path: Path) -> None:
    harness = Harness(sqlite_url, config_of())
    store = optuna.artifacts.FileSystemArtifactStore(tmp_path)
    page = tmp_path / "page.html"
    page.write_text("<script>alert(1)</script>")
    ids = [
        optuna.artifacts.upload_artifact(artifact_store=store, file_path=str(page), study_or_trial=one, mimetype=kind)
        for one, kind in [(harness.study, "text/html"), (harness.study, "text/html\r\nX-Evil: 1")]
    ]
    storage = open_storage(sqlite_url, create=False, reading=True, may_write=True)
    browser = RealBrowser(sqlite_url)
    application = optuna_dashboard.wsgi(optuna.storages.get_storage(storage), artifact_store=store)
    application.install(RouteRules(storage))
    browser.control.application = application
    status, headers, text = browser("GET", f"/artifacts/1/{ids[0]}")
    assert (status, text) == (200, page.read_text())
    assert headers["content-disposition"] == "attachment"
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-security-policy"] == "sandbox; default-src 'none'"  # the first of two; both hold
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers  # or any site could read it
    assert browser("GET", f"/artifacts/1/{ids[1]}")[0] == 404
    assert browser("GET", "/artifacts/1/0-0")[0] == 404
    (tmp_path / ids[0]).unlink()
    assert browser("GET", f"/artifacts/1/{ids[0]}")[0] == 404


MALFORMED: list[tuple[str, str, Any]] = [
    ("POST", "/api/studies", None),
    ("POST", "/api/studies", []),
    ("POST", "/api/studies", {"study_name": "a\nb", "directions": ["minimize"]}),
    ("POST", "/api/studies", {"study_name": "\ud800", "directions": ["minimize"]}),
    ("POST", "/api/studies", {"study_name": "x" * 513, "directions": ["minimize"]}),
    ("POST", "/api/studies", {"study_name": "x", "directions": [1]}),
    ("POST", "/api/studies", {"study_name": "x", "directions": ["sideways"]}),
    ("POST", "/api/trials/1/tell", {"state": "Complete", "values": [float("nan")]}),
    ("POST", "/api/trials/1/tell", {"state": "Complete", "values": [1, 2]}),
    ("POST", "/api/trials/1/tell", {"state": "Complete", "values": [10**400]}),
    ("POST", "/api/trials/1/tell", {"state": "Complete", "values": {}}),
    ("POST", "/api/trials/1/tell", {"state": 7}),
    ("POST", "/api/trials/1/user-attrs", {"user_attrs": {"": 1}}),
    ("POST", "/api/trials/1/user-attrs", {"user_attrs": {"a\0": 1}}),
    ("POST", "/api/trials/1/user-attrs", {"user_attrs": [1]}),
    ("PUT", "/api/studies/1/note", {"version": "1", "body": "a"}),
    ("PUT", "/api/studies/1/note", {"version": 10**30, "body": "a"}),
    ("PUT", "/api/studies/1/note", {"version": True, "body": "a"}),
    ("PUT", "/api/studies/1/1/note", {"version": 1, "body": ["a"]}),
    ("DELETE", "/api/studies/1", [1]),
]


def test_malformed_writes_are_refused_with_the_rule(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    harness = Harness(url, config_of())
    browser = RealBrowser(url)
    before = contents(harness.storage.engine)
    for method, path, body in MALFORMED:
        status, reason = browser.json(method, path, body)
        assert (status, bool(reason)) == (400, True), (path, body, status)
    deep = "[" * 100_000
    for text in ("{", deep, '{"a":' + deep, "\xff", "NaN", '"a"'):
        status, _, _ = browser("POST", "/api/studies", text, content_type="application/json")
        assert status == 400
    assert browser("POST", "/api/studies", '{"study_name": "x"}', content_type="text/plain")[0] == 400
    for path, query in (("", "after=x"), ("", "after=-1"), ("/plot/pareto_front", "")):
        assert browser("GET", f"/api/studies/1{path}", query=query)[0] == 400
    for path in ("/api/studies/77", "/api/studies/77/plot/edf", "/csv/77", "/api/studies/77/param_importances"):
        assert browser("GET", path)[0] == 404
    for path in ("/favicon.ico", "/static/bundle.js"):
        assert browser("GET", path)[0] == 200  # without Accept-Encoding
        assert browser("GET", path, accept_encoding="\x80\xff")[0] == 200
        assert browser("GET", path, accept_encoding="br, gzip")[0] == 200
    assert contents(harness.storage.engine) == before
    assert "Traceback" not in capfd.readouterr().err


class Client:
    """HTTP to a dashboard, with its cookies."""

    def __init__(self, port: int) -> None:
        self.port, self.cookies = port, dict[str, str]()

    def __call__(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())} | {
            key.replace("_", "-"): value for key, value in headers.items()
        }
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        connection.close()
        for cookie in answer.headers.get_all("Set-Cookie", []):
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, text


def test_over_http_with_a_login(sqlite_url: str, tmp_path: Path) -> None:
    Harness(sqlite_url, config_of())
    with dashboard(sqlite_url, tmp_path, "--host", "0.0.0.0", "--allow-host", "box", password=SECRET) as served:
        assert "with a login" in served.first_line
        assert SECRET not in Path(f"/proc/{served.process.pid}/cmdline").read_text() + served.first_line
        client = Client(served.port)
        assert client("GET", "/healthz")[::2] == (200, "ok\n")
        assert client("GET", "/api/studies")[0] == 401
        assert client("POST", "/login", "password=wrong")[0] == 401
        assert client("POST", "/login", urlencode({"password": SECRET}))[0] == 303
        _, headers, text = client("GET", "/api/studies")
        assert [one["study_name"] for one in json.loads(text)["study_summaries"]] == ["s"]
        assert "server" not in headers
        assert client("GET", "/api/studies", Host="evil.example")[0] == 403
        assert client("GET", "/api/studies", Host="box")[0] == 200
        assert client("DELETE", "/api/studies/1", "{}", Origin="http://evil.example")[0] == 403
        assert client("POST", "/api/studies/1/rename", "{}")[0] == 403
        assert client("POST", "/api/studies", "x", Content_Length=str(2**20 + 1))[0] == 413
        own = f"http://127.0.0.1:{served.port}"
        json_type = {"Content_Type": "application/json", "Origin": own}
        assert client("DELETE", "/api/studies/1", "{}", **json_type)[0] == 204
        assert json.loads(client("GET", "/api/studies")[2])["study_summaries"] == []
        assert client("POST", "/logout", Origin=own)[0] == 303
        assert client("GET", "/api/studies")[0] == 401
        assert served.terminate() == 0


def test_over_http_read_only(sqlite_url: str, tmp_path: Path) -> None:
    harness = Harness(sqlite_url, config_of())
    with dashboard(sqlite_url, tmp_path, "--read-only") as served:
        assert "read-only" in served.first_line
        client = Client(served.port)
        assert client("DELETE", "/api/studies/1", "{}", Content_Type="application/json")[0] == 403
        status, headers, _ = client("GET", "/")
        assert (status, headers["location"]) == (302, "/dashboard")
        assert client("GET", "/dashboard")[0] == 200
        # What is written elsewhere is seen: read-only is not frozen.
        harness.storage.set_study_user_attr(1, "colour", "green")
        assert "green" in client("GET", "/api/studies")[2]
        assert served.terminate() == 0
    assert optuna.get_all_study_names(harness.storage) == ["s"]


def test_refused_before_anything_is_opened(sqlite_url: str, tmp_path: Path) -> None:
    storage = open_storage(sqlite_url)
    with pytest.raises(UserError, match="anybody could delete"):
        serve(storage, "0.0.0.0", 0, pytest.fail)
    with pytest.raises(UserError, match="cannot listen on"):
        serve(storage, "192.0.2.1", 0, pytest.fail, read_only=True)
    done = study("dashboard", "--storage", sqlite_url, "--host", "0.0.0.0", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--password-file" in done.stderr


def served_by(url: str, arguments: str, request_seconds: int | None = None) -> list[str]:
    """A command that serves as `study dashboard` does, with these arguments of `serve`."""
    code = f"""
import sys
from dashboards.server import serve
from storage.engine import open_storage
if {request_seconds}:
    serve.REQUEST_SECONDS = {request_seconds}
storage = open_storage({url!r}, create=False, reading=True, may_write=True)
serve.serve(storage, "127.0.0.1", 0, lambda at: print(at, file=sys.stderr, flush=True), {arguments})
"""
    return [sys.executable, "-c", code]


HALF_SENT = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n",
    b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\npassword=",
    b"POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nFFFF\r\npassword=",
)


def test_half_sent_requests_do_not_silence_it(sqlite_url: str, tmp_path: Path) -> None:
    Harness(sqlite_url, config_of())
    with dashboard(sqlite_url, tmp_path, password=SECRET) as served, ExitStack() as stack:
        for number in range(105):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=30))
            half.sendall(HALF_SENT[number % len(HALF_SENT)])
        client = Client(served.port)
        assert client("GET", "/healthz")[::2] == (200, "ok\n")
        assert client("POST", "/login", urlencode({"password": SECRET}))[0] == 303


def closed_while_sending(connections: list[socket.socket]) -> bool:
    """Whether the other end closes all connections although a byte arrives every 0.1 s, for a minute."""
    for _ in range(600):
        for connection in list(connections):
            try:
                connection.sendall(b"x")
            except ConnectionError:
                connections.remove(connection)
        if not connections:
            return True
        time.sleep(0.1)
    return False


def test_a_request_that_is_sent_byte_by_byte_is_ended(sqlite_url: str, tmp_path: Path) -> None:
    """Every byte is activity; that must not keep a connection for ever."""
    Harness(sqlite_url, config_of())
    command = served_by(sqlite_url, "", request_seconds=2)
    with dashboard(sqlite_url, tmp_path, command=command) as served, ExitStack() as stack:
        connections = []
        for half in HALF_SENT:
            connections.append(stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=30)))
            connections[-1].sendall(half)
        assert closed_while_sending(connections)
        assert Client(served.port)("GET", "/healthz")[0] == 200
    assert "Traceback" not in served.log.read_text()


def test_too_large_headers_and_malformed_request_lines_are_refused(sqlite_url: str, tmp_path: Path) -> None:
    Harness(sqlite_url, config_of())
    with dashboard(sqlite_url, tmp_path) as served:
        assert Client(served.port)("GET", "/healthz", X="x" * 2**15)[0] == 431
        for line in (b"GET http://[ HTTP/1.1", b"GET", b"\xff / HTTP/1.1"):
            with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
                connection.sendall(line + b"\r\nHost: localhost\r\n\r\n")
                assert b" 400 " in connection.makefile("rb").readline(), line
    assert "Traceback" not in served.log.read_text()


def test_behind_a_trusted_proxy_each_client_is_throttled_alone(sqlite_url: str, tmp_path: Path) -> None:
    Harness(sqlite_url, config_of())
    arguments = f"password={SECRET!r}, trusted_proxy='127.0.0.1'"
    with dashboard(sqlite_url, tmp_path, command=served_by(sqlite_url, arguments)) as served:

        def attempt(password: str, forwarded: str) -> int:
            body = urlencode({"password": password})
            return Client(served.port)("POST", "/login", body, X_Forwarded_For=forwarded)[0]

        for number in range(Throttle.FREE_ATTEMPTS):
            assert attempt("wrong", f"192.0.2.{number}, 198.51.100.7") == 401  # what the client claims changes nothing
        assert attempt(SECRET, "192.0.2.77, 198.51.100.7") == 429
        assert attempt(SECRET, "198.51.100.8") == 303
        assert attempt(SECRET, "198.51.100.7, 2001:db8::1") == 303


def test_only_the_trusted_proxy_names_the_client(sqlite_url: str, tmp_path: Path) -> None:
    Harness(sqlite_url, config_of())
    for proxy in (None, "192.0.2.1"):
        command = served_by(sqlite_url, f"password={SECRET!r}, trusted_proxy={proxy!r}")
        with dashboard(sqlite_url, tmp_path, command=command) as served:
            for number in range(Throttle.FREE_ATTEMPTS):
                forwarded = {"X_Forwarded_For": f"192.0.2.{number}", "Forwarded": f"for=192.0.2.{number}"}
                assert Client(served.port)("POST", "/login", "password=wrong", **forwarded)[0] == 401
            body = urlencode({"password": SECRET})
            assert Client(served.port)("POST", "/login", body, X_Forwarded_For="192.0.2.99")[0] == 429
