"""The gradient of attention_score, in plain PyTorch for every backend."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..precision import full_precision
from .queries import chunks
from .reference import attention, attention_score, best_heads, over_heads, padded, uncounted


@full_precision
def attention_score_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    query_rows: torch.Tensor,
    key_mask: torch.Tensor | None,
    droppable: torch.Tensor | None,
    causal: bool,
    scale: float,
    mode: str,
    heads: str | int,
    queries: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient in ``q`` and ``k``: the logits are made again, some queries at a time. The choice of heads is a constant."""
    batch, h, _, d = q.shape
    group = (batch, k.shape[1], -1, d)
    keys = padded(k, key_mask)
    grad = grad.to(keys.dtype)
    d_q, d_k = keys.new_zeros(q.shape), keys.new_zeros(keys.shape)
    if queries == "mean":
        grad = grad / (query_rows >= 0).sum(1, keepdim=True).clamp(min=1)
    else:
        score = attention_score(q, k, query_rows, key_mask, droppable, causal, scale, mode, heads, queries)
        grad = torch.where(score == 0, 0.0, grad / score)
    for part in chunks(q, k):
        some, rows = q[:, :, part], query_rows[:, part]
        hidden, probabilities = attention(some, k, rows, key_mask, causal, scale, mode)
        weights = probabilities.masked_fill(uncounted(hidden, droppable), 0)
        order: Any = best_heads(probabilities, droppable, mode, heads) if isinstance(heads, int) else None
        share = grad[:, None, None].expand(weights.shape)
        if queries == "l2":
            share = share * over_heads(weights, heads, order)[:, None]
        if heads == "max":  # equal maxima share it
            most = weights == weights.amax(1, keepdim=True)
            share = share * most / most.sum(1, keepdim=True)
        elif heads == "mean":
            share = share / h
        elif order is not None:
            chosen = torch.zeros_like(weights[..., 0]).scatter(1, cast(torch.Tensor, order), 1 / int(heads))
            share = share * chosen[..., None]
        share = share.masked_fill(uncounted(hidden, droppable), 0)
        if mode == "softmax":
            share = probabilities * (share - (share * probabilities).sum(-1, keepdim=True))
        share = (share * scale).reshape(*group[:3], k.shape[2])
        d_q[:, :, part] = (share @ keys).view(some.shape)
        d_k += share.transpose(-1, -2) @ padded(some, rows >= 0).reshape(group)
    return d_q.to(q.dtype), d_k.to(k.dtype)
