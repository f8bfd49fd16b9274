"""A step recorded as a CUDA graph and replayed: one launch instead of two hundred."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

WARM_UPS = 3
"""Steps taken as they are written before one is recorded: cuDNN and cuBLAS choose and load their kernels in them."""
SWITCH = "STUDY_CUDA_GRAPHS"
"""Environment variable: 0 leaves all steps as they are written."""

Inputs = tuple[Tensor | None, ...]
Call = Callable[..., Tensor | None]


class Recording(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    """Records what a call asks of a device. Recording does not execute it."""

    def plainly(self, call: Callable[[], Tensor | None]) -> Tensor | None:
        """Execute the call where it would be recorded."""

    def record(self, call: Callable[[], Tensor | None]) -> tuple[Recording, Tensor | None]:
        """What replays the call, and the tensor in which each replay leaves the result.

        Raises:
            RuntimeError: the call does something that cannot be recorded, such as waiting for the device.
        """


class CudaRecorder:
    """CUDA graphs on one device, all in one pool of memory, for between replays none of them needs any of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def plainly(self, call: Callable[[], Tensor | None]) -> Tensor | None:
        # On the stream of the recordings, because autograd remembers the stream of a parameter's first gradient.
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Tensor | None]) -> tuple[Recording, Tensor | None]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            # thread_local: the thread that stores checkpoints copies from the device meanwhile.
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = call()
        return graph, result


def recorder(device: torch.device) -> Recorder | None:
    """For devices that can record, unless the environment says no."""
    return CudaRecorder(device) if device.type == "cuda" and os.environ.get(SWITCH) != "0" else None


@dataclass
class _Recorded:
    inputs: Inputs
    recording: Recording
    result: Tensor | None


class Step:
    """Does what `call(*inputs)` does, from the fourth time on for inputs of the same shapes by replaying it.

    Args:
        recorder: None: every call is executed as it is written.
        state: all tensors that outlive a call and that it changes. They must stay the same tensors, changed in place.

    Under deterministic algorithms a recording is used only if its first replay leaves the bits in `state` and result
    that the call itself leaves; else a warning says so, and such calls are executed as they are written.
    """

    def __init__(self, recorder: Recorder | None, state: list[Tensor]) -> None:
        self.recorder, self.state = recorder, state
        self.taken: Counter[tuple[object, ...]] = Counter()
        self.recorded: dict[tuple[object, ...], _Recorded | None] = {}
        """By the inputs' shapes; None: cannot be used."""

    def __call__(self, call: Call, *inputs: Tensor | None) -> Tensor | None:
        """The result may be overwritten by the next call."""
        if self.recorder is None:
            return call(*inputs)
        shapes = tuple(None if each is None else each.shape for each in inputs)
        known = self.recorded.get(shapes)
        if known is not None:
            for place, each in zip(known.inputs, inputs, strict=True):
                if place is not None and each is not None:
                    place.copy_(each)
            known.recording.replay()
            return known.result
        self.taken[shapes] += 1
        if self.taken[shapes] <= WARM_UPS or shapes in self.recorded:
            return self.recorder.plainly(lambda: call(*inputs))
        return self._record(self.recorder, shapes, call, inputs)

    def _record(self, recorder: Recorder, shapes: tuple[object, ...], call: Call, inputs: Inputs) -> Tensor | None:
        """This call is executed as it is written, once it has been recorded and replayed."""
        places = tuple(None if each is None else each.clone() for each in inputs)
        before, known, replayed = _copies(self.state), None, []
        try:
            known = _Recorded(places, *recorder.record(lambda: call(*places)))
            known.recording.replay()
            replayed = _copies([*self.state, known.result])
        except RuntimeError as error:
            known = None
            warnings.warn(f"steps are not replayed: {str(error).splitlines()[0]}", RuntimeWarning, stacklevel=2)
        with torch.no_grad():
            for tensor, value in zip(self.state, before, strict=True):
                tensor.copy_(value)
        result = recorder.plainly(lambda: call(*inputs))
        if known is not None and torch.are_deterministic_algorithms_enabled():
            plain = [each for each in (*self.state, result) if each is not None]
            if not all(map(torch.equal, replayed, plain)):
                known = None
                warnings.warn("steps are not replayed: a replay computed other bits", RuntimeWarning, stacklevel=2)
        self.recorded[shapes] = known
        return result


def _copies(tensors: list[Tensor] | list[Tensor | None]) -> list[Tensor]:
    return [each.detach().clone() for each in tensors if each is not None]
