"""The gradient of weighted_merge: one more gather, through the edges sorted by source row."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ...core import arguments
from .groups import groups


def kernels(name: str) -> Any:
    """The kernels of a backend; imported when the first call needs them."""
    return importlib.import_module(".triton" if name == "triton" else ".native", __package__)


def gradients(
    grad: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None, mean: bool,
    both: bool, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients in ``x``, through the edges sorted by source row, and, if ``both``, in ``weights`` (else an empty tensor)."""
    run = kernels(backend)
    if backend != "triton":
        return run.gradients(grad, x, offsets, rows, weights, mean, both, backend)
    (_, n, _), k, edges = x.shape, offsets.shape[1] - 1, rows.shape[1]
    weights = torch.ones(rows.shape, device=x.device) if weights is None else weights
    own = torch.arange(edges, device=x.device).expand(rows.shape).contiguous()
    sums = lambda values: run.weighted_merge(values[:, :, None], offsets, own, None, False)[:, :, 0]
    target = torch.searchsorted(offsets[:, 1:].contiguous(), own, right=True)  # [B, E] output row of each edge
    used = (own >= offsets[:, :1]) & (target < k)
    target = torch.where(used, target, k)
    if mean:
        whole = sums(weights)
        inverse = torch.where(whole == 0, 0.0, 1 / torch.where(whole == 0, 1.0, whole))
        grad = inverse[:, :, None] * grad.float()
    x, grad = arguments.unit_stride(x), arguments.unit_stride(grad)
    back, order = groups(torch.where(used, rows, n), n)
    d_x = run.weighted_merge(grad, back, target.gather(1, order), weights.gather(1, order), False, x.dtype)
    if not both:
        return d_x, x.new_empty(0, dtype=torch.float32)
    dots = run.row_dots(x, grad, rows, target)
    if mean:  # a weight also lessens the share of its neighbours
        dots = dots - torch.nn.functional.pad(inverse * sums(weights * dots), (0, 1)).gather(1, target)
    return d_x, dots


def backward(name: str, needed: dict[int, bool], grad: torch.Tensor, *fields: Any) -> tuple[Any, ...]:
    """The gradients of a request's fields by the kernels of a backend: of the rows and, where they require one, of the weights."""
    x, offsets, rows, weights, mean = fields
    both = needed.get(3, False)
    d_x, d_weights = gradients(grad, x, offsets, rows, weights, mean, both, name)
    return d_x, None, None, d_weights if both else None
