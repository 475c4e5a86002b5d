"""variation_score in plain PyTorch."""

from __future__ import annotations

from typing import cast

import torch

from ...backends.requests import Source


def variation_score(
    h_prev: torch.Tensor, h_cur: torch.Tensor, *, metric: str = "l2", score_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """How much one decoder layer changed each token: ``[..., D], [..., D] -> [...]`` float32 (float64 for float64)."""
    wide = torch.float64 if h_cur.dtype == torch.float64 else torch.float32
    a, b = h_prev.to(wide), h_cur.to(wide)
    if metric == "cosine":
        score = _cosine_distance(a.double(), b.double()).to(wide)
    else:
        d = b - a
        if score_dtype is not None:
            d = d.to(score_dtype).to(wide)
        score = torch.linalg.vector_norm(d, ord={"l2": 2, "l1": 1}[metric], dim=-1)
    return score if score_dtype is None else score.to(score_dtype).to(wide)


def ranked_by(source: Source) -> torch.Tensor:
    """The scores of a source: those given, or the change."""
    if source.scores is not None:
        return source.scores
    h_prev, h_cur = cast(torch.Tensor, source.h_prev), cast(torch.Tensor, source.h_cur)
    return variation_score(h_prev, h_cur, metric=source.metric, score_dtype=source.score_dtype)


def _cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - cos; 1 where a vector is zero, as ``torch.cosine_similarity`` has it. In float64: 1 - cos cancels near 1."""
    product = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    zero = product == 0
    return torch.where(zero, 1.0, 1.0 - (a * b).sum(-1) / torch.where(zero, 1.0, product))
