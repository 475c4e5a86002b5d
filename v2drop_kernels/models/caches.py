"""What a KV cache must know about the drops in it, and compaction of the caches of earlier layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.compact import compact_
from .adapters import caches, masks
from .adapters.arguments import LayerCall
from .rows import KeptRows


@dataclass
class CacheState:
    """The rows that each layer's cache holds. It is stored on the cache, so copies of the cache have it too.

    Attributes
    ----------
    prompt : int
        Rows of the prompt as the model counts them.
    layers : tuple
        Per layer the :class:`KeptRows` of its cache; None if all rows are there.
    visible : Tensor | None
        bool ``[B, prompt]``: which rows are not padding, if the prompt came with a 4-D mask, as ``generate`` makes it for
        static caches.
    """

    prompt: int
    layers: tuple[KeptRows | None, ...]
    visible: torch.Tensor | None = None

    @property
    def first_is_short(self) -> bool:
        """Whether the first layer already lacks rows; the model takes its length for the length of the text."""
        return self.layers[0] is not None

    def attach(self, call: LayerCall, rows: int) -> Any:
        """Store this state on the cache of the call, and return the cache; None without one."""
        cache = call.cache
        if cache is not None:
            caches.check_cache(cache)
            setattr(cache, caches.STATE, self)
            mask = call.mask
            if self.visible is None and mask is not None and mask.dim() == 4 and caches.is_static(cache):
                # A copy: a view would keep the whole mask in memory as long as the cache.
                self.visible = masks.last_row(mask, rows).clone()
        return cache

    @staticmethod
    def of(cache: Any) -> CacheState | None:
        """The state that is stored on a cache."""
        state: CacheState | None = getattr(cache, caches.STATE, None)
        return state

    @staticmethod
    def remove(cache: Any) -> None:
        """Remove the state of an earlier prompt."""
        if cache is not None and hasattr(cache, caches.STATE):
            delattr(cache, caches.STATE)


def compact_static(
    layers: Sequence[Any], keep: torch.Tensor, *, ragged: bool, mask: torch.Tensor | None, rows: int, backend: str | None
) -> None:
    """Compact the preallocated keys and values of earlier layers in place.

    Parameters
    ----------
    layers : sequence
        The filled layers of a static cache.
    keep : Tensor
        int64 ``[B, S]``: rows to keep.
    ragged : bool
        Whether ``keep`` has padding.
    mask : Tensor | None
        4-D mask of the prompt.
    rows : int
        Rows of the prompt.
    backend : str | None
        As in :func:`v2drop_kernels.compact_`.

    Raises
    ------
    ValueError
        Items of different lengths, or padding: a static layer has one length for the whole batch.
    """
    if ragged or (mask is not None and not bool(masks.last_row(mask, rows).all())):
        raise ValueError("compact_earlier_kv with a static cache needs items of one length without padding")
    compact_(keep, caches.keys_and_values(layers), backend=backend)
    caches.shorten_static(layers, keep.shape[1])
