"""The Python API: launch and open studies, and their results as tables, figures and reports.

    import study

    result = study.launch("quick", storage="sqlite:///study.db")
    result.trials()             # a pandas DataFrame, or a list of dictionaries where pandas is not installed
    result.figures["learning curves"]

The command line does the same things, and more: a study that one of them has started, the other can open.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go

from dashboards import aggregate, comparison, study_data, tables
from dashboards.figures import accuracy, effort, search
from dashboards.reports import csv as csv_report
from dashboards.reports import html as html_report
from dashboards.reports import json as json_report
from dashboards.status import heading
from dashboards.study_data import StudyData
from storage.budgets import parse_budgets, set_budgets
from storage.engine import open_storage
from storage.errors import Unreachable, UserError
from storage.stop_requests import withdraw_stop
from storage.study_name import check_study_name
from storage.text import printable
from storage.transfer import COPIED_TO
from storage.url import DEFAULT
from study import confirm as confirming
from study import create
from study import derive as deriving
from study.after import informing
from study.config import extensions
from study.config.assignments import assign
from study.config.loading import LoadedConfig, load, parse_config
from study.config.models import StudyConfig
from study.create import OpenStudy
from study.exit_codes import DATABASE_UNAVAILABLE
from study.launchers.launcher import LaunchOptions, make_launcher
from study.launchers.loop import run_study
from study.logs import shown_by_default
from study.worker.supervisor import STOP_SIGNALS

logger = logging.getLogger(__name__)

Table = Any
"""A pandas DataFrame where pandas is installed, else a list of dictionaries. One row each."""


def launch(
    config: str | Path | Mapping[str, Any],
    *,
    assignments: Iterable[str] = (),
    name: str | None = None,
    storage: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    data_root: str | Path | None = None,
    budget: Iterable[str] | None = None,
    after: str | None = None,
) -> Study:
    """Start a study on this machine, or continue it, and return when its workers have ended.

    A line on stderr shows each trial that has finished, unless the program has configured logging; in a notebook bars
    show the progress where ipywidgets is installed. Ctrl-C, or "interrupt the kernel", ends the workers in order; the
    same call continues. A study that is stopped, or whose budget is spent, is returned as it is.

    Args:
        config: a preset or config file, as `study launch` takes it, or a config's sections as a dictionary. Own code is
            found in the file's folder and in those of $STUDY_CODE.
        assignments: such as "policy.alpha=[400, 800]", laid over it, as `--set` does.
        name: of the study. None: that of the preset or file; a dictionary needs one.
        storage: database URL. None: $STUDY_STORAGE, else sqlite:///study.db.
        workers: processes. None: one a GPU, or one a core.
        device: auto, cpu, cuda, cuda:N or mps.
        threads: of each worker on a CPU. None: $OMP_NUM_THREADS, else 1.
        data_root: folder of images. None: $STUDY_DATA_ROOT, else a cache.
        budget: such as ["2 h", "500000 images"], shared by all workers. None: as it is.
        after: the name of a study in the same storage with the same data, protocol, network and epochs, whose finished
            trials inform the sampler of a new study; they count nowhere else. The same call continues.

    Raises:
        UserError: bad input, or a study of that name with other settings or data; nothing has begun.
        Unreachable: the database was unavailable for too long; the same call continues later.
        KeyboardInterrupt: interrupted.
    """
    words = [assignments] if isinstance(assignments, str) else assignments
    if isinstance(config, Mapping):
        if name is None:
            raise UserError('a config that is a dictionary needs a name: study.launch({...}, name="mine")')
        tree = copy.deepcopy(dict(config))
        for each in words:
            assign(tree, each)
        loaded = LoadedConfig(parse_config(tree), name)
        origin = "Python"
    else:
        loaded, origin = load(str(config), words), str(config)
        extensions.allow([] if loaded.folder is None else [loaded.folder])
    options = LaunchOptions(device=device, workers=workers, threads=threads)
    study_name = loaded.name if name is None else name
    root = data_root or loaded.data_root
    return _run(loaded.config, study_name, origin, storage, options, root, budget, after=after)


def open_study(name: str, storage: str | None = None) -> Study:
    """A study that exists.

    Args:
        storage: database URL. None: $STUDY_STORAGE, else sqlite:///study.db.

    Raises:
        UserError: no such database or study.
    """
    return Study(create.open_study(_url(storage), name))


class Study:
    """A study in its database. Everything is read when it is asked for, so a study that runs shows what there is.

    Accuracies are in [0, 1], times in seconds, energy in joules, moments in seconds since 1970.
    """

    def __init__(self, opened: OpenStudy) -> None:
        self._opened = opened

    @property
    def name(self) -> str:
        return self._opened.name

    @property
    def config(self) -> StudyConfig:
        """Its settings; frozen."""
        return self._opened.config

    def trials(self) -> Table:
        """A row a trial: state, value (the best validation accuracy), costs, parameters; none that is excluded."""
        return _table(tables.trials(self._data()))

    def epochs(self) -> Table:
        """A row an epoch of every trial: accuracy, loss, images, what was exchanged, seconds, joules."""
        return _table(tables.epochs(self._data()))

    def attempts(self) -> Table:
        """A row a worker's time with one trial: owner, device, start, end, outcome, error."""
        return _table(tables.attempts(self._data()))

    def logs(self, trial: int | None = None) -> Table:
        """A row a line that workers logged: trial, attempt (from 1), owner, moment, level, message.

        Args:
            trial: the number of one trial. None: of all, by time.

        Raises:
            UserError: no such trial.
        """
        return _table(tables.logs(self._opened.engine, self.name, trial))

    def settings(self) -> Table:
        """A row a setting over its seeds: means with their 95 % confidence intervals."""
        return _table(tables.settings(self._data()))

    def findings(self) -> dict[str, Any]:
        """What a report says: `verdict` (sentences), `cells`, `comparisons`, `effects`, `pareto`, states, spending.

        The keys of `study report --json`, without the tables that `trials` and `epochs` return.
        """
        document = json_report.report(self._data())
        return {key: value for key, value in document.items() if key not in ("trials", "epochs", "manifest")}

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the complete trial with the highest value; None: no trial is complete."""
        data = self._data()
        top = data.best
        return None if top is None else next(row for row in tables.trials(data) if row["trial"] == top.number)

    @property
    def figures(self) -> dict[str, go.Figure]:
        """Those figures of a report that have something to show, by name. A notebook shows a figure by itself."""
        data = self._data()
        findings, grid = aggregate.findings(data), aggregate.grid(data)
        drawn = {
            "settings": accuracy.intervals(data, findings),
            "grid": None if grid is None else accuracy.heat_map(data, grid),
            "learning curves": accuracy.learning_curves(data, findings),
            "cost": search.cost([data]),
            "exchange": effort.exchange(data, findings),
            "coverage": effort.coverage(data, findings),
            "parameters": search.slices(data),
            "importance": search.importance(data),
            "workers": effort.timeline(data),
        }
        return {name: figure for name, figure in drawn.items() if figure is not None}

    def report(self, path: str | Path) -> list[Path]:
        """Write a report: FILE.html one page with all figures, FILE.json all numbers, a folder the CSV tables.

        Returns:
            The files that were written.

        Raises:
            UserError: it cannot be written.
        """
        path, data = Path(path), self._data()
        if path.suffix not in (".html", ".json"):
            return csv_report.write([data], path)
        text = (html_report.page if path.suffix == ".html" else json_report.text)([data])
        return [_written(path, text)]

    def confirm(
        self,
        top: int = 3,
        seeds: int = 5,
        *,
        name: str | None = None,
        workers: int | None = None,
        device: str = "auto",
        data_root: str | Path | None = None,
        again: bool = False,
    ) -> Study:
        """Run the best settings again on fresh seeds, then evaluate them once on the test split; the confirming study.

        Args:
            top: how many of the best settings.
            seeds: for each.
            name: of the confirming study. None: NAME-confirmed.
            workers, device, data_root: as for `launch`.
            again: ask the test split although a confirmation has; both studies record it.

        Raises:
            UserError: fewer settings than `top` have a complete trial, the test split has been asked, or the data here
                are others.
        """
        searched, new = self._opened, name or f"{self.name}-confirmed"
        confirms = confirming.plan(searched, new, top, seeds, again=again)
        options = LaunchOptions(device=device, workers=workers)
        return _run(confirms.config, new, f"confirm {self.name}", searched.url, options, data_root, confirms=confirms)

    def compare(self, *others: Study | str) -> StudyComparison:
        """Other studies on the same validation images against this one.

        Args:
            others: studies, or names of studies in the same storage.

        Raises:
            UserError: their values do not compare; what differs.
        """
        opened = [open_study(other, self._opened.url) if isinstance(other, str) else other for other in others]
        return StudyComparison(comparison.compare_studies([self._data(), *(other._data() for other in opened)]))

    def derive(
        self,
        name: str,
        config: str | Path | None = None,
        *,
        assignments: Iterable[str] = (),
        trials: int | None = None,
    ) -> Study:
        """A new study with this one's settings but another search space, with the finished trials that lie in it.

        Its other trials are queued: `study resume NAME` runs them, or `launch(new.config.model_dump(), name=new.name)`.
        Which trials were not taken over, and why, is logged.

        Args:
            name: of the new study, in the same storage.
            config: a config file or preset, which is laid over this study's settings.
            assignments: such as "policy.alpha=[400, 800]", laid over both.
            trials: `search.trials`; those that are taken over count among them.

        Raises:
            UserError: the changes concern what decides a trial's numbers; bad settings; a study of that name is there.
        """
        source = None if config is None else str(config)
        words = [assignments] if isinstance(assignments, str) else assignments
        with shown_by_default():
            for line in deriving.derive(self._opened, name, source, words, trials).lines():
                logger.info("%s", line)
        return Study(OpenStudy(self._opened.url, self._opened.storage, *create.load_study(self._opened.storage, name)))

    @property
    def optuna(self) -> optuna.Study:
        """The `optuna.Study`, for Optuna's own tools: `trials_dataframe()`, `optuna.visualization`, `enqueue_trial`.

        It has excluded trials too, and a trial's intermediate values are its best accuracy so far.
        """
        return optuna.load_study(study_name=self.name, storage=self._opened.storage)

    def __repr__(self) -> str:
        return "\n".join(heading(self._data().status))

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"

    def _data(self) -> StudyData:
        return study_data.read(self._opened.storage, self.name)


class StudyComparison:
    """Studies against the first of them, as they were when `Study.compare` was called."""

    def __init__(self, compared: comparison.Compared) -> None:
        self._compared = compared

    @property
    def answer(self) -> str:
        """Whose best setting is better, and by how much; or that the data cannot tell."""
        return self._compared.said.answer

    @property
    def warnings(self) -> list[str]:
        """What can be wrong with the answer."""
        return self._compared.said.warnings

    @property
    def sentences(self) -> list[str]:
        """What else was found."""
        return self._compared.said.sentences

    def settings(self) -> Table:
        """A row a setting of each study: mean and interval, and its difference from the first study's."""
        return _table(tables.compared(self._compared))

    def findings(self) -> dict[str, Any]:
        """The keys of `study compare --json`."""
        return json_report.comparison(self._compared)

    @property
    def figure(self) -> go.Figure | None:
        """The settings with their intervals; None without a complete trial."""
        return accuracy.settings_of_studies(self._compared)

    def report(self, path: str | Path) -> list[Path]:
        """Write FILE.html, one page with figures, or FILE.json, all numbers.

        Returns:
            The file.

        Raises:
            UserError: it cannot be written, or has another suffix.
        """
        path = Path(path)
        if path.suffix not in (".html", ".json"):
            raise UserError(f"a comparison is written as FILE.html or FILE.json, got {str(path)!r}")
        text = html_report.comparison_page if path.suffix == ".html" else json_report.comparison_text
        return [_written(path, text(self._compared))]

    def __repr__(self) -> str:
        return printable("\n".join(self._compared.said.lines))

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def _written(path: Path, text: str) -> Path:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def _run(
    config: StudyConfig,
    name: str,
    origin: str,
    storage: str | None,
    options: LaunchOptions,
    data_root: str | Path | None,
    budget: Iterable[str] | None = None,
    confirms: confirming.Confirmation | None = None,
    after: str | None = None,
) -> Study:
    """Create the study or find it, and run it.

    Args:
        confirms: what the study confirms: the data must be the same.
        after: the study whose trials inform the sampler.
    """
    check_study_name(name)
    url = _url(storage)
    budgets = None if budget is None else parse_budgets([budget] if isinstance(budget, str) else budget)
    workforce = make_launcher(options, url)
    workforce.check_budgets(budgets or ())
    root = data_root or os.environ.get("STUDY_DATA_ROOT")
    folder = None if root is None else str(Path(root).expanduser().resolve())
    data = create.prepare(config, folder)  # everything that can be wrong is found before the database is touched
    if confirms is not None:
        create.check_fingerprint(confirms.searched.study, data)
    opened = open_storage(url)
    informed = None if after is None else informing(opened, name, after, data)
    more = confirms.attributes if confirms else None
    create.create_study(opened, name, origin, data.config, data, more, informed)
    study = OpenStudy(url, opened, *create.load_study(opened, name))
    if confirms is not None:
        confirms.record(study)
    if copy := study.study.user_attrs.get(COPIED_TO):
        raise UserError(f"the study {name!r} was copied (to {copy}); continue the copy, or: study resume --force")
    if budgets is not None:
        set_budgets(study.engine, study.id, budgets)
    withdraw_stop(study.engine, study.id)
    with _own_signal_handlers(), shown_by_default():
        code = run_study(workforce, study, folder)
    if code == DATABASE_UNAVAILABLE:
        raise Unreachable(f"the database of {name!r} was unavailable for too long; the same call continues later")
    return Study(study)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """A study's run sets handlers; whoever called has its own again afterwards."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _url(storage: str | None) -> str:
    return storage or os.environ.get("STUDY_STORAGE") or DEFAULT


def _table(rows: Iterable[dict[str, Any]]) -> Table:
    try:
        import pandas
    except ImportError:
        return list(rows)
    return pandas.DataFrame(list(rows))
