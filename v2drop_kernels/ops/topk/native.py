# SPDX-License-Identifier: Apache-2.0
"""segmented_topk and variation_topk in the compiled library."""

from __future__ import annotations

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
    return values, indices
