# SPDX-License-Identifier: Apache-2.0
"""drop_tokens in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...backends.requests import DropRequest
from ...core.plan import CuPlan


def drop_tokens(request: DropRequest, place: str) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The kept rows ``[B, out_rows]``, the gathered tensors, and new offsets ``[groups + 1]`` for a CuPlan."""
    (source_view, source), plan = native.read_source(request.source), request.plan
    ranked = source.h_cur if source.scores is None else source.scores
    assert ranked is not None
    device = ranked.device
    batch = 1 if isinstance(plan, CuPlan) else plan.batch
    keep = torch.empty_strided((batch, plan.out_rows), (max(plan.out_rows, 1), 1), dtype=torch.int64, device=device)
    offsets = native.device_offsets(request.cu_seqlens, plan)
    new_cu = None if offsets is None else torch.empty(plan.groups + 1, dtype=torch.int32, device=device)
    results, gathers = native.outputs(request.gathers, plan.out_rows)
    native.call(
        "drop_tokens", place, device, source_view, native.segments(plan), native.maybe_view(offsets), native.view(keep),
        native.maybe_view(new_cu), gathers, plan=plan,
    )  # fmt: skip
    return keep, results, new_cu
