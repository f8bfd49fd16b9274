"""Stopping a study wherever its workers are, and budgets that they share."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from dashboards import status
from storage import budgets, queue, stop_requests
from storage.engine import database_time, open_storage
from storage.errors import UserError
from storage.schema import ATTEMPTS, EPOCHS, SPENDING, STUDY_ATTRS
from study import exit_codes
from study.worker import stop_monitor
from study.worker.stop_monitor import StopMonitor
from tests.e2e.test_command import started, stop, study, wait_for, working
from tests.support.harness import Harness, config_of


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["20 gpu-hours"], {"gpu-hours": 20.0}),
        (["2h", "500_000_000 images"], {"hours": 2.0, "images": 5e8}),
        (["3 kWh", "0.5 GPU-hours"], {"kWh": 3.0, "gpu-hours": 0.5}),
        (["5e8 images"], {"images": 5e8}),
        (["1,500,000 images", "1.5 h"], {"images": 1.5e6, "hours": 1.5}),
        (["none"], {}),
    ],
)
def test_budgets_are_read(texts: list[str], expected: dict[str, float]) -> None:
    assert budgets.parse_budgets(texts) == expected


@pytest.mark.parametrize(
    "texts", [["20"], ["h"], ["0 h"], ["-1 h"], ["2 weeks"], ["1 h", "2 hours"], ["nan h"], [""], ["1,5 h"]]
)
def test_malformed_budgets_are_refused(texts: list[str]) -> None:
    with pytest.raises(UserError, match="budget"):
        budgets.parse_budgets(texts)


def test_a_stop_request_holds_until_a_resume(url: str) -> None:
    harness = Harness(url, config_of())
    engine, study_id = harness.storage.engine, harness.study._study_id
    assert stop_requests.reason_to_stop(engine, study_id) is None
    stop_requests.request_stop(engine, study_id)
    stop_requests.request_stop(engine, study_id)
    assert "study stop" in (stop_requests.reason_to_stop(engine, study_id) or "")
    stop_requests.withdraw_stop(engine, study_id)
    assert stop_requests.reason_to_stop(engine, study_id) is None


def test_what_is_spent_is_counted_over_all_attempts(url: str) -> None:
    """Two workers side by side, a pause, one more: gpu-hours add up, hours are those in which anybody worked."""
    harness = Harness(url, config_of())
    engine, study_id = harness.storage.engine, harness.study._study_id
    ids = [trial._trial_id for trial in harness.study.trials]
    rows = [(ids[0], 0, 3600, 100, 3.6e6), (ids[1], 1800, 5400, 200, 0.0), (ids[2], 9000, 10800, 50, 1.8e6)]
    with engine.begin() as connection:
        for trial_id, start, end, images, joules in rows:
            row = {"trial_id": trial_id, "token": 1, "owner": "w", "device": "gpu", "outcome": "finished"}
            row |= {"started_at": start, "ended_at": end, "images": images, "joules": joules}
            connection.execute(sa.insert(ATTEMPTS).values(row))
    expected = {"gpu-hours": 2.5, "hours": 2.0, "images": 350, "kWh": 1.5}
    assert budgets.spending(engine, study_id).amounts == pytest.approx(expected)
    assert budgets.spending(engine, study_id).workers == 0
    taken = {"trial_id": ids[3], "token": 1, "owner": "w", "device": "gpu", "started_at": 20000, "images": 0}
    with engine.begin() as connection:  # its trial was put back: nobody will write its end
        connection.execute(sa.insert(ATTEMPTS).values(taken))
    assert budgets.spending(engine, study_id).amounts["gpu-hours"] == pytest.approx(2.5)
    budgets.set_budgets(engine, study_id, {"hours": 2.1, "images": 350})
    assert stop_requests.reason_to_stop(engine, study_id) == "the budget is spent: 350 of 350 images"
    many = replace(budgets.spending(engine, study_id), amounts={"images": 10_250})
    assert many.reason_to_stop({"images": 10_000}) == "the budget is spent: 10,250 of 10,000 images"
    budgets.set_budgets(engine, study_id, {})
    assert stop_requests.reason_to_stop(engine, study_id) is None
    lease = harness.queue(seconds=60).claim()
    assert lease is not None
    assert budgets.spending(engine, study_id).workers == 1


@pytest.mark.parametrize(
    ("amounts", "workers", "limits", "seconds"),
    [
        ({"gpu-hours": 2.0, "hours": 1.0, "images": 7200}, 4, {}, math.inf),
        ({"gpu-hours": 2.0, "hours": 1.0, "images": 7200}, 4, {"images": 10800}, 900.0),  # one image a second each
        ({"gpu-hours": 2.0, "hours": 1.0, "images": 7200}, 0, {"images": 10800}, 0.0),
        ({"gpu-hours": 2.0, "hours": 1.0, "images": 0}, 4, {"images": 10800}, 0.0),
        ({"gpu-hours": 0.0, "hours": 0.0, "images": 0}, 4, {"gpu-hours": 1.0}, 0.0),
        ({"gpu-hours": 2.0, "hours": 1.0, "images": 0}, 4, {"gpu-hours": 3.0}, 900.0),
        ({"gpu-hours": 2.0, "hours": 1.0, "images": 0}, 4, {"hours": 1.5, "gpu-hours": 10.0}, 1800.0),
        ({"gpu-hours": 2.0, "hours": 1.0, "images": 7200}, 4, {"images": 100}, 0.0),
    ],
)
def test_how_long_budgets_will_last(
    amounts: dict[str, float], workers: int, limits: dict[str, float], seconds: float
) -> None:
    spent = budgets.Spending(amounts, workers, 3600 * amounts["gpu-hours"])
    assert spent.seconds_left(limits) == pytest.approx(seconds)


def test_the_faster_pace_counts_towards_how_long_budgets_will_last() -> None:
    """A slow start, then 100 images a second: the mean over all history would see 10."""
    before, now = ({"gpu-hours": s / 3600, "hours": s / 3600, "images": i} for s, i in ((90, 0), (100, 1000)))
    spent = budgets.Spending(now, 1, 100.0, at=1100.0)
    assert spent.seconds_left({"images": 2000}) == pytest.approx(100.0)
    assert spent.seconds_left({"images": 2000}, budgets.Spending(before, 1, 90.0, at=1090.0)) == pytest.approx(10.0)


@pytest.mark.parametrize(
    "stored", ["7", "[]", '{"apples": 1}', '{"images": "many"}', '{"images": null}', '{"hours": 1e999}']
)
def test_what_is_no_budget_limits_nothing(stored: str, sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    engine, study_id = harness.storage.engine, harness.study._study_id
    budgets.set_budgets(engine, study_id, {})
    with engine.begin() as connection:
        connection.execute(sa.update(STUDY_ATTRS).where(STUDY_ATTRS.c.key == "budgets").values(value_json=stored))
    assert stop_requests.read_controls(engine, study_id).budgets == {}
    assert stop_requests.reason_to_stop(engine, study_id) is None
    status.page(status.read(engine, "s"))


@pytest.mark.parametrize(
    "spent", ["{", "[]", "{}", '{"amounts": {}, "workers": 0, "seconds_worked": 0}', '{"amounts": 1, "workers": "a"}']
)
def test_stored_sums_of_another_form_are_added_up_again(spent: str, sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    engine, study_id = harness.storage.engine, harness.study._study_id
    budgets.recent_spending(engine, study_id)
    with engine.begin() as connection:
        connection.execute(sa.update(SPENDING).values(spent=spent, took=100.0))
    assert budgets.recent_spending(engine, study_id).amounts.keys() == budgets.UNITS.keys()
    with engine.connect() as connection:
        assert connection.scalar(sa.select(SPENDING.c.spent)) != spent


def test_one_worker_sums_for_all(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the sum is fresh, and while another worker computes it; that worker may have died."""
    harness = Harness(url, config_of())
    engine, study_id = harness.storage.engine, harness.study._study_id
    added = []
    real = budgets.spending

    def counted(engine: sa.Engine, study_id: int) -> budgets.Spending:
        added.append(study_id)
        return real(engine, study_id)

    monkeypatch.setattr(budgets, "spending", counted)

    def stored(**cells: Any) -> None:
        values = {SPENDING.c[name]: value for name, value in cells.items()}
        with engine.begin() as connection:
            connection.execute(sa.update(SPENDING).values(values))

    first = budgets.recent_spending(engine, study_id)
    assert first == budgets.Spending(dict.fromkeys(budgets.UNITS, 0.0) | {"images": 0}, 0, 0, at=first.at)
    assert abs(first.at - time.time()) < 60
    stored(took=100.0)  # so it is fresh for as long as sums may be returned
    assert budgets.recent_spending(engine, study_id) == first
    assert len(added) == 1
    stored(took=0.01, at=database_time(engine) - 0.2)
    assert budgets.recent_spending(engine, study_id).at >= first.at
    assert len(added) == 2
    stored(took=1.0, at=database_time(engine) - 61.0)
    budgets.recent_spending(engine, study_id)
    assert len(added) == 3
    stored(took=1.0, at=database_time(engine) + 3600.0)  # the database's clock was put back
    budgets.recent_spending(engine, study_id)
    assert len(added) == 4


def test_of_many_that_ask_at_once_one_computes_the_sum(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All find the sums old before the first of them claims to add up, and that one is not done before all others have
    returned the old ones, which are fresh for 40 s from when they were claimed.
    """
    harness = Harness(url, config_of())
    study_id = harness.study._study_id
    old = budgets.recent_spending(harness.storage.engine, study_id)
    with harness.storage.engine.begin() as connection:
        connection.execute(sa.update(SPENDING).values(took=4.0, at=database_time(harness.storage.engine) - 45.0))
    added: list[Any] = []
    sums: list[budgets.Spending] = []
    all_old, all_answered, real = threading.Barrier(8), threading.Barrier(8), budgets.spending

    def has_read(_: Any, __: Any, statement: str, *___: Any) -> None:
        if f"FROM {SPENDING.name}" in statement.replace("\n", ""):
            all_old.wait(30)

    def spent(*where: Any) -> budgets.Spending:
        added.append(where)
        all_answered.wait(30)
        return real(*where)

    def ask(engine: sa.Engine) -> None:
        sums.append(budgets.recent_spending(engine, study_id))
        if sums[-1] == old:
            all_answered.wait(30)

    monkeypatch.setattr(budgets, "spending", spent)
    engines = [open_storage(url, create=False).engine for _ in range(8)]
    for engine in engines:
        sa.event.listen(engine, "after_cursor_execute", has_read)
    threads = [threading.Thread(target=ask, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) == 1
    assert sums.count(old) == 7


def test_workers_that_share_a_gpu_spend_its_hours_together(url: str) -> None:
    harness = Harness(url, config_of())
    engine, study_id = harness.storage.engine, harness.study._study_id
    row = {"token": 1, "owner": "w", "device": "gpu", "started_at": 0, "ended_at": 3600, "images": 0}
    with engine.begin() as connection:
        for trial, share in zip(harness.study.trials, (0.5, 0.5, None), strict=False):
            connection.execute(sa.insert(ATTEMPTS).values(row | {"trial_id": trial._trial_id, "share": share}))
    spent = budgets.spending(engine, study_id)
    assert spent.amounts["gpu-hours"] == pytest.approx(2.0)  # one GPU by two workers, one by one
    assert spent.amounts["hours"] == pytest.approx(1.0)
    assert spent.seconds_worked == pytest.approx(3 * 3600)
    assert harness.queue(share=0.25).claim() is not None
    with engine.connect() as connection:
        assert connection.scalar(sa.select(ATTEMPTS.c.share).where(ATTEMPTS.c.ended_at.is_(None))) == 0.25


def test_an_epoch_whose_commit_was_not_answered_counts_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks after the commit: the same statements come again."""
    harness = Harness(url, config_of())
    work = harness.queue()
    lease = work.claim()
    assert lease is not None
    monkeypatch.setattr(queue, "retry", lambda action, *_, **__: (action(), action())[1])
    row = {"accuracy": 0.5, "loss": 1.0, "images": 60, "train_seconds": 2.0, "validation_seconds": 1.0}
    row |= {"kind": "keep", "k": 0, "beta": 0.0, "joules": 5.0}  # type: ignore[dict-item]
    for epoch in (1, 2):
        work.record(lease, [row | {"epoch": epoch}], {epoch: 0.5})
    spent = budgets.spending(harness.storage.engine, harness.study._study_id).amounts
    assert spent["images"] == 120
    assert spent["kWh"] == pytest.approx(10.0 / 3.6e6)


def test_a_worker_looks_at_a_far_budget_seldom_and_at_a_near_one_after_every_epoch(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(url, config_of(training={"epochs": 20}))
    engine, study_id = harness.storage.engine, harness.study._study_id
    looks: list[str] = []

    def spent(*where: Any) -> budgets.Spending:
        """At a pace of 1,000 images a second, whatever this machine's is, and never what it was a moment ago."""
        looks.append("")
        spending = budgets.spending(where[0], where[1])
        return replace(spending, seconds_worked=spending.amounts["images"] / 1000, at=0.0)

    monkeypatch.setattr(budgets, "recent_spending", spent)
    # Time stands still: the looks are those after epochs.
    over = threading.Event()
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: over.wait())
    monkeypatch.setattr(stop_monitor, "time", clock)

    def epochs_and_looks(budget: float) -> int:
        budgets.set_budgets(engine, study_id, {"images": budget})
        stop = StopMonitor()
        stop.watch(engine, study_id)
        looks.clear()
        harness.work(stop, most=1)
        stop._stop()  # its thread ends, without another check
        stop._study = None
        return len(looks)

    # After the first of 20 epochs: nobody was at work before, so there was no pace to go by.
    assert epochs_and_looks(1e12) == 1
    assert epochs_and_looks(1e12) == 1
    used = int(budgets.spending(engine, study_id).amounts["images"])
    assert used == 2 * 20 * 60
    assert epochs_and_looks(used + 10 * 90) == 10
    assert budgets.spending(engine, study_id).amounts["images"] == used + 10 * 90
    over.set()


# With real workers, from the command line.


LAUNCH = ("launch", "quick", "--device", "cpu", "--set", "pruning=none", "--set", "network.width=0.125")


def test_a_spent_budget_ends_the_study_and_a_larger_one_continues_it(tmp_path: Path) -> None:
    """12 trials of 2 epochs; 3,000 images are spent somewhere in the fourth."""
    first = study(*LAUNCH, "--set", "training.epochs=2", "--workers", "2", "--budget", "3000 images", cwd=tmp_path)
    assert first.returncode == exit_codes.BUDGET_SPENT, first.stderr
    assert "the budget is spent" in first.stderr
    status = study("status", "quick", cwd=tmp_path).stdout
    spent = float(status.partition("spent ")[2].partition(" of")[0].replace(",", ""))
    assert 3000 <= spent < 9600  # all of them; how many more than 3,000 depends on how busy the machine is
    last = study("resume", "quick", "--device", "cpu", "--workers", "1", "--budget", "none", cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert "12 complete" in last.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "budget"), [("images", "60000 images"), ("gpu-hours", "0.04 gpu-hours"), ("hours", "0.005 h")]
)
def test_eight_workers_overrun_a_budget_by_an_epoch_each_at_most(unit: str, budget: str, tmp_path: Path) -> None:
    launched = study(*LAUNCH, "--set", "training.epochs=1000", "--workers", "8", "--budget", budget, cwd=tmp_path)
    assert launched.returncode == exit_codes.BUDGET_SPENT, launched.stderr
    document = json.loads(study("status", "quick", "--json", "-", cwd=tmp_path).stdout)
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'study.db'}")
    longest = sa.func.max(EPOCHS.c.train_seconds + EPOCHS.c.validation_seconds + EPOCHS.c.selection_seconds)
    with engine.connect() as connection:
        seconds, images, workers = connection.execute(
            sa.select(
                longest,
                sa.func.max(EPOCHS.c.images),
                sa.select(sa.func.count(ATTEMPTS.c.owner.distinct())).scalar_subquery(),
            )
        ).one()
    assert workers == 8
    over = document["spent"][unit] - document["budgets"][unit]
    # Hours run on while the last checkpoint is stored.
    allowed = {"images": 8 * images, "gpu-hours": 8 * (seconds + 1) / 3600, "hours": (seconds + 1) / 3600}[unit]
    print(f"{budget}: {over:.4g} {unit} over; allowed {allowed:.4g}; longest epoch {seconds:.2f} s, {images} images")  # noqa: T201
    assert 0 <= over < allowed


def test_stop_ends_workers_wherever_they_are(tmp_path: Path) -> None:
    endless = (*LAUNCH, "--set", "training.epochs=100000")
    launched = started(*endless, "--workers", "1", cwd=tmp_path)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first = wait_for(lambda: next(iter(working(url, "quick")), None))
    stop(first, url)  # no hurry for it while the other starts
    alone = started("worker", "quick", "--device", "cpu", cwd=tmp_path)
    wait_for(lambda: alone.pid in working(url, "quick"))
    assert len(working(url, "quick")) == 2
    os.kill(first, signal.SIGCONT)
    assert study("stop", "quick", cwd=tmp_path).returncode == 0
    for process in (launched, alone):
        _, err = process.communicate(timeout=200)
        assert process.returncode == exit_codes.STOPPED, err
        assert "stopped by `study stop`" in err
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        states = connection.exec_driver_sql("SELECT state, count(*) FROM trials GROUP BY state").all()
        live = connection.exec_driver_sql("SELECT count(*) FROM trial_leases WHERE expires_at > 0").scalar()
    assert TrialState.FAIL.name not in dict(states)
    assert live == 0
    for start in (("worker", "quick", "--device", "cpu"), endless):
        refused = study(*start, cwd=tmp_path)  # a machine that restarts its launcher must not take the request back
        assert refused.returncode == exit_codes.STOPPED
        assert "stopped by `study stop`" in refused.stderr
    resumed = study("resume", "quick", "--device", "cpu", "--workers", "1", "--budget", "1 images", cwd=tmp_path)
    assert resumed.returncode == exit_codes.BUDGET_SPENT
    assert "the budget is spent; continue with: study resume quick --budget" in resumed.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--budget", "3 kWh"), "a budget in kWh needs devices that report their energy; cpu does not"),
        (("--workers", "9" * 20), "--workers must be at most"),
        (
            ("--launcher", "ray", "--cpus-per-worker", "inf"),
            "--cpus-per-worker must be 0 or a number from 0.0001 on, got inf",
        ),
        (
            ("--launcher", "ray", "--gpus-per-worker", "0.00001"),
            "--gpus-per-worker must be 0 or a number from 0.0001 on",
        ),
        (("--launcher", "ray", "--storage", "postgresql://me:hunt%65r2@h/x"), "Ray shows the launcher's command line"),
        (
            ("--launcher", "ray", "--storage", "postgresql://me@h/x?password=hunter2"),
            "Ray shows the launcher's command line",
        ),
    ],
)
def test_what_workers_cannot_do_is_refused_before_anything_is_made(
    more: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    refused = study(*LAUNCH, *more, cwd=tmp_path)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert message in refused.stderr
    assert not (tmp_path / "study.db").exists()
