"""A trained model, from a study or from a file: its network, its classes, and what it says of pictures.

    from study import load_model

    model = load_model("my-study")  # or load_model("my-study-trial-7.safetensors")
    print(model.predict(["picture.jpg"]).names)

Pictures become what those of a training folder become; arrays are taken as they are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from optuna.artifacts.exceptions import ArtifactNotFound
from torch import Tensor, nn

from storage import artifacts, queries
from storage.artifacts import DatabaseArtifactStore
from storage.engine import open_engine, reader
from storage.errors import UserError
from storage.object_store import MODEL, MOST_BYTES
from storage.url import DEFAULT
from study import model_file
from study.model_file import ModelDescription
from study.training.data import decoding
from study.training.data.dataset import DataError, Images, printable
from study.training.data.decoding import Files, Form, Report
from study.training.device import pick_device, pick_precision

logger = logging.getLogger(__name__)

BATCH = 256
"""Inputs that pass through the network at a time."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of N inputs."""

    probabilities: NDArray[np.float32]
    """Of each class, shape [N, classes]."""
    classes: tuple[str, ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Index of the most probable class, shape [N]."""
        labels: NDArray[np.int64] = self.probabilities.argmax(1)
        return labels

    @property
    def names(self) -> list[str]:
        """The most probable class."""
        return [self.classes[label] for label in self.labels]

    @property
    def confidences(self) -> NDArray[np.float32]:
        """Its probability, shape [N]."""
        highest: NDArray[np.float32] = self.probabilities.max(1)
        return highest


class TrainedModel:
    """A network with the weights of a trial's best epoch, and all that is needed to use it."""

    def __init__(self, network: nn.Module, description: ModelDescription, device: torch.device) -> None:
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        """In evaluation mode: normalised inputs to logits, float32 [N, channels, height, width] or [N, features]."""
        self.description, self.device = description, device
        self._mean, self._std = (torch.tensor(values, device=device) for values in (description.mean, description.std))
        # As it was validated, where this device multiplies bf16 natively.
        native = description.precision == "bf16" and pick_precision("auto", device) == "bf16"
        self._autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=native)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the network's outputs, in order."""
        return self.description.classes

    @property
    def form(self) -> Form:
        """What every picture becomes before the network sees it.

        Raises:
            UserError: the model was not trained on pictures.
        """
        if not self.description.is_images:
            raise UserError(
                f"this model was trained on {self.description.dtype} of shape {self.description.shape}, not on "
                "pictures; give its predict() such arrays"
            )
        height, width, channels = self.description.shape
        return Form(height, width, channels)

    def predict(self, inputs: Images | Sequence[str | os.PathLike[str]]) -> Predictions:
        """The probabilities of the classes.

        Args:
            inputs: an array of the training data's kind (of images: uint8, shape [N, height, width, channels]), or
                paths of image files, which are decoded and resized as those of a training folder are.

        Raises:
            DataError: an array of another kind, or a file that cannot be used.
            UserError: paths, and the model was not trained on pictures.
        """
        batches = self._of_array(inputs) if isinstance(inputs, np.ndarray) else self._of_files(inputs)
        parts = [self.probabilities(batch) for batch in batches]
        empty = np.zeros((0, len(self.classes)), np.float32)
        return Predictions(np.concatenate([empty, *parts]), self.classes)

    def probabilities(self, batch: Images) -> NDArray[np.float32]:
        """Of the classes, shape [batch, classes], of inputs that pass through the network together."""
        with torch.no_grad(), self._autocast:
            inputs = torch.from_numpy(np.ascontiguousarray(batch)).to(self.device)
            logits: Tensor = self.network(normalised(inputs, self._mean, self._std))
        probabilities: NDArray[np.float32] = logits.float().softmax(1).cpu().numpy()
        return probabilities

    def decode(self, path: str | os.PathLike[str]) -> Images:
        """A picture as the network's input, uint8, shape [height, width, channels].

        Raises:
            DataError: it cannot be used, and why.
        """
        try:
            return Files([os.fspath(path)]).convert(0, self.form, Report())
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 — a decoder may raise anything on damaged files
            raise DataError(f"{printable(path)}: {decoding.reason(error)}") from None

    def _of_array(self, inputs: Images) -> Iterator[Images]:
        shape, dtype = self.description.shape, self.description.dtype
        if inputs.dtype.name != dtype or inputs.shape[1:] != shape:
            raise DataError(
                f"inputs of this model are {dtype} of shape [N, {', '.join(map(str, shape))}], got {inputs.dtype} of "
                f"shape {list(inputs.shape)}"
            )
        for start in range(0, len(inputs), BATCH):
            yield inputs[start : start + BATCH]

    def _of_files(self, paths: Sequence[str | os.PathLike[str]]) -> Iterator[Images]:
        if isinstance(paths, str | os.PathLike):
            raise DataError(f"predict() takes a list of paths, got one: write [{str(paths)!r}]")
        for start in range(0, len(paths), BATCH):
            yield np.stack([self.decode(path) for path in paths[start : start + BATCH]])


def normalised(inputs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Inputs as the network takes them: normalised by channel, of images channels first."""
    scaled = (inputs - mean) / std
    return scaled.permute(0, 3, 1, 2) if scaled.ndim == 4 else scaled


def load_model(
    source: str | os.PathLike[str], storage: str | None = None, trial: int | None = None, *, device: str = "auto"
) -> TrainedModel:
    """The model of a study, or of a file that `study model` wrote.

    Args:
        source: the study's name, or the path of a file that ends in .safetensors.
        storage: database URL. None: $STUDY_STORAGE, else sqlite:///study.db.
        trial: the number of the trial. None: the best one whose model is kept.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: no such study, model or file; a file that is damaged or no model; own code that is not allowed here
            ($STUDY_CODE); a device that is not there.
    """
    try:
        picked = pick_device(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    content, called = read_model(source, storage, trial)
    return TrainedModel(*model_file.from_bytes(content, called), picked)


def read_model(source: str | os.PathLike[str], storage: str | None, trial: int | None) -> tuple[bytes, str]:
    """The content of a model's file, and what to call it; as `load_model`."""
    if is_file(source):
        if trial is not None:
            raise UserError(f"a file holds the model of one trial: leave trial {trial} out, or name a study")
        return _read_file(Path(source)), printable(source)
    url = storage or os.environ.get("STUDY_STORAGE") or DEFAULT
    engine = open_engine(url)
    name = os.fspath(source)
    study_id, attributes = queries.find(engine, name)
    models = artifacts.stored(engine, study_id)
    chosen = next((model for model in models if trial is None or model.trial == trial), None)
    with reader(engine).connect() as connection:
        best = queries.best_trial(connection, study_id)
    if chosen is not None and trial is None and best is not None and best[1] != chosen.trial:
        logger.warning(
            "the best trial of %r is %d (%.4f), and its model was not kept: this is trial %d (%.4f)",
            name, best[1], best[0], chosen.trial, chosen.value,
        )  # fmt: skip
    if chosen is None:
        raise UserError(_why_none(name, attributes, [model.trial for model in models], trial))
    try:
        with DatabaseArtifactStore(engine).open_reader(chosen.id) as file:
            return file.read(), f"of trial {chosen.trial} of {name!r}"
    except (ArtifactNotFound, OSError) as error:
        raise UserError(f"cannot read the model of trial {chosen.trial} of {name!r}: {error}") from None


def is_file(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a file and not a study."""
    return not isinstance(source, str) or source.endswith(f".{MODEL}")


def _read_file(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise UserError(f"no model file {printable(path)}; `study model NAME` writes one")
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None


def _why_none(name: str, attributes: dict[str, Any], kept: list[int], trial: int | None) -> str:
    if kept:
        return f"the model of trial {trial} of {name!r} is not kept; kept are those of {', '.join(map(str, kept))}"
    keep = attributes["config"].get("artifacts", {}).get("keep", "best")
    if keep == "none":
        return f"the study {name!r} keeps no models: artifacts.keep is none; launch one with another setting"
    return f"the study {name!r} has no model: it keeps those of trials that finish, and none has left one yet"
