"""Reports: settings over their seeds, comparisons, the verdict, figures, and their limits."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from dashboards import aggregate, status, study_data
from dashboards.conclusions import Conclusions, conclude
from dashboards.figures import accuracy as accuracy_figures
from dashboards.figures import effort, search
from dashboards.figures.style import for_dashboard
from dashboards.reports import console as console_report
from dashboards.reports import html
from dashboards.reports import json as json_report
from dashboards.server.publish import note, publish, sentence, sparkline, trial_note
from dashboards.study_data import StudyData, TrialRow
from storage import budgets, queries, stop_requests
from storage.engine import open_storage
from storage.errors import UserError
from storage.optuna_internals import STUDY_NOTE, trial_note_keys
from storage.study_attributes import read_system_attributes, set_system_attributes
from study.config.models import StudyConfig
from study.confirm import FAR, ask_test_split, confirmation, earlier_confirmations, record_test_split
from study.create import (
    OpenStudy,
    PreparedData,
    config_warnings,
    create_study,
    load_study,
    open_study,
    prepare,
)
from tests.support.harness import Harness, config_of, scripted_accuracies
from tests.support.made_studies import made, made_cells

ALL = ["dynamic", "static", "fresh", "full", "infobatch"]


def text_of(data: StudyData) -> str:
    output = Console(file=io.StringIO(), width=400)
    output.print(console_report.report_text(data))
    return output.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    """Every policy, two seeds, equal images, with the last word; all stall from the third epoch on."""
    harness = Harness(
        f"sqlite:///{tmp_path_factory.mktemp('controls') / 'study.db'}",
        config_of(
            data={"train_images": 200, "test": True},
            policy={"name": ALL, "alpha": 60, "beta": 0.5},
            training={"images": 450},
            search={"replicates": 2},
        ),
    )
    with scripted_accuracies(lambda trainer: min(0.3 + 0.1 * len(trainer.history), 0.5)):
        harness.work()
    return study_data.read(harness.storage, "s")


def test_all_policies_train_on_equally_many_images(controls: StudyData) -> None:
    assert [row.images for row in controls.rows] == [450] * 10
    seen = {row.policy: row.seen for row in controls.rows}
    assert seen["static"] == 60 < seen["dynamic"] <= seen["full"] == 200
    assert {row.epochs for row in controls.rows if row.policy == "full"} == {3}
    assert {row.epochs for row in controls.rows if row.policy == "static"} == {8}


def test_comparisons_are_with_each_control_on_the_test_split(controls: StudyData) -> None:
    findings = aggregate.findings(controls)
    assert findings.measure == "test"
    assert [(c.a, c.b, c.difference.n) for c in findings.comparisons] == [("dynamic", b, 2) for b in ALL[1:]]
    by = {cell.policy: cell for cell in findings.cells}
    expected = np.mean([by["dynamic"].by_seed("test")[s] - by["full"].by_seed("test")[s] for s in (0, 1)])
    assert findings.comparisons[2].difference.mean == pytest.approx(expected)
    assert set(findings.ratios) == set(ALL)
    assert findings.ratios["full"].mean == 1.0


def test_the_report_on_the_terminal_as_a_page_and_as_json(controls: StudyData) -> None:
    text = text_of(controls)
    assert "Comparisons in points, paired by seed" in text
    assert "test %" in text
    page = html.page([controls])
    # settings, curves, cost, history, times, exchange, coverage, workers
    assert page.count('class="plotly-graph-div"') == 8
    document = json.loads(json_report.text([controls]))
    assert [cell["accuracy"]["n"] for cell in document["cells"]] == [2] * 5
    assert len(document["comparisons"]) == 4
    assert document["manifest"]["images"] == {"train": 200, "validation": 144, "test": 359}
    assert document["manifest"]["versions"]["torch"]
    assert [trial["images"] for trial in document["trials"]] == [450] * 10
    (parameters,) = {trial["network_parameters"] for trial in document["trials"]}
    assert f"norm batch; {parameters:,} parameters" in document["description"]["Network"]
    assert f"network paper, width 0.125, norm batch; {parameters:,} parameters" in text_of(controls)


def test_figures_and_note_reach_optuna_dashboard(controls: StudyData) -> None:
    storage = open_storage(str(controls.study._storage._backend.url), create=False)  # type: ignore[attr-defined]
    publish(controls, storage)
    publish(controls, storage)  # again, in place
    attributes = controls.study._storage.get_study_system_attrs(controls.study._study_id)
    note = "".join(value for key, value in attributes.items() if key.startswith("dashboard:note_str"))
    assert "study resume s" in note
    plots = {key for key in attributes if key.startswith("dashboard:plot_data")}
    for name in ("settings", "learning-curves", "cost", "workers"):
        assert any(f"study-{name}" in json.dumps([key, attributes[key]]) for key in plots), (name, plots)


def notes_of(data: StudyData) -> dict[str, str]:
    attributes = data.study._storage.get_study_system_attrs(data.study._study_id)
    return {key: value for key, value in attributes.items() if "note_str" in key}


@pytest.mark.parametrize("version", ["x", [1], None, 2.5])
def test_a_version_of_a_note_that_is_no_number_counts_as_none(version: object, sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    key, _ = STUDY_NOTE
    set_system_attributes(harness.storage.engine, harness.study._study_id, {key: version})
    publish(study_data.read(harness.storage, "s"), harness.storage)
    assert read_system_attributes(harness.storage.engine, harness.study._study_id, key) == {key: 1}


def test_every_trial_has_a_note_and_a_visitors_stays(controls: StudyData) -> None:
    storage = open_storage(str(controls.study._storage._backend.url), create=False)  # type: ignore[attr-defined]
    publish(controls, storage)
    ids = {trial.number: trial._trial_id for trial in controls.study.trials}
    texts = {number: notes_of(controls)[trial_note_keys(ids[number])[1]] for number in ids}
    best = controls.best
    assert best is not None
    assert "The highest of 10 complete trials." in texts[best.number]
    assert sum("The highest of" in text for text in texts.values()) == 1
    for number, text in texts.items():
        assert text.startswith(f"**Trial {number}** of s: ")
        assert "Accuracy by epoch: `" in text
        assert f"study model s --trial {number} --toml" in text
        assert "On the test split: " in text
    keys = trial_note_keys(ids[3])
    set_system_attributes(storage.engine, controls.id, {keys[1]: "my own note"})
    before = read_system_attributes(storage.engine, controls.id, "dashboard:%note_ver")
    publish(controls, storage)
    assert notes_of(controls)[keys[1]] == "my own note"
    after = read_system_attributes(storage.engine, controls.id, "dashboard:%note_ver")
    assert {key for key in after if after[key] != before[key]} == {"dashboard:note_ver"}  # nothing written in vain


def test_a_note_begins_with_the_answer_and_renders_nothing_that_others_wrote(controls: StudyData) -> None:
    findings = aggregate.findings(controls)
    evil = "![x](http://e.x/p.png) <img src=x> `code` **bold** [a](javascript:b) $x$ http://e.x\n# head"
    broken = replace(controls.rows[0], state="failed", error=evil)
    text = note(replace(controls, name=evil, rows=(broken, *controls.rows[1:])), findings, [])
    assert text.startswith("**Cannot tell these 5 settings apart")
    markdown = re.sub(r"(`+) ?.*?[^`] ?\1(?!`)", "", text)  # without code spans, which render nothing
    markdown = re.sub(r"\\.", "", markdown)  # nor do escaped characters
    for mark in ("![", "](", "<img", "**bold", "$x", "http:"):
        assert mark not in markdown
    assert "\n# head" not in text
    assert "`` ![x](http://e.x/p.png) <img src=x> `code`" in text


def test_a_trial_that_was_pruned_says_how_to_queue_its_setting_again(controls: StudyData) -> None:
    complete = controls.rows[0]
    pruned = replace(complete, state="pruned", parameters={"policy": "static", "beta": 0.5, "nesterov": True}, seed=7)
    text = trial_note(controls, pruned)
    assert "`study enqueue s policy=static beta=0.5 nesterov=true --seed 7`, then `study resume s`" in text
    assert "study model" not in text
    assert "study enqueue" not in trial_note(controls, complete)


def test_commands_in_sentences_are_code_and_nothing_else_is() -> None:
    assert sentence("a_b: `study confirm 'x y'` runs") == r"a\_b\: `study confirm 'x y'` runs"
    assert sentence("one ` alone_") == r"one \` alone\_"
    answer = html._said(Conclusions("`study <b>` & `", [], []))
    assert answer == "<p class='answer'><b><code>study &lt;b&gt;</code> &amp; `</b></p>"


def test_figures_fit_the_cards_of_optuna_dashboard(controls: StudyData) -> None:
    """The card is 450 pixels high (0.21) and cuts off what is below."""
    findings = aggregate.findings(controls)
    tall = accuracy_figures.learning_curves(controls, findings)
    assert tall is not None
    assert tall.layout.height > 450
    fitted = for_dashboard(tall)
    assert fitted.layout.height == 450
    assert (fitted.layout.legend.yref, fitted.layout.legend.yanchor) == ("container", "bottom")
    low = effort.timeline(controls)
    assert low is not None
    height = low.layout.height
    assert for_dashboard(low).layout.height == min(height, 450)


def test_a_curve_as_bars() -> None:
    assert sparkline([0.1, 0.5, 0.9]) == "10.00 % ▁▅█ 90.00 %"
    assert sparkline([0.5]) == "50.00 % ▁ 50.00 %"
    assert len(sparkline(list(np.linspace(0, 1, 1000)))) < 70


def test_two_studies_share_a_page(controls: StudyData) -> None:
    page = html.page([controls, controls])
    assert "Side by side" in page
    assert "their accuracies do not compare" not in page
    assert "href='#study-1'" in page
    assert "<article id='study-1'>" in page
    assert len(json.loads(json_report.text([controls, controls]))) == 2


# Studies made by hand, with known effects.


def with_policies(*names: str, seeds: int = 8) -> StudyConfig:
    return config_of(policy={"name": list(names), "alpha": 60, "beta": 0.5}, search={"replicates": seeds})


def test_a_known_effect_is_significant_and_its_absence_is_not() -> None:
    draws = np.random.default_rng(1).normal(0, 0.002, (3, 8))
    base = 0.8 + 0.01 * np.arange(8)  # seeds differ more than policies do: only pairing sees the effect
    data = made(
        {"dynamic": list(base + draws[0]), "static": list(base - 0.01 + draws[1]), "fresh": list(base + draws[2])},
        with_policies("dynamic", "static", "fresh"),
    )
    findings = aggregate.findings(data)
    assert [c.finding for c in findings.comparisons] == ["better", "cannot tell"]
    text = " ".join(conclude(data, findings).lines)
    assert "dynamic is better than static" in text
    assert "Cannot tell dynamic from fresh" in text
    assert "nothing shows that the rule does better than drawing anew" in text


@pytest.mark.parametrize(
    ("fresh", "sentence"),
    [(-0.02, "The rule adds something beyond fresh data"), (0.02, "drawing anew every epoch does better")],
)
def test_the_verdict_weighs_the_controls(fresh: float, sentence: str) -> None:
    draws = np.random.default_rng(2).normal(0.8, 0.002, (3, 8))
    values = {"dynamic": list(draws[0]), "static": list(draws[1] - 0.03), "fresh": list(draws[2] + fresh)}
    data = made(values, with_policies(*values))
    assert sentence in " ".join(conclude(data, aggregate.findings(data)).lines)


def test_main_effects_need_a_whole_grid() -> None:
    """Alpha makes a difference and beta none; a grid with a hole gives no effects, for its levels are not alike."""
    config = config_of(policy={"alpha": [30, 60, 90], "beta": [0.3, 0.5, 0.7]}, search={"replicates": 6})
    draws = np.random.default_rng(3).normal(0, 0.002, (6, 3, 3))
    rows: list[TrialRow] = []
    template = made({"dynamic": [0.5]}, config).rows[0]
    for (seed, i, j), noise in np.ndenumerate(draws):
        chosen = {"alpha": (30, 60, 90)[i], "beta": (0.3, 0.5, 0.7)[j]}
        rows.append(replace(template, number=len(rows), parameters=chosen, seed=seed, value=0.6 + 0.05 * i + noise))
    whole = replace(made({}, config), rows=tuple(rows))
    effects = aggregate.findings(whole).effects
    assert effects["alpha"] < 0.05 < effects["beta"]
    holed = [row for row in rows if row.parameters != {"alpha": 90, "beta": 0.7}]
    assert aggregate.findings(replace(whole, rows=tuple(holed))).effects == {}


def test_single_runs_support_no_conclusion() -> None:
    data = made({"dynamic": [0.8], "static": [0.7]}, with_policies("dynamic", "static", seeds=1))
    text = " ".join(conclude(data, aggregate.findings(data)).lines)
    assert "cannot be told from chance" in text
    assert aggregate.findings(data).comparisons[0].finding == "cannot tell"


def test_settings_that_are_single_runs_come_best_first_with_their_trial() -> None:
    config = config_of(
        policy={"name": ["dynamic", "static"], "alpha": {"low": 30, "high": 90}, "beta": 0.5},
        search={"sampler": "tpe", "trials": 4},
    )
    runs = [("dynamic", 40, 0.5), ("static", 50, 0.9), ("dynamic", 60, 0.7), ("static", 70, 0.6)]
    cells = [({"policy": policy, "alpha": alpha}, [value]) for policy, alpha, value in runs]
    data = made_cells(cells, config, states=["pruned", "complete", "complete", "pruned"])
    heads, lines = console_report.cells_table(data, aggregate.findings(data))
    assert (heads[:3], heads[-1]) == (["setting", "trial", "validation %"], "state")
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        ("static, alpha 50", "1", "complete"), ("dynamic, alpha 60", "2", "complete"),
        ("static, alpha 70", "3", "pruned"), ("dynamic, alpha 40", "0", "pruned"),
    ]  # fmt: skip
    assert re.search(r"Settings, best first.*static, alpha 50 +1 .* complete", text_of(data), re.DOTALL)
    table = html.page([data]).partition("<h2>Settings</h2>")[2].partition("</table>")[0]
    assert re.findall(r"<tr><td>([^<]*)</td><td>(\d)</td>", table) == [(line[0], line[1]) for line in lines]
    assert [cell["trials"] for cell in json_report.report(data)["cells"]] == [[0], [1], [2], [3]]


def test_nothing_complete_no_verdict_no_empty_figure() -> None:
    empty = made({}, with_policies("dynamic", "static"))
    findings = aggregate.findings(empty)
    assert conclude(empty, findings).answer.startswith("No answer yet: no trial is complete")
    drawn = [
        accuracy_figures.intervals(empty, findings), accuracy_figures.learning_curves(empty, findings),
        search.cost([empty]), search.slices(empty), search.history(empty), search.parallel(empty),
        effort.times(empty, findings), effort.exchange(empty, findings),
        effort.coverage(empty, findings), effort.timeline(empty),
    ]  # fmt: skip
    assert drawn == [None] * len(drawn)
    assert "plotly-graph-div" not in html.page([empty])


def test_a_thousand_trials_stay_readable() -> None:
    config = config_of(policy={"alpha": 60, "beta": 0.5}, search={"replicates": 1000})
    many = made({"dynamic": list(np.linspace(0.5, 0.9, 1000))}, config, epochs=50)
    findings = aggregate.findings(many)
    curves = accuracy_figures.learning_curves(many, findings)
    assert curves is not None
    assert any("80 % of the other" in str(trace.name) for trace in curves.data)
    page = html.page([many])
    assert "The best 500 of 1,000" in page
    assert len(page) - len(get_plotlyjs()) < 2_000_000


def test_the_pareto_front_is_the_undominated_trials() -> None:
    config = with_policies("dynamic", "static")
    rows = made({"dynamic": [0.5, 0.6, 0.6, 0.9]}, config).rows
    costed = [replace(row, images=images) for row, images in zip(rows, (10, 20, 15, 40), strict=True)]
    assert [row.number for row in aggregate.pareto(costed)] == [0, 2, 3]


@pytest.mark.parametrize(("images", "delta", "warns"), [(1000, 0.01, True), (10000, 0.01, False), (1000, 0.02, False)])
def test_a_delta_below_the_noise_is_warned_of(images: int, delta: float, warns: bool) -> None:
    config = config_of(policy={"alpha": 60, "delta": delta})
    counts = {"train": 1000, "validation": images, "test": 0}
    data = PreparedData("", counts, (1000, images, 0), config, (), (32, 32, 3), None)
    sentences = config_warnings(config, data)
    assert any("gains of that size can be chance" in sentence for sentence in sentences) == warns
    assert config_warnings(config_of(policy={"name": "static", "alpha": 60, "delta": delta}), data) == []


def test_many_trials_of_the_gp_sampler_are_warned_of() -> None:
    data = PreparedData(
        "0" * 64, {"train": 1294, "validation": 144}, (1294, 144, 359), config_of(), (), (32, 32, 3), None
    )
    policy = {"alpha": {"low": 40, "high": 100, "step": 20}, "delta": 0.1}
    for trials, warns in ((1000, False), (2000, True)):
        config = config_of(policy=policy, search={"sampler": "gp", "trials": trials})
        assert any("search.sampler gp" in sentence for sentence in config_warnings(config, data)) == warns


# Confirmation, and searches with two objectives.


def test_the_best_are_confirmed_on_fresh_seeds_and_the_test_split(sqlite_url: str) -> None:
    harness = Harness(
        sqlite_url,
        config_of(
            policy={"alpha": {"low": 40, "high": 100, "step": 20}, "beta": 0.5},
            training={"lr": {"low": 0.001, "high": 0.01}},
            search={"sampler": "random", "trials": 4},
        ),
    )
    harness.work()
    again, origin = confirmation(harness.study, harness.config, 2, 3)
    ranked = sorted(harness.study.trials, key=lambda t: -t.values[0])
    assert again.search.cells == tuple(t.params for t in ranked[:2])
    assert origin["confirms"]["values"] == [t.values[0] for t in ranked[:2]]
    assert again.data.test
    create_study(harness.storage, "again", "confirm s", again, prepare(again, None), origin)
    study, config = load_study(harness.storage, "again")
    assert config == again
    assert [t.user_attrs["seed"] for t in study.trials] == [FAR, FAR, FAR + 1, FAR + 1, FAR + 2, FAR + 2]
    confirmed = Harness(sqlite_url, again, "once more")
    confirmed.work()
    read = study_data.read(confirmed.storage, "once more")
    assert {row.state for row in read.rows} == {"complete"}
    assert all(row.test is not None for row in read.rows)
    study.set_user_attr("x", 1)
    confirmed.study.set_user_attr("confirms", origin["confirms"])
    text = text_of(study_data.read(confirmed.storage, "once more"))
    assert "regression to the mean" in text
    assert "on the test split, evaluated once a trial," in text
    with pytest.raises(UserError, match="--top must be at most the 4 settings"):
        confirmation(harness.study, harness.config, 5, 1)


def test_a_trial_with_epochs_but_without_its_parameters_is_left_out(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    harness = Harness(
        sqlite_url,
        config_of(policy={"alpha": {"low": 40, "high": 100, "step": 20}}, search={"sampler": "random", "trials": 3}),
    )
    harness.work()
    with harness.storage.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM trial_params WHERE trial_id = 2 AND param_name = 'alpha'")
    data = study_data.read(harness.storage, "s")
    assert [row.number for row in data.rows] == [0, 2]
    assert "trial 1 is left out: it has epochs, but no value of alpha" in caplog.text
    assert "of 2 runs" in text_of(data)
    html.page([data])


@pytest.mark.parametrize("at", [1e300, -1e300, 1e12, "abc", b"\0"])
def test_times_that_are_no_dates_do_not_stop_anybody(at: float | str | bytes, sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    harness.queue().claim()
    with harness.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_attempts SET started_at = ?", (at,))
    output = Console(file=io.StringIO(), width=400)
    output.print(status.summaries_table(status.summaries(harness.storage.engine)))
    output.print(status.page(status.read(harness.storage.engine, "s")))
    assert html.page([study_data.read(harness.storage, "s")])


def test_another_study_of_the_same_data_may_have_any_config(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}))
    harness.work()
    for name, config in (("t", "{"), ("u", "[]"), ("v", '{"data": 3}'), ("w", "null")):
        Harness(sqlite_url, config_of(training={"epochs": 1}), name)
        with harness.storage.engine.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE study_user_attributes SET value_json = ? WHERE key = 'config' "
                "AND study_id = (SELECT study_id FROM studies WHERE study_name = ?)", (config, name),
            )  # fmt: skip
    assert html.page([study_data.read(harness.storage, "s")])


def test_a_broken_error_is_shown_as_it_is_and_broken_parameters_are_named(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of(training={"epochs": 1}))
    harness.work(most=1)
    queue = harness.queue()
    lease = queue.claim()
    assert lease is not None
    queue.fail(lease, "boom")
    with harness.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_user_attributes SET value_json = '{boom' WHERE key = 'error'")
    assert status.read(harness.storage.engine, "s").failures == {1: "{boom"}
    with harness.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_params SET distribution_json = '{' WHERE trial_id = 1")
    with pytest.raises(UserError, match="the parameters of trial 0 cannot be read"):
        status.read(harness.storage.engine, "s")


def test_an_attempt_whose_end_precedes_its_start_is_drawn(sqlite_url: str) -> None:
    harness = Harness(sqlite_url, config_of())
    harness.queue().claim()
    with harness.storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_attempts SET ended_at = started_at - 1, outcome = 'vanished'")
    figure = effort.timeline(study_data.read(harness.storage, "s"))
    assert figure is not None
    assert [tuple(bar.x) for bar in figure.data] == [(0.0,)]


def test_the_test_split_is_asked_once_or_knowingly_again(sqlite_url: str) -> None:
    searched = Harness(sqlite_url, config_of(policy={"alpha": 60}, training={"epochs": 1}), "tpe")
    searched.work()

    def confirm(name: str, top: int, again: bool = False) -> tuple[bool, OpenStudy]:
        study = open_study(sqlite_url, "tpe")
        config, origin = confirmation(study.study, study.config, top, 1, earlier_confirmations(study, name))
        asked = ask_test_split(study, name, config, again=again)
        create_study(study.storage, name, "confirm tpe", config, prepare(config, None), origin)
        confirming = open_study(sqlite_url, name)
        record_test_split(study, confirming, again=asked)
        return asked, confirming

    asked, first = confirm("first", 1)
    assert not asked
    assert not confirm("changed-my-mind", 2)[0]  # nothing has been evaluated yet
    Harness(sqlite_url, first.config, "first").work()
    assert not confirm("first", 1)[0]  # continued
    with pytest.raises(UserError, match=r"asked for 'tpe' already: by 'first' \(settings: 1, seeds: 1\).*--again"):
        confirm("third", 1)
    assert "third" not in queries.study_names(searched.storage.engine)
    asked, third = confirm("third", 1, again=True)
    assert asked
    assert third.config.search.seed == 3 * FAR  # seeds that no confirmation has had
    record = open_study(sqlite_url, "tpe").study.user_attrs["test_asked"]
    assert [(one["study"], one["again"]) for one in record] == [
        ("first", False), ("changed-my-mind", False), ("third", True),
    ]  # fmt: skip
    Harness(sqlite_url, third.config, "third").work()
    text = " ".join(conclude(read := study_data.read(searched.storage, "third"), aggregate.findings(read)).lines)
    assert "once a trial; 1 time in first. It was asked again with --again." in text
    text = " ".join(conclude(read := study_data.read(searched.storage, "tpe"), aggregate.findings(read)).lines)
    assert "The test split was evaluated: 1 time in first; 1 time in third." in text


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
def test_two_objectives_give_optunas_pareto_front(sampler: str, sqlite_url: str) -> None:
    config = config_of(
        policy={"alpha": {"low": 40, "high": 160, "step": 20}, "beta": {"low": 0.1, "high": 0.9}},
        search={"sampler": sampler, "trials": 6, "objective": "accuracy,images"},
    )
    harness = Harness(sqlite_url, config)
    harness.work()
    trials = harness.study.trials
    assert [t.values[1] for t in trials] == [3.0 * t.params["alpha"] for t in trials]
    front = {row.number for row in aggregate.pareto([*study_data.read(harness.storage, "s").rows])}
    assert front <= {t.number for t in harness.study.best_trials}  # Optuna's keeps ties, too
    assert {t.values[0] for t in harness.study.best_trials} == {trials[n].values[0] for n in front}


def test_a_page_is_written_whatever_the_names(controls: StudyData, tmp_path: Path) -> None:
    nasty = replace(controls, name="<script>alert(1)</script>")
    page = html.page([nasty])
    assert "<script>alert(1)" not in page


def test_watching_shows_workers_budgets_and_failures_and_ends_with_the_study(url: str) -> None:
    harness = Harness(url, config_of())
    first, second = (harness.queue(owner=f"{host}:7:x", device=f"gpu of {host}") for host in ("here", "there"))
    broken = first.claim()
    assert broken is not None
    first.release(broken, error="CUDA error: out of luck")
    lease = second.claim()
    assert lease is not None
    row = {"epoch": 1, "accuracy": 0.5, "loss": 1.0, "images": 60, "train_seconds": 2.0, "validation_seconds": 1.0}
    second.record(lease, [row | {"kind": "keep", "k": 0, "beta": 0.0}], {1: 0.5})
    engine, study_id = harness.storage.engine, harness.study._study_id
    budgets.set_budgets(engine, study_id, {"images": 1000})
    console = Console(file=io.StringIO(), width=200)
    console.print(status.page(status.read(engine, "s")))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 trials: 2 waiting, 1 running, 1 interrupted" in text
    assert "spent 60 of 1,000 images, 940 left" in text
    assert "attempts that failed last:" in text
    assert "trial 0 on here:7: CUDA error: out of luck" in text
    (line,) = (line for line in text.splitlines() if "gpu of there" in line)
    assert [word for word in line.split() if word in ("there:7", "20", "50.00")] == ["there:7", "20", "50.00"]
    stop_requests.request_stop(engine, study_id)
    console.print(status.page(status.read(engine, "s")))
    assert "stopped by `study stop`; continue with: study resume s" in console.file.getvalue()  # type: ignore[attr-defined]
    stop_requests.withdraw_stop(engine, study_id)
    budgets.set_budgets(engine, study_id, {"images": 50})
    spent = status.read(engine, "s")
    assert spent.stop == "the budget is spent: 60 of 50 images"
    assert spent.seconds_left is None
    assert status.document(spent)["stop"] == spent.stop
    second.release(lease)
    harness.work()
    status.watch(engine, "s", console)  # finished: returns at once
    assert "4 trials: 4 complete" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_comparison_is_cut_on_a_narrow_terminal(width: int) -> None:
    values = {"dynamic": [0.80, 0.82, 0.81, 0.83], "static": [0.70, 0.73, 0.71, 0.72], "full": [0.8, 0.81, 0.84, 0.8]}
    config = config_of(policy={"name": list(values), "alpha": 60, "beta": 0.5}, search={"replicates": 4})
    output = Console(file=io.StringIO(), width=width)
    output.print(console_report.report_text(made(values, config), width))
    text = output.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    (heads,) = (line for line in text.splitlines() if "p adjusted" in line)
    assert re.search(r"^ settings +n +difference \(95 %\) .* finding\s*$", heads)
    assert ("p Wilcoxon" in heads) or width < 200


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("parameters", [2, 7])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_number_is_cut_on_a_narrow_terminal(seeds: int, parameters: int, width: int) -> None:
    """What has no room is left out as a whole; a long setting goes on in further lines."""
    names = ("alpha", "lr", "weight_decay", "label_smoothing", "momentum", "warmup", "clip")[:parameters]
    cells = [
        ({name: 0.123456 + 100 * (name == "alpha") for name in names} | {"beta": b}, [0.8] * seeds) for b in (0.3, 0.6)
    ]
    searched = {"lr": [0.1, 0.2], "weight_decay": [0.1, 0.2], "label_smoothing": [0.1, 0.2]}
    searched |= {"momentum": [0.1, 0.2], "warmup": [0.1, 0.2], "clip": [0.1, 0.2]}
    training = {name: values for name, values in searched.items() if name in names} | {"optimizer": "sgd"}
    config = config_of(policy={"alpha": [60, 90], "beta": [0.3, 0.6]}, training=training, search={"replicates": seeds})
    output = Console(file=io.StringIO(), width=width)
    output.print(console_report.report_text(made_cells(cells, config), width))
    text = output.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "80.00" in text
    (heads,) = (line for line in text.splitlines() if re.search(r"^ (setting|trial) .* (accuracy|validation %) ", line))
    assert re.search(r"(state|seconds|may be best|validation %)\s*$", heads)
    assert ("seconds" in heads) or width < 200
