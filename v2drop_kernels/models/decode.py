"""Forwards behind a filled cache: steps, later chunks of a prompt, and later turns of a chat, also with images of their own."""

from __future__ import annotations

from typing import Any

import torch

from .adapters import caches
from .adapters.spans import placeholder_runs
from .caches import CacheState
from .setup import Setup


def brings_images(setup: Setup, top: dict[str, Any]) -> bool:
    """Whether the new tokens contain vision tokens; reads ids on the host unless there is one token per item.

    Raises
    ------
    ValueError
        ``spans`` were given, which describe the first forward; or the model has windows.
    """
    tokens: Any = top.get("input_ids")
    if tokens is None or tokens.shape[1] == 1 or not placeholder_runs(tokens, setup.adapter.token_ids):
        return False
    if setup.adapter.windowed:
        raise ValueError("input_ids must not bring images behind a filled cache of a model with windows, which forgot rows")
    if setup.options.spans is not None:
        raise ValueError("spans describe the first forward: they must be None where input_ids bring images behind a filled cache")
    return True


def state_of(cache: Any) -> CacheState | None:
    """What a filled cache holds; None: all rows in all layers.

    Raises
    ------
    ValueError
        The layers differ in length for a reason unknown to this package.
    """
    state = CacheState.of(cache)
    if state is None:
        caches.check_one_length(cache)
    return state


def rotary_ids(decoder: dict[str, Any], state: CacheState) -> Any:
    """The position ids that the rotary embedding will receive in a step, if a layer needs them; else None."""
    if all(rows is None or rows.shift is None for rows in state.layers):
        return None
    ids: Any = decoder.get("position_ids")
    if ids is None:
        first, tokens = decoder["past_key_values"].get_seq_length(), decoder["inputs_embeds"]
        return torch.arange(tokens.shape[1], device=tokens.device)[None] + first
    return ids[1:] if ids.dim() == 3 and ids.shape[0] == 4 else ids
