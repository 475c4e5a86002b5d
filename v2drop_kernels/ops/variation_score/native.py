# SPDX-License-Identifier: Apache-2.0
"""variation_score and its backward pass in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...backends.requests import ScoreBackwardRequest, Source


def variation_score(source: Source, place: str) -> Tensor:
    """Float32 scores ``[B, N]`` or ``[T]``."""
    source_view, source = native.read_source(source)
    h_cur = source.h_cur
    assert h_cur is not None
    scores = torch.empty(h_cur.shape[:-1], dtype=torch.float32, device=h_cur.device)
    native.call("variation_score", place, h_cur.device, source_view, native.view(scores))
    return scores


def variation_score_backward(request: ScoreBackwardRequest, place: str) -> tuple[Tensor | None, Tensor | None]:
    """Gradients in ``h_prev`` and ``h_cur``, None where not needed."""
    grad, (source_view, source) = request.grad, native.read_source(request.source._replace(score_dtype=None))
    h_cur = source.h_cur
    assert h_cur is not None
    d_prev, d_cur = (
        torch.empty(h_cur.shape, dtype=h_cur.dtype, device=h_cur.device) if needed else None
        for needed in (request.need_prev, request.need_cur)
    )
    gradients = native.maybe_view(d_prev), native.maybe_view(d_cur)
    native.call("variation_score_backward", place, h_cur.device, native.view(grad), source_view, *gradients)
    return d_prev, d_cur
