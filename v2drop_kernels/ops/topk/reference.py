"""segmented_topk and variation_topk in plain PyTorch."""

from __future__ import annotations

from typing import Any, cast

import torch

from ...backends.requests import Budget, TopKRequest
from ...core.arguments import is_packed, per_segment_k
from ...core.droppable import layout_of
from ...core.layout import TokenLayout
from ...core.types import TopK
from ..variation_score.reference import ranked_by, variation_score


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of one segment, best first: score descending, NaN above +inf, equal scores by index."""
    return torch.sort(scores, descending=True, stable=True).indices[:k]


def segment_rows(layout: TokenLayout) -> list[torch.Tensor]:
    """The competing rows of every segment, as flat rows of the batch."""
    rows = []
    for s in layout.segments():
        r = torch.arange(s.row, s.row + s.n)
        if layout.mask is not None:
            r = r[layout.mask.flatten()[s.row : s.row + s.n].cpu()]
        rows.append(r)
    return rows


def segmented_topk(scores: torch.Tensor, k: Any, *, cu_seqlens: Any = None, droppable: Any = None, order: str = "position") -> TopK:
    """The k highest scores of every segment: ``[B, N]`` or packed ``[T]`` to values and indices ``[G, K]``."""
    packed = is_packed(droppable, cu_seqlens)
    layout = layout_of(droppable, None if packed else scores.shape[0], scores.shape[-1], cu_seqlens)
    segments, flat = layout.segments(), scores.flatten()
    ks = [min(x, s.available) for x, s in zip(per_segment_k(k, len(segments)), segments, strict=True)]
    values = flat.new_full((len(segments), max(ks, default=0)), -torch.inf)
    indices = torch.full(values.shape, -1, dtype=torch.int64, device=scores.device)
    for g, (rows, x) in enumerate(zip(segment_rows(layout), ks, strict=True)):
        chosen = rows.to(scores.device)[best(flat[rows], x)]
        if order == "position":
            chosen = chosen.sort().values
        values[g, : len(chosen)] = flat[chosen]
        indices[g, : len(chosen)] = chosen - (0 if packed else segments[g].item * layout.rows)
    return TopK(values, indices)


def variation_topk(
    h_prev: torch.Tensor,
    h_cur: torch.Tensor,
    k: Any,
    *,
    metric: str = "l2",
    cu_seqlens: Any = None,
    droppable: Any = None,
    order: str = "position",
    score_dtype: torch.dtype | None = None,
) -> TopK:
    """``segmented_topk(variation_score(h_prev, h_cur), k)``."""
    scores = variation_score(h_prev, h_cur, metric=metric, score_dtype=score_dtype)
    return segmented_topk(scores, k, cu_seqlens=cu_seqlens, droppable=droppable, order=order)


def run(request: TopKRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """The values and indices of a request, from the caller's own arguments."""
    k, droppable, cu_seqlens = cast(Budget, request.budget)
    return segmented_topk(ranked_by(request.source), k, cu_seqlens=cu_seqlens, droppable=droppable, order=request.order)
