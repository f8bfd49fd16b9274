"""A study as read from its database: one row a trial, its epochs, who worked on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from dashboards import status
from dashboards.status import Status
from storage import queries
from storage.cached_storage import CachedStorage
from storage.optuna_internals import storage_of, study_id_of
from storage.queries import Attempt, TestSplitUse
from study.config.loading import parse_config
from study.config.models import StudyConfig, means_something
from study.search.space import fixed, relevant

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_CURVES = 400
NOTHING = queries.Totals(0, 0.0, 0, 0, 0.0, 0.0, 0.0, None)


@dataclass(frozen=True)
class TrialRow:
    """One trial."""

    number: int
    state: str
    parameters: dict[str, Any]
    """What was chosen for it."""
    settings: dict[str, Any]
    """All of its parameters: what was chosen over what the config fixes."""
    seed: int | None
    value: float | None
    """Best validation accuracy in [0, 1]; of an unfinished trial, the best so far."""
    best_epoch: int | None
    epochs: int
    images: int
    """Trained on (forward and backward), counted with repetition."""
    seen: int
    """Different images trained on."""
    train_seconds: float
    validation_seconds: float
    selection_seconds: float
    joules: float | None
    test: float | None
    """Accuracy of the best epoch's network on the test split, where the study asks for it."""
    error: str | None
    attributes: dict[str, Any]

    @property
    def policy(self) -> str:
        return str(self.settings["policy"])

    @property
    def alpha(self) -> int | None:
        """Images an epoch, for the policies that have a fixed number."""
        return self.settings["alpha"] if means_something("alpha", self.settings) else None

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.validation_seconds + self.selection_seconds


@dataclass(frozen=True, eq=False)
class StudyData:
    """A study as read from its database. One is equal to itself alone."""

    name: str
    preset: str
    config: StudyConfig
    rows: tuple[TrialRow, ...]
    """All but those that a person has excluded, which `status` names, and any that this program cannot have made."""
    curves: dict[int, list[dict[str, Any]]]
    """Trial number to its rows of `trial_epochs`; of more than MOST_CURVES trials, the best and a sample."""
    attempts: tuple[Attempt, ...]
    study: optuna.Study
    status: Status
    test_uses: tuple[TestSplitUse, ...] = ()
    """All studies of the database that have evaluated the test split of these data."""
    studies: frozenset[str] = frozenset()
    """Names of all studies of the database."""
    storage_option: str | None = None
    """What commands in sentences need for `--storage`; None: nothing."""

    @property
    def engine(self) -> sa.Engine:
        storage: Any = storage_of(self.study)
        return storage.engine  # type: ignore[no-any-return]

    @property
    def id(self) -> int:
        """Of the study's row."""
        return study_id_of(self.study)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """What its trials differ in, in the config's order."""
        return tuple(self.config.searched())

    @cached_property
    def counts(self) -> dict[str, int]:
        """Images by split: train, validation, test; empty for studies of the first version."""
        return dict(self.study.user_attrs.get("images", {}))

    @property
    def facts(self) -> dict[str, Any]:
        """Of the data: `shape` of an image, number of `classes`, by split the `largest` class's share."""
        return dict(self.study.user_attrs.get("data_facts", {}))

    @property
    def metric(self) -> str:
        """What the values are, as people write it."""
        return self.config.search.metric.replace("_", " ").replace("macro f1", "macro-F1")

    @property
    def classes(self) -> int | None:
        """None for studies of versions that did not store it."""
        count = self.facts.get("classes")
        return count if isinstance(count, int) and count > 0 else None

    @property
    def guess(self) -> float | None:
        """The accuracy in validation of always guessing the largest class, or one at random if that is more; None for
        other metrics, and where the classes are not known.
        """
        if not self.classes or self.config.search.metric != "accuracy":
            return None
        return max(1 / self.classes, self.largest_class or 0.0)

    @property
    def largest_class(self) -> float | None:
        """Its share of the validation images."""
        largest = self.facts.get("largest")
        share = largest.get("validation") if isinstance(largest, dict) else None
        return share if isinstance(share, float) and share <= 1 else None

    @property
    def measured_on(self) -> dict[str, int]:
        """Images by split where a value is a share of them, with binomial noise; empty for other metrics."""
        return self.counts if self.config.search.metric == "accuracy" else {}

    @property
    def validation_set(self) -> dict[str, object]:
        """What two studies must share for their accuracies to be on the same images."""
        options = self.config.data
        return {
            "data fingerprint": self.study.user_attrs.get("data_fingerprint"),
            "data.protocol": options.protocol,
            "data.holdout": options.holdout if options.protocol == "holdout" else None,
            "validation images": self.counts.get("validation"),
        }

    @property
    def best(self) -> TrialRow | None:
        done = [row for row in self.rows if row.state == "complete" and row.value is not None]
        return max(done, key=lambda row: (row.value or 0.0, -row.number), default=None)


def read(storage: RDBStorage, name: str, storage_option: str | None = None) -> StudyData:
    """Args:
        storage_option: what commands in sentences need for `--storage`.

    Raises:
        UserError: no such study.
    """
    study_id, attributes = queries.find(storage.engine, name)
    config = parse_config(attributes["config"])
    study = optuna.load_study(study_name=name, storage=CachedStorage(storage))
    progress = status.read(storage.engine, name)
    totals = queries.epoch_totals(storage.engine, study_id)
    totals = {number: total for number, total in totals.items() if number not in progress.excluded}
    errors = queries.last_errors(storage.engine, study_id)
    curves = queries.epoch_rows(storage.engine, study_id, _chosen(totals))
    curves = {number: curve for number, curve in curves.items() if number in totals}
    rows, shared, searched = [], fixed(config), config.searched()
    for trial in study.get_trials(deepcopy=False):
        total = totals.get(trial.number, NOTHING)
        lacking = [name for name in searched if name not in trial.params] if total is not NOTHING else []
        if lacking := [name for name in lacking if relevant(config, trial.params, name)]:
            logger.warning("trial %d is left out: it has epochs, but no value of %s", trial.number, ", ".join(lacking))
            continue
        curve = curves.get(trial.number, [])
        top = max(curve, key=lambda epoch: (epoch["accuracy"], -epoch["epoch"]), default=None)
        failed, ran = trial.state == TrialState.FAIL, trial.number in totals
        rows.append(
            TrialRow(
                number=trial.number,
                state=queries.STATE_NAMES[trial.state],
                parameters=trial.params,
                settings=shared | trial.params,
                seed=trial.user_attrs.get("seed"),
                value=total.accuracy if ran and not failed else None,
                best_epoch=trial.user_attrs.get("best_epoch") if top is None else top["epoch"],
                epochs=total.epochs,
                images=total.images,
                seen=total.seen,
                train_seconds=total.train_seconds,
                validation_seconds=total.validation_seconds,
                selection_seconds=total.selection_seconds,
                joules=total.joules,
                test=trial.user_attrs.get("test_accuracy"),
                error=trial.user_attrs.get("error") or errors.get(trial.number),
                attributes=trial.user_attrs,
            )
        )
    attempts = tuple(queries.attempts(storage.engine, study_id))
    return StudyData(
        name=name, preset=progress.preset, config=config, rows=tuple(rows), curves=curves, attempts=attempts,
        study=study, status=progress, storage_option=storage_option,
        studies=frozenset(queries.study_names(storage.engine)),
        test_uses=tuple(queries.test_split_uses(storage.engine, attributes.get("data_fingerprint"))),
    )  # fmt: skip


def _chosen(totals: dict[int, queries.Totals]) -> list[int] | None:
    """Whose epochs to read one by one; None: everybody's."""
    if len(totals) <= MOST_CURVES:
        return None
    return best_and_sample(list(totals), lambda number: totals[number].accuracy, MOST_CURVES)


def best_and_sample(items: Sequence[T], value: Callable[[T], float], most: int) -> list[T]:
    """At most so many of the items, in their order: a quarter of them the best, the others evenly spread."""
    if len(items) <= most:
        return list(items)
    ranked = sorted(range(len(items)), key=lambda i: (-value(items[i]), i))
    best, others = ranked[: most // 4], sorted(ranked[most // 4 :])
    step = -(-len(others) // (most - len(best)))
    return [items[i] for i in sorted(best + others[::step])]
