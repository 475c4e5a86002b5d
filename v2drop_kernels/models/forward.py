"""One forward of the decoder: what its hooks share, and the arguments of layers that hold only some rows of the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .adapters import ModelAdapter, caches
from .adapters.arguments import LayerCall
from .adapters.masks import cut_mask
from .caches import CacheState
from .prefill import Prefill
from .rows import KeptRows


@dataclass
class Forward:
    """The state of one forward.

    Attributes
    ----------
    prefill : Prefill | None
        Of a prompt, until the final norm.
    state : CacheState | None
        The rows that each layer's cache holds; None where all layers hold all rows.
    position_ids : Tensor | None
        As the rotary embedding was called with.
    """

    prefill: Prefill | None = None
    state: CacheState | None = None
    position_ids: Any = None
    _masks: list[tuple[KeptRows, Any]] = field(default_factory=list)
    _ropes: list[tuple[KeptRows, Any]] = field(default_factory=list)

    def mask(self, adapter: ModelAdapter, call: LayerCall, layer: int) -> Any:
        """The mask of a layer that lacks rows, made once for all layers that hold the same rows."""
        columns = self.state.layers[layer] if self.state else None
        assert columns is not None
        length = caches.key_count(call.cache, call.hidden.shape[1], layer)
        return _once(self._masks, columns, lambda: self._cut(adapter, call.mask, columns, length))

    def _cut(self, adapter: ModelAdapter, mask: Any, columns: KeptRows, length: int) -> Any:
        assert self.state is not None
        prefill, prompt = self.prefill, self.state.prompt
        if prefill is not None and not prefill.first:
            return cut_mask(mask, columns, prompt, prefill=True, length=length, flash=adapter.flash)
        if prefill is not None and prefill.current is not None and mask is not None and mask.dim() == 4:
            at = prefill.current.keep.clamp(min=0).to(mask.device)[:, None, :, None]
            mask = mask.expand(at.shape[0], -1, -1, -1)
            mask = mask.gather(2, at.expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = cut_mask(mask, columns, prompt, prefill=False, length=length, flash=adapter.flash)
        # A static cache has the same size in every layer, so behind fewer rows there are more columns than the mask is wide.
        return mask[..., :length] if isinstance(mask, torch.Tensor) else mask

    def cut(self, adapter: ModelAdapter, call: LayerCall, layer: int) -> LayerCall:
        """The arguments of a layer that lacks rows."""
        new = call.with_mask(self.mask(adapter, call, layer))
        if self.prefill is not None:
            return new if self.prefill.rope is None else new.with_rope(self.prefill.rope).without_position_ids()
        assert self.state is not None
        rows = self.state.layers[layer]
        assert rows is not None
        if rows.shift is None:
            return new
        rotary, ids = adapter.decoder.rotary_emb, self.position_ids - rows.shift
        return new.with_rope(_once(self._ropes, rows, lambda: rotary.forward(call.hidden, ids)))

    def close(self) -> None:
        """Mark the cache as unused: without hooks it must not be read."""
        if self.state is not None:
            self.state.active = False


def _once(found: list[tuple[KeptRows, Any]], rows: KeptRows, make: Callable[[], Any]) -> Any:
    """``make()``, evaluated once in a forward for all layers that hold the same rows."""
    for known, value in found:
        if known is rows:
            return value
    value = make()
    found.append((rows, value))
    return value
