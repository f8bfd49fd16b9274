"""Random HTTP requests to a dashboard: none is answered with a server error, hangs or leaves a traceback in its log.

A failure names the seed of its request: FUZZ_SEED=<seed> FUZZ_SECONDS=0 sends that request alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from storage.optuna_internals import DashboardRoute
from tests.integration.test_access_control import contents
from tests.support.harness import Harness, config_of
from tests.support.served import SECRET, Dashboard, dashboard

SECONDS = float(os.environ.get("FUZZ_SECONDS", 30))
SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**32)))
MAX_SECONDS = 60
"""That an answer may take: plots are drawn by the dashboard, on a machine that may be busy."""

ROUTES = (
    *(tuple(route.split(" ", 1)) for route in DashboardRoute),
    *(
        ("GET", path)
        for path in ("/", "/dashboard", "/dashboard/studies/1", "/api/meta", "/api/studies", "/favicon.ico")
    ),
    *(("GET", path) for path in ("/static/bundle.js", "/incompatible-rdb-schema", "/healthz", "/login", "/logout")),
    *(("GET", f"/api/studies/1/{rest}") for rest in ("param_importances", "plot/edf", "plot/timeline")),
    *(("POST", path) for path in ("/login", "/logout")),
)
METHODS = (
    "GET",
    "HEAD",
    "OPTIONS",
    "POST",
    "PUT",
    "DELETE",
    "PATCH",
    "PROXY",
    "ANY",
    "TRACE",
    "CONNECT",
    "get",
    "É",
    "",
)
PLOTS = ("contour", "slice", "parallel_coordinate", "rank", "edf", "timeline", "pareto_front", "other")
IDS = (
    "1",
    "2",
    "3",
    "4",
    "0",
    "-1",
    "+1",
    "01",
    "1e3",
    "٣",
    "１",
    "²",
    "2147483648",
    "9" * 30,
    "9" * 5000,
    "1.0",
    "x",
    "",
)
TEXTS = (
    "s",
    "日",
    "a\nb",
    "\0",
    "\ud800",
    "\x1b]0;x\x07",
    "x" * 600,
    "<script>",
    "../..",
    "%00",
    "",
    "'; DROP TABLE trials",
)
TYPES = (
    "application/json",
    "application/json; charset=utf-16",
    "application/json-rpc",
    "text/plain",
    "a/b; charset=no",
)
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "multipart/form-data", "")
KEYS = (
    *("study_name", "directions", "version", "body", "state", "values", "user_attrs", "remove_associated_artifacts"),
    *("mode", "candidates", "clicked", "output_type", "file", "filename", "user_query"),
)
FRAGMENTS = (
    b"%",
    b"%00",
    b"%FF",
    b"%C0%AF",
    b"%2F",
    b"//",
    b"/../",
    b";",
    b"?",
    b"#",
    b"\\",
    b"%25",
    b" ",
    b"\xff",
    b"[",
)
HEADERS = (
    *("Host", "Cookie", "Origin", "Sec-Fetch-Site", "Accept", "Accept-Encoding", "Range", "If-Modified-Since"),
    *("X-Forwarded-For", "Forwarded", "Transfer-Encoding", "Content-Length", "Expect", "Upgrade", "X-" + "y" * 300),
)
VALUES = (
    *(
        "localhost",
        "localhost:8080",
        "[::1]",
        "http://localhost",
        "http://[",
        "null",
        "*/*",
        "text/html",
        "gzip",
        "chunked",
    ),
    *(
        "bytes=0-1",
        "bytes=-5",
        "bytes=9-1",
        "bytes=x",
        "Thu, 01 Jan 1970 00:00:00 GMT",
        "Thu, 99 Xxx 99999 00:00:00",
        "-1",
    ),
    *(
        'a={"b":1}',
        "study_session_80=x",
        "novalue",
        "100-continue",
        "1, 1",
        "99999999999999999999",
        "close",
        "\x80\xff",
        "",
    ),
)


def value(draw: random.Random, depth: int = 3) -> Any:
    """A JSON value."""
    kind = draw.randrange(9 if depth else 7)
    if kind == 7:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 8:
        return {draw.choice((*KEYS, *TEXTS)): value(draw, depth - 1) for _ in range(draw.randrange(4))}
    number = draw.choice((0, 1, -1, 0.5, 2**31, 2**63, 10**400, 1e308, float("nan"), -float("inf")))
    word = draw.choice(("minimize", "Complete", "Fail", "running", "note", "data:,", "1"))
    return draw.choice((None, True, number, number, draw.choice(TEXTS), word))


def body(draw: random.Random) -> bytes:
    """Often a JSON object with the keys that the routes read, sometimes anything."""
    kind = draw.random()
    if kind < 0.7:
        document = {key: value(draw) for key in draw.sample(KEYS, draw.randrange(1, 6))}
        if draw.random() < 0.5:
            name = draw.choice((*TEXTS, f"study {draw.random()}"))
            document |= {"study_name": name, "directions": draw.choices(("minimize", "maximize"), k=draw.randrange(4))}
        if draw.random() < 0.5:
            document |= {
                "version": draw.choice((1, 2, 5)),
                "body": draw.choice(TEXTS),
                "state": "Complete",
                "values": [draw.random()] * draw.choice((1, 1, 2)),
            }
        text = json.dumps(document, ensure_ascii=draw.random() < 0.7).encode(errors="surrogatepass")
        return text if draw.random() < 0.9 else text[: draw.randrange(len(text) + 1)]
    if kind < 0.8:
        return b"password=" + quote(draw.choice((SECRET, "wrong", *TEXTS)), errors="replace").encode() + b"&next=/%E6"
    return draw.choice(
        (b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"--x\r\n\r\n", draw.randbytes(200), b"\xff\xfe{\0}\0")
    )


def path(draw: random.Random, rule: str) -> bytes:
    def part(match: re.Match[str]) -> str:
        if match[1] == "plot_type":
            return draw.choice(PLOTS)
        return (
            draw.choice(("0-1", "x", "a" * 400))
            if "artifact" in match[1] or "history" in match[1]
            else draw.choice(IDS[:4] * 3 + IDS)
        )

    text = re.sub(r"<(\w+)(?::\w+)?(?::[^>]*)?>", part, rule)
    encoded = quote(text, errors="replace").encode() if draw.random() < 0.9 else text.encode(errors="replace")
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        at = draw.randrange(len(encoded) + 1)
        encoded = encoded[:at] + draw.choice(FRAGMENTS) + encoded[at:]
    queries = (
        b"after=0",
        b"after=x",
        b"after=-1",
        b"after=" + b"9" * 5000,
        b"trial_ids=0,1",
        b"trial_ids=%FF",
        b"&=&;%",
    )
    return encoded + (b"?" + draw.choice(queries) if draw.random() < 0.3 else b"")


def request(draw: random.Random) -> bytes:
    """One request, whole or not."""
    if draw.random() < 0.03:
        return draw.randbytes(draw.randrange(1, 500))
    method, rule = draw.choice(ROUTES)
    if draw.random() < 0.1:
        method = draw.choice(METHODS)
    content = body(draw) if method != "GET" or draw.random() < 0.1 else b""
    headers = {"Host": "localhost", "Connection": "close"}
    if content or draw.random() < 0.5:
        headers["Content-Length"] = str(len(content))
        headers["Content-Type"] = draw.choice(TYPES[:1] * 6 + TYPES + FORMS)
    for _ in range(draw.choice((0, 0, 1, 1, 3))):
        headers[draw.choice(HEADERS)] = draw.choice(VALUES)
    lines = [f"{key}: {text}".encode("latin-1") for key, text in headers.items()]
    first = (
        method.encode()
        + b" "
        + path(draw, rule)
        + b" HTTP/"
        + draw.choice((b"1.1",) * 9 + (b"1.0", b"2.0", b"0.9", b"x"))
    )
    whole = b"\r\n".join((first, *lines, b"", content))
    if draw.random() < 0.05:
        at = draw.randrange(len(whole))
        whole = whole[:at] + draw.randbytes(draw.randrange(4)) + whole[at + draw.randrange(4) :]
    return whole


def status(port: int, sent: bytes) -> int | None:
    """Of the answer; None: the request was not whole, and the connection was closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=MAX_SECONDS) as connection:
        received = b""
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                received = (received + chunk)[:64]
        except TimeoutError:
            raise
        except OSError:  # closed before all of it was sent
            pass
        match = re.match(rb"HTTP/1\.[01] (\d{3}) ", received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"))
        return int(match[1]) if match else None


def check_alive(served: Dashboard, seed: int) -> None:
    with urllib.request.urlopen(f"{served.url}/healthz", timeout=MAX_SECONDS) as answer:
        assert answer.read() == b"ok\n", f"seed {seed}"
    log = served.log.read_text(errors="replace")
    assert "Traceback" not in log, f"seed {seed} or one of the 20 before it: {log[-3000:]}"
    assert "Exception" not in log, f"seed {seed} or one of the 20 before it: {log[-3000:]}"


def fuzz(served: Dashboard, seconds: float, seed: int) -> Counter[int | None]:
    """Send requests of the seeds `seed`, `seed + 1`, … for so many seconds, at least one; the answers by status."""
    statuses: Counter[int | None] = Counter()
    end = time.monotonic() + seconds
    while not statuses or time.monotonic() < end:
        sent = request(random.Random(seed))
        try:
            answer = status(served.port, sent)
        except TimeoutError:
            raise AssertionError(f"seed {seed}: no answer after {MAX_SECONDS} s to {sent[:500]!r}") from None
        # 501: a transfer encoding that waitress does not know.
        assert answer is None or answer < 500 or answer == 501, f"seed {seed}: {answer} to {sent[:500]!r}"
        statuses[answer] += 1
        if statuses.total() % 20 == 0:
            check_alive(served, seed)
        seed += 1
    check_alive(served, seed - 1)
    return statuses


@pytest.mark.fuzz
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("password", [None, SECRET])
def test_random_requests(password: str | None, sqlite_url: str, tmp_path: Path) -> None:
    harness = Harness(sqlite_url, config_of(training={"epochs": 2}, policy={"alpha": [60], "beta": [0.3, 0.6, 0.9]}))
    harness.work(most=2)
    lease = harness.queue(seconds=10_000).claim()
    assert lease is not None
    before = contents(harness.storage.engine)
    with dashboard(sqlite_url, tmp_path, password=password) as served:
        statuses = fuzz(served, SECONDS / 2, SEED)
        assert served.terminate() == 0
    print(f"{statuses.total()} requests from seed {SEED}: {dict(sorted(statuses.items(), key=str))}")  # noqa: T201
    # The study of which a worker holds a trial is as it was, except for notes.
    after = contents(harness.storage.engine)
    for table in ("trials", "trial_params", "trial_values", "trial_leases", "trial_epochs", "trial_user_attributes"):
        assert before[table] == after[table], table
    if password is not None:
        assert before == after
