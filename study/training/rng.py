"""One seed a trial, one independent stream of random numbers for each thing that draws."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, stream: str) -> torch.Generator:
    """The generator of one named stream: `weights`, `policy`, `shuffle` or `augment`.

    Streams do not touch one another, so two trials of one seed start from the same weights, the same first subset and
    the same shuffles whatever their policy draws: what differs between them is the policy alone. On the CPU, so that
    the draws are the same on every device.
    """
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
