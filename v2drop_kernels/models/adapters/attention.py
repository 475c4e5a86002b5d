"""Queries and keys of a decoder block, computed again from its input with the block's own projections."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .arguments import is_pair


def rotate(block: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """The rotary embedding of the block's model, ``apply_rotary_pos_emb``."""
    return sys.modules[type(block.self_attn).__module__].apply_rotary_pos_emb(query, key, cos, sin)


def scaling(block: Any) -> float:
    """What the block multiplies the attention logits by."""
    return float(block.self_attn.scaling)


def _check(block: Any, rope: Any) -> None:
    """Raise ValueError where queries and keys are made in a way that :func:`project` does not repeat."""
    attn: Any = getattr(block, "self_attn", None)
    lacking = next((name for name in ("q_proj", "k_proj", "head_dim", "scaling") if not hasattr(attn, name)), None)
    if lacking is None and not hasattr(block, "input_layernorm"):
        lacking = "norm of the block's input"
    if lacking is None and not is_pair(rope):
        lacking = "rotary tables (cos, sin)"
    if lacking is not None:
        raise ValueError(f"policy must not need attention in {type(block).__name__}, whose attention has no {lacking}")
    norms = [name for name, _ in attn.named_children() if "norm" in name and name not in ("q_norm", "k_norm")]
    if norms or hasattr(attn, "sinks"):
        raise ValueError(f"policy must not need attention in {type(block).__name__}, whose attention has {(norms or ['sinks'])[0]}")


def project(
    block: Any, hidden: torch.Tensor, rows: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[B, H, Q, Dh]`` of ``rows`` int64 ``[B, Q]``, and keys ``[B, Hkv, N, Dh]`` of all rows, in one block.

    ``hidden`` is the input of the block, ``rope`` the ``(cos, sin)`` tables of its rows.
    """
    _check(block, rope)
    attn = block.self_attn
    items = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
    normed = block.input_layernorm(hidden)

    def heads(projection: Any, norm: str, x: torch.Tensor) -> torch.Tensor:
        y = projection(x).unflatten(-1, (-1, attn.head_dim))
        return (getattr(attn, norm)(y) if hasattr(attn, norm) else y).transpose(1, 2)

    at = rows.clamp(min=0)
    query, keys = heads(attn.q_proj, "q_norm", normed[items, at]), heads(attn.k_proj, "k_norm", normed)
    cos, sin = (x.expand(hidden.shape[0], -1, -1) for x in rope)
    query, _ = rotate(block, query, query, cos[items, at], sin[items, at])
    keys, _ = rotate(block, keys, keys, cos, sin)
    return query, keys
