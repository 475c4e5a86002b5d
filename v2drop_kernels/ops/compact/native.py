# SPDX-License-Identifier: Apache-2.0
"""compact, its backward pass, and compact_ in the compiled library."""

from __future__ import annotations

from torch import Tensor

from ...backends import native
from ...backends.requests import CompactBackwardRequest, CompactRequest


def compact(request: CompactRequest, place: str) -> list[Tensor]:
    """Rows ``keep [B, S]`` of every tensor."""
    keep = request.keep
    results, gathers = native.outputs(request.gathers, keep.shape[-1])
    native.call("compact", place, keep.device, native.view(keep), gathers)
    return results


def compact_backward(request: CompactBackwardRequest, place: str) -> list[Tensor]:
    """Gradients with ``rows`` rows: zero where a row was dropped."""
    keep, rows = request.keep, request.rows
    results, gathers = native.outputs(request.gathers, rows)
    native.call("compact_backward", place, keep.device, native.view(keep), rows, gathers, rows=keep.shape[0] * rows)
    return results


def compact_(request: CompactRequest, place: str) -> None:
    """Move the kept rows of every tensor to the front."""
    keep = request.keep
    gathers = [(native.view(g.tensor), None, g.batch_dim, g.row_dim, 0) for g in request.gathers]
    native.call("compact_inplace", place, keep.device, native.view(keep), gathers)
