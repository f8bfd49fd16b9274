"""Lays a study down in a database, once, and finds it again: its config, its data's fingerprint, its tickets."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import optuna
from optuna.storages import RDBStorage

from storage import files
from storage.checkpoints import DATABASE
from storage.connect import open_storage
from storage.errors import UserError
from storage.tickets import lay
from study import space
from study.config import StudyConfig
from study.parsing import differences, parse_config
from study.training import data as datasets

PROTOCOLS = {
    "paper": "paper: the test split validates, so it chose the best epoch too",
    "holdout": "holdout: part of the training split validates, the test split is untouched",
}


def load_study(storage: RDBStorage, name: str) -> tuple[optuna.Study, StudyConfig]:
    """An existing study of ours and its config.

    Raises:
        UserError: no study of that name (with the names there are), or one that this program did not lay down.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        names = sorted(optuna.get_all_study_names(storage))
        there = f"studies there: {', '.join(names)}" if names else "there are none yet"
        raise UserError(f"no study {name!r} in this storage; {there}") from None
    config = study.user_attrs.get("config")
    if config is None:
        raise UserError(f"the study {name!r} was not laid down by `study launch`: it has no config")
    return study, parse_config(config)


def lay_down(storage: RDBStorage, name: str, preset: str, config: StudyConfig, dataset: datasets.Dataset) -> bool:
    """Create the study and its tickets, or find them; whether there was anything new.

    Raises:
        UserError: the study exists with another config or other data, and what differs.
    """
    existed = name in optuna.get_all_study_names(storage)
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    attributes = {
        "config": config.model_dump(mode="json"),
        "preset": preset,
        "data_fingerprint": dataset.fingerprint,
        "protocol": PROTOCOLS[config.data.protocol],
    }
    # In this order: another launch lays trials and config down together, so who sees its trials then sees its config.
    trials = study.get_trials(deepcopy=False)
    found = study.user_attrs
    ours = study.direction == optuna.study.StudyDirection.MAXIMIZE and not (found or trials)
    if "config" not in found and not ours:
        raise UserError(f"the study {name!r} was not laid down by `study launch`; choose another --name")
    if not found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["validation accuracy"])
    found = lay(storage.engine, study._study_id, attributes, space.tickets(config))
    theirs = parse_config(found["config"])
    if theirs != config:
        changed = "; ".join(differences(config, theirs))
        raise UserError(
            f"the study {name!r} exists with another config (asked != stored): {changed}; choose another --name"
        )
    check_fingerprint(study, dataset)
    return not existed


def check_here(url: str, name: str, root: str | None, say: Callable[[str], None]) -> None:
    """Whether this machine has the data of the study `name`.

    Raises:
        UserError, DataError: no such study, or not its data.
    """
    study, config = load_study(open_storage(url, create=False, reading=True), name)
    check_fingerprint(study, datasets.load(config.data.name, root, say))


def check_fingerprint(study: optuna.Study, dataset: datasets.Dataset) -> None:
    """Raises:
    UserError: the data are not those that the study was laid down on.
    """
    expected = study.user_attrs["data_fingerprint"]
    if dataset.fingerprint != expected:
        raise UserError(
            f"the data here (fingerprint {dataset.fingerprint[:16]}) are not those of the study {study.study_name!r} "
            f"({expected[:16]}); use the same images (--data-root)"
        )


def prepare(config: StudyConfig, root: str | None, say: Callable[[str], None]) -> datasets.Dataset:
    """The study's data, once they are here and every alpha fits them.

    Raises:
        UserError, DataError: the data or an alpha cannot be used.
    """
    if config.checkpoint.store != DATABASE:
        files.check(config.checkpoint.store)
    part = config.data
    dataset = datasets.load(part.name, root, say)
    split = datasets.split(dataset, part.protocol, holdout=part.holdout, train_images=part.train_images)
    space.check_alpha(config, len(split.train_labels))
    return dataset
