# SPDX-License-Identifier: Apache-2.0
"""weighted_merge in the compiled library, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...backends.requests import MergeRequest
from .groups import groups

EDGE_BYTES, SPARE_BYTES = 8, 512  # of the scratch memory of the gradients on CUDA


def run(request: MergeRequest, place: str) -> Tensor:
    """The merged rows of a request; its index lists and weights are contiguous."""
    x, offsets, rows, weights, mean = request
    x = native.unit_stride(x)
    out = torch.empty((x.shape[0], offsets.shape[1] - 1, x.shape[2]), dtype=x.dtype, device=x.device)
    if out.numel():
        native.call(
            "weighted_merge", place, x.device, native.view(x), native.view(offsets), native.view(rows), native.maybe_view(weights),
            mean, native.view(out),
        )  # fmt: skip
    return out


def gradients(
    grad: Tensor, x: Tensor, offsets: Tensor, rows: Tensor, weights: Tensor | None, mean: bool, both: bool, place: str
) -> tuple[Tensor, Tensor]:
    """Gradients in ``x`` and, if ``both``, in ``weights`` (else an empty tensor)."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weights = torch.empty(rows.shape if both else 0, dtype=torch.float32, device=x.device)
    if grad.numel() == 0 or rows.numel() == 0:
        return d_x.zero_(), d_weights.zero_()
    x, grad = native.unit_stride(x), native.unit_stride(grad)
    back, order = _by_source(rows, x.shape[1]) if place == "cuda" else (None, None)
    native.call(
        "weighted_merge_backward", place, x.device, native.view(grad), native.view(x), native.view(offsets), native.view(rows),
        native.maybe_view(weights), mean, native.maybe_view(back), native.maybe_view(order), native.view(d_x),
        native.view(d_weights) if both else None, workspace=EDGE_BYTES * rows.numel() + SPARE_BYTES,
    )  # fmt: skip
    return d_x, d_weights


def _by_source(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The edges by source row, those from no row last."""
    return groups(torch.where((rows >= 0) & (rows < n), rows, n), n)
