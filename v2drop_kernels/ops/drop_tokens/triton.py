"""The whole step, score, select and compaction, in two launches where the competitions are small, else in three or five."""

from __future__ import annotations

from typing import cast

import torch

from ...backends import configs, launch, relaunch
from ...backends.requests import DropRequest, KnownGathers
from ...backends.tables import Tables
from ...core.plan import Plan
from ..compact.triton import Selection, gather
from ..topk.triton import launch_select
from ..variation_score.triton import plan_keys


def drop_tokens(request: DropRequest) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """``(keep, gathered tensors, new cu_seqlens)``; the last for a ``CuPlan`` only.

    Where ``configs.fuses_select`` says so (few competing rows in a segment): score, then a gather whose programs each repeat the
    select of their segment. Elsewhere, and where the lengths are only on the device: score, select, gather. Given ``scores`` take
    select and gather. The select is one launch, or three dependent ones where ``configs.wide_chunk`` says so. More than
    ``configs.TENSORS_PER_LAUNCH`` tensors take one more gather for each as many.
    """
    source, gathers = request.source, request.gathers
    device = cast(torch.Tensor, source.h_cur if source.scores is None else source.scores).device
    tables = launch.tables_of(request.plan, device)
    if type(gathers) is not KnownGathers:
        return _drop(request, device, tables)
    ranked = source.h_prev if source.scores is None else source.scores  # h_cur is among the tensors that are gathered
    given = lambda: [cast(torch.Tensor, ranked), *gathers.tensors, *gathers.results]
    places = gathers.addresses[-8 * (1 + 2 * len(gathers)) :]
    (keep,) = relaunch.repeated(request.memo, device, given, tables, lambda: _drop(request, device, tables)[:1], places)
    return keep, gathers.results, None


def _drop(
    request: DropRequest, device: torch.device, tables: Tables
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    source, plan, cu_seqlens, gathers = request[:4]
    scores, mask, scored = source.scores, source.mask, source.scores is None
    pdl = launch.has_pdl(device)
    batch = plan.batch if isinstance(plan, Plan) else 1
    keep = launch.empty((batch, plan.out_rows), torch.int64, device)
    if scores is None:
        scores, mask = plan_keys(source, plan, tables, force=True), None
        if isinstance(plan, Plan) and gathers and configs.fuses_select(plan.max_n, plan.groups):
            return keep, gather(keep, gathers, plan.rows, selection=Selection(scores, plan, tables), waits=pdl), None
    new_cu = None if isinstance(plan, Plan) else torch.empty(plan.groups + 1, dtype=torch.int32, device=device)
    launch_select(keep, None, new_cu, scores, mask, plan, cu_seqlens, tables, force=True, waits=scored and pdl, triggers=pdl)
    return keep, gather(keep, gathers, plan.rows, waits=pdl), new_cu
