"""Workers on a Ray cluster: it is joined, asked whether its nodes can reach the storage, and given a supervisor."""

from __future__ import annotations

import hashlib
import importlib.util
import ipaddress
import logging
import os
import socket
import time
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from sqlalchemy.engine import URL

from storage.errors import Unreachable, UserError
from storage.url import file_of, parse, redact
from study.create import OpenStudy
from study.exit_codes import BAD_INPUT
from study.launchers.launcher import LaunchOptions

if TYPE_CHECKING:
    from study.launchers.ray_supervisor import WorkerRequest

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LEAST = 0.0001
"""Ray counts resources in such parts."""
STOPPING_SECONDS = 30.0
"""How long a launcher that was interrupted waits for its workers to end."""
OUR_PACKAGES = ("study", "storage", "dashboards")
TOKEN_HINT = "; if it wants a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless it is in ~/.ray/auth_token"


class RayLauncher:
    """The workers of a study on a Ray cluster that this process has joined.

    Args:
        request: how many workers, and what each needs.
        storage_url: for the workers, password and all.
    """

    def __init__(self, request: WorkerRequest, storage_url: SecretStr, *, detached: bool) -> None:
        self.request, self.storage_url, self.detached = request, storage_url, detached
        self.supervisor: Any = None
        self.notes_read = 0

    @classmethod
    def join(cls, options: LaunchOptions, url: str) -> RayLauncher:
        """Join the Ray cluster at the address given; without one, the one that runs here, else a new one that ends with
        this process. Our packages travel with it to nodes that have only what they need: torch, Optuna and so on.

        Raises:
            UserError: Ray or a cluster is not there, or the workers could not work.
        """
        _check_options(options)
        is_lasting = _join_cluster(options.address or os.environ.get("RAY_ADDRESS") or None)
        if options.detach and not is_lasting:
            raise UserError("--detach needs a Ray cluster that outlives this command; start one with: ray start --head")
        return cls(_worker_request(options), secret_url(url, _other_nodes()), detached=options.detach)

    def check_budgets(self, units: Iterable[str]) -> None:
        if "kWh" in units and not self.request.gpus:
            raise UserError("a budget in kWh needs workers on GPUs, which report their energy; use another unit")

    def start(self, study: OpenStudy, data_root: str | None, unfinished: int) -> None:
        with _cluster_errors_as_user_errors():
            self.supervisor, existed = _supervisor(study.name, self.request, self.storage_url, data_root)
            where = "attached to its workers on" if existed else "on"
            logger.info("%s the Ray cluster: %s", where, _describe(self.request))

    def poll(self) -> int | None:
        import ray

        with _cluster_errors_as_user_errors():
            status = ray.get(self.supervisor.status.remote(self.notes_read))
        self.notes_read += len(status.notes)
        for note in status.notes:
            logger.warning("%s", note)
        if status.code == BAD_INPUT:
            raise UserError(status.reason)
        return None if status.code is None else int(status.code)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def progressed(self) -> None:
        """The supervisor counts deaths itself: it outlives this launcher."""

    def stop(self) -> None:
        import ray

        with _cluster_errors_as_user_errors():
            ray.get(self.supervisor.stop.remote())
            deadline = time.monotonic() + STOPPING_SECONDS
            while ray.get(self.supervisor.status.remote(self.notes_read)).code is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)


def _check_options(options: LaunchOptions) -> None:
    if importlib.util.find_spec("ray") is None:
        raise UserError("--launcher ray needs Ray, which is not installed; pip install 'dynamic-training-study[ray]'")
    if options.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"on a Ray cluster Ray chooses the device; --device must be auto, cuda or cpu, got {options.device!r}"
        )
    needs = (("--gpus-per-worker", options.gpus_per_worker), ("--cpus-per-worker", options.cpus_per_worker))
    for name, need in needs:
        if need and not LEAST <= need < float("inf"):
            raise UserError(f"{name} must be 0 or a number from {LEAST:g} on, got {need:g}")


def _join_cluster(address: str | None) -> bool:
    """Whether the cluster outlives this process."""
    import ray
    from ray.exceptions import RayError

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    root = Path(__file__).parents[2]
    packages = {"py_modules": [str(root / package) for package in OUR_PACKAGES], "excludes": ["__pycache__"]}
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": packages}
    _check_address(address)
    try:
        with warnings.catch_warnings(action="ignore"):  # what they say is in the error
            ray.init(address or "auto", **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        if address is not None or not isinstance(error, ConnectionError):
            reason = str(error).strip().splitlines()[0]
            hint = "" if os.environ.get("RAY_AUTH_MODE") == "token" else TOKEN_HINT
            raise UserError(f"no Ray cluster at --address {address or 'auto'}: {reason}{hint}") from None
        try:
            ray.init("local", include_dashboard=False, **settings)
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as failed:
            reason = str(failed).strip().splitlines()[0]
            raise UserError(f"there is no Ray cluster, and none could be started here: {reason}") from None
        return False
    return True


def _check_address(address: str | None) -> None:
    """Raises UserError if nothing listens there: Ray itself would try for minutes."""
    if address in (None, "auto"):
        return
    host, _, port = str(address).removeprefix("ray://").rpartition(":")
    try:
        if not (host and port.isdecimal()):
            raise OSError("write auto, HOST:PORT or ray://HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster at --address {address}: {error}") from None


def _worker_request(options: LaunchOptions) -> WorkerRequest:
    import ray

    from study.launchers.ray_supervisor import WorkerRequest

    gpus, cpus, device = options.gpus_per_worker, options.cpus_per_worker, options.device
    cpus = 1.0 if cpus is None else cpus
    if gpus is None:
        gpus = 0.0 if device == "cpu" or not ray.cluster_resources().get("GPU") else 1.0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda needs --gpus-per-worker above 0, and a cluster that has GPUs")
    if not gpus and not cpus:
        raise UserError("a worker needs --gpus-per-worker or --cpus-per-worker above 0")
    device = device if device != "auto" else "cuda" if gpus else "cpu"
    return WorkerRequest(workers=options.workers, gpus=gpus, cpus=cpus, device=device, threads=options.threads)


def _other_nodes() -> set[str]:
    """The addresses of the cluster's nodes other than this machine. Over ray:// that is all of them."""
    import ray

    here = "" if ray.util.client.ray.is_connected() else ray.util.get_node_ip_address()
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]} - {here}


def secret_url(storage_url: str, others: Collection[str]) -> SecretStr:
    """The URL with all that another node needs: where the file is, or the user and password that this machine uses.

    Args:
        others: addresses of the cluster's nodes other than this machine.

    Raises:
        UserError: the database is not there, or the other nodes cannot reach it.
    """
    url = parse(storage_url)
    path = file_of(url)
    if path is not None:
        full, problem = url.set(database=str(path.resolve())), "a file of this machine"
    else:
        full, loopback, _ = _resolved(url)
        problem = "on this machine's loopback" if loopback else ""
    if others and problem:
        some = ", ".join(sorted(others)[:3]) + (", …" if len(others) > 3 else "")
        raise UserError(
            f"the storage {redact(url)} is {problem}, which the cluster's other nodes ({some}) cannot reach; use a "
            "PostgreSQL on an address of your network: --storage postgresql://USER@HOST/DATABASE"
        )
    return SecretStr(full.render_as_string(hide_password=False))


def _resolved(url: URL) -> tuple[URL, bool, str]:
    """User, password, host and port as libpq found them: in the URL, the environment or ~/.pgpass; whether the server
    was reached by a way that only this machine has; the database, however the URL spells it.
    """
    import psycopg

    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        with psycopg.connect(plain, connect_timeout=10) as connection:
            info = connection.info
            resolved = url.set(username=info.user, password=info.password or None, host=info.host, port=info.port)
            at = None if info.host.startswith("/") else ipaddress.ip_address(info.hostaddr)
            local = at is None or at.is_loopback or at.is_unspecified
            which = f"{'loopback' if local else at} {info.port} {info.dbname}"
    except psycopg.Error as error:
        raise Unreachable(f"cannot use the database {redact(url)}: {str(error).strip().splitlines()[0]}") from None
    return resolved.difference_update_query([key for key in resolved.query if "pass" in key.lower()]), local, which


def _describe(request: WorkerRequest) -> str:
    import ray

    room, needs = (
        request.room(ray.nodes()),
        f"{request.cpus:g} CPUs" + (f", {request.gpus:g} GPUs" * bool(request.gpus)),
    )
    if request.workers is None and room:
        return f"as many workers as fit ({needs} each): {room} now"
    most = request.workers or 1
    waits = f"; the cluster has room for {room} now, the others wait" if room < most else ""
    return f"{most} workers ({needs} each){waits}"


def _supervisor(name: str, request: WorkerRequest, storage_url: SecretStr, data_root: str | None) -> tuple[Any, bool]:
    """The study's supervisor, with this request; whether there was one already."""
    import ray
    from ray.exceptions import RayActorError

    from study.launchers.ray_supervisor import RaySupervisor, WorkerJob

    # The same name in another database is another study.
    url = parse(storage_url.get_secret_value())
    database = str(url.database) if file_of(url) is not None else _resolved(url)[2]
    key = hashlib.sha256(f"{database} {name}".encode()).hexdigest()[:12]
    actor_name, namespace = f"supervisor of {name}", f"study-{key}"
    passed_on = {
        k: v for k, v in os.environ.items() if k.startswith("PGSSL") or k in ("STUDY_PATIENCE_SECONDS", "STUDY_CODE")
    }
    job = WorkerJob(name=name, storage_url=storage_url, data_root=data_root, environment=passed_on)
    actor = ray.remote(RaySupervisor).options(
        name=actor_name,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},  # whose end is the cluster's end
    )
    for last in (False, False, True):
        try:
            ray.get_actor(actor_name, namespace=namespace)
            existed = True
        except ValueError:
            existed = False
        supervisor = actor.remote(job, request)
        try:
            ray.get(supervisor.update.remote(job, request))
            return supervisor, existed
        except RayActorError:  # an old one has ended just now
            if last:
                raise
            time.sleep(1.0)
    raise AssertionError


@contextmanager
def _cluster_errors_as_user_errors() -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, ConnectionError) as error:
        raise UserError(
            f"the Ray cluster does not answer ({str(error).strip().splitlines()[0]}); workers there keep running; "
            f"the same command attaches to them, or starts workers again"
        ) from None
