"""A trial's checkpoint: serialised, read back and checked; on this machine's disk while the database is unavailable."""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from storage import checkpoints
from storage.queue import Lease, Queue
from study.training.state import validate_state
from study.training.trainer import FORMAT, Trainer
from study.trial.logged import NOT_ON_CONSOLE

logger = logging.getLogger(__name__)

State = dict[str, Any]
Identity = Mapping[str, Any]
"""What a checkpoint belongs to: study, parameters, seed, data. One of another identity is not used."""


def on_host(state: State) -> State:
    """A copy in the processor's memory, made by the thread that trains: no other has to wait for the device."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu"]
    return copy.deepcopy(state, {id(tensor): tensor.detach().cpu() for tensor in tensors})


def to_bytes(state: State, identity: Identity) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "identity": dict(identity), "state": state}, buffer)
    return buffer.getvalue()


def from_bytes(payload: bytes, identity: Identity, trainer: Trainer) -> State:
    """The state that `to_bytes` stored, once it is known to fit.

    `weights_only`: nothing that comes from a database or a file can run code.

    Raises:
        ValueError: it is unreadable, of another version, of another identity, or cannot be loaded by `trainer`.
    """
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 — whatever unpickling foreign bytes may raise
        raise ValueError(f"it is unreadable ({type(error).__name__})") from None
    try:
        return _checked(content, identity, trainer)
    except (RuntimeError, TypeError) as error:  # such as a comparison with a tensor
        raise ValueError(f"it is of another form ({type(error).__name__})") from None


def _checked(content: Any, identity: Identity, trainer: Trainer) -> State:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("it is of another version of this program")
    stored = content.get("identity")
    if not isinstance(stored, dict) or stored.keys() != identity.keys():
        raise ValueError("it does not say to which trial it belongs")
    if different := [key for key in identity if stored[key] != identity[key]]:
        raise ValueError(f"it belongs to another trial (different: {', '.join(different)})")
    state: State = content.get("state", {})
    validate_state(state, trainer)
    return state


def restore(
    make_trainer: Callable[[], Trainer], queue: Queue, lease: Lease, fallback: Path, identity: Identity
) -> Trainer:
    """A trainer at the furthest checkpoint there is: the database's, or one on this machine's disk; or a new one.

    Which attempt wrote it does not matter: on one kind of device all attempts at a trial pass the same states. A
    checkpoint that cannot be used is dropped with one line, and the trial starts from epoch 0.
    """
    trainer = make_trainer()
    payloads: list[bytes] = []
    try:
        stored = checkpoints.load(queue, lease)
    except OSError as error:
        _drop(lease, f"its store cannot be read: {error}")
        stored = None
    if stored is not None and stored.payload is not None:
        payloads.append(stored.payload)
    elif stored is not None:
        _drop(lease, "it is damaged (checksum)")
    if (local := read_fallback(fallback)) is not None:
        payloads.append(local)
    states = []
    for payload in payloads:
        try:
            states.append(from_bytes(payload, identity, trainer))
        except ValueError as error:
            _drop(lease, str(error))
    for state in sorted(states, key=lambda state: (len(state["history"]), state["step"]), reverse=True):
        try:
            trainer.load_state_dict(state)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:  # such as a generator's bytes
            _drop(lease, f"it cannot be loaded: {error}")
            trainer = make_trainer()
            continue
        logger.info("trial %d resumes after epoch %d", lease.number, len(trainer.history))
        return trainer
    if lease.token > 1:
        logger.info("trial %d has no checkpoint: it starts from epoch 0", lease.number, extra=NOT_ON_CONSOLE)
    return trainer


def _drop(lease: Lease, reason: str) -> None:
    logger.warning("trial %d: its checkpoint is not used: %s", lease.number, " ".join(reason.split()))


def write_fallback(path: Path, payload: bytes) -> None:
    """Store a checkpoint that the database could not take in a file that only this user can read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:  # mode 0600
        file.write(hashlib.sha256(payload).digest() + payload)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


def read_fallback(path: Path) -> bytes | None:
    """What `write_fallback` stored there, if it is there and whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, payload = content[:32], content[32:]
    return payload if hashlib.sha256(payload).digest() == digest else None
