"""Which queries go together: some at a time, and which rows they are by default."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Logits of at most this many (query, head, key) triples are held at a time, or those of one query.
LOGITS_AT_ONCE = 1 << 24


def chunks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    """The queries, some at a time, so that their logits stay within LOGITS_AT_ONCE."""
    batch, h, n, _ = q.shape
    step = max(LOGITS_AT_ONCE // max(batch * h * k.shape[2], 1), 1)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def last_rows(q: torch.Tensor, k: torch.Tensor, causal: bool = True) -> torch.Tensor:
    """int64 ``[B, Q]``: the queries are those of the last rows of ``k``; any row will do where all keys are visible."""
    n = q.shape[2]
    return (torch.arange(n, device=q.device) + (k.shape[2] - n if causal else 0)).expand(q.shape[0], n)
