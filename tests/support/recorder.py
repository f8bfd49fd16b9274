"""A recorder as a CUDA graph is, for the processor: what torch dispatched is dispatched again, on the same tensors.

No Python runs in a replay, so whatever a step keeps outside tensors stays as it was when it was recorded, a tensor that
was replaced by another is written to in vain, and a wait for a number is refused, all as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique2", "masked_select")


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()
        self.earlier: dict[int, tuple[Tensor, Tensor]] = {}
        """Storages from before, each with a copy of what was in it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.partition("::")[2]
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for each in _tensors((args, kwargs)):
            storage = each.untyped_storage()
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self.earlier:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.earlier[storage.data_ptr()] = (whole, whole.clone())
        result = function(*args, **(kwargs or {}))
        for each in _tensors(result):
            if each.untyped_storage().data_ptr() not in self.earlier:
                self.made.add(each.untyped_storage().data_ptr())
        self.calls.append((function, args, kwargs or {}, result))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recording:
    def __init__(self, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        self.calls = calls

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Recorder:
    def plainly(self, call: Callable[[], Tensor | None]) -> Tensor | None:
        return call()

    def record(self, call: Callable[[], Tensor | None]) -> tuple[Recording, Tensor | None]:
        seen = _Dispatched()
        try:
            with seen:
                result = call()
        finally:
            for whole, before in seen.earlier.values():
                whole.copy_(before)
        return Recording(seen.calls), result
