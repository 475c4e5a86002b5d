"""The gradients of key_norm and cosine_to_pivots, in plain PyTorch for every backend."""

from __future__ import annotations

import torch

from ..precision import full_precision
from .reference import key_norm, pivot_rows, unit_rows, wide


def key_norm_backward(grad: torch.Tensor, k: torch.Tensor, norm: str) -> torch.Tensor:
    """The gradient in ``k``; 0 at 0."""
    x, grad = wide(k), grad[:, None, :, None]
    if norm == "l1":
        return (grad * x.sign()).to(k.dtype)
    length = key_norm(k, norm)[:, None, :, None]
    return torch.where(length == 0, 0.0, grad * x / length).to(k.dtype)


@full_precision
def cosine_to_pivots_backward(grad: torch.Tensor, x: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """The gradient in ``x``, as a row and as a pivot; none reaches a row of zeros. In float64, as the cosines."""
    values, grad = x.double(), grad.double()
    (unit, norm), (pivot, pivot_norm) = unit_rows(values), unit_rows(pivot_rows(values, pivots))
    d_unit, d_pivot = grad.transpose(1, 2) @ pivot, grad @ unit
    d_x = (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True)) / norm
    d_rows = (d_pivot - pivot * (pivot * d_pivot).sum(-1, keepdim=True)) / pivot_norm
    # A product with zeros and ones: a scatter of pivots that name one row twice would add in any order.
    where = (pivots[:, None] == torch.arange(x.shape[1], device=x.device)[:, None]).to(values.dtype)
    return (torch.where(norm == torch.inf, 0.0, d_x) + where @ torch.where(pivot_norm == torch.inf, 0.0, d_rows)).to(x.dtype)
