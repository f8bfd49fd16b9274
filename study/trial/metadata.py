"""What is recorded of a trial beside its accuracy: costs, device, versions; and what its checkpoint belongs to."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from study import __version__
from study.config.extensions import is_import_path, source_digest
from study.config.models import StudyConfig
from study.model_file import ModelDescription
from study.search.space import Parameters, settings
from study.training.trainer import EpochResult, Trainer
from study.trial.components import network_arguments

TRAINING_SECTIONS = ("data", "network", "policy", "training")
"""The sections of a config that a trial's numbers depend on."""


def trial_attributes(trainer: Trainer, history: list[EpochResult]) -> dict[str, Any]:
    """User attributes of a trial that has finished after `history`. Seconds, bytes, joules."""
    attributes = {
        "epochs": len(history),
        "images": sum(result.images for result in history),
        "seen": history[-1].seen,
        "train_seconds": round(sum(result.train_seconds for result in history), 3),
        "validation_seconds": round(sum(result.validation_seconds for result in history), 3),
        "selection_seconds": round(sum(result.selection_seconds for result in history), 3),
        "network_parameters": parameter_count(trainer.network),
        "peak_memory_bytes": peak_memory(trainer.device),
        "precision": trainer.precision,
        "device": device_name(trainer.device),
        "host": platform.node(),
        "versions": versions(),
    }
    energy = [result.joules for result in history if result.joules is not None]
    if len(energy) == len(history):
        attributes["joules"] = round(sum(energy), 1)
    return attributes


def checkpoint_identity(
    study: optuna.Study, config: StudyConfig, parameters: Parameters, seed: int
) -> dict[str, str | int | None]:
    """What a checkpoint of a trial with these parameters belongs to. Copies of a study keep its `uid`."""
    sections = config.model_dump(mode="json", include=set(TRAINING_SECTIONS))
    return {
        "study": study.user_attrs.get("uid"),
        "config": _digest(sections),
        "parameters": _digest(parameters),
        "seed": seed,
        "data": study.user_attrs.get("data_fingerprint"),
    }


def model_description(
    study: optuna.Study,
    config: StudyConfig,
    number: int,
    trainer: Trainer,
    top: EpochResult,
    chosen: Parameters,
    seed: int,
) -> ModelDescription:
    """What the file of a trial's model says of it.

    Args:
        number: the trial's.
        top: the epoch after which the weights were taken.
        chosen: the trial's searched parameters.
    """
    data, attributes, parameters = trainer.data, study.user_attrs, settings(config, chosen)
    network = parameters["network"]
    names = attributes.get("classes", [])
    return ModelDescription(
        classes=tuple(names) if len(names) == data.classes else tuple(map(str, range(data.classes))),
        shape=data.shape,
        dtype=data.dtype,
        mean=tuple(data.mean.tolist()),
        std=tuple(data.std.tolist()),
        network=network,
        arguments=network_arguments(parameters),
        code_sha256=source_digest([network]) if is_import_path(network) else None,
        precision=trainer.precision,
        seed=seed,
        study=study.study_name,
        trial=number,
        epoch=top.epoch,
        metric=config.search.metric,
        value=top.score(config.search.metric),
        accuracy=top.accuracy,
        parameters=parameters,
        config=config.model_dump(mode="json"),
        data_fingerprint=str(attributes.get("data_fingerprint", "")),
        protocol=str(attributes.get("protocol", "")),
        versions=versions(),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def parameter_count(network: nn.Module) -> int:
    """Numbers that a network learns; those of layers that never saw an image are not known."""
    return sum(each.numel() for each in network.parameters() if not is_lazy(each))


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch had reserved of a GPU at most during the trial; elsewhere the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


@functools.cache
def versions() -> dict[str, str]:
    """Of this program (with its commit, where it runs from a clone) and of what its numbers depend on."""
    names = {"study": __version__, "torch": str(torch.__version__), "optuna": optuna.__version__}
    clone = Path(__file__).parents[2]
    if (clone / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            describe = subprocess.run(
                ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                capture_output=True, text=True, timeout=5, check=True,
            )  # fmt: skip
            names["commit"] = describe.stdout.strip()
    return names
