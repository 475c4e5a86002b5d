"""Cosines and distances of all rows with all rows, without a gradient: what the merges decide by."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def cosines(a: torch.Tensor, b: torch.Tensor, wide: torch.dtype = torch.float32) -> torch.Tensor:
    """Cosines ``[B, I, J]`` of all rows of ``a [B, I, C]`` with all rows of ``b [B, J, C]``; 0 where a row is zero."""
    wide = torch.promote_types(wide, torch.float64) if a.dtype == torch.float64 else wide
    unit = lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    a, b = unit(a.detach().to(wide)), unit(b.detach().to(wide))
    with _full_precision(a.device.type):
        return a @ b.transpose(1, 2)


def _full_precision(kind: str) -> Any:
    """Without autocast, which would let a decision hang on half precision."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def distances(x: torch.Tensor) -> torch.Tensor:
    """Euclidean distances ``[B, I, I]`` of the rows of ``x``; 0 below 1e-6 of the rows' norms.

    From products in float64, 13 times as fast as by differences on a CPU. They cancel to about 1e-8 of the norms, not to 0,
    where rows are equal; rounded to float32, equal distances come out equal as well.
    """
    products = x.double() @ x.double().transpose(1, 2)
    norms = products.diagonal(dim1=1, dim2=2)
    norms = norms[:, :, None] + norms[:, None]
    squares = norms - 2 * products
    return torch.where(squares > 1e-12 * norms, squares, 0.0).sqrt().to(torch.promote_types(x.dtype, torch.float32))
