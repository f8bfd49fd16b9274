"""What stands before optuna-dashboard: every request that it refuses, every one that it lets pass."""

from __future__ import annotations

import http.client
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from wsgiref.types import StartResponse, WSGIEnvironment

import optuna
import optuna_dashboard
import pytest
import sqlalchemy as sa

from dashboards.server.access_control import SESSION_SECONDS, Guard, Throttle
from dashboards.server.serve import check_names, check_open, is_any, is_loopback, password_from, serve, write_nothing
from storage.engine import open_storage
from storage.errors import UserError
from tests.e2e.test_command import study
from tests.support.harness import Harness, config_of
from tests.support.served import SECRET, dashboard

HOSTS = ("localhost", "127.0.0.1", "::1", "studies.example")
WRITING = ("POST", "PUT", "DELETE", "PATCH", "MKCOL")


class Browser:
    """Requests to a guard in this process, with a clock that the test moves."""

    def __init__(self, **options: Any) -> None:
        self.now, self.reached, self.cookie = 1000.0, 0, ""
        self.guard = Guard(self._inner, HOSTS, clock=lambda: self.now, **options)

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
        } | {f"HTTP_{key.upper()}": value for key, value in headers.items()}
        answer: dict[str, Any] = {}

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            answer.update(status=int(status.split()[0]), headers={key.lower(): value for key, value in headers})

        text = b"".join(self.guard(environ, start_response)).decode(errors="replace")
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
        assert "does not answer" in json.loads(text)["reason"]
    assert browser.reached == 0
    assert not browser.guard.sessions


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


def test_a_study_is_not_renamed_under_its_workers() -> None:
    browser = Browser()
    for path in ("/api/studies/1/rename", "/api/studies/1/rename//"):
        assert browser("POST", path)[0] == 403
    assert browser.reached == 0
    assert browser("PUT", "/api/studies/1/note")[0] == 200


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
    ["study_session_8080=", "study_session_8080=x", "study_session_8080=\ud800", "other=1", "=;=", 'a="', "[]=1"],
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
    assert len(browser.guard.sessions) == 1  # what ended is forgotten


def test_the_server_keeps_neither_password_nor_tokens() -> None:
    browser = Browser(password=SECRET)
    browser.log_in()
    kept = repr(vars(browser.guard))
    assert SECRET not in kept
    assert browser.cookie.partition("=")[2] not in kept


def test_behind_https_the_cookie_is_secure() -> None:
    browser = Browser(password=SECRET)
    body = urlencode({"password": SECRET})
    _, headers, _ = browser("POST", "/login", body, host="studies.example", origin="https://studies.example")
    assert headers["set-cookie"].endswith("; Secure")


@pytest.mark.parametrize("asked", ["//evil.example", "/\\evil.example", "http://evil.example", "/a\r\nb: c", "", "a"])
def test_logging_in_leads_nowhere_else(asked: str) -> None:
    assert Browser(password=SECRET).log_in(next=asked)[1]["location"] == "/"


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
    for _ in range(Throttle.FREE):
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
    browser.now += Throttle.LONGEST
    assert browser.log_in(SECRET)[0] == 303


def test_one_network_of_ipv6_is_one_address() -> None:
    browser = Browser(password=SECRET)
    for i in range(Throttle.FREE):
        assert browser.log_in("wrong", address=f"2001:db8::{i:x}")[0] == 401
    assert browser.log_in(SECRET, address="2001:db8::ffff")[0] == 429
    assert browser.log_in(SECRET, address="2001:db8:0:1::1")[0] == 303


def test_attempts_are_forgotten_and_their_number_is_bounded() -> None:
    throttle = Throttle()
    for i in range(Throttle.MOST + 5):
        throttle.note(f"host{i}", 0.0)
    assert len(throttle.wrong) == Throttle.MOST
    for now in (0.0, 0.0, 0.0, 0.0, 0.0, Throttle.FORGOTTEN + 1):
        throttle.note("host", now)
    assert throttle.wait("host", Throttle.FORGOTTEN + 1) == 0


def test_health_tells_nothing_and_asks_for_nothing() -> None:
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
        assert headers["content-security-policy"] == "frame-ancestors 'none'"
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
    with pytest.raises(UserError, match="12 characters"):
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
    file.write_bytes(b"\xff\xfe" * 10)
    with pytest.raises(UserError, match="not UTF-8"):
        password_from(file, None)


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
    storage = open_storage(url, create=False, reading=True)
    write_nothing(storage.engine)
    application = optuna_dashboard.wsgi(optuna.storages.get_storage(storage))
    browser = Browser(read_only=True)
    browser.guard.application = application
    study_id = harness.storage.get_study_id_from_name("s")
    trial_id = harness.storage.get_all_trials(study_id)[0]._trial_id
    values = {"study_id": study_id, "trial_id": trial_id, "history_id": "1", "artifact_id": "0-1", "plot_type": "slice"}
    routes = {(route.method, route.rule) for route in application.routes}
    assert len(routes) > 20
    reading = 0
    for method, rule in routes:
        path = re.sub(r"<(\w*):?[^<>]*(?:\([^)]*\)\?)?>", lambda found: str(values.get(found[1], "")), rule)
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


class Client:
    """HTTP to a dashboard, with its cookie."""

    def __init__(self, port: int) -> None:
        self.port, self.cookie = port, ""

    def __call__(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Cookie": self.cookie} | {key.replace("_", "-"): value for key, value in headers.items()}
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        connection.close()
        found = {key.lower(): value for key, value in answer.getheaders()}
        if "set-cookie" in found:
            self.cookie = found["set-cookie"].partition(";")[0]
        return answer.status, found, text


def test_over_http_with_a_login(sqlite_url: str, tmp_path: Path) -> None:
    Harness(sqlite_url, config_of())
    with dashboard(sqlite_url, tmp_path, "--host", "0.0.0.0", "--allow-host", "box", password=SECRET) as served:
        assert "with a login" in served.said
        assert SECRET not in Path(f"/proc/{served.process.pid}/cmdline").read_text() + served.said
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
        assert "read-only" in served.said
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
