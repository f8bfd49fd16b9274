"""Creates a study in a database with all of its queued trials, once, and loads it again: config, data, trials."""

from __future__ import annotations

import logging
import math
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage

from storage import object_store, origins
from storage.cached_storage import CachedStorage
from storage.checkpoints import DATABASE
from storage.engine import open_storage
from storage.enqueue import enqueue_trials
from storage.errors import UserError
from storage.optuna_internals import study_id_of
from storage.queries import find, study_names
from storage.study_name import check_study_name
from storage.url import parse, redact
from study import __version__
from study.config import extensions
from study.config.extensions import is_import_path
from study.config.loading import differences, parse_config
from study.config.models import PROTOCOLS, StudyConfig
from study.config.values import smallest
from study.search import space
from study.training.data import dataset, sources
from study.training.data.split import split_dataset, split_notes

logger = logging.getLogger(__name__)

CLASSES = "classes"
"""Key of the study's user attribute: the names of the data's classes, in the order of their labels."""
CONFIG_FORMAT = 1
"""Of the config that a study stores; a later one is for later versions of this program."""
GP_TRIALS = 1000
"""Trials up to which the GP sampler chooses within seconds: 4.7 s after 1,000, 54 s after 2,000 (many_trials
benchmark, one thread)."""


def load_study(storage: RDBStorage, name: str, *, lean: bool = False) -> tuple[optuna.Study, StudyConfig]:
    """An existing study of ours, read through `CachedStorage`, and its config.

    Args:
        lean: as of `CachedStorage`.

    Raises:
        UserError: no study of that name (with the names there are), or one that `study launch` did not create.
    """
    _, attributes = find(storage.engine, name)
    if (stored := attributes.get("config_format", CONFIG_FORMAT)) != CONFIG_FORMAT:
        raise UserError(
            f"the study {name!r} has a config of format {stored!r} of a newer version of this program, which knows "
            f"format {CONFIG_FORMAT}: upgrade this program"
        )
    study = optuna.load_study(study_name=name, storage=CachedStorage(storage, lean=lean))
    return study, parse_config(attributes["config"])


@dataclass(frozen=True)
class OpenStudy:
    """A study and the one connection of this process to its database."""

    url: str
    storage: RDBStorage
    study: optuna.Study
    config: StudyConfig

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def id(self) -> int:
        return study_id_of(self.study)

    @property
    def engine(self) -> sa.Engine:
        return self.storage.engine

    @property
    def shown_url(self) -> str:
        """Without passwords."""
        return redact(parse(self.url))


def open_study(url: str, name: str) -> OpenStudy:
    """Raises:
    UserError: no such database or study.
    """
    storage = open_storage(url, create=False)
    return OpenStudy(url, storage, *load_study(storage, name))


@dataclass(frozen=True)
class PreparedData:
    """Data that are on this machine and fit a study."""

    fingerprint: str
    images: dict[str, int]
    """As the study splits them: train, validation, test."""
    sizes: tuple[int, int, int]
    """The same numbers, in that order."""
    config: StudyConfig
    """The study's, with alpha as a count where it was a part of the training images."""
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    """Of one image: (height, width, channels), or (features,)."""
    code: str | None
    """SHA-256 of the own code that the study names; None: it names none."""
    facts: dict[str, Any] = field(default_factory=dict)
    """`shape` of an image, number of `classes`, and by split the `largest` class's share: what guessing reaches."""


def prepare(config: StudyConfig, root: str | None) -> PreparedData:
    """The study's data, once they are on this machine and every alpha fits them.

    Raises:
        UserError, DataError: the data, an alpha or the checkpoint store cannot be used.
    """
    if config.checkpoint.store != DATABASE:
        object_store.probe(config.checkpoint.store)
    if config.artifacts.store != DATABASE and config.artifacts.count != 0:
        object_store.probe(config.artifacts.store, "artifacts.store")
    options = config.data
    code = extensions.source_digest(config.own_code())
    images = load_images(config, root)
    split = split_dataset(images, options.protocol, holdout=options.holdout, train_images=options.train_images)
    config = config.with_counts(len(split.train))
    for note in (*images.notes, *split_notes(images, split, options.protocol)):
        logger.info("%s", note)
    space.check_alpha(config, len(split.train_labels))
    counts = {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}
    labels = {"train": split.train.labels, "validation": split.validation.labels, "test": split.test.labels}
    shares = {name: round(float(np.bincount(part).max() / len(part)), 6) for name, part in labels.items() if len(part)}
    data = PreparedData(
        images.fingerprint,
        counts,
        (counts["train"], counts["validation"], counts["test"]),
        config,
        split.classes,
        tuple(images.train_images.shape[1:]),
        code,
        {"shape": list(images.train_images.shape[1:]), "classes": len(split.classes), "largest": shares},
    )
    check_trials(config, data)
    return data


def load_images(config: StudyConfig, root: str | None) -> dataset.Dataset:
    """The study's data set on this machine.

    Raises:
        UserError, DataError: it is not here or cannot be used.
    """
    options = config.data
    make = extensions.load(options.name) if is_import_path(options.name) else None
    return sources.load(options.name, root, size=options.size, channels=options.channels, make=make)


def stored_data(study: OpenStudy) -> PreparedData:
    """What the study stores of its data; empty where a study of an earlier version stores nothing."""
    stored = study.study.user_attrs
    images, facts = dict(stored.get("images", {})), dict(stored.get("data_facts", {}))
    return PreparedData(
        stored["data_fingerprint"],
        images,
        (images.get("train", 0), images.get("validation", 0), images.get("test", 0)),
        study.config,
        tuple(map(str, stored.get(CLASSES, ()))),
        tuple(facts.get("shape", ())),
        stored.get("code_sha256"),
        facts,
    )


def check_trials(config: StudyConfig, data: PreparedData) -> None:
    """Try each network, policy and augmentation that is not ours, so that a fault is found before the launch.

    Raises:
        UserError, DataError: one of them cannot be made for these data.
    """
    is_image = len(data.shape) == 3
    if not is_image and config.data.augment:
        raise UserError(f"data.augment is for images; those of {config.data.name!r} have the shape {data.shape}")
    augmentations = [text for text in config.augmentations() if text not in ("none", "flip", "crop", "flip+crop")]
    networks = [name for name in config.networks() if name != "paper" or not is_image or data.shape[-1] != 3]
    policies = [name for name in config.policies() if is_import_path(name)]
    if networks or policies or augmentations:
        from study.trial import components  # loads torch, which the launcher of our own network does without

        for name in networks:
            components.check_network(
                config, components.first_parameters(config, network=name), data.shape, len(data.classes)
            )
        for text in augmentations:
            components.check_augmentation(text, data.shape)
        for name in policies:
            components.make_policy(
                components.first_parameters(config, policy=name), data.images["train"], config.search.seed
            )


def create_study(
    storage: RDBStorage,
    name: str,
    preset: str,
    config: StudyConfig,
    data: PreparedData,
    more: Mapping[str, Any] | None = None,
    informed: origins.Informed | None = None,
) -> bool:
    """Create the study and queue its trials, or find them; whether it is new. More trials or replicates are added.

    Args:
        more: further user attributes of the study.
        informed: the trials of another study that inform the sampler of a new study (`study.after`); a study that
            exists keeps those that it has, which must be of the same other study.

    Raises:
        UserError: no name for a study, or the study exists with another config, other data or informed by another
            study, and what differs.
    """
    check_study_name(name)
    existed = name in study_names(storage.engine)
    pareto = config.search.objective == "accuracy,images"
    directions: list[Literal["maximize", "minimize"]] = ["maximize", "minimize"] if pareto else ["maximize"]
    study = optuna.create_study(
        study_name=name, storage=CachedStorage(storage), directions=directions, load_if_exists=True
    )
    # In this order: another launch queues trials and config together, so who sees its trials then sees its config.
    trials = study.get_trials(deepcopy=False)
    stored = study.user_attrs
    empty = [direction.name.lower() for direction in study.directions] == directions and not (stored or trials)
    if "config" not in stored and not empty:
        raise UserError(f"the study {name!r} was not created by `study launch`; choose another --name")
    if not stored:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["validation accuracy", *(["images trained on"] if pareto else [])])
    attributes = {
        "config": config.model_dump(mode="json"),
        "preset": stored.get("preset", preset),
        "data_fingerprint": data.fingerprint,
        "images": data.images,
        "protocol": stored.get("protocol", PROTOCOLS[config.data.protocol]),  # worded otherwise by older versions
        "data_facts": data.facts,
        **(more or {}),
    }
    if not existed:
        attributes |= {"code_sha256": data.code} if data.code else {}
        attributes |= {"uid": uuid.uuid4().hex, "program_version": __version__, "config_format": CONFIG_FORMAT}
    if CLASSES not in stored:  # a study of an earlier version gets them; else their names are as they were
        attributes[CLASSES] = list(data.classes)
    old = stored.get("config")
    replaced = {"config": old} if old is not None and _grows(parse_config(old), config) else None
    other = {} if informed is None else {origins.AFTER: informed.attribute()}
    if stored:
        _check_informed(name, stored, informed)
    stored = enqueue_trials(
        storage.engine, study_id_of(study), attributes, space.queued_trials(config), replaced, first=other
    )
    _check_informed(name, stored, informed)
    stored_config = parse_config(stored["config"])
    if stored_config != config:
        changed = "; ".join(differences(config, stored_config))
        raise UserError(
            f"the study {name!r} exists with another config (asked != stored): {changed}; choose another --name"
        )
    check_fingerprint(study, data)
    check_code(study, config)
    return not existed


def _check_informed(name: str, stored: Mapping[str, Any], informed: origins.Informed | None) -> None:
    """Raises:
    UserError: another study informs this one, or none does.
    """
    theirs = origins.informed_by(stored)
    asked, is_so = (None if each is None else each.study for each in (informed, theirs))
    if asked == is_so:
        return
    fix = f"choose another --name, or give --after {is_so}" if is_so else "choose another --name, or leave out --after"
    now = f"informed by {is_so!r}" if is_so else "informed by no other study"
    raise UserError(f"the study {name!r} exists and is {now}: {fix}")


def _grows(old: StudyConfig, new: StudyConfig) -> bool:
    """Whether the new config is the old one with more trials or replicates."""
    ours, theirs = new.search, old.search
    if new.model_copy(update={"search": theirs}) != old:
        return False
    if ours.model_copy(update={"trials": theirs.trials, "replicates": theirs.replicates}) != theirs:
        return False
    return ours.replicates >= theirs.replicates and (ours.trials or 0) >= (theirs.trials or 0) and ours != theirs


def check_data(study: OpenStudy, root: str | None) -> None:
    """Whether this machine has the data of the study.

    Raises:
        UserError, DataError: it has not.
    """
    check_code(study.study, study.config)
    check_fingerprint(study.study, load_images(study.config, root))


def check_code(study: optuna.Study, config: StudyConfig) -> None:
    """Whether this process may and can run the own code that the study names.

    Raises:
        UserError: it is in no allowed folder, or is not the code that the study was created with.
    """
    digest = extensions.source_digest(config.own_code())
    expected = study.user_attrs.get("code_sha256")
    if digest is not None and digest != expected:
        raise UserError(
            f"the own code here (SHA-256 {digest[:16]}) is not that of the study {study.study_name!r} "
            f"({str(expected)[:16]}): {', '.join(config.own_code())}; use the same files (--code)"
        )


def check_fingerprint(study: optuna.Study, data: dataset.Dataset | PreparedData) -> None:
    """Raises:
    UserError: the data are not those that the study was created with.
    """
    expected = study.user_attrs["data_fingerprint"]
    if data.fingerprint != expected:
        raise UserError(
            f"the data here (fingerprint {data.fingerprint[:16]}) are not those of the study {study.study_name!r} "
            f"({expected[:16]}); use the same images (--data-root)"
        )


def config_warnings(config: StudyConfig, data: PreparedData) -> list[str]:
    """What a person should know before the study runs, a sentence each."""
    sentences = []
    images = data.images["validation"]
    delta, spread = smallest(config.policy.delta), math.sqrt(0.85 * 0.15 / images)
    if "dynamic" in config.policies() and delta < spread:
        sentences.append(
            f"policy.delta {delta:g} is less than the noise of an accuracy on {images:,} validation images (binomial "
            f"standard deviation {spread:.2g} at 85 %): gains of that size can be chance"
        )
    resource = getattr(config.pruning, "min_resource", None)
    last = space.most_steps(config, data.images["train"])
    if isinstance(resource, int) and resource >= last:
        sentences.append(
            f"pruning.min_resource {resource} is not below the last step {last} of a trial: nothing will be pruned"
        )
    trials = config.search.trials or 0
    if config.search.sampler.kind == "gp" and trials > GP_TRIALS:
        sentences.append(
            f"search.sampler gp takes longer with every trial, and search.trials is {trials:,}: after {GP_TRIALS:,} it "
            "chooses for 5 s or more, after twice as many for a minute; tpe for less than a second"
        )
    return sentences
