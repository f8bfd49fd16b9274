"""End to end in headless Chromium: a study watched as it runs, the login, what is refused, the page on disk."""

from __future__ import annotations

import functools
import http.server
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from storage.engine import open_storage
from tests.e2e.test_command import SMALL, started, study
from tests.support.served import SECRET, Dashboard, dashboard

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; on Debian: apt-get install chromium")
SLOW = 60_000  # ms


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser for which a foreign name leads to this machine, as after DNS rebinding."""
    options = ["--host-resolver-rules=MAP evil.example 127.0.0.1"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")
    expect.set_options(timeout=SLOW)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


@pytest.fixture(scope="module")
def watched(chromium: Browser, folder: Path, url: str) -> Iterator[tuple[Dashboard, Page]]:
    """A dashboard with a login, a visitor who is logged in, and a study that is launched meanwhile."""
    open_storage(url)
    with dashboard(url, folder, password=SECRET) as served:
        page = chromium.new_page()
        page.set_default_timeout(SLOW)
        page.goto(f"{served.url}/dashboard")
        page.get_by_label("Password").fill("wrong password")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_have_text("Wrong password.")
        assert page.context.cookies() == []
        page.get_by_label("Password").fill(SECRET)
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("button", name="Create")).to_be_visible()
        yield served, page
        page.close()


@pytest.fixture(scope="module")
def finished(watched: tuple[Dashboard, Page], folder: Path, url: str) -> tuple[Dashboard, Page]:
    """The same when the study, seen from nothing to its end, is done."""
    _, page = watched
    expect(page.get_by_text("quick")).to_have_count(0)
    launcher = started("launch", "quick", *SMALL, "--set", "training.epochs=2", cwd=folder)

    def reloaded() -> None:
        page.get_by_role("button", name="Reload").click()
        expect(page.get_by_role("link", name="quick")).to_be_visible(timeout=500)

    until(reloaded)
    page.get_by_role("link", name="quick").click()
    page.locator("a[href$='/trials']").click()
    expect(page.get_by_text("Trial 3", exact=False).first).to_be_visible()  # all trials are queued at the start
    out, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, out + err
    expect(page.get_by_text("Complete", exact=True)).to_have_count(5)  # four, and the one that is shown
    return watched


def until(attempt: Callable[[], None]) -> None:
    for _ in range(100):
        with suppress(AssertionError):
            attempt()
            return
    attempt()


def colours(part: Locator) -> int:
    """How many colours a part of a page is drawn in: nothing but a background has one."""
    pixels = Image.open(io.BytesIO(part.screenshot())).convert("RGB").getcolors(2**24)
    assert pixels is not None
    return len(pixels)


def test_a_study_is_seen_as_it_runs(finished: tuple[Dashboard, Page]) -> None:
    served, page = finished
    page.goto(f"{served.url}/dashboard/studies/1")
    curves = page.locator(".js-plotly-plot", has_text="Step")
    expect(curves.locator(".scatterlayer .trace")).to_have_count(4)
    history = page.locator(".js-plotly-plot").first
    history.locator(".scatterlayer .point").nth(3).wait_for(state="attached")
    assert min(colours(curves), colours(history)) > 20


def test_the_session_is_out_of_scripts_reach_and_ends(finished: tuple[Dashboard, Page], chromium: Browser) -> None:
    served, page = finished
    (cookie,) = page.context.cookies(f"{served.url}/dashboard")  # that of a known browser goes to /login alone
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.evaluate("document.cookie") == ""
    other = chromium.new_page()
    other.goto(f"{served.url}/logout")
    expect(other.get_by_label("Password")).to_be_visible()
    page.goto(f"{served.url}/logout")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Password")).to_be_visible()
    assert page.request.get(f"{served.url}/api/studies").status == 401
    # The login leads to the page that was requested.
    other.goto(f"{served.url}/dashboard/studies/1")
    other.get_by_label("Password").fill(SECRET)
    other.get_by_role("button", name="Log in").click()
    expect(other.get_by_text("quick").first).to_be_visible()
    assert other.url == f"{served.url}/dashboard/studies/1"
    other.close()


@pytest.fixture
def read_only(finished: object, folder: Path, url: str) -> Iterator[Dashboard]:
    with dashboard(url, folder, "--read-only") as served:
        yield served


def test_what_is_refused(read_only: Dashboard, chromium: Browser, url: str) -> None:
    page = chromium.new_page()
    page.set_default_timeout(SLOW)
    page.goto(f"{read_only.url}/dashboard")
    page.get_by_role("button", name="delete study").click()
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as refused:
        page.get_by_role("button", name="Yes").click()
    assert refused.value.status == 403
    assert refused.value.json() == {"reason": "this dashboard is read-only"}

    page.goto(f"http://evil.example:{read_only.port}/api/studies")
    expect(page.locator("body")).to_contain_text("does not answer to the name evil.example")
    with foreign_site(
        f'<form method="post" enctype="text/plain" action="{read_only.url}/api/studies"><button>'
    ) as port:
        page.goto(f"http://evil.example:{port}/")
        page.get_by_role("button").click()
        expect(page.locator("body")).to_contain_text("another site's page")
        assert page.url.startswith(read_only.url)
        # Neither in a frame nor by a script.
        page.goto(f"http://evil.example:{port}/")
        fetch = "address => fetch(address).then(() => 'read', () => 'refused')"
        assert page.evaluate(fetch, f"http://evil.example:{port}/") == "read"
        assert page.evaluate(fetch, f"{read_only.url}/api/studies") == "refused"
    page.close()
    assert optuna.get_all_study_names(open_storage(url, create=False, reading=True)) == ["quick"]


@contextmanager
def foreign_site(html: str) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        log_message = functools.partialmethod(lambda *_: None)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_the_page_on_disk_needs_no_network(finished: object, chromium: Browser, folder: Path) -> None:
    done = study("report", "quick", "--html", "report.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    context = chromium.new_context(offline=True)
    page = context.new_page()
    requested: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    address = (folder / "report.html").as_uri()
    page.goto(address)
    figures = page.locator(".plotly-graph-div")
    assert figures.count() >= 2
    for figure in figures.all():
        expect(figure.locator(".main-svg").first).to_be_visible()
        assert colours(figure) > 20
    expect(page.locator("body")).to_contain_text("4 complete")
    assert [one for one in requested if not one.startswith(("data:", "blob:"))] == [address]
    assert faults == []
    context.close()
