"""Checks a trainer's state that comes from a database or a file before any of it is used.

A checksum shows that a checkpoint is what somebody wrote, not that it fits: wrong shapes, indices beyond the data or
NaN in the history would otherwise fail attempt after attempt (issue 14).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import Tensor

from study.training.augment import SHIFT
from study.training.policies import Kind, Resampling
from study.training.trainer import EpochResult, Trainer

INDICES = ("active", "best_active")
"""Keys of a policy's state that hold indices of training images."""


def validate_state(state: Any, trainer: Trainer) -> None:
    """Whether `state` can be loaded by `trainer`, a new one of the same trial.

    Raises:
        ValueError: it cannot, and why.
    """
    expected = trainer.state_dict()
    _require(isinstance(state, Mapping), "it is no mapping")
    _require(state.keys() == expected.keys(), "its keys differ")
    total = len(trainer.data.train_labels)
    for key in ("network", "optimizer", "shuffles", "augmentation", "seen", "loss_sum", "correct", "invalid"):
        _same_form(state[key], expected[key], key)
    if state["best_network"] is not None:
        _same_form(state["best_network"], expected["network"], "best_network")
    _policy(state["policy"], expected["policy"], total)
    _plan(state, total)
    _require(state["precision"] in ("bf16", "fp32"), "its precision is unknown")
    for key in ("train_seconds", "validation_seconds", "selection_seconds"):
        _require(_is_amount(state[key]), f"{key} is no amount")
    _require(state["joules"] is None or _is_amount(state["joules"]), "joules is no amount")
    _require(isinstance(state["best"], float) and -1.0 <= state["best"] <= 1.0, "its best accuracy is outside [-1, 1]")
    _history(state["history"], trainer)


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _same_form(value: Any, expected: Any, where: str) -> None:
    """The same keys, and tensors of the same shape and dtype."""
    if isinstance(expected, Mapping):
        _require(isinstance(value, Mapping) and value.keys() == expected.keys(), f"the keys of {where} differ")
        for key, below in expected.items():
            _same_form(value[key], below, f"{where}.{key}")
    elif isinstance(expected, Tensor):
        fits = isinstance(value, Tensor) and value.shape == expected.shape and value.dtype == expected.dtype
        _require(fits, f"{where} has another shape or dtype")


def _is_subset(index: Any, total: int) -> bool:
    """Whether it is int64, of shape [n], each of 0..total-1 at most once."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1 or not 1 <= len(index) <= total:
        return False
    return bool((index >= 0).all()) and bool((index < total).all()) and len(torch.unique(index)) == len(index)


def _policy(state: Any, expected: Mapping[str, Any], total: int) -> None:
    _require(isinstance(state, Mapping) and state.keys() == expected.keys(), "the keys of the policy differ")
    for key, value in expected.items():
        if key in INDICES:
            _require(_is_subset(state[key], total), f"policy.{key} is no set of training images")
        elif key == "weights":
            fits = isinstance(state[key], Tensor) and state[key].dtype == value.dtype
            _require(fits and state[key].shape == state["active"].shape, "policy.weights do not fit the active set")
        elif isinstance(value, float):
            _require(isinstance(state[key], float) and not math.isnan(state[key]), f"policy.{key} is no number")
        else:
            _same_form(state[key], value, f"policy.{key}")


def _plan(state: Mapping[str, Any], total: int) -> None:
    order, weights, jitter = state["order"], state["weights"], state["jitter"]
    _require(_is_count(state["step"]), "its step is no count")
    if order is None:
        _require(weights is None and jitter is None and state["step"] == 0, "it is within an epoch without a plan")
        return
    _require(_is_subset(order, total), "its plan is no set of training images")
    if weights is not None:
        fits = isinstance(weights, Tensor) and weights.dtype == torch.float32 and weights.shape == order.shape
        _require(fits, "the weights do not fit the plan")
    if jitter is not None:
        fits = isinstance(jitter, Tensor) and jitter.dtype == torch.int8 and jitter.shape == (len(order), 3)
        _require(fits and bool((jitter.abs() <= SHIFT).all()), "the augmentation does not fit the plan")


def _history(history: Any, trainer: Trainer) -> None:
    _require(isinstance(history, list), "its history is no list")
    names = {field.name for field in fields(EpochResult)}
    for number, row in enumerate(history, 1):
        where = f"epoch {number} of its history"
        _require(isinstance(row, Mapping) and row.keys() == names, f"the keys of {where} differ")
        _require(row["epoch"] == number, f"{where} has another number")
        accuracy, loss = row["accuracy"], row["loss"]
        _require(isinstance(accuracy, float) and 0.0 <= accuracy <= 1.0, f"the accuracy of {where} is outside [0, 1]")
        _require(isinstance(loss, float) and math.isfinite(loss), f"the loss of {where} is not finite")
        _require(_is_count(row["images"], 1) and _is_count(row["seen"]), f"the images of {where} are no counts")
        for key in ("train_seconds", "validation_seconds", "selection_seconds"):
            _require(_is_amount(row[key]), f"{key} of {where} is no amount")
        _require(row["joules"] is None or _is_amount(row["joules"]), f"the joules of {where} are no amount")
        _resampling(row["resampling"], where)
    if trainer.images is None:
        _require(len(history) <= trainer.epochs, "its history is longer than the trial")
    else:
        _require(sum(row["images"] for row in history) <= trainer.images, "its history is longer than the trial")


def _resampling(row: Any, where: str) -> None:
    names = {field.name for field in fields(Resampling)}
    _require(isinstance(row, Mapping) and row.keys() == names, f"the resampling of {where} has other keys")
    _require(row["kind"] in get_args(Kind), f"the resampling of {where} is of an unknown kind")
    _require(_is_count(row["k"]) and _is_amount(row["beta"]), f"the resampling of {where} has no counts")
