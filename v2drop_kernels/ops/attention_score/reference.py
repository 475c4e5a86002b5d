"""attention_score in plain PyTorch, for every device and dtype."""

from __future__ import annotations

import torch

from ...backends.requests import AttentionRequest
from ..precision import full_precision
from .queries import chunks, last_rows


@full_precision
def attention_score(
    q: torch.Tensor,
    k: torch.Tensor,
    query_rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    droppable: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    mode: str = "softmax",
    heads: str | int = "mean",
    queries: str = "mean",
) -> torch.Tensor:
    """What queries ``[B, H, Q, Dh]`` give to keys ``[B, Hkv, S, Dh]``: float32 ``[B, S]`` (float64 for float64)."""
    if query_rows is None:
        query_rows = last_rows(q, k, causal)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    total = wide(k).new_zeros(k.shape[0], k.shape[2])
    for part in chunks(q, k):
        hidden, weights = attention(q[:, :, part], k, query_rows[:, part], key_mask, causal, scale, mode)
        order = best_heads(weights, droppable, mode, heads) if isinstance(heads, int) else None
        given = over_heads(weights.masked_fill(uncounted(hidden, droppable), 0), heads, order)
        total = total + (given.square() if queries == "l2" else given).sum(1)
    if queries == "mean":
        return total / (query_rows >= 0).sum(1, keepdim=True).clamp(min=1)
    zero = total == 0  # where the root has no slope
    # In float64, for PyTorch's root of float32 vectors is not the nearest one everywhere.
    return torch.where(zero, 0.0, torch.where(zero, 1.0, total).double().sqrt()).to(total.dtype)


def run(request: AttentionRequest) -> torch.Tensor:
    """The scores of a request."""
    return attention_score(*request)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    query_rows: torch.Tensor,
    key_mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where no query sees a key, ``[B, 1, Q, S]``, and what every head gives to every key, 0 there, ``[B, H, Q, S]``."""
    batch, h, n, d = q.shape
    h_kv, s = k.shape[1:3]
    visible = (query_rows >= 0)[..., None].expand(batch, n, s)
    if causal:
        visible = visible & (torch.arange(s, device=k.device) <= query_rows[..., None])
    if key_mask is not None:
        visible = visible & key_mask[:, None]
    hidden = ~visible[:, None]
    # Query head i reads key head i // (h / h_kv): the heads of a group are rows of one product.
    rows = padded(q, query_rows >= 0).reshape(batch, h_kv, h // h_kv * n, d)
    logits = (rows @ padded(k, key_mask).transpose(-1, -2)).view(batch, h, n, s) * scale
    if mode == "softmax":
        logits = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return hidden, logits.masked_fill(hidden, 0)


def over_heads(weights: torch.Tensor, heads: str | int, order: torch.Tensor | None) -> torch.Tensor:
    """``[B, H, Q, S]`` to ``[B, Q, S]``, with the heads of ``order`` where a number of them is chosen."""
    if heads == "mean":
        return weights.mean(1)
    if heads == "sum":
        return weights.sum(1)
    if heads == "max":
        return weights.amax(1)
    assert order is not None
    return weights.gather(1, order[..., None].expand(*order.shape, weights.shape[-1])).mean(1)


def best_heads(weights: torch.Tensor, droppable: torch.Tensor | None, mode: str, heads: int) -> torch.Tensor:
    """int64 ``[B, heads, Q]``: the heads that give most to the droppable rows in total; of equal ones the lower.

    A softmax gives 1 in total, so those that give least to the other rows: exactly 0 where there are none, for all heads alike.
    """
    given, counted = weights.detach(), torch.ones((), dtype=torch.bool, device=weights.device)
    if droppable is not None:
        counted = droppable[:, None, None]
    if mode == "softmax":
        total = -given.masked_fill(counted, 0).sum(-1) + 0 * given.sum(-1)  # NaN where a weight is
    else:
        total = given.masked_fill(~counted, 0).sum(-1)
    return total.argsort(dim=1, descending=True, stable=True)[:, :heads]


def uncounted(hidden: torch.Tensor, droppable: torch.Tensor | None) -> torch.Tensor:
    """Where a key gets no score."""
    return hidden if droppable is None else hidden | ~droppable[:, None, None]


def padded(x: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    """``[B, H, S, D]`` with zeros where nothing is there: what lies in padding, NaN perhaps, must not reach a product."""
    return wide(x) if there is None else wide(x).masked_fill(~there[:, None, :, None], 0)


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()
