"""The launcher of a study: what starts and supervises its workers, here or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from storage.errors import UserError

if TYPE_CHECKING:
    from study.create import OpenStudy


class Launcher(Protocol):
    """The workers of one study."""

    detached: bool
    """Whether the workers are left alone once they have started."""

    def check_budgets(self, units: Iterable[str]) -> None:
        """Raises:
        UserError: the workers cannot measure one of these units.
        """

    def start(self, study: OpenStudy, data_root: str | None, unfinished: int) -> None:
        """Start the workers, at most one for each of the `unfinished` trials, or attach to those that run already."""

    def poll(self) -> int | None:
        """Replace workers that died and log what happened; the exit code once all have ended.

        Raises:
            UserError: the workers refuse to work (and why), or die as fast as they start.
        """

    def wait(self, seconds: float) -> None:
        """So long, or until a worker ends where that is noticed at once."""

    def progressed(self) -> None:
        """A trial has finished: workers that died before count as repaired."""

    def stop(self) -> None:
        """Have all workers release their trials and end, and wait for that."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What the command line says about workers."""

    launcher: Literal["local", "ray"] = "local"
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    address: str | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float | None = None
    detach: bool = False
    storage_option: str | None = None
    """`--storage` as typed, if it was."""


def make_launcher(options: LaunchOptions, url: str) -> Launcher:
    """The launcher that the options ask for.

    Raises:
        UserError: its workers cannot be had, or options that do not go together.
    """
    if options.launcher == "ray":
        from storage.url import tells_password
        from study.launchers.ray import RayLauncher

        if options.storage_option is not None and tells_password(options.storage_option):
            raise UserError(
                "Ray shows the launcher's command line; put the password into $PGPASSWORD, not into --storage"
            )
        return RayLauncher.join(options, url)
    if any((options.address, options.gpus_per_worker, options.cpus_per_worker, options.detach)):
        raise UserError("--address, --gpus-per-worker, --cpus-per-worker and --detach need --launcher ray")
    from study.launchers.local import LocalLauncher

    return LocalLauncher(options.device, options.workers, options.threads)
