"""Exact selection without a sort: the k largest (score, then smaller index) of every segment, in position order.

One program selects a segment: it finds the threshold, then places the survivors (see triton_keys.py). Few and long segments are
selected by many programs each (see triton_wide.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends import configs, launch, relaunch
from ...backends.launch import row_strides
from ...backends.requests import TopKRequest
from ...backends.tables import Tables
from ...core.plan import CuPlan, Plan
from ..variation_score.triton import plan_keys
from .triton_keys import EXCLUDED, kept_up_to, key_scores, load_keys, score_keys, threshold, threshold_chunked
from .triton_segments import segment_of_plan, store_rows_around
from .triton_wide import launch_wide_select


@triton.jit(do_not_specialize=["scores_b", "mask_b", "rows", "out_rows", "n_prefix", "n", "n_suffix", "k", "groups"])
def _select_fwd_kernel(
    keep, values, new_cu,  # [., out_rows] int64; the chosen scores or None; int32 [G + 1] or None
    scores, scores_b, scores_r,
    mask, mask_b, mask_r,
    table, cu, ks,  # [G, 8] or None; int32 [G + 1] and [G], or None
    rows, out_rows, n_prefix, n, n_suffix, k, groups,
    FORCE: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, CHUNKED: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, WAITS: tl.constexpr, TRIGGERS: tl.constexpr,
):  # fmt: skip
    if TRIGGERS:
        gdc_launch_dependents()
    if WAITS:
        gdc_wait()
    g = tl.program_id(0).to(tl.int64)
    b, position, n, k, dst_start, n_prefix, n_suffix, pad_before, pad_after = segment_of_plan(
        g, table, cu, ks, rows, out_rows, n_prefix, n, n_suffix, k, groups, GROUPS, new_cu is not None
    )
    if new_cu is not None:
        tl.store(new_cu + g, dst_start.to(tl.int32))
        tl.store(new_cu + groups, (dst_start + k).to(tl.int32), mask=g == groups - 1)

    scores += b * scores_b + position * scores_r
    if mask is not None:
        mask += b * mask_b + position * mask_r
    kept_to = keep + (dst_start + pad_before + n_prefix)
    lanes = tl.arange(0, BLOCK)

    if CHUNKED:
        t, quota, found = threshold_chunked(scores, scores_r, mask, mask_r, n, k, FORCE, DEPTH, KEYS // DEPTH)
    else:
        held = load_keys(scores, scores_r, mask, mask_r, tl.arange(0, KEYS), tl.arange(0, KEYS) < n, FORCE)
        t, quota, found = threshold(held, k)
    above = found * 0
    equal = found * 0
    first = n * 0
    while first < n:
        at = first + lanes
        if CHUNKED or KEYS != BLOCK:
            keys = load_keys(scores, scores_r, mask, mask_r, at, at < n, FORCE)
        else:
            keys = held
        kept, upto, above, equal = kept_up_to(keys, t, quota, above, equal)
        # Lanes outside the segment carry the excluded key, which no threshold keeps.
        tl.store(kept_to + (upto - 1), (position.to(tl.int32) + at).to(tl.int64), mask=kept)
        if values is not None:
            if scores.dtype.element_ty == tl.int32:
                value = key_scores(keys)
            else:
                value = tl.load(scores + at.to(tl.int64) * scores_r, mask=kept, other=0.0)
            tl.store(values + (dst_start + pad_before + n_prefix) + (upto - 1), value, mask=kept)
        first += BLOCK

    store_rows_around(keep, values, position, n, k, dst_start, n_prefix, n_suffix, pad_before, pad_after, found, 0, 1, BLOCK)


@triton.jit(do_not_specialize=["slots", "tiles"])
def _rank_fwd_kernel(
    ranked_values, ranked_indices, values, indices,  # [G, slots]; values in position order
    slots, tiles,
    ROWS: tl.constexpr, TILE: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Order every group by score: the rank of a survivor is the number of those that precede it. Empty slots stay last."""
    base = (tl.program_id(0) // tiles).to(tl.int64) * slots
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)  # [ROWS] within the group
    if WAITS:
        gdc_wait()
    index = tl.load(indices + base + i, mask=i < slots, other=-1)
    value = tl.load(values + base + i, mask=i < slots, other=0.0)
    key = tl.where(index >= 0, score_keys(value), EXCLUDED)
    rank = tl.zeros([ROWS], tl.int32)
    first = tl.program_id(0) * 0
    while first < slots:
        j = first + tl.arange(0, TILE)  # [TILE]
        survives = tl.load(indices + base + j, mask=j < slots, other=-1) >= 0
        other = score_keys(tl.load(values + base + j, mask=j < slots, other=0.0))
        other = tl.where(survives, other, EXCLUDED)
        precedes = (other[None, :] > key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum(precedes.to(tl.int32), axis=1)
        first += TILE
    tl.store(ranked_values + base + rank, value, mask=i < slots)
    tl.store(ranked_indices + base + rank, index, mask=i < slots)


def launch_select(
    keep: torch.Tensor,
    values: torch.Tensor | None,
    new_cu: torch.Tensor | None,
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    plan: Plan | CuPlan,
    cu_seqlens: torch.Tensor | None,
    tables: Tables,
    *,
    force: bool,
    waits: bool,
    triggers: bool,
) -> None:
    """Start the select: one program per segment, or many in three launches, write ``keep`` and what else is given."""
    device = scores.device
    n_max = plan.rows if isinstance(plan, CuPlan) else plan.max_n
    chunk = configs.wide_chunk(n_max // plan.groups if isinstance(plan, CuPlan) and plan.groups else n_max, plan.groups, n_max)
    if chunk:
        launch_wide_select(
            keep, values, new_cu, scores, mask, plan, cu_seqlens, tables, chunk, force=force, waits=waits, triggers=triggers
        )
        return
    n_prefix = n = n_suffix = k = 0
    if isinstance(plan, Plan):
        cu_seqlens = None
        if plan.uniform is not None:
            n_prefix, n, n_suffix, k = plan.uniform
    keys, block, num_warps = configs.select_blocks(n_max, lean=mask is not None or isinstance(plan, CuPlan))
    launch.start(
        _select_fwd_kernel, plan.groups, device,
        keep, values, new_cu, scores, *row_strides(scores), mask, *row_strides(mask), tables.segments, cu_seqlens, tables.ks,
        max(plan.rows, 1), plan.out_rows, n_prefix, n, n_suffix, k, plan.groups,
        FORCE=force, KEYS=keys, DEPTH=keys // (32 * num_warps), CHUNKED=n_max > keys, BLOCK=block,
        GROUPS=configs.next_power_of_2(plan.groups) if new_cu is not None else 1,
        WAITS=waits, TRIGGERS=triggers, num_warps=num_warps, **launch.all_registers(device, num_warps),
    )  # fmt: skip


def topk(request: TopKRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """``(values, indices)`` of the kept rows, each ``[G, K]``; without scores they are computed first.

    One launch (three where ``configs.wide_chunk`` says so), one more to score, one more for ``order="score"`` (all-pairs ranks
    of the survivors).
    """
    source = request.source
    given = [x for x in source[:4] if isinstance(x, torch.Tensor)]
    tables = launch.tables_of(request.plan, given[0].device)
    values, indices = relaunch.repeated(request.memo, given[0].device, lambda: given, tables, lambda: _topk(request, tables))
    return values, indices


def _topk(request: TopKRequest, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
    source, plan, cu_seqlens, order = request[:4]
    scores, mask, scored = source.scores, source.mask, source.scores is None
    if scores is None:
        scores, mask = plan_keys(source, plan, tables, force=False), None
    device = scores.device
    pdl = launch.has_pdl(device)
    by_score = order == "score"
    shape = (plan.groups, plan.out_rows)
    indices = launch.empty(shape, torch.int64, device)
    values = launch.empty(shape, torch.float32 if scored else scores.dtype, device)
    launch_select(
        indices, values, None, scores, mask, plan, cu_seqlens, tables,
        force=False, waits=scored and pdl, triggers=by_score and pdl,
    )  # fmt: skip
    if not by_score:
        return values, indices
    ranked_values, ranked_indices = launch.empty(shape, values.dtype, device), launch.empty(shape, torch.int64, device)
    tiles = -(-plan.out_rows // configs.RANK_BLOCK)
    launch.start(
        _rank_fwd_kernel, plan.groups * tiles, device,
        ranked_values, ranked_indices, values, indices, plan.out_rows, tiles,
        ROWS=configs.RANK_BLOCK, TILE=configs.RANK_TILE, WAITS=pdl, num_warps=4,
    )  # fmt: skip
    return ranked_values, ranked_indices
