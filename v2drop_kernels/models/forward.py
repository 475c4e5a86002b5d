"""One forward of the decoder: what its hooks share, and the arguments of layers that hold only some rows of the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .adapters import ModelAdapter, caches
from .adapters.arguments import LayerCall
from .adapters.masks import cut_mask
from .caches import CacheState
from .prefill import Prefill
from .rows import KeptRows


@dataclass
class Forward:
    """The state of one forward: of a prefill, of decoding steps, or of neither.

    Attributes
    ----------
    prefill : Prefill | None
    decoding : CacheState | None
        Of the cache that the tokens of this forward are added to.
    position_ids : Tensor | None
        As the rotary embedding was called with.
    step_mask : Tensor | None
        In decoding, over all rows of the prompt, where the model cannot make it because the first layer lacks rows.
    """

    prefill: Prefill | None = None
    decoding: CacheState | None = None
    position_ids: Any = None
    step_mask: Any = None
    _token: object = field(default_factory=object)  # identifies this forward to KeptRows.once

    def mask(self, adapter: ModelAdapter, call: LayerCall, layer: int, rows: KeptRows, state: CacheState) -> Any:
        """The mask of a layer that holds only ``rows``, made once for all layers that hold the same rows."""
        prefill = self.prefill is not None
        length = caches.key_count(call.cache, call.hidden.shape[1], layer)
        mask = call.mask if prefill or not state.first_is_short else self.step_mask
        make = lambda: cut_mask(mask, rows, state.prompt, prefill=prefill, length=length, flash=adapter.flash)
        return rows.once("mask", self._token, make)

    def cut(self, adapter: ModelAdapter, call: LayerCall, layer: int, rows: KeptRows, state: CacheState) -> LayerCall:
        """The arguments of a layer that holds only ``rows``."""
        new = call.with_mask(self.mask(adapter, call, layer, rows, state))
        if self.prefill is not None:
            return new.with_rope(self.prefill.rope).without_position_ids()
        if rows.shift is None:
            return new
        rotary, ids = adapter.decoder.rotary_emb, self.position_ids - rows.shift
        return new.with_rope(rows.once("rope", self._token, lambda: rotary.forward(call.hidden, ids)))
