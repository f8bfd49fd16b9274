"""A model as an ONNX file, with its normalisation in it, for programs without PyTorch."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from storage.errors import UserError
from study.model import TrainedModel

INPUT, OUTPUT = "images", "probabilities"


class _Whole(nn.Module):
    """float32 inputs in the training data's units (of pictures [N, channels, height, width] in [0, 255]) to
    probabilities.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        description = model.description
        self.network = model.network
        sides = (1,) * (len(description.shape) - 1)
        for name, values in (("mean", description.mean), ("std", description.std)):
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, *sides))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits.softmax(1)


def export(model: TrainedModel, file: Path) -> None:
    """Write `model` to `file`. Its input `images` is float32 [N, channels, height, width] in [0, 255] (or
    [N, features]), N any number; its output `probabilities` is [N, classes]; its metadata name the classes.

    Args:
        model: on the CPU.

    Raises:
        UserError: onnx is not installed, or it cannot express the network.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 — what torch exports with
    except ImportError:
        raise UserError("an ONNX file needs onnx and onnxscript: pip install 'dynamic-training-study[onnx]'") from None
    shape = model.description.shape
    example = torch.zeros(2, shape[-1], *shape[:-1])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Whole(model).eval(),
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: torch.export.Dim("N")}},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # noqa: BLE001 — whatever the exporter raises over a network of any kind
        raise UserError(f"ONNX cannot express this network: {type(error).__name__}: {str(error)[:300]}") from None
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"classes": json.dumps(model.classes)})
    file.write_bytes(proto.SerializeToString())
