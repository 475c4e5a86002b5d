"""Rankings other than variation, for comparison: last-token attention, and chance. float32 ``[B, N]``, higher means keep."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import torch

from ..layout import TokenLayout


@torch.no_grad()
def attention(
    layer: Any, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], layout: TokenLayout, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of each item's last token in ``layer`` to all its rows, mean over heads (FastV's score), as one query.

    ``hidden`` is the input of the layer. Keys are projected again: an attention kernel that never forms the weights
    cannot hand them out, which is the cost of such scores that V2Drop avoids.
    """
    attn = layer.self_attn
    items = torch.arange(hidden.shape[0], device=hidden.device)
    last = torch.tensor([max(hi - 1, 0) for _, hi in layout.bounds], device=hidden.device)
    normed = layer.input_layernorm(hidden)
    split = lambda x: x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
    query, keys = split(attn.q_proj(normed[items, last][:, None])), split(attn.k_proj(normed))
    cos, sin = (x.expand(hidden.shape[0], -1, -1) for x in rope)
    rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
    query, _ = rotate(query, query, cos[items, last][:, None], sin[items, last][:, None])
    keys, _ = rotate(keys, keys, cos, sin)
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    scores = (query.float() @ keys.float().transpose(2, 3)).squeeze(2) * attn.scaling  # [B, H, N]
    seen = layout.real_rows(hidden.device)
    if mask is not None and mask.dim() == 4:
        row = mask.expand(hidden.shape[0], -1, -1, -1)[items, 0, last][:, : hidden.shape[1]]
        seen = seen & (row if row.dtype == torch.bool else row >= 0)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return weights.mean(1)


def chance(layout: TokenLayout, droppable: torch.Tensor, counts: tuple[int, ...], seeds: list[int]) -> torch.Tensor:
    """Seeded random scores that depend on the item alone, not on its neighbours in the batch or its padding."""
    scores = torch.zeros(layout.batch, layout.rows, device=droppable.device)
    for item, (n, seed) in enumerate(zip(counts, seeds, strict=True)):
        if n:
            drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed))
            scores[item, droppable[item]] = drawn.to(droppable.device)
    return scores


def seeds_of(seed: int, layer: int, items: list[list[int]]) -> list[int]:
    """One seed per item from the run's seed, the stage and the item's real token ids."""
    return [zlib.crc32(repr((seed, layer, ids)).encode()) for ids in items]
