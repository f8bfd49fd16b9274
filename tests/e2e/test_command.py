"""The command as users have it: launched, looked at, killed, resumed; and its answers to bad input."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import Engine

from dashboards import study_data
from storage.engine import open_engine, open_storage
from storage.errors import UserError
from storage.queries import attempts, find, progress
from study import exit_codes
from tests.support.command import study as study

SMALL = [
    *("--set", "network.width=0.125", "--set", "data.train_images=300", "--set", "policy.alpha=[100, 150]"),
    *("--set", "policy.beta=[0.3, 0.6]", "--set", "training.epochs=4", "--set", "training.batch_size=50"),
    *("--set", "pruning=none", "--set", "checkpoint.every_seconds=0", "--set", "lease.seconds=1.5", "--device", "cpu"),
    *("--workers", "1"),
]
"""The smallest study that is one: digits, an eighth of the width; every step checkpointed, short leases."""


def started(*arguments: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "study", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def outcome(url: str, name: str) -> list[tuple[Any, ...]]:
    view = study_data.read(open_storage(url, create=False, reading=True), name)
    timeless = {
        number: [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]
        for number, rows in view.curves.items()
    }
    return [(row.number, row.state, row.parameters, row.value, timeless[row.number]) for row in view.rows]


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError("it did not happen")


opened = functools.cache(open_engine)


def there(url: str, name: str) -> tuple[Engine, int] | None:
    """The study, once it is created."""
    with suppress(UserError):
        return opened(url), find(opened(url), name)[0]
    return None


def worker_pid(url: str, name: str, epochs: range = range(1, 1_000_000)) -> int | None:
    """The process that holds a live lease, if it has stored so many epochs of its trial."""
    return next(iter(working(url, name, epochs)), None)


def working(url: str, name: str, epochs: range = range(1_000_000)) -> list[int]:
    """The processes that hold live leases and have stored so many epochs of their trials."""
    study_there = there(url, name)
    running = progress(*study_there).running if study_there else ()
    return [process(trial.owner) for trial in running if trial.epoch in epochs]


def have_worked(url: str, name: str) -> set[int]:
    """The processes that have had a trial, whether or not they have one now."""
    study_there = there(url, name)
    return {process(each.owner) for each in attempts(*study_there)} if study_there else set()


def process(owner: str) -> int:
    return int(owner.split(":")[-2])


def is_stopped(process: int) -> bool:
    return state_and_parent(process)[0] == "T"


def state_and_parent(process: int) -> list[str]:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]


def stop(process: int, url: str) -> None:
    """SIGSTOP, where it is in no transaction: one that is stopped within keeps its locks, which shut all others out."""
    while True:
        os.kill(process, signal.SIGSTOP)
        wait_for(lambda: is_stopped(process))
        if not within_a_transaction(opened(url)):
            return
        os.kill(process, signal.SIGCONT)
        time.sleep(0.002)


def within_a_transaction(engine: Engine) -> bool:
    """Whether anybody else has a transaction in which something was or may be written."""
    if engine.dialect.name == "sqlite":
        with closing(sqlite3.connect(str(engine.url.database), timeout=0, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
            except sqlite3.OperationalError:
                return True
        return False
    others = "datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'"
    with engine.connect() as connection:
        return connection.exec_driver_sql(f"SELECT count(*) FROM pg_stat_activity WHERE {others}").scalar() != 0


def held_in_mid_trial(url: str) -> int:
    """The only worker of SMALL, stopped (SIGSTOP) where some epochs of its trial are stored and some are to come.

    From its first trial on it runs for 2 ms at a time, in which it cannot get past all the epochs in the middle.
    """
    worker = int(wait_for(lambda: worker_pid(url, "quick", range(4))))
    while True:
        stop(worker, url)
        if worker_pid(url, "quick", range(1, 4)) == worker:
            return worker
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.002)


def has_a_signal_waiting(process: int) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("ShdPnd:")[2].split()[0], 16) != 0


def test_a_process_is_stopped_between_two_transactions(sqlite_url: str) -> None:
    """The helper that many of these tests use; this process is in a transaction nearly all the time."""
    storage = open_storage(sqlite_url)
    code = (
        "import sqlite3, sys, time\n"
        "connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)\n"
        "while True:\n"
        "    connection.execute('BEGIN IMMEDIATE'); time.sleep(0.03); connection.commit()\n"
        "    print('again', flush=True); time.sleep(0.005)\n"
    )
    command = [sys.executable, "-c", code, str(storage.engine.url.database)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            for _ in range(3):
                stop(process.pid, sqlite_url)
                assert is_stopped(process.pid)
                assert not within_a_transaction(storage.engine)
                os.kill(process.pid, signal.SIGCONT)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study in study.db."""
    folder = tmp_path_factory.mktemp("finished")
    done = study("launch", "quick", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "trial 3 complete" in done.stderr
    assert "Trials, best first" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # no terminal, no escapes
    return folder


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> list[tuple[Any, ...]]:
    return outcome(f"sqlite:///{finished}/study.db", "quick")


def test_status_prints_a_table_and_json(finished: Path) -> None:
    document = json.loads(study("status", "quick", "--json", "-", cwd=finished).stdout)
    assert document["name"] == "quick"
    assert document["total"] == document["tickets"] == 4
    assert document["states"] == {"waiting": 0, "running": 0, "interrupted": 0, "complete": 4, "pruned": 0, "failed": 0}
    assert set(document["best_params"]) == {"alpha", "beta"}
    assert 0 < document["best_value"] <= 1
    people = study("status", "quick", cwd=finished).stdout
    assert "4 complete" in people
    assert "holdout" in people


def test_launching_again_adds_nothing(finished: Path, undisturbed: list[tuple[Any, ...]]) -> None:
    again = study("launch", "quick", *SMALL, cwd=finished)
    assert again.returncode == 0
    assert "resuming study" in again.stderr
    assert outcome(f"sqlite:///{finished}/study.db", "quick") == undisturbed


def test_report_shows_every_cell_and_the_grid(finished: Path) -> None:
    page = finished / "report.html"
    report = study("report", "quick", "--html", str(page), cwd=finished)
    assert report.returncode == 0
    assert "alpha \\ beta" in report.stdout
    assert report.stdout.count("complete") >= 4
    html = re.sub(r"<script.*?</script>", "", whole := page.read_text(), flags=re.DOTALL)
    assert "Plotly.newPlot" in whole
    assert "validation accuracy (%)" in whole
    assert not any(f'{attribute}="http' in html for attribute in ("src", "href"))  # nothing to fetch


def test_confirm_trains_the_best_again_and_reports_both(finished: Path, tmp_path: Path) -> None:
    exported = study("export", "quick", str(tmp_path / "study.db"), cwd=finished)
    assert exported.returncode == 0, exported.stderr
    done = study("confirm", "quick", "--top", "1", "--seeds", "2", "--device", "cpu", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sentences = " ".join(done.stdout.split())  # long lines are wrapped
    assert "regression to the mean" in sentences
    assert "on the test split, evaluated once a trial," in sentences
    numbers = tmp_path / "report.json"
    assert study("report", "quick", "quick-confirmed", "--json", str(numbers), cwd=tmp_path).returncode == 0
    study_rows, confirmed = json.loads(numbers.read_text())
    assert confirmed["cells"][0]["parameters"] == study_rows["best_params"]
    assert confirmed["cells"][0]["test"]["n"] == 2
    refused = study("confirm", "quick", "--top", "99", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--top must be at most the 4 settings" in refused.stderr


def test_dashboard_serves_the_study_on_loopback(finished: Path) -> None:
    import urllib.request

    server = started("dashboard", "--port", "0", cwd=finished)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        address = line.split()[2]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}/api/studies", timeout=20) as answer:
            studies = json.load(answer)["study_summaries"]
        assert [s["study_name"] for s in studies] == ["quick"]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


@pytest.mark.parametrize(
    "how",
    [
        "ctrl-c",
        # By default a launcher is terminated in test_compose.py, where another ends its study.
        pytest.param("terminate", marks=pytest.mark.slow),
        "kill the launcher",
        "kill the worker",
    ],
)
def test_a_study_survives_and_ends_the_same(how: str, tmp_path: Path, undisturbed: list[tuple[Any, ...]]) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    launcher = started("launch", "quick", *SMALL, cwd=tmp_path)
    try:
        worker = held_in_mid_trial(url)
        if how == "kill the worker":
            os.kill(worker, signal.SIGKILL)
            _, err = launcher.communicate(timeout=120)
            assert launcher.returncode == 0, err
            assert "died" in err
        else:
            number = {"ctrl-c": signal.SIGINT, "terminate": signal.SIGTERM}.get(how, signal.SIGKILL)
            before = state_and_parent(worker)
            launcher.send_signal(number)
            wait_for(lambda: state_and_parent(worker) != before or has_a_signal_waiting(worker))
            os.kill(worker, signal.SIGCONT)
            _, err = launcher.communicate(timeout=120)
            if number == signal.SIGKILL:
                assert launcher.returncode == -signal.SIGKILL
            else:
                assert launcher.returncode == exit_codes.INTERRUPTED, err
                assert "interrupted; nothing is lost; continue with: study resume quick" in err
            wait_for(lambda: not Path(f"/proc/{worker}").exists())  # nobody is left behind
            again = study("launch", "quick", *SMALL, cwd=tmp_path)
            assert again.returncode == 0, again.stderr
            assert "resumes after epoch" in again.stderr
    finally:
        launcher.kill()
    assert outcome(url, "quick") == undisturbed


def test_a_study_moves_by_file_and_by_copy(finished: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path) -> None:
    def fine(*arguments: str) -> str:
        done = study(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr

    home = f"sqlite:///{finished}/study.db"
    fine("export", "quick", "moved.study", "--storage", home)
    assert [p.name for p in tmp_path.iterdir()] == ["moved.study"]  # one file
    fine("import", "moved.study", "--name", "again")
    assert outcome(f"sqlite:///{tmp_path}/study.db", "again") == undisturbed
    fine("copy", "again", "--from", "sqlite:///study.db", "--to", "sqlite:///other.db")
    assert outcome(f"sqlite:///{tmp_path}/other.db", "again") == undisturbed
    assert "study resume again" in fine("copy", "again", "--from", "sqlite:///other.db", "--to", "sqlite:///third.db")
    refused = study("delete", "again", cwd=tmp_path)
    assert (refused.returncode, "use --yes" in refused.stderr) == (2, True)
    fine("delete", "again", "--yes")
    assert "there are none yet" in study("status", "again", cwd=tmp_path).stderr
    refused = study("export", "nope", "x.study", "--storage", home, cwd=tmp_path)
    assert refused.returncode == 2
    assert not (tmp_path / "x.study").exists()
    assert study("requeue", "quick", "--trial", "0", "--storage", home, cwd=tmp_path).returncode == 2


@pytest.mark.slow  # by default: two launchers in test_compose.py, a launcher and a worker in test_budgets_and_stop.py
def test_two_workers_and_a_third_from_elsewhere_share_the_work(postgres: Any, tmp_path: Path) -> None:
    """On PostgreSQL, with blank queued trials: exactly as many trials end as were queued.

    The two are stopped (SIGSTOP) in their trials until the third has finished one.
    """
    url = postgres.new_database()
    searched = ["--set", "search.sampler=tpe", "--set", "policy.beta={low=0.1, high=0.9}", "--trials", "7"]
    searched += ["--set", "lease.seconds=600"]
    launcher = started("launch", "quick", *SMALL, *searched, "--workers", "2", "--storage", url, cwd=tmp_path)
    two: list[int] = []
    while len(two) < 2:
        worker = wait_for(lambda: next((pid for pid in working(url, "quick") if pid not in two), None))
        stop(worker, url)
        if worker in working(url, "quick"):
            two.append(worker)
        else:
            os.kill(worker, signal.SIGCONT)
    joined = started("worker", "quick", cwd=tmp_path, env=os.environ | {"STUDY_STORAGE": url})
    engine, study_id = wait_for(lambda: there(url, "quick"))

    def finished_by() -> list[int]:
        return [process(each.owner) for each in attempts(engine, study_id) if each.outcome == "finished"]

    wait_for(lambda: joined.pid in finished_by())
    for worker in two:
        os.kill(worker, signal.SIGCONT)
    out, err = launcher.communicate(timeout=120)
    _, joined_err = joined.communicate(timeout=120)
    assert (launcher.returncode, joined.returncode) == (0, 0), err + joined_err
    assert {*two, joined.pid} <= set(finished_by())
    document = json.loads(study("status", "quick", "--json", "-", "--storage", url, cwd=tmp_path).stdout)
    assert document["states"]["complete"] == document["total"] == 7
    assert "7 complete" in out


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Runs the command in an empty folder, where it is refused; gives its line on stderr."""
    empty = tmp_path / "empty"
    empty.mkdir()

    def refused(*arguments: str) -> str:
        done = study(*arguments, cwd=empty)
        assert (done.returncode, done.stdout) == (2, "")
        assert list(empty.iterdir()) == []  # nothing half-made is left
        lines = [line for line in done.stderr.splitlines() if not line.startswith("decoding")]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("study: ")
        return lines[0]

    return refused


BAD_INPUT: list[tuple[list[str], str]] = [
    (
        ["launch", "nope"],
        "no preset 'nope'; presets: paper-augmented, paper-baselines, paper-grid, quick",
    ),
    (["launch"], "Missing argument"),
    (["lunch"], "No such command"),
    (["launch", "quick", "--sett", "x=1"], "No such option"),
    (["launch", "quick", "--set", "training.epoch=5"], "unknown key training.epoch (did you mean 'epochs'?)"),
    (["launch", "quick", "--set", "policy.alpha=0"], "from 1 to 1,000,000,000, got 0"),
    (["launch", "quick", "--set", "policy.alpha=1079"], "at most the 1078 training images of 'digits'"),
    (["launch", "quick", "--set", "policy.beta=1.01"], "(0, 1], got 1.01"),
    (["launch", "quick", "--set", "policy.delta=-1"], "at least 0, got -1"),
    (["launch", "quick", "--set", "policy.beta=[0.1, 'x']"], "got 'x'"),
    (["launch", "quick", "--set", "data.name=imagefolder"], "needs --data-root"),
    (["launch", "quick", "--set", "data.name=imagefolder", "--data-root", "/nowhere"], "no folder /nowhere"),
    (["launch", "quick", "--storage", "study.db"], "write sqlite:///study.db"),
    (["launch", "quick", "--storage", "sqlite:////nowhere/study.db"], "no folder /nowhere"),
    (["launch", "quick", "--storage", "sqlite:////proc/study.db"], "cannot use the database"),
    (["launch", "quick", "--storage", "postgresql://me:hunter2@127.0.0.1:1/db"], "me:***@127.0.0.1:1/db"),
    (["launch", "quick", "--device", "tpu"], "got 'tpu'"),
    (
        ["launch", "quick", "--set", "checkpoint.store=ftpx://a/b"],
        "checkpoint.store must be 'database', the whole path of a folder",
    ),
    (["launch", "quick", "--workers", "0"], "--workers"),
    (["launch", "quick", "--budget", "2 weeks"], "a budget is an amount and a unit"),
    (["launch", "quick", "--objective", "speed"], "search.objective: must be accuracy or accuracy,images, got 'speed'"),
    (["launch", "quick", "--set", "training.images=5000"], 'pruning.step must be "images"'),
    (["launch", "verdict", "--set", "data.protocol=paper"], "test needs the holdout protocol"),
    (["confirm", "quick"], "no database file study.db"),
    (["stop", "quick"], "no database file study.db"),
    (["report", "quick", "--json", "/nowhere/x.json"], "no folder /nowhere"),
    (["status", "quick"], "no database file study.db"),
    (["report", "quick", "--html", "/nowhere/x.html"], "no folder /nowhere"),
]


@pytest.mark.parametrize(("arguments", "fault"), BAD_INPUT, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], fault: str, run: Any) -> None:
    line = run(*arguments)
    assert fault in line
    assert "hunter2" not in line


def test_an_undecodable_image_is_named(tmp_path: Path, run: Any) -> None:
    for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / folder / "good.png")
    (tmp_path / "images" / "train" / "cat" / "bad.png").write_text("no image")
    options = ["--set", "data.name=imagefolder", "--data-root", str(tmp_path / "images"), "--set", "policy.alpha=1"]
    assert "bad.png" in run("launch", "quick", *options)


def test_questions_about_a_study_that_is_not_there_name_those_that_are(finished: Path, run: Any) -> None:
    url = f"sqlite:///{finished}/study.db"
    for verb in ("status", "report", "worker"):
        assert "no study 'other' in this storage; studies there: quick" in run(verb, "other", "--storage", url)
    assert "training.epochs: 3 != 4" in run("launch", "quick", *SMALL, "--set", "training.epochs=3", "--storage", url)
