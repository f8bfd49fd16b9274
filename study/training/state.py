"""Checks a trainer's state that comes from a database or a file before any of it is used.

A checksum shows that a checkpoint is what somebody wrote, not that it fits: wrong shapes, indices beyond the data or
NaN in the history would otherwise fail attempt after attempt (issue 14).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import Tensor

from study.training.augment import SHIFT
from study.training.policies import Kind, Policy, Resampling, active_fault
from study.training.trainer import VALIDATION_BATCH, EpochResult, Trainer

INDICES = ("active", "best_active")
"""Keys of the state of our policies that hold indices of training images."""
GENERATORS = ("shuffles", "augmentation", "policy.draws", "random.0")
LARGEST_AMOUNT = 1e12
"""Seconds or joules: the sum of a trial's epochs stays finite."""


def validate_state(state: Any, trainer: Trainer) -> None:
    """Check that `state` can be loaded by `trainer`, a new one of the same trial, and that training can end from there.

    Values that only training can produce, such as weights, are checked for their form and for being finite.

    Raises:
        ValueError: it cannot, and why.
    """
    expected = trainer.state_dict()
    _require(isinstance(state, Mapping), "it is no mapping")
    _require(state.keys() == expected.keys(), "its keys differ")
    same = ("network", "average", "optimizer", "random", "shuffles", "augmentation", "seen", "loss_sum")
    for key in (*same, "validation_loss", "hits", "answers", "invalid"):
        _same_form(state[key], expected[key], key)
    validation_images = len(trainer.data.validation_labels)
    for key in ("hits", "answers", "invalid"):
        counts = bool((state[key] >= 0).all()) and int(state[key].sum()) <= validation_images
        _require(counts, f"{key} is no count of validation images")
    policy = _policy(state["policy"], expected["policy"], trainer)
    _history(state["history"], trainer)
    _best(state, expected["network"], trainer)
    _plan(state, trainer, policy)
    _require(state["precision"] in ("bf16", "fp32"), "its precision is unknown")
    for key in ("train_seconds", "validation_seconds", "selection_seconds"):
        _require(_is_amount(state[key]), f"{key} is no amount")
    _require(state["joules"] is None or _is_amount(state["joules"]), "joules is no amount")


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= LARGEST_AMOUNT  # NaN is neither


def _is_count(value: Any, most: int, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_tensor(value: Any, dtype: torch.dtype) -> bool:
    """Whether it is plain memory of its own: neither sparse, nor without storage, nor one element shown many times."""
    plain = type(value) is Tensor and not value.is_nested and value.layout is torch.strided
    if not plain or value.device.type != "cpu" or value.dtype != dtype or value.requires_grad:
        return False
    return bool(value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last))


def _same_form(value: Any, expected: Any, where: str) -> None:
    """The same keys, and tensors of the same shape and dtype."""
    if isinstance(expected, Mapping):
        _require(isinstance(value, Mapping) and value.keys() == expected.keys(), f"the keys of {where} differ")
        for key, below in expected.items():
            _same_form(value[key], below, f"{where}.{key}")
    elif isinstance(expected, Tensor):
        fits = _is_tensor(value, expected.dtype) and value.shape == expected.shape
        _require(fits, f"{where} has another shape or dtype")
        _require(bool(torch.isfinite(value).all()), f"{where} has values that are not finite")
        if where in GENERATORS:
            _generator(value, where)
    elif isinstance(expected, list):
        _require(isinstance(value, list) and len(value) == len(expected), f"{where} has another length")
        for number, (one, other) in enumerate(zip(value, expected, strict=True)):
            _same_form(one, other, f"{where}.{number}")
    elif expected is None:
        _require(value is None, f"{where} is not of this trial")


def _generator(state: Tensor, where: str) -> None:
    try:
        torch.Generator().set_state(state)
    except RuntimeError:
        raise ValueError(f"{where} is no state of a generator") from None


def _is_subset(index: Any, total: int) -> bool:
    """Whether it is int64, of shape [n], each of 0..total-1 at most once."""
    if not _is_tensor(index, torch.int64) or index.dim() != 1 or not 1 <= len(index) <= total:
        return False
    return bool((index >= 0).all()) and bool((index < total).all()) and len(torch.unique(index)) == len(index)


def _policy(state: Any, expected: Mapping[str, Any], trainer: Trainer) -> Policy:
    """The trial's policy in this state."""
    total = len(trainer.data.train_labels)
    _require(isinstance(state, Mapping) and state.keys() == expected.keys(), "the keys of the policy differ")
    if type(trainer.policy).__module__ == Policy.__module__:  # the form of other policies' state is their own business
        _known_policy(state, expected, total)
    policy = copy.deepcopy(trainer.policy)
    try:
        policy.load_state_dict(copy.deepcopy(dict(state)))
        fault = active_fault(policy, total)
    except Exception as error:  # noqa: BLE001 - own code may raise anything
        raise ValueError(f"the policy does not load its state ({type(error).__name__})") from None
    _require(not fault, f"the policy's {fault}")
    return policy


def _known_policy(state: Mapping[str, Any], expected: Mapping[str, Any], total: int) -> None:
    for key, value in expected.items():
        if key in INDICES:
            _require(_is_subset(state[key], total), f"policy.{key} is no set of training images")
            if "weights" not in expected:  # a policy with weights chooses how many images it trains on
                _require(state[key].shape == value.shape, f"policy.{key} has another number of images")
        elif key == "weights":
            _weights(state[key], state["active"], "policy.weights do not fit the active set")
        elif isinstance(value, float):  # an accuracy, before the first epoch -inf
            number = state[key]
            fits = isinstance(number, float) and (0.0 <= number <= 1.0 or number == -math.inf)
            _require(fits, f"policy.{key} is no accuracy")
        else:
            _same_form(state[key], value, f"policy.{key}")


def _weights(weights: Any, index: Tensor, fault: str) -> None:
    fits = _is_tensor(weights, torch.float32) and weights.shape == index.shape
    _require(fits and bool((torch.isfinite(weights) & (weights > 0)).all()), fault)


def _best(state: Mapping[str, Any], network: Mapping[str, Any], trainer: Trainer) -> None:
    scores = [row[trainer.options.metric] for row in state["history"]]
    keeps_network = trainer.options.keep_best or trainer.data.test_labels is not None
    is_number = isinstance(state["best"], float)
    _require(is_number and state["best"] == max(scores, default=-1.0), "its best accuracy is not its history's")
    if keeps_network and scores:
        _same_form(state["best_network"], network, "best_network")
    else:
        _require(state["best_network"] is None, "it has a best network before any epoch or without a test split")


def _plan(state: Mapping[str, Any], trainer: Trainer, policy: Policy) -> None:
    """The images of the epoch that is being trained, in their order; none between two epochs."""
    order, weights, jitter, step = state["order"], state["weights"], state["jitter"], state["step"]
    total = len(trainer.data.train_labels)
    if order is None:
        between = weights is None and jitter is None and _is_count(step, most=0)
        _require(between, "it is within an epoch without a plan")
        return
    _require(_is_subset(order, total), "its plan is no set of training images")
    active = policy.active
    length = len(active)
    if trainer.images is not None:
        length = min(length, trainer.images - sum(row["images"] for row in state["history"]))
    is_drawn = len(order) == length and bool(torch.isin(order, active).all())
    _require(is_drawn, "its plan is not of the policy's active set")
    steps = trainer.train_steps(length)
    steps += math.ceil(len(trainer.data.validation_labels) / VALIDATION_BATCH)
    _require(_is_count(step, most=steps - 1), "its step is outside the epoch")
    _require((weights is None) == (policy.weights is None), "the weights of its plan are not its policy's")
    if weights is not None:
        _weights(weights, order, "the weights do not fit the plan")
    _require((jitter is None) == (not trainer.options.augmentation.jitters), "its augmentation is not the trial's")
    if jitter is not None:
        fits = _is_tensor(jitter, torch.int8) and jitter.shape == (len(order), 3)
        _require(fits and bool((jitter.abs() <= SHIFT).all()), "the augmentation does not fit the plan")


def _history(history: Any, trainer: Trainer) -> None:
    _require(isinstance(history, list), "its history is no list")
    names = {field.name for field in fields(EpochResult)}
    total = len(trainer.data.train_labels)
    for number, row in enumerate(history, 1):
        where = f"epoch {number} of its history"
        _require(isinstance(row, Mapping) and row.keys() == names, f"the keys of {where} differ")
        _require(_is_count(row["epoch"], number, number), f"{where} has another number")
        for key in ("accuracy", "balanced_accuracy", "macro_f1"):
            score = row[key]
            _require(isinstance(score, float) and 0.0 <= score <= 1.0, f"the {key} of {where} is outside [0, 1]")
        for key in ("loss", "validation_loss"):
            _require(isinstance(row[key], float) and math.isfinite(row[key]), f"the {key} of {where} is not finite")
        counts = _is_count(row["images"], total, least=1) and _is_count(row["seen"], total, least=1)
        _require(counts, f"the images of {where} are no counts")
        for key in ("train_seconds", "validation_seconds", "selection_seconds"):
            _require(_is_amount(row[key]), f"{key} of {where} is no amount")
        _require(row["joules"] is None or _is_amount(row["joules"]), f"the joules of {where} are no amount")
        _resampling(row["resampling"], total, where)
    if trainer.images is None:
        _require(len(history) <= trainer.epochs, "its history is longer than the trial")
    else:
        _require(sum(row["images"] for row in history) <= trainer.images, "its history is longer than the trial")


def _resampling(row: Any, total: int, where: str) -> None:
    names = {field.name for field in fields(Resampling)}
    _require(isinstance(row, Mapping) and row.keys() == names, f"the resampling of {where} has other keys")
    _require(row["kind"] in get_args(Kind), f"the resampling of {where} is of an unknown kind")
    _require(_is_count(row["k"], total) and _is_amount(row["beta"]), f"the resampling of {where} has no counts")
