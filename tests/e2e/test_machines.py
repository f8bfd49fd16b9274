"""The recipes of docs/guides/machines.md, verbatim: manifests against their schemas, Slurm's on a real Slurm."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from storage.engine import open_storage
from storage.queries import progress
from tests.e2e.test_command import SMALL, outcome, study, wait_for, worker_pid
from tests.support.postgres import Postgres, free_port

DOC = (Path(__file__).parents[2] / "docs" / "guides" / "machines.md").read_text()


def block(kind: str) -> str:
    (block,) = re.findall(rf"```{kind}\n(.*?)```", DOC, flags=re.DOTALL)
    return str(block)


def test_the_kubernetes_manifests_keep_to_the_schemas() -> None:
    documents = list(yaml.safe_load_all(block("yaml")))
    assert [document["kind"] for document in documents] == ["Secret", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, "1.33", strict=True)
    (container,) = documents[1]["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"][0]["secretRef"]["name"] == documents[0]["metadata"]["name"]
    documents[1]["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] = "75"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(documents[1], "1.33", strict=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_systemd_unit_is_one(tmp_path: Path) -> None:
    def complaints(text: str) -> str:
        unit = tmp_path / "study.service"
        unit.write_text(text.replace("/opt/venv/bin/study", "/bin/true"))
        command = ["systemd-analyze", "verify", "--man=no", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return "\n".join(line for line in done.stderr.splitlines() if "study.service" in line)

    assert complaints(block("ini")) == ""
    assert "Failed to parse service restart" in complaints(
        block("ini").replace("Restart=on-failure", "Restart=perhaps")
    )


SLURM = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={port}
SlurmdPort={other_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=spare Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=owner Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


class Slurm:
    """One node and its controller on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        host, conf = socket.gethostname().partition(".")[0], folder / "slurm.conf"
        conf.write_text(SLURM.format(folder=folder, host=host, port=free_port(), other_port=free_port()))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        self.environment = os.environ | {"SLURM_CONF": str(conf)}
        munge = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self.daemons: list[subprocess.Popen[bytes]] = []
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *munge],
            ["slurmctld", "-D", "-f", str(conf)],
            ["slurmd", "-D", "-f", str(conf)],
        ):
            log = (folder / f"{command[0]}.out").open("wb")
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
            time.sleep(1)
        wait_for(lambda: "idle" in self("sinfo", "--noheader", "--format=%t"))

    def __call__(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment | variables, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    def states(self, job: str) -> set[str]:
        return {line.split()[1] for line in self.queue(job)}

    def queue(self, job: str) -> list[str]:
        options = ("--noheader", "--states=all", "--array", "--format=%i %T")
        return self("squeue", *options, f"--jobs={job}").splitlines()

    def stop(self) -> None:
        self("scancel", "--user=root")
        wait_for(lambda: not self("squeue", "--noheader"))
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(30)


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    if any(shutil.which(name) is None for name in PROGRAMS) or os.geteuid() != 0:
        pytest.skip("no Slurm here, or not root; on Debian: apt-get install slurm-wlm munge")
    # Munge asks that nobody else can write to any folder above its socket but sticky ones.
    folder = Path(f"/tmp/study-slurm-{os.getpid()}")
    folder.mkdir(mode=0o755)
    server = Slurm(folder)
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_slurm_script_on_slurm(slurm: Slurm, postgres: Postgres, tmp_path: Path) -> None:
    """Two array tasks: preempted, resumed, requeued near their time limit by themselves; the outcome is equal."""
    url, quiet = postgres.new_database(), f"sqlite:///{tmp_path / 'study.db'}"
    script = block("sbatch").replace("0-7", "0-1").replace("--gpus-per-task=1 ", "").replace("--cpus-per-task=4", "")
    script = script.replace("04:00:00", "00:01:00").replace("USR1@120", "USR1@30")
    (slurm.folder / "study.sbatch").write_text(script)
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "STUDY_STORAGE": url}
    launch = ["launch", "quick", *SMALL, "--set", "training.epochs=100", "--set", "lease.seconds=10"]

    def log_text() -> str:
        return "".join(path.read_text() for path in slurm.folder.glob("slurm-*.out"))

    job = slurm("sbatch", "--parsable", "study.sbatch", *launch, **variables).strip()
    wait_for(lambda: worker_pid(url, "quick"), 120)
    slurm("sbatch", "--partition=owner", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 3")
    wait_for(lambda: slurm.states(job) == {"PENDING"}, 120)
    assert "DUE TO PREEMPTION" in log_text()
    assert "interrupted; nothing is lost" in log_text()

    pending: dict[str, float] = {}

    def ended() -> bool:
        """A requeued task waits for two minutes. Here it waits for five seconds: in less, its new credential may be of
        the second in which the old one was revoked, and is refused. Once has been seen, it gets the time that it needs.
        """
        states = dict(line.split() for line in slurm.queue(job))
        longer = ["TimeLimit=30"] if "DUE TO JOB REQUEUE" in log_text() else []
        for task, state in states.items():
            since = pending.setdefault(task, time.monotonic()) if state == "PENDING" else pending.pop(task, None)
            if state == "PENDING" and since is not None and time.monotonic() - since > 5:
                slurm("scontrol", "update", f"JobId={task}", "StartTime=now", *longer)
        return set(states.values()) == {"COMPLETED"}

    wait_for(ended, 900)
    assert "DUE TO JOB REQUEUE" in log_text()  # by the script, before its time was up
    assert [row[1] for row in outcome(url, "quick")] == ["complete"] * 4

    done = study(*launch, "--storage", quiet, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert outcome(url, "quick") == outcome(quiet, "quick")

    again = slurm(
        "sbatch", "--parsable", "--time=30", "study.sbatch", *launch, "--name", "cancelled", **variables
    ).strip()
    wait_for(lambda: worker_pid(url, "cancelled"), 120)
    slurm("scancel", again)
    wait_for(lambda: slurm.states(again) == {"CANCELLED"}, 60)
    storage = open_storage(url, create=False, reading=True)
    assert progress(storage.engine, storage.get_study_id_from_name("cancelled")).running == ()  # released
