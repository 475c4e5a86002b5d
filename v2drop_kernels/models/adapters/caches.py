"""transformers' cache classes: which can hold layers of different lengths, and what is stored on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

STATE = "_v2drop_rows"  # attribute of a cache that holds its CacheState


def check_cache(cache: Any) -> None:
    """Raise ValueError unless every layer of the cache keeps its own length."""
    from transformers import cache_utils

    kinds = {type(layer) for layer in getattr(cache, "layers", [None])} | {getattr(cache, "layer_class_to_replicate", None)}
    known = {cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer, cache_utils.StaticLayer, None}
    known.add(getattr(cache_utils, "LinearAttentionLayer", None))
    quantised = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
    odd = sorted(
        kind.__name__
        for kind in kinds - known
        if isinstance(kind, type) and not (kind.__module__ == quantised.__module__ and issubclass(kind, quantised))
    )
    if odd or not hasattr(cache, "layers"):
        what = odd[0] if odd else type(cache).__name__
        raise ValueError(f"past_key_values must be a DynamicCache, or a StaticCache with full attention; {what} cannot be ragged")


def check_plain(cache: Any) -> None:
    """Raise ValueError unless keys and values can be read and replaced: they are neither quantised nor offloaded."""
    from transformers import cache_utils

    quantised = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
    if getattr(cache, "offloading", False) or any(isinstance(layer, quantised) for layer in cache.layers):
        raise ValueError("compact_earlier_kv needs a cache that is neither quantised nor offloaded")


def is_static(cache: Any) -> bool:
    """Whether keys and values are preallocated."""
    from transformers.cache_utils import StaticLayer

    return any(isinstance(layer, StaticLayer) for layer in cache.layers)


def cached_tokens(cache: Any) -> int:
    """Tokens in the cache by its first layer; 0 without a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def layer_tokens(cache: Any, layer: int) -> int:
    """Tokens that a layer has received, also those that its window forgot."""
    return int(cache.layers[layer].get_seq_length())


def _counts(layer: Any) -> bool:
    """Whether a layer has keys and values, not a state."""
    return hasattr(layer, "get_seq_length")


def counted_layer(cache: Any, layer: int) -> int:
    """The layer whose length transformers takes for that of ``layer``: itself, or the first with keys and values."""
    if layer >= len(cache.layers) or _counts(cache.layers[layer]):
        return layer
    return next((i for i, x in enumerate(cache.layers) if _counts(x)), layer)


def check_one_length(cache: Any) -> None:
    """Raise ValueError if the layers differ in length. A static layer's length is on the device and is not read."""
    lengths = {n for layer in cache.layers if _counts(layer) and isinstance(n := layer.get_seq_length(), int)}
    if len(lengths) > 1:
        raise ValueError("past_key_values must be of a prefill under a TokenDropper, but its layers differ in length")


def key_count(cache: Any, new: int, layer: int) -> int:
    """Number of keys that a layer attends to when ``new`` tokens are added."""
    if cache is None or layer >= len(cache.layers):
        return new
    return int(cache.layers[layer].get_mask_sizes(new)[0])


def filled_layers(cache: Any, start: int, stop: int) -> list[Any]:
    """The layers ``start`` to ``stop`` that hold keys; under gradient checkpointing nothing is cached."""
    return [layer for layer in cache.layers[start:stop] if layer.is_initialized]


def keys_and_values(layers: Sequence[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in layers]


def replace_keys_and_values(layers: Sequence[Any], kv: Any) -> None:
    """Store compacted keys and values in dynamic layers."""
    for layer, (keys, values) in zip(layers, kv, strict=True):
        layer.keys, layer.values = keys, values


def shorten_static(layers: Sequence[Any], length: int) -> None:
    """Set the length of static layers whose first ``length`` rows were compacted in place."""
    for layer in layers:
        layer.cumulative_length.fill_(length)
