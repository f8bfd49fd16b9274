"""What people reported of neighbouring tools, tried on this one: one test a kind of fault.

Folders of images are in tests/unit/test_image_folder.py and test_decoding.py, databases in
tests/integration/test_databases.py.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial
from rich.console import Console

from dashboards import status
from storage import transfer
from storage.engine import open_storage
from storage.errors import UserError
from storage.text import command
from study import exit_codes
from study.config.loading import parse_config
from study.create import config_warnings, load_study, prepare
from study.search.pruners import make_pruner
from study.training.networks import CNN
from tests.e2e.test_command import SMALL, held_in_mid_trial, started, study, wait_for, worker_pid
from tests.support.command import study_process
from tests.support.harness import Harness, StopAfter, config_of, scripted_accuracies

ENDLESS = [*SMALL, "--set", "training.epochs=1000000"]
TWO_EPOCHS = [*SMALL, "--set", "training.epochs=2"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def load(url: str, name: str = "quick") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(url, create=False))


# Running


def test_a_finished_trial_that_somebody_adds_does_not_end_the_launcher(url: str, tmp_path: Path) -> None:
    """Public report on a neighbouring tool: a result of one's own, added to a study that runs, ended the run."""
    launcher = started("launch", "quick", *SMALL, cwd=tmp_path)
    try:
        worker = held_in_mid_trial(url)
        known = load(url).trials[0]
        added = create_trial(params=known.params, distributions=known.distributions, value=0.5)
        load(url).add_trial(added)
        os.kill(worker, signal.SIGCONT)
        out, err = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, err
    assert "trial 4 complete alpha 100, beta 0.3: value 0.5000 (not from a worker of this study)" in err
    assert "Traceback" not in err
    assert "5 complete" in out


@pytest.mark.parametrize(
    # A worker that drops its trial and works on is in test_resilience.py, too.
    "how",
    [pytest.param("failed", marks=pytest.mark.slow), "deleted"],
)
def test_a_trial_that_somebody_ends_is_dropped_while_it_trains(how: str, url: str, tmp_path: Path) -> None:
    """Public report on a neighbouring tool: a trial marked as failed went on training to its last epoch.

    It has a million epochs here, so that a worker which gets to the next trial has noticed.
    """
    launcher = started("launch", "quick", *ENDLESS, cwd=tmp_path)
    try:
        wait_for(lambda: worker_pid(url, "quick", range(1, 1_000_000)))
        if how == "failed":
            load(url).tell(0, state=TrialState.FAIL)
            wait_for(lambda: load(url).trials[1].state == TrialState.RUNNING)
            launcher.send_signal(signal.SIGINT)
        else:
            storage = open_storage(url, create=False)
            storage.delete_study(load(url)._study_id)
        _, err = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert "trial 0 has been taken over, finished or deleted by somebody else; this worker drops it" in err
    assert "Traceback" not in err
    assert launcher.returncode == (exit_codes.INTERRUPTED if how == "failed" else exit_codes.BAD_INPUT), err


def test_a_network_whose_outputs_are_not_finite_is_no_result(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Public report on a neighbouring tool: a network that blew up was "complete" with the share of class 0."""
    forward = CNN.forward

    def blown_up(network: CNN, images: torch.Tensor) -> torch.Tensor:
        logits = forward(network, images)
        return logits if network.training else logits * torch.tensor(float("nan"))

    monkeypatch.setattr(CNN, "forward", blown_up)
    harness = Harness(sqlite_url, config_of(policy={"alpha": 60, "beta": 0.5}))
    harness.work()
    (trial,) = harness.study.trials
    assert (trial.state, trial.values, trial.intermediate_values) == (TrialState.FAIL, None, {})
    assert re.search(r"output is not finite on (\d+) of \1 images in epoch 1", trial.user_attrs["error"])


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"alpha": 60, "beta": 7.0}, "beta: "),
        ({"alpha": 10**6, "beta": 0.5}, "alpha must be at most the 200 training images, got 1000000"),
        ({"alpha": "many", "beta": 0.5}, "'many' is not a valid type"),
    ],
)
def test_a_queued_trial_that_cannot_run_fails_at_once(parameters: dict[str, Any], reason: str, sqlite_url: str) -> None:
    """Public report on a neighbouring tool: a trial enqueued out of range was tried again and again."""
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}))
    harness.study.enqueue_trial(parameters)
    harness.work()
    *ours, theirs = harness.study.trials
    assert {trial.state for trial in ours} == {TrialState.COMPLETE}
    assert theirs.state == TrialState.FAIL
    assert reason in theirs.user_attrs["error"], theirs.user_attrs
    assert sum(line.startswith("trial 4 failed") for line in harness.messages) == 1
    assert len(status.read(harness.storage.engine, "s").failed_attempts) <= 1


RANGES = {"policy": {"alpha": {"low": 10, "high": 100, "step": 20}, "beta": 0.5}}
REFUSED = {
    "CMA-ES over lists": (
        {"policy": {"alpha": [10, 20], "beta": [0.1, 0.2]}, "search": {"sampler": "cma-es", "trials": 3}},
        'sampler "cma-es" needs at least two ranges',
    ),
    "CMA-ES over one range": (
        {
            "policy": {"alpha": 10, "beta": {"low": 0.1, "high": 0.9}},
            "search": {"sampler": "cma-es", "trials": 3},
        },
        'sampler "cma-es" needs at least two ranges',
    ),
    "a step that does not fit": (
        RANGES | {"search": {"sampler": "tpe", "trials": 3}},
        "step 20 does not divide the range from 10 to 100; the nearest high that fits is 90",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_search_that_would_not_be_what_it_says_is_refused(case: str) -> None:
    """Public report on a neighbouring tool: such settings were accepted and silently changed or ignored."""
    tree, fault = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(fault)):
        parse_config(tree)


def test_a_pruner_that_can_never_prune_gets_a_warning() -> None:
    """Public report on a neighbouring tool: a min_resource above the epochs pruned nothing, and nothing said so."""
    for resource, warned in ((3, True), (30, True), (2, False)):
        config = config_of(pruning={"kind": "successive-halving", "min_resource": resource})
        sentences = [line for line in config_warnings(config, prepare(config, None)) if "min_resource" in line]
        assert (
            sentences
            == [f"pruning.min_resource {resource} is not below the last step 3 of a trial: nothing will be pruned"]
            * warned
        )


def test_warnings_of_libraries_appear_once_and_without_their_paths(tmp_path: Path) -> None:
    """Public report on a neighbouring tool: a warning with a library's path for every trial."""
    code = "\n".join(
        [
            "from study import logs",
            "logs.configure()",
            "import warnings, logging, optuna",
            "from storage.engine import open_storage",
            "open_storage('sqlite:///study.db')",
            "for _ in range(3):",
            "    warnings.warn('drawn independently', optuna.exceptions.ExperimentalWarning)",
            "    logging.getLogger('optuna.samplers').warning('falls back')",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stderr == "warning: drawn independently\nwarning: falls back\n"
    searched = ["--set", "search.sampler=cma-es", "--set", "policy.beta={low=0.1, high=0.9}", "--trials", "4"]
    searched += ["--set", "policy.alpha={low=50, high=100}", "--set", "training.epochs=1"]
    done = study_process("launch", "quick", *SMALL, *searched, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert not [line for line in lines if "site-packages" in line or ".py:" in line]
    assert len([line for line in lines if line.startswith("warning: ")]) == len(
        {line for line in lines if line.startswith("warning: ")}
    )


def test_an_ascii_terminal_does_not_end_a_study(tmp_path: Path) -> None:
    """Public report on a neighbouring tool: UnicodeEncodeError after all trials had finished."""
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = study_process("launch", "quick", *TWO_EPOCHS, "--name", "é日 – π", cwd=tmp_path, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stderr.isascii()
    assert "?? ? ? (quick): 4 trials: 4 complete" in done.stdout
    for verb in (("status", "é日 – π"), ("list",), ("report", "é日 – π")):
        shown = study_process(*verb, cwd=tmp_path, env=ascii_only)
        assert (shown.returncode, shown.stderr) == (0, "")


def test_nothing_follows_the_line_of_an_error(tmp_path: Path) -> None:
    """Public report on a neighbouring tool: 30 lines of "nanobind: leaked" under a perfect error.

    torchvision, which named data sets load, imports Triton, whose bindings print them at the exit.
    """
    (tmp_path / "file").touch()
    options = ["--set", "data.name=cifar10", "--set", "policy.alpha=10", "--data-root", "file/folder"]
    done = study_process("launch", "quick", *options, cwd=tmp_path)
    assert done.returncode == exit_codes.BAD_INPUT
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("study: cannot keep cifar10 under")


# Ends


@pytest.mark.parametrize(
    ("failures", "allowed", "code"),
    [
        (0, 0, exit_codes.OK),
        (1, 0, exit_codes.TRIALS_FAILED),
        (1, 1, exit_codes.OK),
        (2, 1, exit_codes.TRIALS_FAILED),
        (4, 0, exit_codes.TRIALS_FAILED),
        (4, 4, exit_codes.TRIALS_FAILED),
    ],
)
def test_the_exit_code_tells_a_success_from_failed_trials(
    failures: int, allowed: int, code: int, sqlite_url: str, tmp_path: Path
) -> None:
    """Public report on a neighbouring tool: exit code 0 where every trial had failed."""
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}))
    fail_first(harness, failures)
    harness.work()
    done = study("resume", "s", "--device", "cpu", "--allow-failures", str(allowed), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert (code == exit_codes.OK) != (
        f"{failures} of 4 trials failed; run them again with: study requeue s --failed" in done.stderr
    )


def fail_first(harness: Harness, count: int) -> None:
    queue = harness.queue()
    for _ in range(count):
        lease = queue.claim()
        assert lease is not None
        queue.fail(lease, "a reason")


def test_every_deliberate_end_has_an_exit_code_of_its_own() -> None:
    """Public report on a neighbouring tool: a deliberate stop could not be told from an interruption.

    That commands end with them is tested where they are stopped: in test_command.py and test_budgets_and_stop.py.
    """
    assert len(exit_codes.MEANINGS) == 8
    ends = (exit_codes.OK, exit_codes.STOPPED, exit_codes.BUDGET_SPENT, exit_codes.INTERRUPTED)
    assert ends == (0, 4, 5, 130)


# Copies


def test_a_copy_is_resumed_and_not_its_source(tmp_path: Path) -> None:
    """Public report on a neighbouring tool: the printed command resumed the old copy, and the two diverged."""
    source, target = f"sqlite:///{tmp_path}/study.db", f"sqlite:///{tmp_path}/an other.db"
    harness = Harness(source, config_of(training={"epochs": 1}))
    harness.work(most=1)
    copied = study("copy", "s", "--from", source, "--to", target, "--name", "t w", cwd=tmp_path)
    assert copied.returncode == 0, copied.stderr
    hint = copied.stderr.strip().partition("continue with: ")[2]
    assert hint == command("resume", "t w", storage=target)
    assert f"--storage '{target}'" in hint
    for verb in (("resume", "s"), ("worker", "s")):  # a refused worker leaves no threads
        refused = study(*verb, "--device", "cpu", cwd=tmp_path)
        assert refused.returncode == exit_codes.BAD_INPUT
        assert "was copied (to t w in " in refused.stderr
        assert "--force" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert len([t for t in load(source, "s").trials if t.state.is_finished()]) == 1
    typed = subprocess.run(
        hint.replace("study ", f"{sys.executable} -m study ", 1) + " --device cpu --workers 1",
        shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert typed.returncode == 0, typed.stderr
    assert all(t.state == TrialState.COMPLETE for t in load(target, "t w").trials)
    forced = study("resume", "s", "--force", "--device", "cpu", "--workers", "1", cwd=tmp_path)
    assert forced.returncode == 0, forced.stderr


HYPERBAND = {
    "policy": {"alpha": 60, "beta": [0.96 - 0.08 * i for i in range(9)]},
    "pruning": {"kind": "hyperband", "min_resource": 1, "reduction_factor": 2},
    "training": {"epochs": 8},
}


def test_a_copy_under_another_name_is_pruned_as_the_original(tmp_path: Path) -> None:
    """Public report on a neighbouring tool: Hyperband chose other brackets after a study was renamed."""

    def outcome(name: str, original_name: str | None = "s") -> list[tuple[Any, ...]]:
        """Of a study that is renamed after two trials; its copy goes by `original_name`."""
        harness = Harness(f"sqlite:///{tmp_path / f'{name}-{original_name}.db'}", config_of(**HYPERBAND))
        harness.work(most=2)
        if name != "s":
            transfer.copy(harness.storage, harness.storage, "s", name)
            harness.study, harness.config = load_study(harness.storage, name)
            harness.study.pruner = make_pruner(harness.config, len(harness.data.train_labels))
            harness.study.set_user_attr(transfer.ORIGINAL_NAME, original_name or name)
        harness.work()
        trials = optuna.load_study(study_name=name, storage=harness.storage).trials
        return [(t.number, t.state, t.value, len(t.intermediate_values)) for t in trials]

    # The higher beta the better, whatever a processor makes of it.
    with scripted_accuracies(lambda trainer: trainer.policy.beta * (1 - 0.5 ** (len(trainer.history) + 1))):  # type: ignore[attr-defined]
        original = outcome("s")
        assert TrialState.PRUNED in {state for _, state, *_ in original}
        assert outcome("renamed") == original
        # The control: by its own name the copy gets other brackets.
        assert any(outcome(name, None) != original for name in ("renamed", "t", "u"))


# Looking


def shown(harness: Harness, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(status.page(status.read(harness.storage.engine, "s"), width=width))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_status_of_an_interrupted_study_says_so(sqlite_url: str) -> None:
    """Public report on a neighbouring tool: "1 running", nobody at work, and a time left."""
    harness = Harness(sqlite_url, config_of())
    harness.work(StopAfter(4), most=1)
    text = shown(harness, 200)
    assert "4 trials: 3 waiting, 1 interrupted" in text
    assert "trial 0 is interrupted (epoch 1 of 3)" in text
    assert "paused: no worker runs; continue with: study resume s" in text
    assert " left " not in text
    assert "running" not in text
    assert status.read(harness.storage.engine, "s").seconds_left is None


def test_the_hint_of_a_status_names_the_storage_that_was_asked(sqlite_url: str, tmp_path: Path) -> None:
    """Public report on a neighbouring tool: hints lacked the option without which they meant another study."""
    harness = Harness(sqlite_url.replace("study.db", "my own.db"), config_of())
    harness.work(StopAfter(4), most=1)
    url = sqlite_url.replace("study.db", "my own.db")
    done = study("status", "s", "--storage", url, cwd=tmp_path)
    assert f"continue with: {command('resume', 's', storage=url)}" in done.stdout
    assert (
        "continue with: study resume s\n"
        in study("status", "s", cwd=tmp_path, env=os.environ | {"STUDY_STORAGE": url}).stdout
    )


def test_watching_fits_80_columns(sqlite_url: str) -> None:
    """Public report on a neighbouring tool: the table of a narrow terminal lost its columns."""
    harness = Harness(sqlite_url, config_of())
    queue = harness.queue(owner="a-machine-with-a-long-name.example.org:1234567:x", device="NVIDIA H100 80GB HBM3")
    lease = queue.claim()
    assert lease is not None
    row = {"epoch": 1, "accuracy": 0.5, "loss": 1.0, "images": 60, "train_seconds": 2.0, "validation_seconds": 1.0}
    queue.record(lease, [row | {"kind": "keep", "k": 0, "beta": 0.0}], {1: 0.5})
    lines = shown(harness).splitlines()
    assert max(map(len, lines)) <= 80
    head = next(line for line in lines if "machine" in line)
    for column in ("trial", "epoch", "images/s", "best", "lease left"):
        assert column in head
    text = " ".join(lines)
    assert "50.00 %" in text
    assert "1234567" in re.sub(r"\s", "", text)


# Names that others chose

HOSTILE = "a[/b][red]\x1b]0;owned\x07\u202e"


def test_what_others_wrote_does_nothing_on_a_terminal(sqlite_url: str, tmp_path: Path) -> None:
    """Public report on a neighbouring tool: a name with markup ended the program, one with ESC set the title."""
    harness = Harness(sqlite_url, config_of())
    queue = harness.queue(owner=f"{HOSTILE}:1:x", device=HOSTILE, max_attempts=1)
    failed = queue.claim()
    assert failed is not None
    queue.fail(failed, f"{HOSTILE}\nsecond line")
    assert queue.claim() is not None  # stays at work
    with harness.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE studies SET study_name = ?", (f"{HOSTILE}x",))
    everything = ""
    for verb in (("status",), ("status", "--json", "-"), ("list",), ("report", f"{HOSTILE}x"), ("stop", f"{HOSTILE}y")):
        done = study(*verb, cwd=tmp_path)
        assert "Traceback" not in done.stderr, verb
        everything += done.stdout + done.stderr
    assert not set("\x1b\x07\u202e") & set(everything)
    assert "a[/b][red]\\x1b]0;owned\\x07\\u202e" in everything  # as it is, and escaped


def test_a_name_with_markup_or_quotes_is_a_name(tmp_path: Path) -> None:
    """Public report on a neighbouring tool: MarkupError after the study had been created."""
    name = "a[/b] [bold]x[/bold] $(touch owned) 'x'"
    done = study("launch", "quick", *TWO_EPOCHS, "--name", name, "--budget", "1 images", cwd=tmp_path)
    assert done.returncode == exit_codes.BUDGET_SPENT, done.stderr
    assert f"starting study {name!r}" in done.stderr
    assert command("resume", name) in done.stderr
    assert name in study("status", name, cwd=tmp_path).stdout


def test_a_file_in_the_current_folder_does_not_run_in_the_place_of_ours(tmp_path: Path) -> None:
    """Public report on a neighbouring tool: a user's own study.py ran as the worker, and no trial was trained."""
    for file in ("study.py", "storage.py", "torch.py", "logging.py", "dashboards/__init__.py"):
        own = tmp_path / file
        own.parent.mkdir(exist_ok=True)
        own.write_text(f"open('{own.stem}-ran', 'w').close()\nraise SystemExit(0)\n")
    # As the installed script starts: without the current folder on the path.
    start = [sys.executable, "-P", "-c", "from study.__main__ import main; main()", "launch", "quick", *TWO_EPOCHS]
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 complete" in done.stdout
    assert not list(tmp_path.glob("*-ran"))
