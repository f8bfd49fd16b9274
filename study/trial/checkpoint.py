"""A trial's checkpoint: serialised, written beside the database when that is unavailable, read back."""

from __future__ import annotations

import copy
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from storage import checkpoints
from storage.queue import Lease, Queue
from study.training.trainer import FORMAT, Trainer
from study.trial import checkpoint


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in the processor's memory, made by the thread that trains: no other has to wait for the device."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu"]
    return copy.deepcopy(state, {id(tensor): tensor.detach().cpu() for tensor in tensors})


def _restore(trainer: Trainer, queue: Queue, lease: Lease, kept: Path, say: Callable[[str], None]) -> None:
    """Take up the furthest checkpoint there is: the database's, or one that was kept on this machine's disk.

    Whose attempt it came from does not matter: on one kind of device all attempts at a trial pass the same states.
    """
    found = checkpoints.load(queue, lease)
    payloads = [] if found is None or found.payload is None else [found.payload]
    if found is not None and found.payload is None:
        say(f"trial {lease.number}: its checkpoint is damaged (checksum); it starts again from epoch 0")
    aside = checkpoint.kept(kept)
    if aside is not None:
        payloads.append(aside)
    states = [state for payload in payloads if (state := from_bytes(payload)).get("format") == FORMAT]
    if len(states) < len(payloads):
        say(f"trial {lease.number}: its checkpoint is of another version of this program and is not used")
    if states:
        trainer.load_state_dict(max(states, key=lambda state: (len(state["history"]), state["step"])))
        say(f"trial {lease.number} goes on after epoch {len(trainer.history)}")


State = dict[str, Any]


def to_bytes(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(payload: bytes) -> State:
    """weights_only: nothing that comes from a database or a file can run code."""
    state: State = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def keep(path: Path, payload: bytes) -> None:
    """Put a checkpoint that the database could not take into a file of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(hashlib.sha256(payload).digest() + payload)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def kept(path: Path) -> bytes | None:
    """What was kept there, if it is there and whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, payload = content[:32], content[32:]
    return payload if hashlib.sha256(payload).digest() == digest else None
