"""attention_score in plain PyTorch, and the gradient that every backend shares."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Logits of at most this many (query, head, key) triples are held at a time, or those of one query.
LOGITS_AT_ONCE = 1 << 24


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
    total = _wide(k).new_zeros(k.shape[0], k.shape[2])
    for part in chunks(q, k):
        hidden, weights = attention(q[:, :, part], k, query_rows[:, part], key_mask, causal, scale, mode)
        given = over_heads(weights.masked_fill(_uncounted(hidden, droppable), 0), heads)
        total = total + (given.square() if queries == "l2" else given).sum(1)
    if queries == "mean":
        return total / (query_rows >= 0).sum(1, keepdim=True).clamp(min=1)
    zero = total == 0  # where the root has no slope
    # In float64, for PyTorch's root of float32 vectors is not the nearest one everywhere.
    return torch.where(zero, 0.0, torch.where(zero, 1.0, total).double().sqrt()).to(total.dtype)


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
    keys = _padded(k, key_mask)
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
        weights = probabilities.masked_fill(_uncounted(hidden, droppable), 0)
        share = grad[:, None, None].expand(weights.shape)
        if queries == "l2":
            share = share * over_heads(weights, heads)[:, None]
        if heads == "max":  # equal maxima share it
            most = weights == weights.amax(1, keepdim=True)
            share = share * most / most.sum(1, keepdim=True)
        elif heads == "mean":
            share = share / h
        elif heads != "sum":
            chosen = torch.zeros_like(weights[..., 0]).scatter(1, best_heads(weights, int(heads)), 1 / int(heads))
            share = share * chosen[..., None]
        share = share.masked_fill(_uncounted(hidden, droppable), 0)
        if mode == "softmax":
            share = probabilities * (share - (share * probabilities).sum(-1, keepdim=True))
        share = (share * scale).reshape(*group[:3], k.shape[2])
        d_q[:, :, part] = (share @ keys).view(some.shape)
        d_k += share.transpose(-1, -2) @ _padded(some, rows >= 0).reshape(group)
    return d_q.to(q.dtype), d_k.to(k.dtype)


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
    rows = _padded(q, query_rows >= 0).reshape(batch, h_kv, h // h_kv * n, d)
    logits = (rows @ _padded(k, key_mask).transpose(-1, -2)).view(batch, h, n, s) * scale
    if mode == "softmax":
        logits = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return hidden, logits.masked_fill(hidden, 0)


def over_heads(weights: torch.Tensor, heads: str | int) -> torch.Tensor:
    """``[B, H, Q, S]`` to ``[B, Q, S]``."""
    if heads == "mean":
        return weights.mean(1)
    if heads == "sum":
        return weights.sum(1)
    if heads == "max":
        return weights.amax(1)
    order = best_heads(weights, int(heads))
    return weights.gather(1, order[..., None].expand(*order.shape, weights.shape[-1])).mean(1)


def best_heads(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """int64 ``[B, heads, Q]``: the heads that give most in total; of equal ones the lower."""
    return weights.detach().sum(-1).argsort(dim=1, descending=True, stable=True)[:, :heads]


def chunks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    """The queries, some at a time, so that their logits stay within LOGITS_AT_ONCE."""
    batch, h, n, _ = q.shape
    step = max(LOGITS_AT_ONCE // max(batch * h * k.shape[2], 1), 1)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def last_rows(q: torch.Tensor, k: torch.Tensor, causal: bool = True) -> torch.Tensor:
    """int64 ``[B, Q]``: the queries are those of the last rows of ``k``; any row will do where all keys are visible."""
    n = q.shape[2]
    return (torch.arange(n, device=q.device) + (k.shape[2] - n if causal else 0)).expand(q.shape[0], n)


def _uncounted(hidden: torch.Tensor, droppable: torch.Tensor | None) -> torch.Tensor:
    return hidden if droppable is None else hidden | ~droppable[:, None, None]


def _padded(x: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    """``[B, H, S, D]`` with zeros where nothing is there: what lies in padding, NaN perhaps, must not reach a product."""
    return _wide(x) if there is None else _wide(x).masked_fill(~there[:, None, :, None], 0)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
