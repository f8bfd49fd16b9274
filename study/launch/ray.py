"""A study on a Ray cluster: joined, asked whether its nodes can reach the storage, given a crew, watched."""

from __future__ import annotations

import hashlib
import importlib.util
import ipaddress
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from rich.console import Console
from sqlalchemy.engine import URL

from storage.engine import open_storage
from storage.errors import UserError
from storage.url import file_of, parse, redact
from study.create import load_study
from study.exit_codes import BAD_INPUT
from study.launch.progress import ProgressDisplay, tolerate_outage
from study.worker.stop_monitor import STOP_SIGNALS

if TYPE_CHECKING:
    from study.launch.ray_supervisor import Order

POLL_SECONDS = 0.5
LEAST = 0.0001
"""Ray counts resources in such parts."""
STOPPING_SECONDS = 30.0
"""How long a launcher that was interrupted waits for its workers' end."""
OURS = ("study", "storage", "dashboards")
TOKEN_HINT = "; if it wants a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless it is in ~/.ray/auth_token"


@dataclass(frozen=True)
class Site:
    """A Ray cluster that this process has joined, and what a study wants of it."""

    order: Order
    secret: SecretStr
    """The storage's URL for the workers, password and all."""
    detach: bool


def join(
    address: str | None,
    storage_url: str,
    workers: int | None,
    gpus: float | None,
    cpus: float | None,
    device: str,
    *,
    detach: bool,
) -> Site:
    """Join the Ray cluster at `address`; None: the one that runs here, else a new one that ends with this process.

    Our packages travel with it, to nodes that have only what they need: torch, Optuna and the other dependencies.

    Args:
        workers: None: as many as fit.
        gpus: of each worker; None: 1 where the cluster has GPUs, unless the device is the CPU.

    Raises:
        UserError: Ray or a cluster is not there, or the workers could not work.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--on ray needs Ray, which is not installed; pip install 'dynamic-training-study[ray]'")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"on a Ray cluster Ray chooses the device; --device must be auto, cuda or cpu, got {device!r}")
    for name, need in (("--gpus-per-worker", gpus), ("--cpus-per-worker", cpus)):
        if need and not LEAST <= need < float("inf"):
            raise UserError(f"{name} must be 0 or a number from {LEAST:g} on, got {need:g}")
    import ray
    from ray.exceptions import RayError

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    root = Path(__file__).parents[2]
    packages = {"py_modules": [str(root / package) for package in OURS], "excludes": ["__pycache__"]}
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": packages}
    address = address or os.environ.get("RAY_ADDRESS") or None
    lasting = True
    _check(address)
    try:
        with warnings.catch_warnings(action="ignore"):  # what they say is in the error
            ray.init(address or "auto", **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        if address is not None or not isinstance(error, ConnectionError):
            reason = str(error).strip().splitlines()[0]
            hint = "" if os.environ.get("RAY_AUTH_MODE") == "token" else TOKEN_HINT
            raise UserError(f"no Ray cluster at --address {address or 'auto'}: {reason}{hint}") from None
        lasting = False
        try:
            ray.init("local", include_dashboard=False, **settings)
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as failed:
            reason = str(failed).strip().splitlines()[0]
            raise UserError(f"there is no Ray cluster, and none could be started here: {reason}") from None
    if detach and not lasting:
        raise UserError("--detach needs a Ray cluster that outlives this command; start one with: ray start --head")
    return Site(
        _order(workers, gpus, 1.0 if cpus is None else cpus, device), secret_url(storage_url, _others()), detach
    )


def _check(address: str | None) -> None:
    """Whether somebody listens there: Ray itself would try for minutes."""
    if address in (None, "auto"):
        return
    host, _, port = str(address).removeprefix("ray://").rpartition(":")
    try:
        if not (host and port.isdecimal()):
            raise OSError("write auto, HOST:PORT or ray://HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster at --address {address}: {error}") from None


def _order(workers: int | None, gpus: float | None, cpus: float, device: str) -> Order:
    import ray

    from study.launch.ray_supervisor import Order

    if gpus is None:
        gpus = 0.0 if device == "cpu" or not ray.cluster_resources().get("GPU") else 1.0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda needs --gpus-per-worker above 0, and a cluster that has GPUs")
    if not gpus and not cpus:
        raise UserError("a worker needs --gpus-per-worker or --cpus-per-worker above 0")
    return Order(workers, gpus, cpus, device if device != "auto" else "cuda" if gpus else "cpu")


def _others() -> set[str]:
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
            found = url.set(username=info.user, password=info.password or None, host=info.host, port=info.port)
            at = None if info.host.startswith("/") else ipaddress.ip_address(info.hostaddr)
            local = at is None or at.is_loopback or at.is_unspecified
            which = f"{'loopback' if local else at} {info.port} {info.dbname}"
    except psycopg.Error as error:
        raise UserError(f"cannot use the database {redact(url)}: {str(error).strip().splitlines()[0]}") from None
    return found.difference_update_query([key for key in found.query if "pass" in key.lower()]), local, which


def run(
    name: str, storage_url: str, site: Site, data_root: str | None, console: Console, refresh: Callable[[], None]
) -> int | None:
    """Give the study its crew, or find the one that it has, and watch until all workers have ended.

    Returns:
        0: settled; 75: the database was away for too long; 130: somebody asked the workers to stop; None: detached.

    Raises:
        UserError: the workers refuse to work (and why), or the cluster is gone.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the workers have given their trials back.
    """
    import ray

    storage = open_storage(storage_url, create=False, reading=True)
    study, config = load_study(storage, name)
    display = ProgressDisplay(console, storage, study, config, refresh)
    if display.settled:
        return 0

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True, style="dim")

    with _as_one_line():
        crew, found = _crew(name, site, data_root)
        say(f"{'attached to its workers on' if found else 'on'} the Ray cluster: {_says(site.order)}")
    if site.detach:
        return None
    for number in STOP_SIGNALS:  # now, because ray.init takes SIGTERM for itself
        signal.signal(number, signal.default_int_handler)
    told, news = 0, None
    try:
        with display.bars, _as_one_line():
            while news is None or news.code is None:
                time.sleep(POLL_SECONDS)
                news = ray.get(crew.news.remote(told))
                told += len(news.notes)
                for note in news.notes:
                    console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
                with tolerate_outage():
                    display.update()
                    display.refresh_when_due()
    except KeyboardInterrupt:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        with _as_one_line():
            ray.get(crew.stop.remote())
            deadline = time.monotonic() + STOPPING_SECONDS
            while ray.get(crew.news.remote(told)).code is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        raise
    if news.code == BAD_INPUT:
        raise UserError(news.why)
    return int(news.code)


def _says(wanted: Order) -> str:
    import ray

    room, needs = wanted.room(ray.nodes()), f"{wanted.cpus:g} CPUs" + (f", {wanted.gpus:g} GPUs" * bool(wanted.gpus))
    if wanted.workers is None and room:
        return f"as many workers as fit ({needs} each): {room} now"
    most = wanted.workers or 1
    waits = f"; the cluster has room for {room} now, the others wait" if room < most else ""
    return f"{most} workers ({needs} each){waits}"


def _crew(name: str, site: Site, data_root: str | None) -> tuple[Any, bool]:
    """The study's crew, told what is wanted; whether there was one already."""
    import ray
    from ray.exceptions import RayActorError

    from study.launch.ray_supervisor import Job, RaySupervisor

    # The same name in another database is another study.
    url = parse(site.secret.get_secret_value())
    where = str(url.database) if file_of(url) is not None else _resolved(url)[2]
    key = hashlib.sha256(f"{where} {name}".encode()).hexdigest()[:12]
    called, namespace = f"crew of {name}", f"study-{key}"
    along = {k: v for k, v in os.environ.items() if k.startswith("PGSSL") or k == "STUDY_PATIENCE_SECONDS"}
    job = Job(name, site.secret, data_root, along)
    actor = ray.remote(RaySupervisor).options(
        name=called,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},  # whose end is the cluster's end
    )
    for last in (False, False, True):
        try:
            ray.get_actor(called, namespace=namespace)
            found = True
        except ValueError:
            found = False
        crew = actor.remote(job, site.order)
        try:
            ray.get(crew.take.remote(job, site.order))
            return crew, found
        except RayActorError:  # it had lingered long enough just now
            if last:
                raise
            time.sleep(1.0)
    raise AssertionError


@contextmanager
def _as_one_line() -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, ConnectionError) as error:
        raise UserError(
            f"the Ray cluster does not answer ({str(error).strip().splitlines()[0]}); what still runs there goes on; "
            f"the same command attaches to it, or starts workers again"
        ) from None
