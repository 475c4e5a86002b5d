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
    source, plan = native.readable(request.source), request.plan
    ranked = source.h_cur if source.scores is None else source.scores
    assert ranked is not None
    device, shape = ranked.device, (plan.groups, plan.out_rows)
    values = torch.empty(shape, dtype=torch.float32 if source.scores is None else ranked.dtype, device=device)
    indices = torch.empty(shape, dtype=torch.int64, device=device)
    segments, known = native.segments(plan, place, device)
    offsets = native.device_offsets(request.cu_seqlens, plan)
    native.call(
        "topk", place, device, native.source_view(source), segments, native.maybe_view(offsets),
        library.ORDERS[request.order], native.view(values), native.view(indices),
        width=plan.out_rows if request.order == "score" else 0, **known,
    )  # fmt: skip
    return values, indices
