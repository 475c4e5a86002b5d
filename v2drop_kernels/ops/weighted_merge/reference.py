"""weighted_merge in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding_bag

from ...backends.requests import MergeRequest


def run(request: MergeRequest) -> torch.Tensor:
    """The merged rows of a request."""
    x, offsets, rows, weights, mean = request
    return weighted_merge(x, offsets, rows, weights, mean=mean)


def weighted_merge(
    x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None = None, *, mean: bool = False
) -> torch.Tensor:
    """Weighted sums (or means) of rows of ``x [B, N, D]``: ``[B, K, D]``; accumulates in float32 (float64 for float64)."""
    (batch, n, d), edges = x.shape, rows.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if batch * n * d * edges * offsets.shape[1] == 0:
        return x[:, :0].sum(1, keepdim=True, dtype=x.dtype).expand(batch, offsets.shape[1] - 1, d)  # zeros, with a gradient
    item = torch.arange(batch, device=x.device)[:, None]
    edge = torch.arange(edges, device=x.device)
    # Nothing but the item's own rows is read, whatever a list on a device may hold, which nobody has looked at.
    offsets = offsets.clamp(0, edges).cummax(1).values
    used = (edge >= offsets[:, :1]) & (edge < offsets[:, -1:]) & (rows >= 0) & (rows < n)
    w = torch.where(used, torch.ones((), dtype=wide, device=x.device) if weights is None else weights.to(wide), 0.0)
    # One bag per output row, and one before and after those of each item for the edges that belong to none.
    bags = (torch.nn.functional.pad(offsets, (1, 0)) + item * edges).flatten()
    table, index = x.to(wide).reshape(batch * n, d), (torch.where(used, rows, 0) + item * n).flatten()
    total = embedding_bag(index, table, bags, mode="sum", per_sample_weights=w.flatten())
    if mean:
        whole = embedding_bag(torch.arange(batch * edges, device=x.device), w.reshape(-1, 1), bags, mode="sum")
        total = torch.where(whole == 0, 0.0, total / torch.where(whole == 0, 1.0, whole))
    return total.view(batch, -1, d)[:, 1:-1].to(x.dtype)


def by_products(request: MergeRequest) -> torch.Tensor:
    """The same by products with zeros and ones, ``[B, K, E]``: embedding_bag has no second derivatives and no forward mode."""
    x, offsets, rows, weights, mean = request
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    n, edge = x.shape[1], torch.arange(rows.shape[1], device=x.device)
    there = (rows >= 0) & (rows < n)
    owned = (edge >= offsets[:, :-1, None]) & (edge < offsets[:, 1:, None]) & there[:, None]
    shares = owned.to(wide) if weights is None else torch.where(owned, weights.to(wide)[:, None], 0.0)
    values = x.to(wide).gather(1, torch.where(there, rows, 0)[..., None].expand(*rows.shape, x.shape[2])) if n else x.new_zeros(
        *rows.shape, x.shape[2], dtype=wide
    )  # fmt: skip
    total = shares @ values
    if mean:
        whole = shares.sum(-1, keepdim=True)
        total = torch.where(whole == 0, 0.0, total / torch.where(whole == 0, 1.0, whole))
    return total.to(x.dtype)
