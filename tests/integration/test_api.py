"""The Python API: results as tables, figures and reports; a launch from Python; the notebook of the examples."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import optuna
import pandas
import pytest
from nbclient import NotebookClient
from optuna.trial import TrialState

import study
from storage.errors import UserError
from study.config.models import StudyConfig
from tests.support.harness import BASE, Harness, config_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> study.Study:
    """Full and static training, two epochs each."""
    url = f"sqlite:///{tmp_path_factory.mktemp('api') / 'study.db'}"
    policy = {"name": ["static", "full"], "alpha": 60, "beta": 0.5}
    Harness(url, config_of(policy=policy, training={"epochs": 2})).work()
    return study.open_study("s", url)


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import study, sys; assert not {'torch', 'optuna', 'plotly', 'pandas'} & sys.modules.keys(); "
        "assert 'launch' in dir(study); assert callable(study.launch) and callable(study.open_study)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_tables_are_data_frames(result: study.Study) -> None:
    trials, epochs, attempts = result.trials(), result.epochs(), result.attempts()
    assert all(isinstance(table, pandas.DataFrame) for table in (trials, epochs, attempts, result.settings()))
    assert list(trials["policy"]) == ["static", "full"]
    assert list(epochs.groupby("trial")["accuracy"].max()) == list(trials["value"])
    assert list(epochs["images"]) == [60, 60, 200, 200]
    assert {"loss", "kind", "k", "train_seconds", "joules"} <= set(epochs.columns)
    assert list(attempts["outcome"]) == ["finished", "finished"]


def test_without_pandas_tables_are_lists(result: study.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)  # `import pandas` fails
    assert [row["trial"] for row in result.trials()] == [0, 1]


def test_findings_best_figures_and_optuna(result: study.Study) -> None:
    best = result.best
    assert best is not None
    assert best["value"] == result.trials()["value"].max()
    assert result.findings()["verdict"]
    assert {"learning curves", "cost"} <= result.figures.keys()
    assert isinstance(result.optuna, optuna.Study)
    frame = result.optuna.trials_dataframe()
    assert list(frame["value_validation accuracy"]) == list(result.trials()["value"])
    assert "s (test): 2 trials: 2 complete" in repr(result)
    assert result._repr_html_().startswith("<pre>s (test)")


def test_reports_go_by_the_path(result: study.Study, tmp_path: Path) -> None:
    assert result.report(tmp_path / "page.html") == [tmp_path / "page.html"]
    assert "<h1>s</h1>" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "numbers.json") in result.report(tmp_path / "numbers.json")
    assert len(result.report(tmp_path / "tables")) == 4
    with pytest.raises(UserError, match="cannot write"):
        result.report(tmp_path / "missing" / "page.html")


def test_a_launch_from_python_runs_continues_and_confirms(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    tree = BASE | {"training": BASE["training"] | {"epochs": 1}, "policy": {"alpha": 60, "beta": [0.3, 0.6]}}
    handler = signal.getsignal(signal.SIGTERM)
    (tmp_path / "mine.toml").write_text(
        "data = {train_images = 200}\nnetwork = {width = 0.125}\npolicy = {alpha = 60, beta = [0.3, 0.6]}\n"
        "training = {epochs = 1, batch_size = 50, lr = 0.005}\n"
    )
    launched = study.launch(tree, name="mine", storage=url, workers=1, device="cpu")
    assert [trial.state for trial in launched.optuna.trials] == [TrialState.COMPLETE] * 2
    assert signal.getsignal(signal.SIGTERM) == handler
    assert study.launch(tmp_path / "mine.toml", storage=url).name == "mine"  # the same settings: nothing is left to do
    confirmed = launched.confirm(top=1, seeds=2, workers=1)
    assert (confirmed.name, len(confirmed.trials())) == ("mine-confirmed", 2)
    assert confirmed.trials()["test"].notna().all()
    with pytest.raises(UserError, match="asked for 'mine' already"):
        launched.confirm(top=1, seeds=2, name="more", workers=1)


LAUNCH = """
import logging, sys, study
{}
logging.getLogger("optuna").warning("of the user's")
study.launch({!r}, name="shown", storage={!r}, workers=1, device="cpu")
print(logging.getLogger("study").handlers, logging.getLogger("study").level)
"""


@pytest.mark.parametrize(
    ("configured", "shown"),
    [
        ("", ["trial 0 complete", "trial 1 complete"]),
        ("logging.basicConfig(format='mine: %(message)s', level=logging.INFO)",
         ["mine: trial 0 complete", "mine: trial 1 complete"]),
        pytest.param("logging.basicConfig()", [], marks=pytest.mark.slow),
        pytest.param("logging.getLogger('study').addHandler(logging.NullHandler())", [], marks=pytest.mark.slow),
        pytest.param("logging.getLogger('study').setLevel(logging.WARNING)", [], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_launch_shows_its_trials_unless_logging_is_configured(
    configured: str, shown: list[str], tmp_path: Path
) -> None:
    tree = BASE | {"training": BASE["training"] | {"epochs": 1}, "policy": {"alpha": 60, "beta": [0.3, 0.6]}}
    program = LAUNCH.format(configured, tree, f"sqlite:///{tmp_path / 'study.db'}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    lines = [line for line in done.stderr.splitlines() if "complete" in line]
    assert [line[: len(start)] for line, start in zip(lines, shown, strict=True)] == shown, done.stderr
    assert "of the user's" in done.stderr
    after = f"[{'<NullHandler (NOTSET)>' * ('NullHandler' in configured)}] {30 if 'setLevel' in configured else 0}"
    assert done.stdout.strip() == after  # whatever the program configures later holds


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(UserError, match="needs a name"):
        study.launch({}, storage=url)
    with pytest.raises(UserError, match="no preset 'nowhere'"):
        study.launch("nowhere", storage=url)
    with pytest.raises(UserError, match="unknown key"):
        study.launch({"polcy": {}}, name="x", storage=url)
    with pytest.raises(UserError):
        study.open_study("x", url)
    assert not (tmp_path / "study.db").exists()


def test_the_notebook_of_the_examples_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error"]
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in shown)
    assert any(output.output_type == "stream" and output.text.startswith("trial 1 complete") for output in shown)
    assert any("<table" in output.get("data", {}).get("text/html", "") for output in shown)
    assert (tmp_path / "notebook.html").exists()


@pytest.mark.parametrize("config", ["quick", BASE | {"description": "mine"}], ids=["preset", "dictionary"])
def test_a_launch_overrides_settings_as_the_command_does(
    config: str | dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a worker: what is launched is what is run."""
    seen: list[StudyConfig] = []
    monkeypatch.setattr("study.api._run", lambda of, *_, **__: seen.append(of))
    kept = copy.deepcopy(config)
    words = ["training.epochs=6", "policy.alpha=[40, 60]"]
    study.launch(config, assignments=words, name="short", storage=f"sqlite:///{tmp_path / 'study.db'}")
    study.launch(config, assignments=words[0], name="short", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [each.training.epochs for each in seen] == [6, 6]
    assert seen[0].policy.alpha == (40, 60) != seen[1].policy.alpha
    assert config == kept
