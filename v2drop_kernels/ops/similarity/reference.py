"""key_norm and cosine_to_pivots in plain PyTorch."""

from __future__ import annotations

import torch

from ...backends.requests import CosineRequest, KeyNormRequest
from ..precision import full_precision


def key_norm(k: torch.Tensor, norm: str) -> torch.Tensor:
    """The norm of a row over heads and channels together: ``[B, Hkv, S, Dh] -> [B, S]`` float32 (float64 for float64)."""
    return torch.linalg.vector_norm(wide(k), ord={"l1": 1, "l2": 2}[norm], dim=(1, 3))


@full_precision
def cosine_to_pivots(x: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """The cosine of every row of ``[B, N, D]`` with the rows ``pivots [B, P]``: ``[B, P, N]`` float32 (float64 for float64)."""
    rows = x.double()  # products of float32 numbers neither round nor leave the range
    cosines = unit_rows(pivot_rows(rows, pivots))[0] @ unit_rows(rows)[0].transpose(1, 2)
    return cosines.to(wide(x).dtype)


def run_key_norm(request: KeyNormRequest) -> torch.Tensor:
    """The norms of a request."""
    return key_norm(*request)


def run_cosine(request: CosineRequest) -> torch.Tensor:
    """The cosines of a request."""
    return cosine_to_pivots(*request)


def pivot_rows(x: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """``[B, P, D]`` rows, zeros for what is none."""
    n = x.shape[1]
    padded = x if n else x.new_zeros(x.shape[0], 1, x.shape[2])
    rows = padded.gather(1, pivots.clamp(0, max(n - 1, 0))[..., None].expand(-1, -1, x.shape[2]))
    return rows.masked_fill(((pivots < 0) | (pivots >= n))[..., None], 0)


def unit_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of length 1, and the length they had; zeros stay zeros, at no finite length, so that no gradient passes."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = norm.masked_fill(norm == 0, torch.inf)
    return x / norm, norm


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()
