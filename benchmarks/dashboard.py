"""How optuna-dashboard copes with large studies, and our page beside it.

    python -m benchmarks.dashboard [TRIALS …] [--no-browser]

Finished trials of 200 epochs, written by the database itself; then requests to a real `study dashboard`, a page in
headless Chromium, and `study report --html`. Default: 1,000 and 10,000 trials, on SQLite and on PostgreSQL.
"""

from __future__ import annotations

import argparse
import http.client
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import sqlalchemy as sa
from playwright.sync_api import TimeoutError as TooLong
from playwright.sync_api import sync_playwright

from storage.engine import open_storage
from study.config.loading import load_config
from study.create import create_study, prepare
from tests.support.postgres import Postgres
from tests.support.served import Dashboard, dashboard

EPOCHS = 200
PATIENCE = 300.0
CURVE = "0.9 * n / (n + 20.0 + t.number % 50)"


def write(url: str, trials: int) -> None:
    """A study of `trials` finished trials: half of them complete, the others pruned."""
    settings = [
        f"search.trials={trials}",
        f"training.epochs={EPOCHS}",
        "search.sampler=random",
        "policy.alpha={low=200, high=900}",
        "policy.beta={low=0.1, high=0.9}",
    ]
    config = load_config("quick", settings)
    storage = open_storage(url)
    create_study(storage, "large", "quick", config, prepare(config, None))
    parameter = "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) SELECT t.trial_id, "
    steps = f"WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {EPOCHS}) "
    alpha = optuna.distributions.distribution_to_json(optuna.distributions.IntDistribution(200, 900))
    beta = optuna.distributions.distribution_to_json(optuna.distributions.FloatDistribution(0.1, 0.9))
    statements = [
        "UPDATE trials SET state = 'COMPLETE', datetime_start = CURRENT_TIMESTAMP, "
        "datetime_complete = CURRENT_TIMESTAMP",
        "UPDATE trials SET state = 'PRUNED' WHERE number % 2 = 1",
        f"{parameter} 'alpha', 200 + (t.number * 37) % 701, '{alpha}' FROM trials t",
        f"{parameter} 'beta', 0.1 + 0.8 * ((t.number * 61) % 1000) / 1000.0, '{beta}' FROM trials t",
        "INSERT INTO trial_values (trial_id, objective, value, value_type) SELECT t.trial_id, 0, "
        f"{CURVE}, 'FINITE' FROM trials t, (SELECT {EPOCHS} AS n) s",
        "INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type) "
        f"{steps} SELECT t.trial_id, n, {CURVE}, 'FINITE' FROM trials t, s",
        "INSERT INTO trial_epochs (trial_id, epoch, accuracy, loss, images, train_seconds, validation_seconds, kind, "
        f"k, beta, decision) {steps} SELECT t.trial_id, n, {CURVE}, 1.0, 500, 0.5, 0.1, "
        "CASE WHEN n % 9 = 0 THEN 'type1' ELSE 'keep' END, 100, 0.5, 'go' FROM trials t, s",
        "INSERT INTO trial_attempts (trial_id, token, owner, device, started_at, ended_at, outcome, images) "
        f"SELECT t.trial_id, 1, 'host:1', 'cpu', 1000 + t.number, 1100 + t.number, 'finished', {EPOCHS * 500} "
        "FROM trials t",
        "INSERT INTO trial_leases (trial_id, token, owner, expires_at, attempts) "
        "SELECT t.trial_id, 1, 'host:1', 0, 0 FROM trials t",
    ]
    with storage.engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement.replace(":", "\\:")))
    storage.engine.dispose()


def ask(served: Dashboard, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    start, spent = time.perf_counter(), processor_seconds(served.process.pid)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        size = len(answer.read())
    except TimeoutError:
        return f"no answer in {PATIENCE:.0f} s"
    finally:
        connection.close()
    took, spent = time.perf_counter() - start, processor_seconds(served.process.pid) - spent
    return f"{answer.status}, {took:.2f} s ({spent:.2f} s of processor), {size / 1e6:.2f} MB"


def processor_seconds(pid: int) -> float:
    """What the process has used: on a machine with other work, this is what can be compared."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return f"{int(next(line for line in lines if line.startswith('VmHWM')).split()[1]) / 1e3:.0f} MB"


def in_browser(served: Dashboard, path: str, drawn: str) -> str:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        start = time.perf_counter()
        try:
            page.goto(f"{served.url}{path}")
            page.locator(drawn).first.wait_for(timeout=PATIENCE * 1000)
        except TooLong:
            return f"nothing drawn in {PATIENCE:.0f} s"
        finally:
            page.close()
            browser.close()
        return f"{time.perf_counter() - start:.1f} s until it is drawn"


def measure(url: str, folder: Path, trials: int, browser: bool) -> None:
    start = time.perf_counter()
    write(url, trials)
    print(f"  written in {time.perf_counter() - start:.1f} s", flush=True)
    with dashboard(url, folder, "--read-only") as served:
        for title, path in {
            "list of studies": "/api/studies",
            "study, first time": "/api/studies/1",
            "study, again": "/api/studies/1",
            "study, a poll for what is new": f"/api/studies/1?after={trials}",
            "importance of parameters": "/api/studies/1/param_importances",
            "slice plot": "/api/studies/1/plot/slice",
            "contour plot": "/api/studies/1/plot/contour",
            "CSV": "/csv/1",
        }.items():
            print(f"  {title}: {ask(served, path)}", flush=True)
        if browser:
            print(f"  study page in Chromium: {in_browser(served, '/dashboard/studies/1', '.js-plotly-plot .point')}")
            print(f"  list of trials in Chromium: {in_browser(served, '/dashboard/studies/1/trials', 'text=Trial 3')}")
        print(f"  memory of the dashboard at its height: {resident(served.process.pid)}", flush=True)
    start, spent = time.perf_counter(), sum(os.times()[2:4])
    page = folder / f"report-{trials}.html"
    command = [sys.executable, "-m", "study", "report", "large", "--storage", url, "--html", str(page)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    took, spent = time.perf_counter() - start, sum(os.times()[2:4]) - spent
    print(
        f"  study report --html: {took:.1f} s ({spent:.1f} s of processor), {page.stat().st_size / 1e6:.1f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", type=int, default=[1_000, 10_000], metavar="TRIALS")
    parser.add_argument("--no-browser", action="store_true")
    options = parser.parse_args()
    server = Postgres()
    try:
        with tempfile.TemporaryDirectory() as name:
            for trials in options.trials:
                for url in (f"sqlite:///{name}/{trials}.db", server.new_database()):
                    print(f"{trials:,} trials of {EPOCHS} epochs, {url.partition(':')[0]}", flush=True)
                    measure(url, Path(name), trials, not options.no_browser)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
