"""The file of a trained model: safetensors, whose metadata say all that is needed to use it and where it comes from.

Nobody vouches for such a file, nor for what a database holds: sizes, names, shapes and types are checked against the
network that the metadata describe, before any of it is used. Nothing in it is unpickled or run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, ValidationError, model_validator
from torch import Tensor, nn

from storage.errors import UserError
from storage.object_store import MOST_BYTES
from storage.text import one_line
from study.config import extensions
from study.config.values import Section
from study.training.data.dataset import DataError
from study.training.networks import TORCHVISION, make_network

FORMAT = 1
"""Of the description; grows when an older program could not use it."""
KEY = "dynamic-training-study"
"""Of the metadata that hold the description, as JSON."""
MOST_HEADER_BYTES = 20_000_000
MOST_TENSORS = 100_000

_Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Text = Annotated[str, StringConstraints(max_length=1000)]
_Size = Annotated[int, Field(ge=1, le=100_000)]


class ModelDescription(Section):
    """What a model takes and gives, and where it comes from."""

    format: Literal[1] = 1
    classes: tuple[_Name, ...] = Field(min_length=1, max_length=1_000_000)
    """Names of the network's outputs, in order."""
    shape: tuple[_Size, ...] = Field(min_length=1, max_length=4)
    """Of one input: height, width, channels; or features of data that are no images."""
    dtype: Literal["uint8", "float32"]
    """Of an input, before it is normalised: images are uint8."""
    mean: tuple[float, ...] = Field(min_length=1, max_length=100_000)
    """Per channel of the training data, in their units. Inputs are normalised as (input - mean) / std."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1, max_length=100_000)
    network: _Text
    """`network.name` of the config."""
    arguments: dict[str, Any]
    """Of the network, as the trial had them."""
    code_sha256: _Text | None = None
    """Of the source of a network by import path."""
    precision: Literal["fp32", "bf16"]
    """In which it was trained and validated."""
    seed: int = Field(ge=0, lt=2**63)
    """The trial's."""
    study: _Text
    trial: int = Field(ge=0)
    """Its number."""
    epoch: int = Field(ge=1)
    """After which the weights were taken: the best one."""
    metric: _Text
    """What the best epoch and the best trial are chosen by."""
    value: float
    """Of the metric on the validation images after that epoch, in [0, 1]."""
    accuracy: float
    """Likewise."""
    parameters: dict[str, Any]
    """All of the trial's."""
    config: dict[str, Any]
    """The study's."""
    data_fingerprint: _Text
    protocol: _Text
    versions: dict[str, _Text]

    @model_validator(mode="after")
    def _fits_together(self) -> ModelDescription:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        if self.dtype == "uint8" and len(self.shape) != 3:
            raise ValueError("images need a height, a width and channels")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, self.shape[-1]):
            raise ValueError("mean and std do not fit the channels")
        return self

    @property
    def is_images(self) -> bool:
        """Whether inputs are pictures: height, width, and one or three channels of uint8."""
        return self.dtype == "uint8" and self.shape[-1] in (1, 3)


def to_bytes(state: Mapping[str, Tensor], description: ModelDescription) -> bytes:
    """The file's content.

    Args:
        state: the network's `state_dict`, on any device.

    Raises:
        ValueError: it holds something that is no tensor, or it is too large.
    """
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"the network's state holds something that is no tensor: {', '.join(other)}")
    from safetensors.torch import save

    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    content: bytes = save(tensors, {KEY: description.model_dump_json()})
    return content


def from_bytes(content: bytes, source: str) -> tuple[nn.Module, ModelDescription]:
    """The network with its weights, on the CPU and in evaluation mode, and the description.

    A network of own code is made by a function of the allowed folders, if its source is as it was.

    Args:
        source: what the content is called in messages.

    Raises:
        UserError: it is no such file, is damaged, or does not fit the network that it names; own code that is not
            allowed, or another.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    description = describe(content, source)
    try:
        tensors = load(content)
        network = _network(description, tensors)
        network.load_state_dict(tensors)
    except (SafetensorError, ValueError, TypeError, RuntimeError, KeyError, OverflowError, DataError) as error:
        raise _wrong(source, error) from None
    return network.eval(), description


def describe(content: bytes, source: str) -> ModelDescription:
    """The description of a model's file. Raises as `from_bytes`."""
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has {len(content):,} bytes, more than {MOST_BYTES:,}")
        length = int.from_bytes(content[:8], "little")
        if not 2 <= length <= min(MOST_HEADER_BYTES, len(content) - 8):
            raise ValueError("it is no safetensors file")
        header = json.loads(content[8 : 8 + length])
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        text = metadata.get(KEY) if isinstance(metadata, dict) else None
        if not isinstance(text, str):
            raise ValueError("it is no model of this program: it has no description")
        if len(header) > MOST_TENSORS:
            raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")
        written = json.loads(text)
        if isinstance(written, dict) and written.get("format") != FORMAT:
            raise ValueError(f"its format {written.get('format')!r:.20} is of another version, this is {FORMAT}")
        return ModelDescription.model_validate(written)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise _wrong(source, f"its description is wrong: {where}: {fault['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _wrong(source, error) from None


def _network(description: ModelDescription, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A new network whose state has the names, shapes and types of `tensors`.

    Raises:
        ValueError, DataError, UserError: it has others, or cannot be made.
    """
    if not extensions.is_import_path(description.network):
        with torch.device("meta"):  # without memory: nobody knows yet whether the file's tensors are as large
            _check(_made(description), tensors)
    network = _made(description)
    _check(network, tensors)
    return network


def _made(description: ModelDescription) -> nn.Module:
    sides = description.shape[:-1] or (1,)
    size: Any = sides[0] if len(set(sides)) == 1 else sides
    arguments, make = description.arguments, None
    if extensions.is_import_path(description.network):
        make = extensions.load(description.network)
        if (found := extensions.source_digest([description.network])) != description.code_sha256:
            raise ValueError(
                f"the source of its network {description.network!r} here (SHA-256 {str(found)[:16]}) is not the one "
                f"that it was trained with ({str(description.code_sha256)[:16]}); allow the folder that holds that one"
            )
    elif description.network.startswith(TORCHVISION):  # the file has the weights that these have become
        arguments = {name: value for name, value in arguments.items() if name != "weights"}
    return make_network(
        description.network,
        arguments,
        classes=len(description.classes),
        channels=description.shape[-1],
        size=size,
        seed=description.seed,
        make=make,
    )


def _check(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = network.state_dict()
    if different := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"its tensors are not those of its network ({different[0]} and {len(different) - 1} others)")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"its tensor {name} is {_kind(tensor)}, and {_kind(expected[name])} in the network that it names"
            )
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum(dtype=torch.float64))):
            raise ValueError(f"its tensor {name} has values that are not finite")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _wrong(source: str, reason: object) -> UserError:
    return UserError(f"cannot use the model {source}: {one_line(str(reason))[:500]}")
