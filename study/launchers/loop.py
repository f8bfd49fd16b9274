"""The loop around a launcher: workers started and watched, progress shown, events sent, until the study has ended."""

from __future__ import annotations

import signal
from collections.abc import Callable

from storage import early_end
from study.create import OpenStudy
from study.exit_codes import OK
from study.launchers.hooks import EventHook
from study.launchers.launcher import Launcher
from study.launchers.progress import ProgressDisplay, tolerate_outage
from study.worker.supervisor import STOP_SIGNALS

POLL_SECONDS = 0.5
"""Between two looks at the progress."""


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
