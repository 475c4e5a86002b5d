"""The whole step, score, select and compaction, in two launches where the competitions are small and three elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...backends import configs, launch
from ...core.plan import CuPlan, Plan
from ...core.types import GatherSpec
from ..compact.triton import Selection, gather
from ..topk.triton import launch_select
from ..variation_score.triton import plan_scores


def drop(
    scores: torch.Tensor | None,
    prev: torch.Tensor | None,
    cur: torch.Tensor | None,
    plan: Plan | CuPlan,
    mask: torch.Tensor | None,
    parts: Sequence[GatherSpec],
    metric: str,
    score_dtype: torch.dtype | None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """``(keep, compacted parts, new cu_seqlens)``; the last for a ``CuPlan`` only.

    Where ``configs.fuses_select`` says so (few competing rows in a stretch): score, then a gather whose programs each repeat the
    select of their stretch. Elsewhere, and where only the device knows the lengths: score, select, gather. Given ``scores`` take
    select and gather. More than ``configs.TENSORS_PER_LAUNCH`` tensors take one more gather for each as many.
    """
    scored = scores is None
    device = cur.device if scores is None else scores.device  # type: ignore[union-attr]
    pdl = launch.has_pdl(device)
    batch = plan.batch if isinstance(plan, Plan) else 1
    keep = torch.empty((batch, plan.out_rows), dtype=torch.int64, device=device)
    if scores is None:
        scores = plan_scores(prev, cur, plan, mask, metric, score_dtype, triggers=True)  # type: ignore[arg-type]
        if isinstance(plan, Plan) and parts and configs.fuses_select(plan.max_n, plan.groups):
            return keep, gather(keep, parts, plan.rows, selection=Selection(scores, mask, plan), waits=pdl), None
        # The scores are one flat array; batch entry b begins at b * rows.
        scores = scores.view(batch, plan.rows)
    new_cu = None if isinstance(plan, Plan) else torch.empty(plan.groups + 1, dtype=torch.int32, device=device)
    launch_select(keep, None, new_cu, scores, mask, plan, cu_seqlens, force=True, waits=scored and pdl, triggers=pdl)
    return keep, gather(keep, parts, plan.rows, waits=pdl), new_cu
