"""The networks of trials: the CNN of the paper's Table 1, torchvision's, or one from own code."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from study.training.data.dataset import DataError
from study.training.rng import generator, random_state, stream_seed

# Table 1 contradicts itself in channels; this reading reproduces every spatial size that it prints. Numbers are the
# output channels of 3x3 convolutions with padding 1, "max" a 2x2 max-pool. 32x32 in; the maps leaving the pools are
# 16, 8, 4 and 2 wide; "2 Max Pooling" of the table are the two in a row. Then an average pool to 1x1.
LAYERS: tuple[int | Literal["max"], ...] = (
    *(32, 32, 32, 32), "max", *(64, 64, 64, 64, 64), "max", "max", *(128, 128, 144, 144, 144), "max", *(144, 144, 144),
)  # fmt: skip
HIDDEN = 144


class CNN(nn.Module):
    """[batch, channels, 32, 32] images to [batch, classes] logits (the softmax is in the loss).

    1.54 million parameters and 86 million multiply-adds an image at width 1 and 10 classes. Weights are He-normal from
    `weights`; biases start at zero.
    """

    def __init__(
        self,
        classes: int,
        weights: torch.Generator,
        *,
        channels: int = 3,
        width: float = 1.0,
        norm: Literal["batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in LAYERS:
            if layer == "max":
                # Before the ReLU, which then has a quarter to do; the two commute, bit for bit.
                layers.insert(-1, nn.MaxPool2d(2))
                continue
            out = scaled(layer, width)
            # Batch norm has a bias of its own.
            layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=norm == "none"))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(out))
            layers.append(nn.ReLU())
            channels = out
        hidden = scaled(HIDDEN, width)
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=weights)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def make_network(
    name: str,
    arguments: Mapping[str, Any],
    *,
    classes: int,
    channels: int,
    size: int | tuple[int, int],
    seed: int,
    make: Callable[..., Any] | None = None,
) -> nn.Module:
    """The network `name` with the initial weights of a trial.

    Args:
        name: `paper`, `torchvision:NAME`, or the import path of `make`.
        arguments: `width` and `norm` of `paper`; else keyword arguments of the maker. torchvision's may name
            `weights`: the images must then be like those that the weights were trained on.
        size: height and width of the images in pixels, one number where they are equal.
        seed: the trial's. `paper` draws from its own stream; other networks find PyTorch's global generator seeded.
        make: own code, `make(classes, channels, size, **arguments) -> nn.Module`.

    Raises:
        DataError: the network cannot be made: an unknown name, arguments that it does not take, weights that cannot
            be had.
    """
    if name == "paper":
        return CNN(classes, generator(seed, "weights"), channels=channels, **arguments)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, "weights"))
        try:
            if name.startswith(TORCHVISION):
                return _torchvision(name.removeprefix(TORCHVISION), classes, channels, dict(arguments))
            assert make is not None
            network = make(classes, channels, size, **arguments)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"network {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise DataError(f"network {name!r} must be a torch.nn.Module, and is of type {type(network).__name__}")
    return network


TORCHVISION = "torchvision:"


def _torchvision(name: str, classes: int, channels: int, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise DataError(f"torchvision has no classification network {name!r}{hint}")
    if channels != 3:
        raise DataError(f"torchvision's networks take 3 channels, and the images have {channels}: set data.channels=3")
    if name in ("googlenet", "inception_v3"):  # with auxiliary heads they return no plain logits
        arguments = {"aux_logits": False, "init_weights": True} | arguments
    weights = arguments.pop("weights", None)
    network: nn.Module = models.get_model(name, num_classes=classes, **arguments)
    if weights is not None:
        _load_weights(network, name, str(weights))
    return network


def _load_weights(network: nn.Module, name: str, wanted: str) -> None:
    """torchvision's weights for all layers but the last, whose classes are others."""
    from torchvision import models

    enum = models.get_model_weights(name)
    if wanted not in enum.__members__:
        raise DataError(f"torchvision has no weights {wanted!r} for {name}; there are: {', '.join(enum.__members__)}")
    try:
        stored = enum[wanted].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the weights {wanted} of {name} are not in {torch.hub.get_dir()}/checkpoints and could not be downloaded "
            f"({error}): copy the file there"
        ) from None
    own = network.state_dict()
    fitting = {key: value for key, value in stored.items() if key in own and value.shape == own[key].shape}
    missing = {key.rpartition(".")[0] for key in own.keys() - fitting.keys()}
    if len(missing) > MOST_HEADS:
        raise DataError(f"the weights {wanted} do not fit {name} with these arguments: {len(missing)} layers differ")
    network.load_state_dict(fitting, strict=False)


MOST_HEADS = 2
"""Layers that weights may not fit: the last one, and where there is one its auxiliary twin."""


def check_output(network: nn.Module, images: Tensor, classes: int, name: str) -> None:
    """Whether the network turns images into logits.

    Args:
        images: float32, shape [batch, channels, height, width], or [batch, features].

    Raises:
        DataError: it does not, and what it does.
    """
    try:
        with torch.no_grad():
            logits = copy.deepcopy(network).eval()(images)
    except Exception as error:
        shape = list(images.shape)
        raise DataError(
            f"network {name!r} fails on a batch of shape {shape}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (len(images), classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"network {name!r} must return logits of shape [batch, classes], here {[len(images), classes]}, got {got}"
        )


def draws_random_numbers(network: nn.Module, images: Tensor) -> bool:
    """Whether a training pass of `images` draws from PyTorch's global generators. The network stays as it is."""
    trial = copy.deepcopy(network).train()
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        before = random_state(images.device)
        try:
            trial(images)
        except ValueError:  # batch norm wants more than one value a channel; whoever trains finds out
            return True
        after = random_state(images.device)
    return any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
