"""`--on-event`: what the command gets, and that nothing it does can harm the study."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import queries
from storage.errors import UserError
from storage.optuna_internals import study_id_of
from study.create import OpenStudy
from study.exit_codes import BUDGET_SPENT, INTERRUPTED, OK
from study.launchers import hooks
from study.launchers.hooks import EventHook, parse_command
from tests.support.harness import Harness, config_of, scripted_accuracies

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> OpenStudy:
    """Three complete trials (0.2, 0.4, 0.3) and one that has failed."""
    url = f"sqlite:///{tmp_path_factory.mktemp('hooks') / 'study.db'}"
    harness = Harness(url, config_of(training={"epochs": 1}))
    values = iter([0.2, 0.4, 0.3])
    with scripted_accuracies(lambda _: next(values)):
        harness.work(most=3)
    queue = harness.queue()
    lease = queue.claim()
    assert lease is not None
    queue.fail(lease, "the device is lost")
    return OpenStudy(url, harness.storage, harness.study, harness.config)


def send(study: OpenStudy, command: list[str], code: int = OK) -> None:
    hook = EventHook(command, study)
    now = queries.progress(study.engine, study_id_of(study.study))
    for trial in study.study.get_trials():
        hook.trial(trial, now)
    hook.end(code)
    hook.close()


def test_a_command_gets_every_event_in_order(study: OpenStudy, tmp_path: Path) -> None:
    file = tmp_path / "events with a space.jsonl"
    program = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read()); print('x' * 100_000)"
    send(study, [sys.executable, "-c", program, str(file)])
    assert file.read_text().endswith("}\n")
    events = [json.loads(line) for line in file.read_text().splitlines()]  # a line each, as `cat >> FILE` has them
    assert [(event["event"], event.get("trial")) for event in events] == [
        ("trial-finished", 0), ("new-best", 0), ("trial-finished", 1), ("new-best", 1), ("trial-finished", 2),
        ("trial-failed", 3), ("study-finished", None),
    ]  # fmt: skip
    assert events[1]["parameters"] == {"alpha": 60, "beta": 0.3}
    assert events[1]["storage"].startswith("sqlite:///")
    assert (events[5]["error"], events[5]["value"]) == ("the device is lost", None)
    assert (events[6]["best"], events[6]["best_trial"], events[6]["failed"]) == (0.4, 1, 1)


@pytest.mark.parametrize(("code", "expected"), [(BUDGET_SPENT, ["budget-spent"]), (INTERRUPTED, [])])
def test_the_end_is_named_by_its_cause(study: OpenStudy, tmp_path: Path, code: int, expected: list[str]) -> None:
    file = tmp_path / "events"
    program = "import sys, json; open(sys.argv[1], 'a').write(json.load(sys.stdin)['event'] + '\\n')"
    hook = EventHook([sys.executable, "-c", program, str(file)], study)
    hook.end(code)
    hook.close()
    assert (file.read_text().split() if file.exists() else []) == expected


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "import time; time.sleep(600)"])
def test_a_command_that_fails_is_one_warning(study: OpenStudy, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "SECONDS", 0.2)
    warnings: list[str] = []
    monkeypatch.setattr(hooks.logger, "warning", lambda text, *values: warnings.append(text % values))
    send(study, [sys.executable, "-c", program])
    assert len(warnings) == 1
    assert "--on-event" in warnings[0]


@pytest.mark.parametrize("command", ["", "no-such-program-anywhere x", 'python3 "open'])
def test_a_command_that_cannot_be_run_is_refused_at_the_start(command: str) -> None:
    with pytest.raises(UserError, match="--on-event"):
        parse_command(command)


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[bytes]]]:
    """A server on loopback, and the bodies that it got."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", bodies
    server.shutdown()
    server.server_close()


EVENT = {"event": "new-best", "study": "s", "trial": 7, "value": 0.5}


def run(command: list[str], event: dict[str, object], **variables: str) -> None:
    environment = {**os.environ, **variables}
    subprocess.run(command, input=json.dumps(event), text=True, env=environment, check=True, timeout=60)


def test_the_webhook_example_posts_a_line(webhook: tuple[str, list[bytes]]) -> None:
    url, bodies = webhook
    command = [sys.executable, str(EXAMPLES / "on_event_webhook.py")]
    run(command, EVENT, WEBHOOK_URL=url)
    run(command, EVENT, WEBHOOK_URL=url, WEBHOOK_FORMAT="text")
    assert json.loads(bodies[0]) == {"text": "s: new-best, trial 7, accuracy 0.5000"}
    assert bodies[1] == b"s: new-best, trial 7, accuracy 0.5000"


def test_the_mail_example_mails_what_matters(tmp_path: Path) -> None:
    program = tmp_path / "sendmail"
    program.write_text(f'#!/bin/sh\n[ "$1" = -t ] && cat >> {tmp_path}/mail\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for name in ("trial-finished", "trial-failed"):
        run([str(EXAMPLES / "on_event_mail.sh")], EVENT | {"event": name}, MAIL_TO="me@example.org", PATH=path)
    mail = (tmp_path / "mail").read_text()
    assert mail.startswith("To: me@example.org\nSubject: study event\n")
    assert "trial-failed" in mail
    assert "trial-finished" not in mail
