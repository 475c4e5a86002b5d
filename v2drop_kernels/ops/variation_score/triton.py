"""Token variation scores: how far each row of ``cur`` moved from ``prev``.

One read of both tensors, no second pass. Rows are visited in *slot* order: the competing rows of all segments, end to end, so
that kept-anyway rows cost nothing and ragged batches launch no idle programs. ``l2`` is the correctly rounded root of sum d^2,
summed in float32. ``cosine`` is 1 - cos from float64 sums, in which products of float32 numbers are exact: aa = sum a^2,
bb = sum b^2, ab = sum a b and dd = sum (a - b)^2. For norms within a factor of two it is taken by
``dd - (|a| - |b|)^2 = 2 |a| |b| (1 - cos)``, which does not cancel near cos = 1 as 1 - ab/(|a| |b|) would; for others it is the
other way round. csrc/core/score_cuda.cuh says what float64 costs.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ...backends import configs, launch
from ...backends.launch import COL_N_PREFIX, COL_SRC_START, TABLE_FIELDS, row_strides
from ...backends.requests import ScoreBackwardRequest, Source
from ...backends.tables import NONE, Tables
from ...core.arguments import METRICS, unit_stride
from ...core.plan import CuPlan, Plan
from ..topk.triton_keys import EXCLUDED, FORCED, score_keys

_ROUNDINGS = {None: tl.float32, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def segment_of(starts, x, groups, STRIDE: tl.constexpr, STEPS: tl.constexpr):
    """Index of the last segment that starts at or before ``x`` (so an empty one never), by bisection."""
    low = x * 0
    high = low + (groups - 1)
    for _ in tl.static_range(STEPS):
        middle = (low + high + 1) // 2
        right = tl.load(starts + middle * STRIDE) <= x
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle - 1)
    return low


@triton.jit
def _load_pair(
    prev_row, cur_row, start, inside,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PREV_POLICY: tl.constexpr, CUR_POLICY: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of both tensors."""
    cols = start + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    mask = inside[:, None] & (cols < D)
    prev_at = tl.multiple_of(prev_row + cols, (ALIGN, ALIGN))
    cur_at = tl.multiple_of(cur_row + cols, (ALIGN, ALIGN))
    a = tl.load(prev_at, mask=mask, other=0.0, eviction_policy=PREV_POLICY)
    b = tl.load(cur_at, mask=mask, other=0.0, eviction_policy=CUR_POLICY)
    return a, b  # [ROWS, BLOCK_D]


@triton.jit
def _cosine_sums(x, y, sums, VECTOR: tl.constexpr):
    """``(aa, bb, ab, dd)``, float64 ``[ROWS, BLOCK_D / VECTOR]``, with what ``[ROWS, BLOCK_D]`` of both rows add to them.

    VECTOR neighbours lie in one thread, which adds them up one after the other: few registers, and no exchange between threads.
    """
    if VECTOR > 1:
        half: tl.constexpr = x.shape[1] // 2
        x_even, x_odd = tl.split(tl.reshape(x, [x.shape[0], half, 2]))
        y_even, y_odd = tl.split(tl.reshape(y, [y.shape[0], half, 2]))
        sums = _cosine_sums(x_even, y_even, sums, VECTOR // 2)
        sums = _cosine_sums(x_odd, y_odd, sums, VECTOR // 2)
    else:
        aa, bb, ab, dd = sums
        a = x.to(tl.float32).to(tl.float64)
        b = y.to(tl.float32).to(tl.float64)
        sums = tl.fma(a, a, aa), tl.fma(b, b, bb), tl.fma(a, b, ab), tl.fma(b - a, b - a, dd)
    return sums


@triton.jit
def _cosine_distance(sums):
    """Float64 ``1 - cos`` of rows, 1 where a row is zero; their norms, 1 there; and where that is."""
    aa, bb, ab, dd = sums
    norm_a = tl.sqrt(tl.sum(aa, axis=1))
    norm_b = tl.sqrt(tl.sum(bb, axis=1))
    ab = tl.sum(ab, axis=1)
    dd = tl.sum(dd, axis=1)
    zero = (norm_a == 0) | (norm_b == 0)
    norm_a = tl.where(zero, 1.0, norm_a)
    norm_b = tl.where(zero, 1.0, norm_b)
    gap = norm_a - norm_b
    product = norm_a * norm_b
    alike = (norm_a <= 2 * norm_b) & (norm_b <= 2 * norm_a)
    distance = tl.where(alike, (dd - gap * gap) / (2 * product), 1 - ab / product)
    # Not tl.clamp: it would turn a NaN into 0.
    distance = tl.where(distance < 0, 0.0, tl.where(distance > 2, 2.0, distance))
    return tl.where(zero, 1.0, distance), norm_a, norm_b, zero


@triton.jit
def _round(x, TYPE: tl.constexpr):
    """Float32 ``x`` rounded to nearest even in TYPE. By hand for bfloat16: Triton's interpreter truncates there."""
    if TYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    elif TYPE == tl.float16:  # noqa: SIM300
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit(
    do_not_specialize=["prev_b", "prev_r", "cur_b", "cur_r", "mask_b", "mask_r", "slots", "rows", "n_prefix", "n", "groups"]
)
def _variation_score_fwd_kernel(
    scores,  # [Bt * rows]: float32, or int32 for keys
    prev, prev_b, prev_r,
    cur, cur_b, cur_r,
    mask, mask_b, mask_r,  # None, or True where a row competes; for keys only
    table, starts,  # [G, 8], [G + 1]; None for uniform plans
    slots, rows, n_prefix, n, groups,
    D: tl.constexpr, ALIGN: tl.constexpr, METRIC: tl.constexpr, ROUND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, STEPS: tl.constexpr, SEARCH_STEPS: tl.constexpr,
    FORCE: tl.constexpr, TRIGGERS: tl.constexpr,
):  # fmt: skip
    if TRIGGERS:
        gdc_launch_dependents()
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = slot < slots
    slot = tl.where(inside, slot, 0)
    if table is None:
        b = slot // n
        r = n_prefix + slot % n
    else:
        g = segment_of(starts, slot, groups, 1, SEARCH_STEPS)
        row = table + g * TABLE_FIELDS
        flat = tl.load(row + COL_SRC_START) + tl.load(row + COL_N_PREFIX) + slot - tl.load(starts + g)
        b = flat // rows
        r = flat % rows

    competes = inside
    if mask is not None:
        competes = inside & (tl.load(mask + b * mask_b + r * mask_r, mask=inside, other=0) != 0)
    prev_row = (prev + b * prev_b + r * prev_r)[:, None]
    cur_row = (cur + b * cur_b + r * cur_r)[:, None]

    diff = tl.zeros([ROWS, BLOCK_D], tl.float32)
    none = tl.zeros([ROWS, BLOCK_D // VECTOR], tl.float64)
    sums = (none, none, none, none)
    for start in tl.static_range(0, D, STEPS * BLOCK_D):
        loaded = (_load_pair(prev_row, cur_row, start, competes, D, BLOCK_D, ALIGN, "evict_first", ""),)
        for step in tl.static_range(1, STEPS):
            if start + step * BLOCK_D < D:
                pair = _load_pair(prev_row, cur_row, start + step * BLOCK_D, competes, D, BLOCK_D, ALIGN, "evict_first", "")
                loaded = loaded + (pair,)  # type: ignore[assignment]  # noqa: RUF005
        # Always true, but ptxas cannot know: in one basic block it moves uses up between the loads, which leaves as few as two
        # of the eight in flight. Cosine has a block for each step, so that the float64 numbers of one live at a time.
        if METRIC == 2:
            for step in tl.static_range(len(loaded)):
                if slots != -1 - step:
                    x, y = loaded[step]
                    sums = _cosine_sums(x, y, sums, VECTOR)
        elif slots > 0:
            for step in tl.static_range(len(loaded)):
                x, y = loaded[step]
                d = _round(y.to(tl.float32) - x.to(tl.float32), ROUND)
                diff = tl.fma(d, d, diff) if METRIC == 0 else diff + tl.abs(d)

    if METRIC == 2:
        distance, _, _, _ = _cosine_distance(sums)
        score = tl.where(competes, distance, 0.0).to(tl.float32)  # [ROWS]
    else:
        score = tl.sum(diff, axis=1)
        score = tl.sqrt_rn(score) if METRIC == 0 else score
    score = _round(score, ROUND)
    if scores.dtype.element_ty == tl.int32:
        score = score_keys(score)
        if mask is not None:
            score = tl.where(competes, score, FORCED if FORCE else EXCLUDED)
    tl.store(scores + b * rows + r, score, mask=inside)


@triton.jit(do_not_specialize=["prev_b", "prev_r", "cur_b", "cur_r", "grad_b", "grad_r", "total", "rows"])
def _variation_score_bwd_kernel(
    grad_prev, grad_cur,  # [Bt, rows, D] contiguous, or None
    grad, grad_b, grad_r,
    prev, prev_b, prev_r,
    cur, cur_b, cur_r,
    total, rows,
    D: tl.constexpr, ALIGN: tl.constexpr, METRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = flat < total
    flat = tl.where(inside, flat, 0)
    b = flat // rows
    r = flat % rows
    g = tl.load(grad + b * grad_b + r * grad_r, mask=inside, other=0.0)
    prev_row = (prev + b * prev_b + r * prev_r)[:, None]
    cur_row = (cur + b * cur_b + r * cur_r)[:, None]

    # The metric as sums over the row; the second walk below finds the row in L1 or L2.
    if METRIC != 1:
        dd = tl.zeros([ROWS, BLOCK_D], tl.float32)
        none = tl.zeros([ROWS, BLOCK_D // VECTOR], tl.float64)
        sums = (none, none, none, none)
        for start in tl.static_range(0, D, BLOCK_D):
            x, y = _load_pair(prev_row, cur_row, start, inside, D, BLOCK_D, ALIGN, "evict_last", "evict_last")
            if METRIC == 2:
                sums = _cosine_sums(x, y, sums, VECTOR)
            else:
                d = y.to(tl.float32) - x.to(tl.float32)
                dd = tl.fma(d, d, dd)
        if METRIC == 2:
            # d(1 - cos)/dy = -(x / (|x||y|) - cos y / |y|^2), and the same with x and y exchanged.
            distance, norm_a, norm_b, zero = _cosine_distance(sums)
            up = tl.where(zero, 0.0, g.to(tl.float64))
            cross = (-up / (norm_a * norm_b))[:, None]
            own_a = (up * (1 - distance) / (norm_a * norm_a))[:, None]
            own_b = (up * (1 - distance) / (norm_b * norm_b))[:, None]
        else:
            norm = tl.sqrt_rn(tl.sum(dd, axis=1))[:, None]
            g_norm = tl.where(norm == 0, 0.0, tl.div_rn(g[:, None], norm))

    out_row = (flat * D)[:, None]
    for start in tl.static_range(0, D, BLOCK_D):
        x, y = _load_pair(prev_row, cur_row, start, inside, D, BLOCK_D, ALIGN, "evict_first", "evict_first")
        x = x.to(tl.float32)
        y = y.to(tl.float32)
        if METRIC == 0:
            to_cur = g_norm * (y - x)
            to_prev = -to_cur
        elif METRIC == 1:
            to_cur = g[:, None] * ((y > x).to(tl.float32) - (y < x).to(tl.float32))
            to_prev = -to_cur
        else:
            to_cur = (x.to(tl.float64) * cross + y.to(tl.float64) * own_b).to(tl.float32)
            to_prev = (y.to(tl.float64) * cross + x.to(tl.float64) * own_a).to(tl.float32)
        cols = start + tl.arange(0, BLOCK_D)[None, :]
        mask = inside[:, None] & (cols < D)
        if grad_cur is not None:
            to_cur = _round(to_cur, grad_cur.dtype.element_ty)
            tl.store(grad_cur + out_row + cols, to_cur.to(grad_cur.dtype.element_ty), mask=mask)
        if grad_prev is not None:
            to_prev = _round(to_prev, grad_prev.dtype.element_ty)
            tl.store(grad_prev + out_row + cols, to_prev.to(grad_prev.dtype.element_ty), mask=mask)


def variation_score(source: Source) -> torch.Tensor:
    """Float32 scores ``[B, N]`` or ``[T]``."""
    lead = cast(torch.Tensor, source.h_cur).shape[:-1]
    plan = Plan(math.prod(lead[:-1]), lead[-1], 0, 0, (0, lead[-1], 0, 0))
    return _launch_score(source._replace(mask=None), plan, NONE, torch.float32, force=False, triggers=False).view(lead)


def plan_keys(source: Source, plan: Plan | CuPlan, tables: Tables, *, force: bool) -> torch.Tensor:
    """int32 keys ``[Bt, rows]`` of the rows that compete in ``plan`` (see ops/topk/triton_keys.py); the others stay unwritten.

    Rows outside the mask are kept before all others if ``force``, else never. The caller's next launch waits for this one, where
    there is programmatic dependent launch.
    """
    return _launch_score(source, plan, tables, torch.int32, force=force, triggers=True)


def _launch_score(
    source: Source, plan: Plan | CuPlan, tables: Tables, dtype: torch.dtype, *, force: bool, triggers: bool
) -> torch.Tensor:
    _, h_prev, h_cur, mask, metric, score_dtype = source
    prev, cur = unit_stride(cast(torch.Tensor, h_prev)), unit_stride(cast(torch.Tensor, h_cur))
    batch = 1 if isinstance(plan, CuPlan) else plan.batch
    scores = launch.empty((batch, plan.rows), dtype, cur.device)
    d = cur.shape[-1]
    n_prefix, groups = 0, plan.groups
    if isinstance(plan, CuPlan):
        n = slots = plan.rows
    elif plan.uniform is not None:
        n_prefix, n = plan.uniform[:2]
        slots = batch * n
    else:
        n, slots = plan.max_n, sum(plan.column("n"))
    tile_rows, block_d, num_warps = configs.score_config(d, cur.element_size())
    launch.start(
        _variation_score_fwd_kernel, -(-slots // tile_rows), cur.device,
        scores, prev, *_strides(prev), cur, *_strides(cur), mask, *row_strides(mask), tables.segments, tables.starts,
        slots, plan.rows, n_prefix, n, groups,
        D=d, ALIGN=_alignment(prev, cur), METRIC=METRICS.index(metric), ROUND=_ROUNDINGS[score_dtype],
        ROWS=tile_rows, BLOCK_D=block_d, VECTOR=_vector(block_d, cur), STEPS=configs.SCORE_STEPS, FORCE=force,
        SEARCH_STEPS=0 if tables.segments is None else max(groups - 1, 0).bit_length(),
        TRIGGERS=triggers and launch.has_pdl(cur.device), num_warps=num_warps,
    )  # fmt: skip
    return scores


def variation_score_backward(request: ScoreBackwardRequest) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients in ``prev`` and ``cur`` (contiguous; None where not needed) from that of the scores."""
    grad, (_, h_prev, h_cur, _, metric, _), need_prev, need_cur = request
    prev, cur = unit_stride(cast(torch.Tensor, h_prev)), unit_stride(cast(torch.Tensor, h_cur))
    grad_prev = torch.empty(prev.shape, dtype=prev.dtype, device=prev.device) if need_prev else None
    grad_cur = torch.empty(cur.shape, dtype=cur.dtype, device=cur.device) if need_cur else None
    rows, d = cur.shape[-2:]
    total = math.prod(cur.shape[:-1])
    tile_rows, block_d, num_warps = configs.score_config(d, cur.element_size())
    launch.start(
        _variation_score_bwd_kernel, -(-total // tile_rows) if need_prev or need_cur else 0, cur.device,
        grad_prev, grad_cur, grad, *row_strides(grad), prev, *_strides(prev), cur, *_strides(cur), total, rows,
        D=d, ALIGN=_alignment(prev, cur), METRIC=METRICS.index(metric), ROWS=tile_rows, BLOCK_D=block_d,
        VECTOR=_vector(block_d, cur), num_warps=num_warps,
    )  # fmt: skip
    return grad_prev, grad_cur


def _strides(hidden: torch.Tensor) -> tuple[int, int]:
    """Strides (batch entry, row) of ``[B, N, D]`` or ``[T, D]``."""
    return (hidden.stride(0), hidden.stride(1)) if hidden.dim() == 3 else (0, hidden.stride(0))


def _vector(block_d: int, cur: torch.Tensor) -> int:
    """Neighbours in a row that one thread loads at once."""
    return min(block_d, 16 // cur.element_size())


def _alignment(prev: torch.Tensor, cur: torch.Tensor) -> int:
    """Bytes, at most 16, to which every row of both tensors is aligned: the width of the kernel's loads."""
    bits = prev.data_ptr() | cur.data_ptr() | 16
    for stride in (*_strides(prev), *_strides(cur)):
        bits |= stride * cur.element_size()
    return bits & -bits
