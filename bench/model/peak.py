"""The most memory that tensors of a piece of code held at once, on any device, counted exactly and without a clock.

Counts the storages that torch ops make, from their making to their end; what an op uses inside and frees again is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Peak(TorchDispatchMode):
    """``with Peak() as peak: ...`` then ``peak.bytes``: the peak of what was made inside, what was there before not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.setdefault(tensor.untyped_storage(), 0)  # there before, or counted already
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._end, storage.nbytes())
        self.bytes = max(self.bytes, self._now)
        return out

    def _end(self, size: int) -> None:
        self._now -= size
