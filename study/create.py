"""Lays a study down in a database, once, and finds it again: its config, its data's fingerprint, its tickets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.storages import RDBStorage

from storage import object_store
from storage.cached_storage import CachedStorage
from storage.checkpoints import DATABASE
from storage.engine import open_storage
from storage.enqueue import enqueue_trials
from storage.errors import UserError
from storage.optuna_internals import study_id_of
from storage.queries import find
from study.config.loading import differences, parse_config
from study.config.models import PROTOCOLS, Range, StudyConfig
from study.search import space
from study.training.data import dataset, sources
from study.training.data.split import split_dataset


def load_study(storage: RDBStorage, name: str) -> tuple[optuna.Study, StudyConfig]:
    """An existing study of ours, read through `CachedStorage`, and its config.

    Raises:
        UserError: no study of that name (with the names there are), or one that this program did not lay down.
    """
    _, attributes = find(storage.engine, name)
    study = optuna.load_study(study_name=name, storage=CachedStorage(storage))
    return study, parse_config(attributes["config"])


@dataclass(frozen=True)
class PreparedData:
    """Data that are here and fit a study."""

    fingerprint: str
    images: dict[str, int]
    """As the study splits them: train, validation, test."""
    sizes: tuple[int, int]
    """Of the data set's training and test split."""


def create_study(
    storage: RDBStorage,
    name: str,
    preset: str,
    config: StudyConfig,
    data: PreparedData,
    more: Mapping[str, Any] | None = None,
) -> bool:
    """Create the study and its tickets, or find them; whether it is new. More trials or replicates are added to it.

    Args:
        more: further user attributes of the study.

    Raises:
        UserError: the study exists with another config or other data, and what differs.
    """
    existed = name in optuna.get_all_study_names(storage)
    both = config.search.objective == "accuracy,images"
    directions: list[Literal["maximize", "minimize"]] = ["maximize", "minimize"] if both else ["maximize"]
    study = optuna.create_study(
        study_name=name, storage=CachedStorage(storage), directions=directions, load_if_exists=True
    )
    attributes = {
        "config": config.model_dump(mode="json"),
        "preset": preset,
        "data_fingerprint": data.fingerprint,
        "images": data.images,
        "protocol": PROTOCOLS[config.data.protocol],
        **(more or {}),
    }
    # In this order: another launch lays trials and config down together, so who sees its trials then sees its config.
    trials = study.get_trials(deepcopy=False)
    found = study.user_attrs
    ours = [direction.name.lower() for direction in study.directions] == directions and not (found or trials)
    if "config" not in found and not ours:
        raise UserError(f"the study {name!r} was not laid down by `study launch`; choose another --name")
    if not found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["validation accuracy", *(["images trained on"] if both else [])])
    stored = found.get("config")
    more_work = stored is not None and _grows(parse_config(stored), config)
    instead = {"config": stored} if more_work else None
    found = enqueue_trials(storage.engine, study_id_of(study), attributes, space.queued_trials(config), instead)
    theirs = parse_config(found["config"])
    if theirs != config:
        changed = "; ".join(differences(config, theirs))
        raise UserError(
            f"the study {name!r} exists with another config (asked != stored): {changed}; choose another --name"
        )
    check_fingerprint(study, data)
    return not existed


def _grows(old: StudyConfig, new: StudyConfig) -> bool:
    """Whether the new config is the old one with more trials or replicates."""
    ours, theirs = new.search, old.search
    if new.model_copy(update={"search": theirs}) != old:
        return False
    if ours.model_copy(update={"trials": theirs.trials, "replicates": theirs.replicates}) != theirs:
        return False
    return ours.replicates >= theirs.replicates and (ours.trials or 0) >= (theirs.trials or 0) and ours != theirs


def check_here(url: str, name: str, root: str | None, say: Callable[[str], None]) -> None:
    """Whether this machine has the data of the study `name`.

    Raises:
        UserError, DataError: no such study, or not its data.
    """
    study, config = load_study(open_storage(url, create=False, reading=True), name)
    check_fingerprint(study, sources.load(config.data.name, root, say))


def check_fingerprint(study: optuna.Study, dataset: dataset.Dataset | PreparedData) -> None:
    """Raises:
    UserError: the data are not those that the study was laid down on.
    """
    expected = study.user_attrs["data_fingerprint"]
    if dataset.fingerprint != expected:
        raise UserError(
            f"the data here (fingerprint {dataset.fingerprint[:16]}) are not those of the study {study.study_name!r} "
            f"({expected[:16]}); use the same images (--data-root)"
        )


def prepare(config: StudyConfig, root: str | None, say: Callable[[str], None]) -> PreparedData:
    """The study's data, once they are here and every alpha fits them.

    Raises:
        UserError, DataError: the data or an alpha cannot be used.
    """
    if config.checkpoint.store != DATABASE:
        object_store.check(config.checkpoint.store)
    part = config.data
    dataset = sources.load(part.name, root, say)
    split = split_dataset(dataset, part.protocol, holdout=part.holdout, train_images=part.train_images)
    space.check_alpha(config, len(split.train_labels))
    parts = {"train": split.train_labels, "validation": split.validation_labels, "test": split.test_labels}
    images = {name: len(labels) for name, labels in parts.items()}
    return PreparedData(dataset.fingerprint, images, (len(dataset.train_labels), len(dataset.test_labels)))


def noise_warning(config: StudyConfig, validation_images: int) -> str | None:
    """What to know if delta is within the standard deviation (binomial, at 85 %) of the validation accuracy."""
    delta, spread = config.policy.delta, math.sqrt(0.85 * 0.15 / validation_images)
    smallest = delta.low if isinstance(delta, Range) else min(delta) if isinstance(delta, tuple) else delta
    if "dynamic" not in config.policies() or smallest >= spread:
        return None
    return (
        f"note: policy.delta {smallest:g} is less than the noise of accuracy on {validation_images:,} validation "
        f"images (standard deviation {spread:.2g} at 85 %): most stalls will be chance"
    )
