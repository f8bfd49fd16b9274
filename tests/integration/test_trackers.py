"""Studies in TensorBoard, MLflow and Weights & Biases: what arrives, and that a repeated call doubles nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dashboards import study_data
from dashboards.trackers import replay
from storage.errors import UserError
from tests.support.harness import Harness, StopAfter, config_of


@pytest.fixture
def harness(sqlite_url: str) -> Harness:
    """Two trials of three epochs: the first complete, the second interrupted after one or two."""
    harness = Harness(sqlite_url, config_of(policy={"alpha": [60, 90], "beta": 0.3}, checkpoint={"every_seconds": 0}))
    harness.work(most=1)
    harness.work(StopAfter(4), most=1)
    return harness


def publish(harness: Harness, kind: str, at: str | None) -> int:
    return replay.publish(study_data.read(harness.storage, "s"), replay.make_tracker(kind, at, "s"))


def scalars(folder: Path, tag: str) -> list[tuple[int, Any]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def accuracies(harness: Harness, trial: int) -> list[tuple[int, Any]]:
    curve = study_data.read(harness.storage, "s").curves[trial]
    return [(row["epoch"], pytest.approx(row["accuracy"])) for row in curve]


def test_tensorboard_gets_each_epoch_once(harness: Harness, tmp_path: Path) -> None:
    stored = len(accuracies(harness, 0)) + len(accuracies(harness, 1))
    assert 4 <= stored < 6
    assert publish(harness, "tensorboard", str(tmp_path / "runs")) == stored
    assert publish(harness, "tensorboard", str(tmp_path / "runs")) == 0
    harness.work()
    assert publish(harness, "tensorboard", str(tmp_path / "runs")) == 6 - stored
    for number in (0, 1):
        folder = tmp_path / "runs" / "s" / f"trial-{number}"
        assert scalars(folder, "epoch/accuracy") == accuracies(harness, number)
        value = harness.study.trials[number].value
        assert scalars(folder, "value") == [(3, pytest.approx(value))]
        before = len(list(folder.iterdir()))
        assert publish(harness, "tensorboard", str(tmp_path / "runs")) == 0
        assert len(list(folder.iterdir())) == before


def test_a_tracker_that_is_not_installed_is_named(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "dashboards.trackers.mlflow", raising=False)
    with pytest.raises(UserError, match=r"pip install 'dynamic-training-study\[mlflow\]'"):
        publish(harness, "mlflow", "http://127.0.0.1:9")


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--artifacts-destination", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
                break
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with the processes that it has started
        server.wait()


@pytest.mark.slow
def test_mlflow_gets_each_epoch_once(harness: Harness, mlflow_server: str) -> None:
    from mlflow.tracking import MlflowClient

    stored = len(accuracies(harness, 0)) + len(accuracies(harness, 1))
    assert publish(harness, "mlflow", mlflow_server) == stored
    harness.work()
    assert publish(harness, "mlflow", mlflow_server) == 6 - stored
    assert publish(harness, "mlflow", mlflow_server) == 0
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("s")
    runs = {int(run.data.tags["study.trial"]): run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == [0, 1]
    for number, run in runs.items():
        history = client.get_metric_history(run.info.run_id, "accuracy")
        assert sorted((metric.step, metric.value) for metric in history) == accuracies(harness, number)
        assert run.data.metrics["value"] == pytest.approx(harness.study.trials[number].value)
        assert (run.info.status, run.data.params["alpha"]) == ("FINISHED", str([60, 90][number]))


@pytest.mark.slow
def test_mlflow_that_does_not_answer_is_one_line(harness: Harness) -> None:
    with pytest.raises(UserError, match="MLflow cannot be used"):
        publish(harness, "mlflow", "http://127.0.0.1:9")


@pytest.mark.slow
def test_wandb_gets_each_epoch_once(harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    stored = len(accuracies(harness, 0)) + len(accuracies(harness, 1))
    assert publish(harness, "wandb", None) == stored
    assert publish(harness, "wandb", None) == 0
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    harness.work()
    assert publish(harness, "wandb", None) == 6 - stored
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3  # only the second trial had something new
