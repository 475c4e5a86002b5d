"""What a KV cache holds of a text whose vision tokens were dropped, and compaction of the caches of earlier layers."""

from __future__ import annotations

import functools
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
        Rows of the text that ``layers`` describe, as the model counts them. Every layer holds all tokens behind them.
    layers : tuple
        Per layer the :class:`KeptRows` of its cache; None if all rows are there.
    plain : bool
        Whether a single token needs no mask and no position ids of its own: the model may then be called without hooks.
    active : bool
        Whether a forward runs in which hooks cut the masks.
    ends_in_image : bool
        Whether the last row of the prompt is a vision token.
    traced : Forward | None
        While a step is being compiled.
    """

    prompt: int
    layers: tuple[KeptRows | None, ...]
    plain: bool = False
    active: bool = False
    ends_in_image: bool = False
    traced: Any = None

    @property
    def first_layer(self) -> int:
        """The first layer that lacks rows; the number of layers if none does."""
        return next((i for i, rows in enumerate(self.layers) if rows is not None), len(self.layers))

    def attach(self, call: LayerCall) -> Any:
        """Store this state on the cache of the call, and return the cache; None without one."""
        if call.cache is not None:
            caches.check_cache(call.cache)
            self.resume(call.cache)
        return call.cache

    def resume(self, cache: Any) -> None:
        """Store this state on a cache whose layers may differ in length."""
        setattr(cache, caches.STATE, self)
        if not isinstance(cache, DroppedCache):
            kind: Any = type(cache)
            cache.__class__ = _dropped_class(kind)
        self.active = True

    def missing(self, layer: int) -> int:
        """Rows of the text that the layer does not hold."""
        rows = self.layers[layer] if layer < len(self.layers) else None
        return 0 if rows is None else self.prompt - rows.keep.shape[1]

    def select(self, select: Any) -> None:
        """Follow the cache to other items of the batch, see :meth:`KeptRows.items`."""
        moved = {id(rows): rows if rows is None else rows.items(select) for rows in self.layers}
        self.layers = tuple(moved[id(rows)] for rows in self.layers)

    def crop(self, count: int) -> None:
        """Forget the last ``count`` rows of the prompt; raises ValueError unless every layer holds them."""
        cut = {id(rows): rows if rows is None else rows.without_last(count, self.prompt) for rows in self.layers}
        if any(rows is not None and cut[id(rows)] is None for rows in self.layers):
            raise ValueError("tokens_to_remove must end behind the vision tokens: TokenDropper dropped some of those to be removed")
        self.layers, self.prompt = tuple(cut[id(rows)] for rows in self.layers), self.prompt - count

    @staticmethod
    def of(cache: Any) -> CacheState | None:
        """The state that is stored on a cache."""
        state: CacheState | None = getattr(cache, caches.STATE, None)
        return state

    @staticmethod
    def remove(cache: Any) -> None:
        """Remove the state of an earlier prompt."""
        if isinstance(cache, DroppedCache):
            cache.__dict__.pop(caches.STATE, None)
            cache.__class__ = type(cache).__mro__[2]


class DroppedCache:
    """A cache of a text with dropped tokens: a mixin in front of the cache's own class.

    To the model the cache has the length of the text, so that position ids and masks come out for all rows; a TokenDropper cuts the
    masks for the layers that lack rows. Without one such a layer would attend to the wrong rows, so :meth:`update` raises an error.
    """

    _v2drop_rows: CacheState | None = None

    @property
    def _state(self) -> CacheState:
        return self._v2drop_rows or CacheState(0, (), plain=True, active=True)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        length = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return 0 if isinstance(length, int) and not length else length + self._state.missing(caches.counted_layer(self, layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
        return length + self._state.missing(caches.counted_layer(self, layer_idx)), offset

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        state = self._state
        if not state.active and (not state.plain or key_states.shape[-2] > 1 or caches.is_static(self)):
            raise ValueError("past_key_values lacks dropped vision tokens: use it in a block of TokenDropper, with any schedule")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        CacheState.remove(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._state.select(lambda x, dim: x.index_select(dim, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._state.select(lambda x, dim: x[(slice(None),) * dim + (indices,)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._state.select(lambda x, dim: x.repeat_interleave(repeats, dim))

    def crop(self, tokens_to_remove: int) -> None:
        state, length = self._state, int(self.get_seq_length())
        count = length - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if (inside := count - (length - state.prompt)) > 0:
            state.crop(inside)
        super().crop(-max(count, 0))  # type: ignore[misc]

    def __copy__(self) -> Any:
        return _restored(type(self).__mro__[2], self.__dict__)

    def __reduce__(self) -> Any:
        return _restored, (type(self).__mro__[2], self.__dict__)


@functools.cache
def _dropped_class(kind: Any) -> Any:
    return type(str(kind.__name__), (DroppedCache, kind), {"__module__": kind.__module__})


def _restored(kind: type, contents: dict[str, Any]) -> Any:
    """A copy of a cache, from its own class: the class with the mixin is no attribute of a module."""
    made = _dropped_class(kind)
    cache = made.__new__(made)
    cache.__dict__.update(contents)
    return cache


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
