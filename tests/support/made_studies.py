"""Studies made by hand, with known accuracies, for tests of what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna

from dashboards.status import Status
from dashboards.study_data import StudyData, TrialRow
from storage import budgets, queries
from storage.queries import TestSplitUse
from study.config.models import PROTOCOLS, StudyConfig
from study.search.space import settings

IMAGES = {"train": 200, "validation": 1000, "test": 1000}
FACTS = {"classes": 10, "largest": {"validation": 0.102, "test": 0.1}, "shape": [8, 8, 1]}


def made(values: Mapping[str, Sequence[float]], config: StudyConfig, epochs: int = 3, **options: Any) -> StudyData:
    """Trials of the policies `values`, accuracies by seed."""
    searched = isinstance(config.policy.name, tuple)
    cells = [({"policy": policy} if searched else {}, accuracies) for policy, accuracies in values.items()]
    return made_cells(cells, config, epochs=epochs, **options)


def made_cells(
    cells: Sequence[tuple[dict[str, Any], Sequence[float]]],
    config: StudyConfig,
    *,
    epochs: int = 3,
    curve: Callable[[float, int], float] = lambda accuracy, epoch: accuracy,
    test: Callable[[float], float] | None = None,
    seconds: Callable[[dict[str, Any]], float] = lambda _: 1.5,
    states: Sequence[str] = (),
    images: Mapping[str, int] = IMAGES,
    attributes: Mapping[str, Any] | None = None,
    uses: Sequence[TestSplitUse] = (),
    waiting: int = 0,
) -> StudyData:
    """Trials with these parameters, accuracies by seed.

    Args:
        curve: accuracy of an epoch (from 1) of a trial that reaches an accuracy.
        test: accuracy on the test split of a trial that reaches an accuracy in validation; None: not evaluated.
        seconds: of a trial with these parameters.
        states: of the trials, in their order; those beyond are complete.
        images: by split.
        attributes: further user attributes of the study.
        uses: studies that have evaluated the test split.
        waiting: further trials that have not begun.
    """
    rows: list[TrialRow] = []
    curves: dict[int, list[dict[str, Any]]] = {}
    for index, (chosen, accuracies) in enumerate(cells):
        for seed, accuracy in enumerate(accuracies):
            number = len(rows)
            row = settings(config, chosen)
            trained = epochs * int(row.get("alpha") or 200)
            curves[number] = [
                {"epoch": n, "accuracy": curve(accuracy, n), "images": 60, "kind": "type1", "k": 30, "seen": 60}
                for n in range(1, epochs + 1)
            ]
            state = states[number] if number < len(states) else "complete"
            costs: dict[str, Any] = {"images": trained, "seen": 60, "train_seconds": seconds(chosen)}
            costs |= {"validation_seconds": 0.0, "selection_seconds": 0.0, "joules": None, "error": None}
            costs |= {"test": None if test is None else test(accuracy), "attributes": {"cell": index}}
            what = (number, state, dict(chosen), row, seed, accuracy, epochs, epochs)
            rows.append(TrialRow(*what, **costs))
    study = optuna.create_study(direction="maximize")
    for key, value in {"images": dict(images), "data_facts": FACTS, **(attributes or {})}.items():
        study.set_user_attr(key, value)
    counts = dict.fromkeys(queries.STATE_NAMES.values(), 0) | {"waiting": waiting}
    for each in rows:
        counts[each.state] += 1
    top = max((each for each in rows if each.state == "complete"), key=lambda each: each.value or 0, default=None)
    now = queries.Progress(
        states=counts, running=(), interrupted=(), epochs=0, images=0,
        best=top.value if top else None, best_trial=top.number if top else None,
    )  # fmt: skip
    known = Status(
        name="made", preset="test", config=config.model_dump(mode="json"), protocol=PROTOCOLS[config.data.protocol],
        progress=now, best_parameters=top.parameters if top else {}, budgets={},
        spent=dict.fromkeys(budgets.UNITS, 0.0), stop=None, failures={}, failed_attempts=(),
    )  # fmt: skip
    return StudyData("made", "test", config, tuple(rows), curves, (), study, known, tuple(uses))
