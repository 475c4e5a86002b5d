"""Selection by many programs per segment, in three dependent launches, for segments of more keys than one program reads in time.

Programs own chunks of CHUNK keys, and every number has one writer, without atomics. The comments of the three kernels say more.
1. **count**: SAMPLES keys of the segment are thresholds; a program counts the keys of its chunk that are at least each of them.
2. **split**: T lies between ``low``, the largest sample that at least k keys reach, and the next sample above. The keys between
   them are the candidates, about n / SAMPLES, which the programs write in the order of the rows.
3. **place**: T is ``low`` if fewer than k keys are above it; otherwise every program finds T among the candidates by bisection.
Samples only bear on the time: with bad luck there are many candidates, up to all keys, and the last launch takes longer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends import configs, launch
from ...backends.launch import row_strides
from ...backends.tables import Tables
from ...core.plan import CuPlan, Plan
from .triton_keys import EXCLUDED, FORCED, kept_up_to, key_scores, load_keys, threshold, threshold_chunked
from .triton_segments import segment_of_plan, store_rows_around

# Fields of a chunk in the scratch memory: keys above all candidates, keys above ``low``, keys that are at least ``low``.
_ABOVE, _OVER, _REACH = (tl.constexpr(i) for i in range(3))
_CHUNK_FIELDS = 3
_FIELDS = tl.constexpr(_CHUNK_FIELDS)


@triton.jit
def _competing_rows(g, table, cu, ks, rows, out_rows, n_prefix, n, n_suffix, k, groups):
    """Batch entry and first row of those that compete in segment ``g``, how many they are, and how many of them are kept."""
    found = segment_of_plan(g, table, cu, ks, rows, out_rows, n_prefix, n, n_suffix, k, groups, 1, False)
    return found[0], found[1], found[2], found[3]


@triton.jit
def _samples(scores, scores_r, mask, mask_r, n, j, FORCE: tl.constexpr, SAMPLES: tl.constexpr):
    """The thresholds ``j``. The first lets every key pass that takes part; no other is below it."""
    at = (j.to(tl.int64) * n // SAMPLES).to(tl.int32)
    keys = load_keys(scores, scores_r, mask, mask_r, at, (j > 0) & (at < n), FORCE)
    return tl.maximum(keys, EXCLUDED + 1)


@triton.jit(do_not_specialize=["scores_b", "mask_b", "rows", "out_rows", "n_prefix", "n", "n_suffix", "k", "groups", "chunks"])
def _select_count_fwd_kernel(
    counts,  # int32 [G, chunks, SAMPLES / 2]: samples j and j + SAMPLES / 2 in 16 bits each
    scores, scores_b, scores_r,
    mask, mask_b, mask_r,
    table, cu, ks,
    rows, out_rows, n_prefix, n, n_suffix, k, groups, chunks,
    FORCE: tl.constexpr, CHUNK: tl.constexpr, SAMPLES: tl.constexpr, LANES: tl.constexpr,
    WAITS: tl.constexpr, TRIGGERS: tl.constexpr,
):  # fmt: skip
    if TRIGGERS:
        gdc_launch_dependents()
    if WAITS:
        gdc_wait()
    g = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    b, position, n, k = _competing_rows(g, table, cu, ks, rows, out_rows, n_prefix, n, n_suffix, k, groups)
    first = chunk * CHUNK
    if first < n:
        scores += b * scores_b + position * scores_r
        if mask is not None:
            mask += b * mask_b + position * mask_r
        j = tl.arange(0, SAMPLES // 2)
        low = _samples(scores, scores_r, mask, mask_r, n, j, FORCE, SAMPLES)[:, None]
        high = _samples(scores, scores_r, mask, mask_r, n, j + SAMPLES // 2, FORCE, SAMPLES)[:, None]
        count = tl.zeros([SAMPLES // 2, LANES], tl.int32)
        end = tl.minimum(first + CHUNK, n)
        while first < end:
            for step in tl.static_range(4):
                at = first + step * LANES + tl.arange(0, LANES)
                keys = load_keys(scores, scores_r, mask, mask_r, at, at < end, FORCE)[None, :]
                count += tl.where(keys >= low, 1, 0) + tl.where(keys >= high, 1 << 16, 0)
            first += 4 * LANES
        tl.store(counts + tl.program_id(0).to(tl.int64) * (SAMPLES // 2) + j, tl.sum(count, axis=1))


@triton.jit(
    do_not_specialize=["scores_b", "mask_b", "rows", "out_rows", "n_prefix", "n", "n_suffix", "k", "groups", "chunks", "room"]
)
def _select_split_fwd_kernel(
    candidates, sums, heads,  # int32 [G, room]; [G, 3, chunks]; [G, 2]: low, and how many rows are kept
    counts,
    scores, scores_b, scores_r,
    mask, mask_b, mask_r,
    table, cu, ks,
    rows, out_rows, n_prefix, n, n_suffix, k, groups, chunks, room,
    FORCE: tl.constexpr, CHUNK: tl.constexpr, SAMPLES: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    WAITS: tl.constexpr, TRIGGERS: tl.constexpr,
):  # fmt: skip
    if TRIGGERS:
        gdc_launch_dependents()
    if WAITS:
        gdc_wait()
    g = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    b, position, n, k = _competing_rows(g, table, cu, ks, rows, out_rows, n_prefix, n, n_suffix, k, groups)
    first = chunk * CHUNK
    if (first < n) | (chunk == 0):
        scores += b * scores_b + position * scores_r
        if mask is not None:
            mask += b * mask_b + position * mask_r
        j = tl.arange(0, SAMPLES // 2)
        sample_a = _samples(scores, scores_r, mask, mask_r, n, j, FORCE, SAMPLES)
        sample_b = _samples(scores, scores_r, mask, mask_r, n, j + SAMPLES // 2, FORCE, SAMPLES)

        # Keys that reach each sample: in all chunks, and in those before this one.
        all_a = tl.zeros([DEPTH, SAMPLES // 2], tl.int32)
        all_b = tl.zeros([DEPTH, SAMPLES // 2], tl.int32)
        before_a = tl.zeros([DEPTH, SAMPLES // 2], tl.int32)
        before_b = tl.zeros([DEPTH, SAMPLES // 2], tl.int32)
        used = (n + CHUNK - 1) // CHUNK
        other = used * 0
        while other < used:
            q = other + tl.arange(0, DEPTH)[:, None]
            found = tl.load(counts + (g * chunks + q) * (SAMPLES // 2) + j[None, :], mask=q < used, other=0)
            all_a += found & 0xFFFF
            all_b += found >> 16
            before_a += tl.where(q < chunk, found & 0xFFFF, 0)
            before_b += tl.where(q < chunk, found >> 16, 0)
            other += DEPTH
        reach_a = tl.sum(all_a, axis=0)
        reach_b = tl.sum(all_b, axis=0)
        k = tl.minimum(k.to(tl.int32), tl.maximum(tl.max(reach_a), tl.max(reach_b)))  # the first sample counts all that take part
        low = tl.maximum(tl.max(tl.where(reach_a >= k, sample_a, EXCLUDED)), tl.max(tl.where(reach_b >= k, sample_b, EXCLUDED)))
        low = tl.maximum(low, EXCLUDED + 1)
        # The largest key below every sample that fewer than k keys reach.
        high = tl.minimum(tl.min(tl.where(reach_a < k, sample_a - 1, FORCED)), tl.min(tl.where(reach_b < k, sample_b - 1, FORCED)))
        over_a = tl.where(sample_a == low, 1, 0) - tl.where((sample_a > low) & (sample_a - 1 == high), 1, 0)
        over_b = tl.where(sample_b == low, 1, 0) - tl.where((sample_b > low) & (sample_b - 1 == high), 1, 0)
        skipped_a = tl.sum(before_a, axis=0)
        skipped_b = tl.sum(before_b, axis=0)
        reach = tl.maximum(tl.max(tl.where(over_a > 0, skipped_a, 0)), tl.max(tl.where(over_b > 0, skipped_b, 0)))
        above = tl.maximum(tl.max(tl.where(over_a < 0, skipped_a, 0)), tl.max(tl.where(over_b < 0, skipped_b, 0)))
        to = candidates + g * room + (reach - above)

        lanes = tl.arange(0, BLOCK)
        end = tl.minimum(first + CHUNK, n)
        n_above = first * 0
        n_over = first * 0
        n_reach = first * 0
        while first < end:
            at = first + lanes
            keys = load_keys(scores, scores_r, mask, mask_r, at, at < end, FORCE)
            among = (keys >= low) & (keys <= high)
            upto = tl.cumsum(among.to(tl.int32), axis=0)
            tl.store(to + (n_reach - n_above) + (upto - 1), keys, mask=among)
            n_above += tl.sum((keys > high).to(tl.int32))
            n_over += tl.sum((keys > low).to(tl.int32))
            n_reach += tl.sum((keys >= low).to(tl.int32))
            first += BLOCK
        mine = sums + g * chunks * _FIELDS + chunk
        tl.store(mine + _ABOVE * chunks, n_above)
        tl.store(mine + _OVER * chunks, n_over)
        tl.store(mine + _REACH * chunks, n_reach)
        if chunk == 0:
            tl.store(heads + g * 2, low)
            tl.store(heads + g * 2 + 1, k)


@triton.jit
def _sums(sums, used, chunks, chunk, LANES: tl.constexpr):
    """The fields of the chunks, added up: of all, then of those before ``chunk``. One pass: the loads are in flight at once."""
    above = tl.zeros([LANES], tl.int32)
    over = tl.zeros([LANES], tl.int32)
    reach = tl.zeros([LANES], tl.int32)
    above_before = tl.zeros([LANES], tl.int32)
    over_before = tl.zeros([LANES], tl.int32)
    reach_before = tl.zeros([LANES], tl.int32)
    other = used * 0
    while other < used:
        q = other + tl.arange(0, LANES)
        x = tl.load(sums + _ABOVE * chunks + q, mask=q < used, other=0)
        y = tl.load(sums + _OVER * chunks + q, mask=q < used, other=0)
        z = tl.load(sums + _REACH * chunks + q, mask=q < used, other=0)
        above += x
        over += y
        reach += z
        above_before += tl.where(q < chunk, x, 0)
        over_before += tl.where(q < chunk, y, 0)
        reach_before += tl.where(q < chunk, z, 0)
        other += LANES
    return tl.sum(above), tl.sum(over), tl.sum(reach), tl.sum(above_before), tl.sum(over_before), tl.sum(reach_before)


@triton.jit
def _among_candidates(candidates, n, k, stop, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """T and R of ``k`` among ``n`` candidates, and how many of the first ``stop`` are above T and equal to it.

    These come before a chunk. Nearly always the candidates fit the registers of a program; if not, they are read for every step.
    """
    i = tl.arange(0, DEPTH * LANES)
    if n <= DEPTH * LANES:
        keys = tl.load(candidates + i, mask=i < n, other=EXCLUDED)
        t, quota, _ = threshold(keys, k)
        larger = tl.sum(((keys > t) & (i < stop)).to(tl.int32))
        equal = tl.sum(((keys == t) & (i < stop)).to(tl.int32))
    else:
        t, quota, _ = threshold_chunked(candidates, 1, None, 0, n, k, False, DEPTH, LANES)
        above = tl.zeros([LANES], tl.int32)
        tied = tl.zeros([LANES], tl.int32)
        first = stop * 0
        while first < stop:
            at = first + tl.arange(0, LANES)
            key = tl.load(candidates + at, mask=at < stop, other=EXCLUDED)
            above += (key > t).to(tl.int32)
            tied += (key == t).to(tl.int32)
            first += LANES
        larger = tl.sum(above)
        equal = tl.sum(tied)
    return t, quota, larger, equal


@triton.jit(
    do_not_specialize=["scores_b", "mask_b", "rows", "out_rows", "n_prefix", "n", "n_suffix", "k", "groups", "chunks", "room"]
)
def _select_place_fwd_kernel(
    keep, values, new_cu,  # as _select_fwd_kernel
    candidates, sums, heads,
    scores, scores_b, scores_r,
    mask, mask_b, mask_r,
    table, cu, ks,
    rows, out_rows, n_prefix, n, n_suffix, k, groups, chunks, room,
    FORCE: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, WAITS: tl.constexpr, TRIGGERS: tl.constexpr,
):  # fmt: skip
    if TRIGGERS:
        gdc_launch_dependents()
    if WAITS:
        gdc_wait()
    g = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    b, position, n, k, dst_start, n_prefix, n_suffix, pad_before, pad_after = segment_of_plan(
        g, table, cu, ks, rows, out_rows, n_prefix, n, n_suffix, k, groups, GROUPS, new_cu is not None
    )
    if new_cu is not None:
        tl.store(new_cu + g, dst_start.to(tl.int32), mask=chunk == 0)
        tl.store(new_cu + groups, (dst_start + k).to(tl.int32), mask=(chunk == 0) & (g == groups - 1))
    t = tl.load(heads + g * 2)
    kept_rows = tl.load(heads + g * 2 + 1)
    first = chunk * CHUNK
    if (first < n) & (kept_rows > 0):
        scores += b * scores_b + position * scores_r
        if mask is not None:
            mask += b * mask_b + position * mask_r
        used = (n + CHUNK - 1) // CHUNK
        beyond, over, reach, beyond_before, above, reach_before = _sums(sums + g * chunks * _FIELDS, used, chunks, chunk, LANES)
        equal = reach_before - above
        quota = kept_rows - over
        if quota <= 0:
            candidates += g * room
            t, quota, larger, equal = _among_candidates(
                candidates, reach - beyond, kept_rows - beyond, reach_before - beyond_before, DEPTH, LANES
            )
            above = beyond_before + larger
        end = tl.minimum(first + CHUNK, n)
        to = dst_start + pad_before + n_prefix
        while first < end:
            at = first + tl.arange(0, BLOCK)
            keys = load_keys(scores, scores_r, mask, mask_r, at, at < end, FORCE)
            kept, upto, above, equal = kept_up_to(keys, t, quota, above, equal)
            tl.store((keep + to) + (upto - 1), (position.to(tl.int32) + at).to(tl.int64), mask=kept)
            if values is not None:
                if scores.dtype.element_ty == tl.int32:
                    value = key_scores(keys)
                else:
                    value = tl.load(scores + at.to(tl.int64) * scores_r, mask=kept, other=0.0)
                tl.store((values + to) + (upto - 1), value, mask=kept)
            first += BLOCK
    store_rows_around(
        keep, values, position, n, k, dst_start, n_prefix, n_suffix, pad_before, pad_after, kept_rows, chunk, chunks, BLOCK
    )


def launch_wide_select(
    keep: torch.Tensor,
    values: torch.Tensor | None,
    new_cu: torch.Tensor | None,
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    plan: Plan | CuPlan,
    cu_seqlens: torch.Tensor | None,
    tables: Tables,
    chunk: int,
    *,
    force: bool,
    waits: bool,
    triggers: bool,
) -> None:
    """Start the three kernels, one program for every ``chunk`` keys of a segment; otherwise as ``launch_select``."""
    device = scores.device
    n_prefix = n = n_suffix = k = 0
    if isinstance(plan, CuPlan):
        room = plan.rows
    else:
        room, cu_seqlens = plan.max_n, None
        if plan.uniform is not None:
            n_prefix, n, n_suffix, k = plan.uniform
    chunks = max(-(-room // chunk), 1)  # a segment without keys still has rows around
    half = configs.WIDE_SAMPLES // 2
    counts = launch.empty((plan.groups, chunks, half), torch.int32, device)
    sums = launch.empty((plan.groups, _CHUNK_FIELDS, chunks), torch.int32, device)
    candidates = launch.empty((plan.groups, room), torch.int32, device)
    heads = launch.empty((plan.groups, 2), torch.int32, device)
    keys = (scores, *row_strides(scores), mask, *row_strides(mask), tables.segments, cu_seqlens, tables.ks)
    sizes = (max(plan.rows, 1), plan.out_rows, n_prefix, n, n_suffix, k, plan.groups, chunks)
    block = min(chunk, 1024)
    pdl = launch.has_pdl(device)
    launch.start(
        _select_count_fwd_kernel, plan.groups * chunks, device, counts, *keys, *sizes,
        FORCE=force, CHUNK=chunk, SAMPLES=configs.WIDE_SAMPLES, LANES=32, WAITS=waits, TRIGGERS=pdl, num_warps=4,
    )  # fmt: skip
    launch.start(
        _select_split_fwd_kernel, plan.groups * chunks, device, candidates, sums, heads, counts, *keys, *sizes, room,
        FORCE=force, CHUNK=chunk, SAMPLES=configs.WIDE_SAMPLES, DEPTH=64, BLOCK=block, WAITS=pdl, TRIGGERS=pdl, num_warps=4,
    )  # fmt: skip
    launch.start(
        _select_place_fwd_kernel, plan.groups * chunks, device, keep, values, new_cu, candidates, sums, heads, *keys, *sizes, room,
        FORCE=force, CHUNK=chunk, DEPTH=8, LANES=128, BLOCK=block,
        GROUPS=configs.next_power_of_2(plan.groups) if new_cu is not None else 1,
        WAITS=pdl, TRIGGERS=triggers, num_warps=4,
    )  # fmt: skip
