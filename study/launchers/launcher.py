"""The launcher of a study: what starts and supervises its workers, here or on a Ray cluster, and the loop around it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from storage import early_end
from storage.errors import UserError
from storage.url import tells_password
from study.create import OpenStudy
from study.exit_codes import OK
from study.launchers.hooks import EventHook
from study.launchers.progress import ProgressDisplay, tolerate_outage
from study.worker.stop_monitor import STOP_SIGNALS

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Between two looks at the progress."""


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


def run_study(
    launcher: Launcher,
    study: OpenStudy,
    data_root: str | None,
    refresh: Callable[[], None] = lambda: None,
    on_event: list[str] | None = None,
) -> int | None:
    """Run a study with the launcher's workers and show its progress until they have ended.

    Args:
        refresh: called when something has changed, not too often and for at most 1 % of the time.
        on_event: the words of a command that gets the study's events.

    Returns:
        The exit code; None: the workers are left running.

    Raises:
        UserError: the workers cannot work.
        KeyboardInterrupt: a signal, once the workers have released their trials.
    """
    hook = EventHook(on_event, study) if on_event else None
    try:
        return _run(launcher, study, data_root, refresh, hook)
    finally:
        if hook is not None:
            hook.close()


def _run(
    launcher: Launcher, study: OpenStudy, data_root: str | None, refresh: Callable[[], None], hook: EventHook | None
) -> int | None:
    display = ProgressDisplay(study, refresh, *([hook.trial] if hook else []))
    if display.finished:
        return OK
    if hook is not None:
        hook.best = display.best
    launcher.start(study, data_root, display.unfinished)
    if launcher.detached:
        return None
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        with display.bars:
            while (code := launcher.poll()) is None:
                with tolerate_outage():
                    if display.update():
                        launcher.progressed()
                    display.refresh_when_due()
                launcher.wait(POLL_SECONDS)
            with tolerate_outage():
                display.update()
                if hook is not None:
                    rules = early_end.read_rules(study.engine, study.id)
                    hook.end(code, early_end.reason_to_end(study.engine, study.id, rules))
    except BaseException:
        for number in STOP_SIGNALS:  # a second Ctrl-C would cut the workers' release short
            signal.signal(number, signal.SIG_IGN)
        launcher.stop()
        raise
    return code
