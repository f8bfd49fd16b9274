"""One seed a trial, one independent stream of random numbers for each thing that draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, stream: str) -> torch.Generator:
    """The generator of one named stream: `weights`, `policy`, `shuffle` or `augment`.

    Streams do not touch one another, so two trials of one seed start from the same weights, the same first subset and
    the same shuffles whatever their policy draws: what differs between them is the policy alone. On the CPU, so that
    the draws are the same on every device.
    """
    return torch.Generator().manual_seed(stream_seed(seed, stream))


def stream_seed(seed: int, stream: str) -> int:
    """What `generator` seeds the stream with; `network` and `weights` of own networks seed PyTorch's own generators."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The states of PyTorch's global generators: the processor's, and the GPU's where one trains. uint8."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def global_generators(state: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Meanwhile PyTorch's global generators continue from `state`, in which they are left; then as they were before."""
    before = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        state[:] = random_state(device)
        _set_random_state(before, device)


def _set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def seeded_state(seed: int, stream: str, device: torch.device) -> list[torch.Tensor]:
    """Of the global generators, seeded by a trial's stream."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(stream_seed(seed, stream))
        return random_state(device)
