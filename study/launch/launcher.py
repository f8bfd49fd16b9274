"""Who works on a study: processes of this machine, or what a Ray cluster places."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console

from storage.errors import UserError
from storage.url import tells_password

Workforce = Callable[[str, str | None, Console, Callable[[], None]], int | None]
"""Works on the study of this name with the data under this root and shows how far it is; calls the last argument when
something has changed, not too often. Gives the exit code; None if the workers are left at work."""


def placed(
    url: str,
    device: str,
    workers: int | None,
    on: str = "here",
    address: str | None = None,
    gpus: float | None = None,
    cpus: float | None = None,
    detach: bool = False,
    typed: str | None = None,
    budgets: Mapping[str, float] | None = None,
) -> Workforce:
    """The workers that were asked for, if they can be had.

    Args:
        typed: the storage as it stands in the command, if it does.
        budgets: new ones, which the workers must be able to keep.

    Raises:
        UserError: they cannot.
    """
    if on == "ray":
        from study.launch import ray

        if typed is not None and tells_password(typed):
            raise UserError("Ray shows a launcher's arguments; put the password into $PGPASSWORD, not into --storage")
        site = ray.join(address, url, workers, gpus, cpus, device, detach=detach)
        if "kWh" in (budgets or {}) and not site.order.gpus:
            raise UserError("a budget in kWh needs workers on GPUs, which tell their energy; use another unit")
        return lambda name, root, console, refresh: ray.run(name, url, site, root, console, refresh)
    if address is not None or gpus is not None or cpus is not None or detach:
        raise UserError("--address, --gpus-per-worker, --cpus-per-worker and --detach need --on ray")
    from study.launch import devices, local
    from study.worker import worker

    chosen = devices.local_devices(device, workers)
    if "kWh" in (budgets or {}):
        worker.check_energy(chosen)

    def here(name: str, root: str | None, console: Console, refresh: Callable[[], None]) -> int:
        return local.run(name, url, chosen, root, console, refresh)

    return here
