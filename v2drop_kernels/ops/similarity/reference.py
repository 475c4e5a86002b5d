"""key_norm and cosine_to_pivots in plain PyTorch, and their gradients, which every backend shares."""

from __future__ import annotations

import torch


def key_norm(k: torch.Tensor, norm: str) -> torch.Tensor:
    """The norm of a row over heads and channels together: ``[B, Hkv, S, Dh] -> [B, S]`` float32 (float64 for float64)."""
    return torch.linalg.vector_norm(_wide(k), ord={"l1": 1, "l2": 2}[norm], dim=(1, 3))


def key_norm_backward(grad: torch.Tensor, k: torch.Tensor, norm: str) -> torch.Tensor:
    """The gradient in ``k``; 0 at 0."""
    x, grad = _wide(k), grad[:, None, :, None]
    if norm == "l1":
        return (grad * x.sign()).to(k.dtype)
    length = key_norm(k, norm)[:, None, :, None]
    return torch.where(length == 0, 0.0, grad * x / length).to(k.dtype)


def cosine_to_pivots(x: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """The cosine of every row of ``[B, N, D]`` with the rows ``pivots [B, P]``: ``[B, P, N]`` float32 (float64 for float64)."""
    x = _wide(x)
    return _unit(_pivot_rows(x, pivots))[0] @ _unit(x)[0].transpose(1, 2)


def cosine_to_pivots_backward(grad: torch.Tensor, x: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """The gradient in ``x``, as a row and as a pivot; none reaches a row of zeros."""
    wide = _wide(x)
    (unit, norm), (pivot, pivot_norm) = _unit(wide), _unit(_pivot_rows(wide, pivots))
    d_unit, d_pivot = grad.transpose(1, 2) @ pivot, grad @ unit
    d_x = (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True)) / norm
    d_rows = (d_pivot - pivot * (pivot * d_pivot).sum(-1, keepdim=True)) / pivot_norm
    # A product with zeros and ones: a scatter of pivots that name one row twice would add in any order.
    where = (pivots[:, None] == torch.arange(x.shape[1], device=x.device)[:, None]).to(wide.dtype)
    return (torch.where(norm == torch.inf, 0.0, d_x) + where @ torch.where(pivot_norm == torch.inf, 0.0, d_rows)).to(x.dtype)


def _pivot_rows(x: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """``[B, P, D]`` rows, zeros for what is none."""
    n = x.shape[1]
    padded = x if n else x.new_zeros(x.shape[0], 1, x.shape[2])
    rows = padded.gather(1, pivots.clamp(0, max(n - 1, 0))[..., None].expand(-1, -1, x.shape[2]))
    return rows.masked_fill(((pivots < 0) | (pivots >= n))[..., None], 0)


def _unit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of length 1, and the length they had; zeros stay zeros, at no finite length, so that no gradient passes."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = norm.masked_fill(norm == 0, torch.inf)
    return x / norm, norm


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
