# SPDX-License-Identifier: Apache-2.0
"""segmented_topk and variation_topk in the compiled library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import native as library
from ...backends import native
from ...backends.requests import TopKRequest


def topk(request: TopKRequest, place: str) -> tuple[Tensor, Tensor]:
    """Values and indices ``[groups, out_rows]``; without scores the rows that compete are scored first, in float32."""
    (source_view, source), plan = native.read_source(request.source), request.plan
    ranked = source.h_cur if source.scores is None else source.scores
    assert ranked is not None
    device, shape, strides = ranked.device, (plan.groups, plan.out_rows), (max(plan.out_rows, 1), 1)
    dtype = torch.float32 if source.scores is None else ranked.dtype
    values = torch.empty_strided(shape, strides, dtype=dtype, device=device)  # a third faster than torch.empty
    indices = torch.empty_strided(shape, strides, dtype=torch.int64, device=device)
    offsets = native.device_offsets(request.cu_seqlens, plan)
    native.call(
        "topk", place, device, source_view, native.segments(plan), native.maybe_view(offsets),
        library.ORDERS[request.order], native.view(values), native.view(indices),
        plan=plan, width=plan.out_rows if request.order == "score" else 0,
    )  # fmt: skip
    alike = offsets is None and source is request.source and type(ranked) is Tensor and library.reads(Tensor)
    if place == "cpu" and request.memo is not None and alike:
        request.memo["again"] = _again(request, values, indices)
    return values, indices


def _again(request: TopKRequest, values: Tensor, indices: Tensor) -> Callable[[tuple[Any, ...]], tuple[Tensor, Tensor]]:
    """The same call for other tensors of the same description: what does not depend on these is read once."""
    empty, threads, context = torch.empty_strided, torch.get_num_threads, native.cpu_context
    function, order = library.lib().topk, library.ORDERS[request.order]
    segments = native.segments(request.plan)  # of the plan, which the memo's owner keeps
    shape, strides, device, dtype, integers = values.shape, values.stride(), values.device, values.dtype, indices.dtype
    codes = native.score_code(request.source.metric, request.source.score_dtype)

    def again(source: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        values = empty(shape, strides, dtype=dtype, device=device)
        indices = empty(shape, strides, dtype=integers, device=device)
        function((*source[:3], None, *codes), segments, None, order, values, indices, context(threads()))
        return values, indices

    return again
