"""Studies on a real Ray cluster of several nodes on this machine, with pretended GPUs: nodes come and go, launchers
die, and the outcome stays that of a single worker.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from storage.errors import Unreachable, UserError
from storage.queries import Running, attempts, progress
from storage.schema import ATTEMPTS, EPOCHS
from study import exit_codes
from study.create import open_study
from study.launchers.ray import RayLauncher, secret_url
from tests.e2e.test_command import there
from tests.e2e.test_command import wait_for as wait
from tests.support.command import study, study_process
from tests.support.harness import Harness, config_of
from tests.support.hosts import Database, Hosts
from tests.support.hosts import can_be_made as hosts_can_be_made
from tests.support.postgres import Postgres, free_port
from tests.unit.test_data import folder

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
from ray._private.state import GlobalState  # noqa: E402
from ray._raylet import GcsClient, GcsClientOptions  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from study.launchers.ray_supervisor import WorkerRequest  # noqa: E402

DASHBOARD = find_spec("aiohttp_cors") is not None
"""Of ray[default]."""
NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80_000_000}
NOTICED_SOON = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
HALF = ["--device", "cpu", "--gpus-per-worker", "0.5", "--cpus-per-worker", "0.5"]
"""Two workers fit on a node; its GPU is a pretence, so they train on the CPU."""
LONG = {
    "policy": {"alpha": [60, 90], "beta": [0.3, 0.6]},
    "training": {"epochs": 300},
    "checkpoint": {"every_seconds": 0},
    "lease": {"seconds": 2.0},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The head; tests add nodes and remove them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {**NODE, "include_dashboard": DASHBOARD, "_system_config": NOTICED_SOON}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def node(cluster: Cluster) -> Iterator[Any]:
    node = cluster.add_node(**NODE)
    yield node
    with suppress(AssertionError):  # lost already
        cluster.remove_node(node)


def command(cluster: Cluster, url: str, *arguments: str) -> list[str]:
    return ["resume", "s", "--storage", url, "--launcher", "ray", "--address", cluster.address, *HALF, *arguments]


def started(cluster: Cluster, url: str, cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "study", *command(cluster, url, *arguments)], cwd=cwd, **pipes)


def below(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    pids = [pid]
    for each in pids:
        pids += [child for child, parent in parents.items() if parent == each]
    return pids


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def running(harness: Harness, epoch: int = 1) -> dict[int, Running]:
    """By the worker's process: those that are some epochs into their trials."""
    now = progress(harness.storage.engine, harness.study._study_id).running
    return {int(trial.owner.split(":")[-2]): trial for trial in now if trial.epoch >= epoch}


def quiet(folder: Path, **sections: Any) -> list[tuple[Any, ...]]:
    """The outcome of a single worker that nobody disturbs."""
    harness = Harness(f"sqlite:///{folder / 'quiet.db'}", config_of(**sections))
    harness.work()
    return harness.outcome()


@pytest.fixture(scope="module")
def long_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    return quiet(tmp_path_factory.mktemp("long"), **LONG)


def wait_for(condition: Callable[[], Any]) -> Any:
    return wait(condition, seconds=200)  # Ray's processes, torch's imports, on two crowded cores


def outcomes(harness: Harness) -> list[str | None]:
    return [each.outcome for each in attempts(harness.storage.engine, harness.study._study_id)]


@pytest.mark.slow
def test_a_cluster_of_its_own(sqlite_url: str, undisturbed: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """Where none runs (so before the others here), one is started for the command; it cannot be left behind."""
    harness = Harness(sqlite_url, config_of())
    asked = ["resume", "s", "--storage", sqlite_url, "--launcher", "ray", "--device", "cpu", "--workers", "1"]
    refused = study_process(*asked, "--detach", cwd=tmp_path)
    assert refused.returncode == 2
    assert "ray start --head" in refused.stderr
    done = study_process(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert harness.outcome() == undisturbed


@pytest.mark.slow
def test_nobody_sees_the_password_and_the_outcome_is_a_single_workers(
    cluster: Cluster, undisturbed: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for in output, the process list, Ray's tables, its pages if they are installed, and its session files."""
    server, launcher, seen = Postgres(), None, set()
    try:
        url = server.new_database()
        harness = Harness(url, config_of())
        with harness.storage.engine.begin() as connection:
            connection.exec_driver_sql("ALTER USER postgres PASSWORD 'hunter2'")
        (server.server.pgdata / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        server.control("reload")
        with pytest.raises(UserError, match="password"):
            secret_url(url, ())
        monkeypatch.setenv("PGPASSWORD", "hunter2")
        launcher = started(cluster, url, tmp_path, "--workers", "2")
        while launcher.poll() is None:
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    seen.add(entry.read_bytes().decode(errors="replace").replace("\0", " "))
            seen |= set(tables(cluster)) | set(pages(cluster))
            time.sleep(1.0)
        out, err = launcher.communicate()
        assert launcher.returncode == 0, err
        assert harness.outcome() == undisturbed
    finally:
        if launcher is not None:
            launcher.kill()
        server.stop()
    session = Path(cluster.head_node.get_session_dir_path())
    files = [file.read_bytes().decode(errors="replace") for file in session.rglob("*") if file.is_file()]
    assert any("study worker s " in line for line in seen)  # we did look while they ran
    assert any("supervisor of s" in line for line in seen)
    assert not DASHBOARD or any("study worker s" in line for line in seen if line.startswith("{"))  # a page
    assert any("RaySupervisor" in text for text in files)
    for text in (out, err, *seen, *files):
        assert "hunter2" not in text


def tables(cluster: Cluster) -> Iterator[str]:
    """All that Ray's control store returns: actors, jobs, nodes, and what programs keep there."""
    state = GlobalState()
    state._initialize_global_state(GcsClientOptions.create(cluster.address, None, True, False))
    yield f"{state.actor_table(None)} {state.job_table()} {state.node_table()}"
    client = GcsClient(address=cluster.address)
    for space in (None, b"fun", b"session", b"job"):
        for key in client.internal_kv_keys(b"", space):
            yield f"{key!r} {client.internal_kv_get(key, space)!r}"


def pages(cluster: Cluster) -> Iterator[str]:
    """What the dashboard shows."""
    if not DASHBOARD:
        return
    views = ("actors", "tasks", "workers", "jobs", "nodes", "objects", "runtime_envs", "placement_groups")
    for path in (*(f"api/v0/{view}?detail=1" for view in views), "logical/actors", "nodes?view=details", "api/jobs/"):
        with suppress(URLError), urlopen(f"http://{cluster.head_node.webui_url}/{path}", timeout=10) as answer:
            yield answer.read().decode()


def test_what_other_nodes_cannot_reach_is_refused(postgres: Postgres, tmp_path: Path) -> None:
    loopback = postgres.new_database()
    for url, what in ((f"sqlite:///{tmp_path}/study.db", "a file of this machine"), (loopback, "loopback")):
        with pytest.raises(
            UserError, match=rf"{what}.*which the cluster's other nodes \(10.0.0.7\) cannot reach; use a"
        ):
            secret_url(url, {"10.0.0.7"})
        assert secret_url(url, set())
    assert not list(tmp_path.iterdir())


def test_a_database_that_was_there_is_unavailable_and_not_bad_input(sqlite_url: str) -> None:
    """Asked for before anything of a cluster is: who it is that this machine connects as."""
    Harness(sqlite_url, config_of())
    request = WorkerRequest(workers=1, gpus=0.0, cpus=1.0, device="cpu")
    launcher = RayLauncher(request, SecretStr(f"postgresql://127.0.0.1:{free_port()}/x"), detached=False)
    with pytest.raises(Unreachable, match="cannot use the database postgresql"):
        launcher.start(open_study(sqlite_url, "s"), None, 1)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    typed = "postgresql://me:hunter2@127.0.0.1:1/studies"
    for arguments, what in (
        (
            ["--launcher", "ray", "--storage", typed],
            "Ray shows the launcher's command line; put the password into $PGPASSWORD",
        ),
        (["--launcher", "ray", "--device", "cuda:1"], "Ray chooses the device"),
        (["--launcher", "ray", "--address", "127.0.0.1:1"], "no Ray cluster at --address 127.0.0.1:1"),
        (["--workers", "0"], "at least 1, or max"),
        (["--gpus-per-worker", "1"], "need --launcher ray"),
    ):
        refused = study("launch", "quick", *arguments, cwd=tmp_path)
        assert refused.returncode == 2, refused.stderr
        assert what in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert "hunter2" not in refused.stderr
    assert not list(tmp_path.iterdir())


def test_a_cluster_of_the_environment_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Not waited for, and not replaced by another."""
    for address in ("ray://127.0.0.1:1", "127.0.0.1:1"):
        refused = study("launch", "quick", "--launcher", "ray", cwd=tmp_path, env=os.environ | {"RAY_ADDRESS": address})
        assert refused.returncode == 2, refused.stderr
        assert f"no Ray cluster at --address {address}" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nodes_come_and_go(
    cluster: Cluster, node: Any, postgres: Postgres, tmp_path: Path, long_undisturbed: list[tuple[Any, ...]]
) -> None:
    harness = Harness(url := postgres.new_database(), config_of(**LONG))
    launcher = started(cluster, url, tmp_path)
    new = None
    try:
        lost = wait_for(lambda: [pid for pid in below(raylet(node)) if pid in running(harness, 3)])
        for pid in reversed(below(raylet(node))):  # as when its power is cut
            os.kill(pid, signal.SIGKILL)
        new = cluster.add_node(**NODE)
        left = wait_for(lambda: [pid for pid in below(raylet(new)) if pid in running(harness)])
        cluster.remove_node(new, allow_graceful=True)  # SIGTERM, as when a cluster is made smaller
        _, err = launcher.communicate(timeout=200)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, err
    log = attempts(harness.storage.engine, harness.study._study_id)
    ended = {(int(each.owner.split(":")[-2]), each.outcome) for each in log}
    assert {(pid, "vanished") for pid in lost} <= ended
    assert {(pid, "released") for pid in left} <= ended
    assert harness.outcome() == long_undisturbed


@pytest.mark.slow
def test_launchers_come_and_go(
    cluster: Cluster, postgres: Postgres, tmp_path: Path, long_undisturbed: list[tuple[Any, ...]]
) -> None:
    """Killed, another attached for fewer workers, interrupted, resumed, stopped; one supervisor at a time."""
    harness = Harness(url := postgres.new_database(), config_of(**LONG))
    first = started(cluster, url, tmp_path, "--workers", "2")
    two = wait_for(lambda: running(harness) if len(running(harness)) == 2 else None)
    first.kill()
    first.communicate()
    second = started(cluster, url, tmp_path, "--workers", "1")
    wait_for(lambda: "released" in outcomes(harness))
    (one,) = wait_for(lambda: running(harness) if len(running(harness)) == 1 else None)
    assert one in two  # the same process as before
    second.send_signal(signal.SIGINT)
    _, err = second.communicate(timeout=100)
    assert second.returncode == exit_codes.INTERRUPTED, err
    assert "attached to its workers" in err
    assert "nothing is lost" in err
    assert not running(harness)
    third = started(cluster, url, tmp_path, "--workers", "2")
    wait_for(lambda: len(running(harness)) == 2)
    assert study_process("stop", "s", "--storage", url, cwd=tmp_path).returncode == 0
    asked = time.monotonic()
    wait_for(lambda: not running(harness))
    assert time.monotonic() - asked < 10  # seconds, on two crowded cores
    _, err = third.communicate(timeout=100)
    assert third.returncode == exit_codes.STOPPED, err
    assert "stopped by `study stop`; nothing is lost; continue with: study resume s" in err
    left = study_process(*command(cluster, url, "--workers", "2", "--detach"), cwd=tmp_path)
    assert left.returncode == 0, left.stderr
    wait_for(lambda: not harness.queue().unfinished())
    assert set(outcomes(harness)) == {"released", "finished"}
    assert harness.outcome() == long_undisturbed
    with harness.storage.engine.connect() as connection:  # all those stops cost no epoch
        trained, stored = (connection.scalar(sa.select(sa.func.sum(t.c.images))) for t in (ATTEMPTS, EPOCHS))
    assert trained == stored


@pytest.mark.slow
def test_two_studies_share_a_cluster(cluster: Cluster, postgres: Postgres, tmp_path: Path) -> None:
    """Of one name, in two databases."""
    benches = [Harness(postgres.new_database(), config_of(training={"epochs": 40})) for _ in range(2)]
    launchers = [started(cluster, bench_url(harness), tmp_path, "--workers", "1") for harness in benches]
    wait_for(lambda: all(running(harness) for harness in benches))
    for launcher, harness in zip(launchers, benches, strict=True):
        _, err = launcher.communicate(timeout=250)
        assert launcher.returncode == 0, err
        assert harness.outcome() == quiet(tmp_path, training={"epochs": 40})


def bench_url(harness: Harness) -> str:
    return str(harness.storage.engine.url)


@pytest.mark.slow
def test_each_node_decodes_its_images_once(cluster: Cluster, postgres: Postgres, tmp_path: Path) -> None:
    """Two workers start at once on a node whose cache is empty."""
    root, cache, url = folder(tmp_path / "images", {"a": 60, "b": 60}), tmp_path / "cache", postgres.new_database()
    node = cluster.add_node(**NODE, env_vars={"STUDY_CACHE": str(cache)})
    decoded = "decoding 122 images"
    asked = ["launch", "quick", "--set", "data.name=imagefolder", "--data-root", str(root), "--storage", url]
    asked += ["--set", "policy.alpha=[50]", "--set", "training.epochs=2000", "--set", "pruning=none"]
    asked += ["--launcher", "ray", "--address", cluster.address, *HALF, "--workers", "4"]
    launcher = subprocess.Popen([sys.executable, "-m", "study", *asked], stderr=subprocess.PIPE, text=True)
    try:
        engine, study_id = wait_for(lambda: there(url, "quick"))
        wait_for(lambda: len(progress(engine, study_id).running) == 4)
        launcher.send_signal(signal.SIGINT)
        _, err = launcher.communicate(timeout=100)
    finally:
        launcher.kill()
        cluster.remove_node(node)
    assert launcher.returncode == exit_codes.INTERRUPTED, err
    assert err.count(decoded) == 1  # the launcher itself, for the head's machine
    assert len(list(cache.glob("imagefolder-*/meta.json"))) == 1
    session = Path(cluster.head_node.get_session_dir_path())
    counts = [file.read_text(errors="replace").count(decoded) for file in session.rglob("worker-*.err")]
    assert sum(counts) == 1


@pytest.mark.slow
def test_a_node_that_refuses_and_a_worker_that_dies_are_not_the_studys_end(
    cluster: Cluster, postgres: Postgres, tmp_path: Path
) -> None:
    """None has the data: refused. One cannot cache decoded images: no worker starts there again, also when one of the
    other's workers is killed.
    """
    root, url = folder(tmp_path / "images", {"a": 60, "b": 60}), postgres.new_database()
    node = cluster.add_node(**NODE, env_vars={"STUDY_CACHE": "/proc/none"})
    asked = ["launch", "quick", "--set", "data.name=imagefolder", "--data-root", str(root), "--storage", url]
    asked += ["--set", "policy.alpha=[50]", "--set", "training.epochs=100", "--set", "pruning=none"]
    created = study_process(*asked, "--device", "cpu", "--budget", "1 images", cwd=tmp_path)
    assert created.returncode == exit_codes.BUDGET_SPENT, created.stderr
    there_it_is = ["--launcher", "ray", "--address", cluster.address, *HALF, "--workers", "4"]
    nowhere = ["resume", "quick", "--storage", url, "--data-root", "/nowhere", "--budget", "none"]
    refused = study_process(*nowhere, *there_it_is, cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("study: no folder /nowhere")
    asked += there_it_is
    launcher = subprocess.Popen([sys.executable, "-m", "study", *asked], stderr=subprocess.PIPE, text=True)
    try:
        engine, study_id = wait_for(lambda: there(url, "quick"))
        wait_for(lambda: len(progress(engine, study_id).running) == 2)
        os.kill(int(progress(engine, study_id).running[0].owner.split(":")[-2]), signal.SIGKILL)
        _, err = launcher.communicate(timeout=250)
    finally:
        launcher.kill()
        cluster.remove_node(node)
    assert launcher.returncode == 0, err
    assert "refuses: cannot cache decoded images in /proc/none" in err
    assert "(exit code -9): " in err
    assert "starting another" in err
    assert progress(engine, study_id).states["complete"] == 4
    assert "vanished" in {each.outcome for each in attempts(engine, study_id)}


@pytest.mark.slow
def test_a_database_unavailable_for_too_long_ends_a_launch_with_75(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_undisturbed: list[tuple[Any, ...]]
) -> None:
    """And nothing is lost: the trial's checkpoint waits on the node's disk."""
    server = Postgres()
    try:
        harness = Harness(url := server.new_database(), config_of(**LONG))
        monkeypatch.setenv("STUDY_PATIENCE_SECONDS", "5")
        launcher = started(cluster, url, tmp_path, "--workers", "1")
        wait_for(lambda: running(harness, 3))
        server.control("stop", "-m", "immediate")
        _, err = launcher.communicate(timeout=200)
        assert launcher.returncode == 75, err
        assert "ended: the database was unavailable for over 5 s; checkpoints that it lacks are in" in err
        assert "when it is back: study resume s" in err
        server.control("start")
        done = study_process(*command(cluster, url, "--workers", "2"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert harness.outcome() == long_undisturbed
    finally:
        server.stop()


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
"""`ray start --head` lets nobody in without its token by default."""


@pytest.fixture
def machines() -> Iterator[tuple[Hosts, str]]:
    """A database on one host and Ray on three others, and the URL of an empty database."""
    with Hosts("db", "head", "w1", "w2") as net, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        ray_here = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus", "1", "--block"]
        head = ["--head", "--port", "6379", "--ray-client-server-port", "10001", "--temp-dir", folder]
        head += ["--include-dashboard", "false"]
        started = []
        server = Database(net, "db")
        try:
            for name in ("head", "w1", "w2"):
                join = head if name == "head" else ["--address", f"{net.address('head')}:6379"]
                where = ["--node-ip-address", net.address(name), "--object-store-memory", "80000000"]
                where += ["--node-manager-port", "6380"]
                more = {"RAY_USAGE_STATS_ENABLED": "0", **TOKEN}
                command = [*net.at(name), *ray_here, *join, *where]
                started.append(subprocess.Popen(command, env=os.environ | more, stdout=subprocess.DEVNULL))
                # One after the other: they share a file system, and so Ray's folder of sockets.
                wait_for(functools.partial(answers, net.address(name), 10001 if name == "head" else 6380))
            yield net, server.new_database()
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait(60)
            server.stop()


def answers(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


@pytest.mark.slow
@pytest.mark.skipif(not hosts_can_be_made(), reason="network namespaces need root and iproute2")
def test_machines_with_addresses_of_their_own(
    machines: tuple[Hosts, str], tmp_path: Path, long_undisturbed: list[tuple[Any, ...]]
) -> None:
    """Joined by ray:// from a fourth; one is cut off from all others for a while."""
    net, url = machines
    harness = Harness(url, config_of(**LONG))
    token = os.environ | TOKEN
    asked = ["resume", "s", "--launcher", "ray", "--address", f"ray://{net.address('head')}:10001", "--device", "cpu"]
    Harness(f"sqlite:///{tmp_path / 'study.db'}", config_of())
    stranger = study_process(*asked, "--storage", url, cwd=tmp_path)
    assert stranger.returncode == 2, stranger.stderr
    assert len(stranger.stderr.splitlines()) == 1
    assert "set RAY_AUTH_MODE=token" in stranger.stderr
    refused = study_process(*asked, "--storage", f"sqlite:///{tmp_path / 'study.db'}", cwd=tmp_path, env=token)
    assert refused.returncode == 2, refused.stderr
    assert f"a file of this machine, which the cluster's other nodes ({net.address('head')}" in refused.stderr
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "study", *asked, "--workers", "3", "--storage", url], cwd=tmp_path, env=token, **pipes
    )
    try:
        wait_for(lambda: len(running(harness, 3)) == 3)
        net.cut("w2")
        wait_for(lambda: "vanished" in outcomes(harness))
        net.mend("w2")
        _, err = launcher.communicate(timeout=300)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, err
    assert harness.outcome() == long_undisturbed


@pytest.mark.slow
def test_a_second_machine_makes_loopback_unreachable(cluster: Cluster, postgres: Postgres, tmp_path: Path) -> None:
    node = cluster.add_node(**NODE, node_ip_address="127.0.0.2")
    try:
        url = postgres.new_database()
        Harness(url, config_of())
        refused = study_process(*command(cluster, url), cwd=tmp_path)
    finally:
        cluster.remove_node(node)
    assert refused.returncode == 2
    assert "loopback, which the cluster's other nodes (127.0.0.2) cannot reach" in refused.stderr
