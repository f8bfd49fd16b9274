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
Shapes = tuple[torch.Size | None, ...]
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

    gave_up = False
    """Set for the whole process where a recording failed: what that leaves behind may make the next one fail too."""

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
        if CudaRecorder.gave_up:
            raise RuntimeError("an earlier recording of this process failed")
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(self.stream),  # left again whatever becomes of the recording
                # thread_local: other threads may do with the device what they like.
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                result = call()
        except RuntimeError:
            CudaRecorder.gave_up = True
            raise
        return _Bounded(graph, self.device), result


class _Bounded:
    """A CUDA graph that lets the host run ahead by a few replays, not by an epoch: who is to stop must stop soon."""

    AHEAD = 16

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self.graph, self.device, self.replays = graph, device, 0
        self.done = [torch.cuda.Event(blocking=True) for _ in range(self.AHEAD)]  # type: ignore[no-untyped-call]

    def replay(self) -> None:
        event = self.done[self.replays % self.AHEAD]
        self.replays += 1
        event.synchronize()  # of AHEAD replays ago; at once if there was none
        self.graph.replay()
        event.record(torch.cuda.current_stream(self.device))


def recorder(device: torch.device) -> Recorder | None:
    """For devices that can record, unless the environment says no."""
    if device.type != "cuda" or os.environ.get(SWITCH) == "0" or CudaRecorder.gave_up:
        return None
    return CudaRecorder(device)


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
        self.taken: Counter[Shapes] = Counter()
        self.recorded: dict[Shapes, _Recorded] = {}
        self.rejected: list[_Recorded] = []
        """Kept: the end of one CUDA graph may take cuBLAS's memory away from the others of its stream."""

    def __call__(self, call: Call, *inputs: Tensor | None) -> Tensor | None:
        """The result may be overwritten by the next call."""
        shapes = tuple(None if each is None else each.shape for each in inputs)
        known = self.recorded.get(shapes)
        if known is not None:
            for place, each in zip(known.inputs, inputs, strict=True):
                if place is not None and each is not None:
                    place.copy_(each)
            known.recording.replay()
            return known.result
        self.taken[shapes] += 1
        if self.recorder is None or self.taken[shapes] != WARM_UPS + 1:
            return self.plainly(call, *inputs)
        return self._record(self.recorder, shapes, call, inputs)

    def plainly(self, call: Call, *inputs: Tensor | None) -> Tensor | None:
        """The call as it is written, which does not count towards its being recorded."""
        return call(*inputs) if self.recorder is None else self.recorder.plainly(lambda: call(*inputs))

    def _record(self, recorder: Recorder, shapes: Shapes, call: Call, inputs: Inputs) -> Tensor | None:
        places = tuple(None if each is None else each.clone() for each in inputs)
        before = _copies(self.state)
        # First as it is written: what memory that took is free again when it is recorded.
        result = self.plainly(call, *inputs)
        after = _copies([*self.state, result])
        self._restore(before)
        try:
            known = _Recorded(places, *recorder.record(lambda: call(*places)))
        except RuntimeError as error:
            self.recorder = None
            self._restore(after)
            warnings.warn(f"steps are not replayed: {_first_cause(error)}", RuntimeWarning, stacklevel=3)
            return result
        known.recording.replay()
        replayed = _copies([*self.state, known.result])
        if torch.are_deterministic_algorithms_enabled() and not all(map(_same_bits, replayed, after)):
            self._restore(after)
            self.rejected.append(known)
            warnings.warn("steps are not replayed: a replay computed other bits", RuntimeWarning, stacklevel=3)
            return result
        self.recorded[shapes] = known
        return known.result

    @torch.no_grad()
    def _restore(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.state, values, strict=False):
            tensor.copy_(value)


def _copies(tensors: list[Tensor] | list[Tensor | None]) -> list[Tensor]:
    return [each.detach().clone() for each in tensors if each is not None]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))  # NaN too


def _first_cause(error: BaseException) -> str:
    """What went wrong in a recording, not that its end failed because of it."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return str(error).splitlines()[0]
