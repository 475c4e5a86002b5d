"""drop_tokens in plain PyTorch, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ...backends.requests import Budget, DropRequest
from ...core import calls, overwrite
from ...core.arguments import is_packed, per_segment_k
from ...core.droppable import layout_of
from ...core.layout import TokenLayout
from ...core.packed import longest_item
from ...core.plan import drop_plan
from ...core.types import Dropped, GatherSpec
from ..compact.reference import gather, pad_rows
from ..host_ints import kept_offsets
from ..topk.reference import best, segment_rows
from ..variation_score.reference import ranked_by, variation_score


def kept_rows(scores: torch.Tensor, layout: TokenLayout, ks: tuple[int, ...]) -> list[torch.Tensor]:
    """Per item the rows that survive, ascending: its real rows less the droppable ones that were not chosen."""
    flat = scores.detach().flatten().cpu()
    stays = layout.real_rows().flatten()
    for k, rows in zip(ks, segment_rows(layout), strict=True):
        stays[rows] = False
        stays[rows[best(flat[rows], k)]] = True
    if layout.is_packed:
        return [lo + stays[lo:hi].nonzero().flatten() for lo, hi in layout.bounds]
    return [row.nonzero().flatten() for row in stays.view(layout.batch, layout.rows)]


def select_and_gather(
    scores: torch.Tensor, k: Any, layout: TokenLayout, gathers: Sequence[GatherSpec]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The step once the scores are known: ``keep [Bt, S]`` and every tensor with the kept rows."""
    rows = kept_rows(scores, layout, per_segment_k(k, layout.groups))
    if layout.is_packed:
        keep = torch.cat([*rows, torch.zeros(0, dtype=torch.int64)])[None]
    else:
        keep = pad_rows(rows, layout.padding_side)
    keep = keep.to(scores.device)
    return keep, gather(keep, gathers)


def drop_tokens(
    h_prev: torch.Tensor | None,
    h_cur: torch.Tensor,
    k: Any,
    *,
    droppable: Any = None,
    scores: torch.Tensor | None = None,
    cu_seqlens: Any = None,
    metric: str = "l2",
    score_dtype: torch.dtype | None = None,
    positions: str = "persistent",
    position_ids: torch.Tensor | None = None,
    kv: Any = None,
    kv_layout: str = "BHSD",
    attention_mask: torch.Tensor | None = None,
    rope: Any = None,
    labels: torch.Tensor | None = None,
    out: Dropped | None = None,
) -> Dropped:
    """Score, choose per segment, and keep the chosen with everything that does not compete."""
    packed = is_packed(droppable, cu_seqlens)
    at = calls.batch_shape("h_cur", h_cur, packed)
    layout = layout_of(droppable, at.batch, at.rows, cu_seqlens)
    if scores is None:
        scores = variation_score(cast(torch.Tensor, h_prev), h_cur, metric=metric, score_dtype=score_dtype)
    after = drop_plan(layout, per_segment_k(k, layout.groups)).layout
    ids = calls.input_positions(positions, position_ids, layout, at.device)
    gathers, unflatten = calls.flatten(
        at, hidden=h_cur, position_ids=ids, kv=kv, kv_layout=kv_layout, attention_mask=attention_mask, rope=rope,
        labels=labels, extra=layout.mask, out=None if out is None else overwrite.checked(out, Dropped, traced=False),
        out_rows=after.rows,
    )  # fmt: skip
    keep, outs = select_and_gather(scores, k, layout, gathers)
    if packed:
        keep = keep[0]
    cu = kept_offsets(keep, layout.cu_seqlens, at.rows, traced=False) if packed else None
    return calls.build_result(
        Dropped, keep, unflatten(outs), mode=positions, position_ids=position_ids, cu_seqlens=cu, after=after,
        ragged=not packed and bool((keep < 0).any()), max_seqlen=longest_item(cu.tolist()) if cu is not None else None,
    )  # fmt: skip


def run(request: DropRequest) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """The kept rows, the gathered tensors and the offsets of a packed result, from the caller's own arguments."""
    k, droppable, cu_seqlens = cast(Budget, request.budget)
    scores = ranked_by(request.source)
    batch = scores.shape[0] if scores.dim() == 2 else None
    layout = layout_of(droppable, batch, scores.shape[-1], cu_seqlens)
    keep, outs = select_and_gather(scores, k, layout, request.gathers)
    if batch is not None:
        return keep, outs, None
    return keep, outs, kept_offsets(keep[0], layout.cu_seqlens, scores.shape[-1], traced=False)
