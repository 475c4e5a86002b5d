"""Decoding behind a cache whose layers differ in length."""

from __future__ import annotations

from typing import Any

import torch

from .adapters import ModelAdapter, caches
from .adapters.masks import full_attention, step_mask
from .adapters.spans import placeholder_runs
from .caches import CacheState
from .forward import Forward


def begin_step(
    adapter: ModelAdapter, top: dict[str, Any], decoder: dict[str, Any], cached: int, forward: Forward
) -> dict[str, Any] | None:
    """Prepare a forward behind a filled cache.

    Parameters
    ----------
    adapter : ModelAdapter
    top, decoder : dict
        Arguments of the model and of its decoder, by name.
    cached : int
        Tokens in the first layer's cache.
    forward : Forward
        Receives the state of the cache.

    Returns
    -------
    dict | None
        New arguments of the decoder; None: they need no change.

    Raises
    ------
    ValueError
        The tokens contain an image, or the layers of the cache differ in length for a reason unknown to this package.
    """
    tokens: Any = top.get("input_ids") if top.get("input_ids") is not None else top["inputs_embeds"]
    if tokens.shape[1] > 1 and tokens.dim() == 2 and placeholder_runs(tokens, adapter.token_ids):
        raise ValueError("input_ids must not bring images behind a filled cache: chunked prefill and later turns with images "
                         "are not supported")  # fmt: skip
    cache: Any = decoder["past_key_values"]
    forward.decoding = state = CacheState.of(cache)
    if state is None:
        caches.check_one_length(cache)
        return None
    return _full_length(adapter, top, decoder, state, cached, tokens, forward) if state.first_is_short else None


def _full_length(
    adapter: ModelAdapter, top: dict[str, Any], decoder: dict[str, Any], state: CacheState, cached: int, tokens: torch.Tensor,
    forward: Forward,
) -> dict[str, Any]:  # fmt: skip
    """Ids and mask for the length of the text, where even the first layer's cache is shorter than that."""
    assert state.layers[0] is not None
    new, missing = tokens.shape[1], state.prompt - state.layers[0].keep.shape[1]
    first = cached + missing
    if decoder.get("position_ids") is None:
        decoder["position_ids"] = torch.arange(first, first + new, device=tokens.device)[None]
    elif top.get("position_ids") is None and top.get("attention_mask") is None:  # Qwen2-VL counted from the cache's length
        decoder["position_ids"] = decoder["position_ids"] + missing
    hidden = adapter.norm.weight.new_empty(()).expand(tokens.shape[0], new, 1)
    mask, static = full_attention(decoder.get("attention_mask")), caches.is_static(decoder["past_key_values"])
    if static and mask is not None and mask.dim() == 4:  # generate() made it, for a first layer that holds all rows
        later = torch.ones(tokens.shape[0], first + new - state.prompt, dtype=torch.bool, device=mask.device)
        mask = None if state.visible is None else torch.cat([state.visible, later], dim=1)
    forward.step_mask = mask = step_mask(mask, first, new, hidden, adapter.attention, static=static)
    decoder["attention_mask"] = mask if mask is not None and mask.dim() == 4 else None
    return decoder
