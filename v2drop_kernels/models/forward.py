"""One forward of the decoder: what its hooks share, and the arguments of layers that hold only some rows of the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .adapters import ModelAdapter, caches
from .adapters.arguments import LayerCall, cut_rope
from .adapters.capabilities import STATEFUL
from .adapters.masks import cut_mask, position_mask, state_mask
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
    visible : Tensor | None
        bool ``[B, prompt + later]`` of the mask that the model was called with: not padding.
    """

    prefill: Prefill | None = None
    state: CacheState | None = None
    position_ids: Any = None
    visible: Any = None
    _masks: list[tuple[KeptRows, object, Any]] = field(default_factory=list)
    _ropes: list[tuple[KeptRows, object, Any]] = field(default_factory=list)

    def mask(self, adapter: ModelAdapter, call: LayerCall, layer: int) -> Any:
        """The mask of a layer that lacks rows, made once for all layers that hold the same rows."""
        columns = self.state.layers[layer] if self.state else None
        assert columns is not None
        if adapter.kinds[layer] in STATEFUL:
            return state_mask(call.mask, None if self.prefill is None else self.prefill.current)
        length = caches.key_count(call.cache, call.hidden.shape[1], layer)
        kind = adapter.kinds[layer]
        return _once(self._masks, columns, kind, lambda: self._cut(adapter, call, layer, columns, length))

    def rope(self, call: LayerCall) -> Any:
        """The rotary tables of the rows that are present, for a layer that was given ``call.rope`` for all rows."""
        prefill = self.prefill
        assert prefill is not None
        if prefill.current is None or call.rope is None:  # some models have blocks without positions
            return call.rope
        if prefill.position_ids is not None or (prefill.rope is not None and prefill.rope_source is call.rope):
            return prefill.rope
        keep, tables = prefill.current.keep, call.rope  # of another kind of layer, or not of the form that a drop cuts
        return _once(self._ropes, prefill.current, id(tables), lambda: cut_rope(tables, keep))

    def _cut(self, adapter: ModelAdapter, call: LayerCall, layer: int, columns: KeptRows, length: int) -> Any:
        assert self.state is not None
        prefill, prompt, mask = self.prefill, self.state.prompt, call.mask
        if prefill is None and adapter.windowed:  # a window's cache forgets rows by their number among those that it received
            new = call.hidden.shape[1]
            return position_mask(
                columns.keep, prompt, new, length, self.visible, call.hidden, window=adapter.window(layer),
                later=caches.layer_tokens(call.cache, layer) - columns.keep.shape[1] + new,
                chunked=adapter.kinds[layer] == "chunked_attention", attention=adapter.attention,
            )  # fmt: skip
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
            if self.prefill.current is None:
                return new
            keep = self.prefill.current.keep
            return new.with_rope(self.rope(call)).with_ids_of(keep, flash=adapter.flash).with_rows_of(keep)
        assert self.state is not None
        rows = self.state.layers[layer]
        assert rows is not None
        if rows.shift is None:
            return new
        rotary, ids = adapter.decoder.rotary_emb, self.position_ids - rows.shift
        return new.with_rope(_once(self._ropes, rows, None, lambda: rotary.forward(call.hidden, ids)))

    def close(self) -> None:
        """Mark the cache as unused: without hooks it must not be read."""
        if self.state is not None:
            self.state.active = False


def _once(found: list[tuple[KeptRows, object, Any]], rows: KeptRows, kind: object, make: Callable[[], Any]) -> Any:
    """``make()``, evaluated once in a forward for all layers of a kind that hold the same rows."""
    for known, other, value in found:
        if known is rows and other == kind:
            return value
    value = make()
    found.append((rows, kind, value))
    return value
