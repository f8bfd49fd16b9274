"""The network, the policy and the training options of a trial, from a config and the trial's parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from study.config import augmentations, extensions
from study.config.models import POLICY_PARAMETERS, StudyConfig
from study.config.values import first
from study.search.space import Parameters
from study.training import networks, policies
from study.training.augment import make_augmentation
from study.training.data.dataset import DataError
from study.training.optimizers import OptimizerOptions
from study.training.policies import Policy
from study.training.schedules import Schedule
from study.training.trainer import TrainingOptions


def make_network(parameters: Parameters, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """The network of a trial with its initial weights.

    Args:
        parameters: all of the trial's.
        shape: of one image, (height, width, channels), or (features,).

    Raises:
        UserError, DataError: own code that is not allowed here; a network that cannot be made.
    """
    name = parameters["network"]
    sides = shape[:-1] or (1,)
    size: Any = sides[0] if len(set(sides)) == 1 else sides
    return networks.make_network(
        name, network_arguments(parameters), classes=classes, channels=shape[-1], size=size, seed=seed, make=_own(name)
    )


def make_policy(parameters: Parameters, total: int, seed: int) -> Policy:
    """The policy of a trial over `total` training images.

    Raises:
        UserError, DataError: own code that is not allowed here or fails.
    """
    name = parameters["policy"]
    if name in POLICY_PARAMETERS:
        return policies.make_policy(name, total, seed, **{key: parameters[key] for key in POLICY_PARAMETERS[name]})
    arguments = _arguments("policy", parameters)
    if parameters["alpha"] is not None:
        arguments = {"alpha": parameters["alpha"]} | arguments
    return policies.make_policy(name, total, seed, make=_own(name), **arguments)


def training_options(config: StudyConfig, parameters: Parameters) -> TrainingOptions:
    """How a trial with these parameters trains."""
    training = config.training
    return TrainingOptions(
        epochs=parameters["epochs"],
        images=training.images,
        batch_size=parameters["batch_size"],
        optimizer=OptimizerOptions(
            name=parameters["optimizer"],
            **{key: parameters[key] for key in ("lr", "weight_decay", "beta1", "beta2", "momentum", "nesterov")},
        ),
        schedule=Schedule(parameters["schedule"], parameters["warmup"]),
        label_smoothing=parameters["label_smoothing"],
        clip=parameters["clip"],
        ema=parameters["ema"],
        augmentation=make_augmentation(augmentations.steps(parameters["augment"])),
        precision=training.precision,
        compile=training.compile,
        metric=config.search.metric,
        keep_best=config.artifacts.keep != "none",
    )


def check_network(config: StudyConfig, parameters: Parameters, shape: tuple[int, ...], classes: int) -> None:
    """Make the network once and pass two empty images through it.

    Raises:
        UserError, DataError: it cannot be made, or does not turn such images into logits.
    """
    network = make_network(parameters, shape, classes, config.search.seed)
    images = torch.zeros((2, *shape))
    batch = images.permute(0, 3, 1, 2) if images.ndim == 4 else images
    networks.check_output(network, batch, classes, parameters["network"])


def check_augmentation(text: str, shape: tuple[int, ...]) -> None:
    """Apply an augmentation, a value of the parameter `augment`, to two empty images of this shape.

    Raises:
        DataError: it cannot be made, or does not give such images.
    """
    images = torch.zeros((2, *shape), dtype=torch.uint8)
    try:
        with torch.random.fork_rng(devices=[]):
            changed = make_augmentation(augmentations.steps(text)).transform(images)
    except Exception as error:
        raise DataError(f"data.augment {text!r} fails on images of {shape}: {error}; give what it needs") from error
    if changed.shape != images.shape or changed.dtype != images.dtype:
        raise DataError(f"data.augment {text!r} must give images of {shape}, and gives {tuple(changed.shape[1:])}")


def first_parameters(config: StudyConfig, **chosen: Any) -> Parameters:
    """All parameters of a trial with `chosen` and the first value of every list."""
    return {name: first(value) for name, value in config.searchable().items()} | chosen


def network_arguments(parameters: Parameters) -> dict[str, Any]:
    """The keyword arguments of a trial's network."""
    if parameters["network"] == "paper":
        return {"width": parameters["width"], "norm": parameters["norm"]}
    return _arguments("network", parameters)


def _arguments(section: str, parameters: Parameters) -> dict[str, Any]:
    prefix = f"{section}."
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def _own(name: str) -> Any:
    return extensions.load(name) if extensions.is_import_path(name) else None
