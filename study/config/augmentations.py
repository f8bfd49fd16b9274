"""The augmentations of `data.augment`: names with arguments, such as `flip` or `ColorJitter(brightness=0.4)`."""

from __future__ import annotations

import ast
import difflib
from typing import Any

PER_IMAGE = ("flip", "crop")
"""Ours: drawn for each image."""
TRANSFORMS = (
    "AugMix", "AutoAugment", "ColorJitter", "ElasticTransform", "GaussianBlur", "GaussianNoise", "RandAugment",
    "RandomAdjustSharpness", "RandomAffine", "RandomAutocontrast", "RandomChannelPermutation", "RandomEqualize",
    "RandomErasing", "RandomGrayscale", "RandomHorizontalFlip", "RandomInvert", "RandomPerspective",
    "RandomPhotometricDistort", "RandomPosterize", "RandomRotation", "RandomSolarize", "RandomVerticalFlip",
    "TrivialAugmentWide",
)  # fmt: skip
"""Classes of torchvision.transforms.v2 that turn uint8 images into uint8 images of the same shape."""
_EXACT = {name.lower(): name for name in (*PER_IMAGE, *TRANSFORMS)} | {"trivialaugment": "TrivialAugmentWide"}
MOST_LENGTH = 300

Step = tuple[str, dict[str, Any]]


def parse_step(text: str) -> Step:
    """An augmentation's exact name and its arguments, from `NAME` or `NAME(argument=value, …)`.

    Raises:
        ValueError: not of that form, an unknown name, an argument that is no literal.
    """
    rule = "an augmentation is NAME or NAME(argument=value)"
    if len(text) > MOST_LENGTH:
        raise ValueError(f"{rule} of at most {MOST_LENGTH} characters, got {text[:40]!r}…")
    try:
        node = ast.parse(text.strip(), mode="eval").body
        arguments: dict[str, Any] = {}
        if isinstance(node, ast.Call) and not node.args:
            arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            node = node.func
        if not isinstance(node, ast.Name) or "None" in arguments:
            raise ValueError
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{rule}, got {text!r}") from None
    name = _EXACT.get(node.id.lower())
    if name is None:
        close = difflib.get_close_matches(node.id.lower(), _EXACT, n=1)
        hint = f" (did you mean {_EXACT[close[0]]!r}?)" if close else ""
        raise ValueError(f"no augmentation {node.id!r}{hint}; there are: {', '.join((*PER_IMAGE, *TRANSFORMS))}")
    if arguments and name in PER_IMAGE:
        raise ValueError(f"{name} takes no arguments, got {text!r}")
    return name, arguments


def steps(value: bool | str | tuple[str, ...]) -> list[Step]:
    """What `data.augment` of one trial means: `true` is flip and crop; a text joins several by `+`."""
    if isinstance(value, bool):
        return [(name, {}) for name in PER_IMAGE] if value else []
    if isinstance(value, str):
        value = () if value == "none" else tuple(value.split("+"))
    return [parse_step(each) for each in value]
