"""Attention of a few queries to many keys, reduced to one score per key, in two launches a chunk of queries.

The first reads every key once for all query heads that share it and leaves the logits in float32, with the maximum and the sum
of exponentials of every block of keys. The second combines these, and reduces over heads and queries: over heads in groups of
HEADS_AT_ONCE, over queries one after the other, so that neither the chunks nor the batch show in the result. Choosing the heads
that give most needs a third, small launch between them, which adds up what each gives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends import launch
from ...backends.configs import INTERPRETED, next_power_of_2
from ...backends.launch import row_strides
from ...backends.requests import AttentionRequest
from ...core.arguments import unit_stride
from .queries import chunks

_REDUCTIONS = {"mean": 0, "sum": 1, "max": 2}

# Heads whose partial sums and weights the second kernel holds at a time.
HEADS_AT_ONCE = 32 if INTERPRETED else 8


def sizes(rows: int, s: int, d: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """``(ROWS, KEYS, BLOCK_S, BLOCK_D, STEPS)``: rows of queries and keys of a program; keys and channels of a step, steps at once.

    Rows are the heads of a group times the queries; a tensor core multiplies 16 at least, which memory hides even where only one
    is real. KEYS leaves at most 64 partial sums per row, so it depends on ``s`` alone; 65536 keys of 4 heads are then 256 programs,
    two for every SM of an H200. A step is 16 KB of 2-byte keys: eight 16-byte copies per thread of 4 warps. Float32 has no tensor
    cores that are exact, and its multiply-adds spill beyond 32 channels; so does unrolling a row of 1024 further than here.
    """
    half = itemsize <= 2
    tile_rows = min(max(next_power_of_2(rows), 16), 32 if half else 16)
    keys = max(next_power_of_2(-(-s // 64)), 128)
    block_d = min(max(next_power_of_2(d), 16), 128 if half else 32)
    steps = -(-d // block_d)
    return tile_rows, keys, keys if INTERPRETED else 64, block_d, steps if steps <= 4 else 1 if half else 2


@triton.jit(do_not_specialize=["q_b", "q_h", "q_n", "k_b", "k_h", "k_s", "rows_b", "rows_n", "mask_b", "mask_s", "drop_b", "drop_s",
                               "items", "n", "s", "blocks"])  # fmt: skip
def _attention_logits_fwd_kernel(
    logits,  # float32 [B, H, Q, S]: invisible keys hold -inf, without SOFTMAX 0; what is not droppable is not written
    partials,  # float32 [3, B, H, Q, blocks]: the maximum, the sum of exponentials below it, and the droppable keys' share; or None
    q, q_b, q_h, q_n,
    k, k_b, k_h, k_s,
    query_rows, rows_b, rows_n,
    key_mask, mask_b, mask_s,  # None, or False where a key is padding
    droppable, drop_b, drop_s,  # None, or True where a row gets a score
    items, n, s, blocks, scale,
    H_KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, CAUSAL: tl.constexpr, SOFTMAX: tl.constexpr,
    SHARES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, STEPS: tl.constexpr, INTERPRETED: tl.constexpr, TRIGGERS: tl.constexpr,
):  # fmt: skip
    if TRIGGERS:
        gdc_launch_dependents()
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(GROUP * n, ROWS)  # they read the same keys, one after the other
    block = program // tiles % blocks
    h_kv = program // tiles // blocks % H_KV
    b = program // tiles // blocks // H_KV

    row = program % tiles * ROWS + tl.arange(0, ROWS)  # [ROWS], the queries of all heads of the group
    inside = row < GROUP * n
    row = tl.where(inside, row, 0)
    head = h_kv * GROUP + row // n
    query = row % n
    position = tl.load(query_rows + b * rows_b + query * rows_n, mask=inside, other=-1)
    query_at = (q + b * q_b + head * q_h + query * q_n)[:, None]
    flat = (b * H_KV * GROUP + head) * n + query  # [ROWS] of B * H * Q

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    share = tl.zeros([ROWS], tl.float32)
    for start in range(0, KEYS, BLOCK_S):
        key = block * KEYS + start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        seen = key < s
        counted = seen
        if droppable is not None:
            counted = seen & (tl.load(droppable + b * drop_b + key * drop_s, mask=seen, other=0) != 0)
        if key_mask is not None:
            seen = seen & (tl.load(key_mask + b * mask_b + key * mask_s, mask=seen, other=0) != 0)
        key_at = (k + b * k_b + h_kv * k_h + key * k_s)[:, None]
        x = tl.zeros([BLOCK_S, ROWS], tl.float32)
        for channels in range(0, D, STEPS * BLOCK_D):
            for step in tl.static_range(STEPS):
                cols = channels + step * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
                # What is padding, of the keys or of the queries, may hold anything, NaN too.
                keys_at = tl.multiple_of(key_at + cols, (ALIGN, ALIGN))
                queries_at = tl.multiple_of(query_at + cols, (ALIGN, ALIGN))
                keys = tl.load(keys_at, mask=seen[:, None] & (cols < D), other=0.0, eviction_policy="evict_first")
                queries = tl.load(queries_at, mask=(position >= 0)[:, None] & (cols < D), other=0.0)
                if INTERPRETED:  # where the bits of bfloat16 would be multiplied as integers
                    keys = keys.to(tl.float32)
                    queries = queries.to(tl.float32)
                x = tl.dot(keys, tl.trans(queries), x, input_precision="ieee")
        x = x * scale

        visible = seen[:, None] & (position >= 0)[None, :]  # [BLOCK_S, ROWS]
        if CAUSAL:
            visible = visible & (key[:, None] <= position[None, :])
        x = tl.where(visible, x, float("-inf") if SOFTMAX else 0.0)
        tl.store(logits + flat[None, :] * s + key[:, None], x, mask=counted[:, None] & inside[None, :])
        if SOFTMAX:
            above = tl.maximum(top, tl.max(x, axis=0))
            base = tl.where(above == float("-inf"), 0.0, above)
            e = tl.exp(x - base[None, :])
            fade = tl.exp(top - base)
            total = total * fade + tl.sum(e, axis=0)
            if SHARES:
                share = share * fade + tl.sum(tl.where(counted[:, None], 0.0, e), axis=0)
            top = above
        elif SHARES:
            share += tl.sum(tl.where(counted[:, None], x, 0.0), axis=0)

    partial = partials + flat * blocks + block if partials is not None else logits
    stride = items * H_KV * GROUP * n * blocks
    if SOFTMAX:
        tl.store(partial, top, mask=inside)
        tl.store(partial + stride, total, mask=inside)
    if SHARES:
        tl.store(partial + 2 * stride, share, mask=inside)


@triton.jit
def _statistics(partials, flat, stride, blocks, inside, BLOCKS: tl.constexpr):
    """The maximum of every row, 0 where it sees nothing, and the reciprocal of its sum of exponentials, 0 there too."""
    block = tl.arange(0, BLOCKS)[None, :]
    mask = inside[:, None] & (block < blocks)
    at = partials + flat[:, None] * blocks + block
    tops = tl.load(at, mask=mask, other=float("-inf"))
    totals = tl.load(at + stride, mask=mask, other=0.0)
    top = tl.max(tops, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    fade = tl.exp(tops - top[:, None])
    total = tl.sum(totals * fade, axis=1)
    return top, tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total)), fade


@triton.jit(do_not_specialize=["total", "stride", "blocks"])
def _attention_shares_fwd_kernel(
    shares,  # float32 [B, H, Q]: what each head gives to the droppable keys
    partials, total, stride, blocks,
    SOFTMAX: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, WAITS: tl.constexpr, TRIGGERS: tl.constexpr,
):  # fmt: skip
    if TRIGGERS:
        gdc_launch_dependents()
    if WAITS:
        gdc_wait()
    flat = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = flat < total
    block = tl.arange(0, BLOCKS)[None, :]
    partial = tl.load(
        partials + 2 * stride + flat[:, None] * blocks + block, mask=inside[:, None] & (block < blocks), other=0.0
    )  # [ROWS, BLOCKS]
    if SOFTMAX:
        _, weight, fade = _statistics(partials, flat, stride, blocks, inside, BLOCKS)
        partial = partial * fade
        # All is 1: what gives least to the other keys gives most, and exactly 0 where there are none.
        share = 0.0 - tl.sum(partial, axis=1) * weight
    else:
        share = tl.sum(partial, axis=1)
    tl.store(shares + flat, share, mask=inside)


@triton.jit(do_not_specialize=["rows_b", "rows_n", "drop_b", "drop_s", "first", "n", "queries", "s", "stride", "blocks"])
def _attention_score_fwd_kernel(
    scores,  # float32 [B, S]
    logits, partials, shares,
    query_rows, rows_b, rows_n,
    droppable, drop_b, drop_s,
    first, n, queries,  # this chunk: n of all the queries, from the first on
    s, stride, blocks,
    H: tl.constexpr, REDUCTION: tl.constexpr, TOP: tl.constexpr, HEADS: tl.constexpr, ALL_HEADS: tl.constexpr, L2: tl.constexpr,
    SOFTMAX: tl.constexpr, BLOCK_S: tl.constexpr, BLOCKS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    if WAITS:
        gdc_wait()
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(s, BLOCK_S)
    b = program // tiles
    key = program % tiles * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    inside = key < s
    counted = inside
    if droppable is not None:
        counted = inside & (tl.load(droppable + b * drop_b + key * drop_s, mask=inside, other=0) != 0)

    score = tl.zeros([BLOCK_S], tl.float32)
    if first > 0:
        score = tl.load(scores + b * s + key, mask=inside, other=0.0)
    query = first * 0
    while query < n:
        if tl.load(query_rows + b * rows_b + (first + query) * rows_n) >= 0:
            given = tl.full([BLOCK_S], float("-inf") if REDUCTION == 2 else 0.0, tl.float32)
            for start in range(0, H, HEADS):
                head = start + tl.arange(0, HEADS)  # [HEADS]
                flat = (b * H + head) * n + query
                at = logits + flat[:, None] * s + key[None, :]
                mask = (head < H)[:, None] & counted[None, :]
                if SOFTMAX:
                    top, weight, _ = _statistics(partials, flat, stride, blocks, head < H, BLOCKS)
                    x = tl.load(at, mask=mask, other=float("-inf"))
                    # Where the query sees no key, also if NaN among those that it sees spoils the sum.
                    x = tl.where(x == float("-inf"), 0.0, tl.exp(x - top[:, None]) * weight[:, None])  # [HEADS, BLOCK_S]
                else:
                    x = tl.load(at, mask=mask, other=0.0)
                if TOP > 0:
                    other = tl.arange(0, ALL_HEADS)[None, :]
                    mine = tl.load(shares + flat, mask=head < H, other=float("-inf"))[:, None]
                    theirs = tl.load(shares + (b * H + other) * n + query, mask=other < H, other=float("-inf"))
                    mine = tl.where(mine == mine, mine, float("inf"))
                    theirs = tl.where(theirs == theirs, theirs, float("inf"))
                    better = (theirs > mine) | ((theirs == mine) & (other < head[:, None]))
                    rank = tl.sum(better.to(tl.int32), axis=1)  # [HEADS]
                    x = tl.where((rank < TOP)[:, None] & mask, x, 0.0)
                if REDUCTION == 2:
                    x = tl.where((head < H)[:, None], x, float("-inf"))
                    most = tl.max(x, axis=0)
                    # The maximum passes over NaN; a sum does not, nor do weights hold two infinities that would make one.
                    unsure = tl.sum(tl.where((head < H)[:, None], x, 0.0), axis=0)
                    most = tl.where(unsure == unsure, most, unsure)
                    given = tl.maximum(given, most, propagate_nan=tl.PropagateNan.ALL)
                else:
                    given += tl.sum(x, axis=0)
            if REDUCTION == 0:
                given = tl.div_rn(given, tl.full([BLOCK_S], TOP if TOP > 0 else H, tl.float32))
            score += given * given if L2 else given
        query += 1

    if first + n == queries:
        if L2:
            score = tl.sqrt_rn(score)
        else:
            present = first * 0
            query = first * 0
            while query < queries:
                present += (tl.load(query_rows + b * rows_b + query * rows_n) >= 0).to(present.dtype)
                query += 1
            score = tl.div_rn(score, tl.zeros([BLOCK_S], tl.float32) + tl.maximum(present, 1).to(tl.float32))
    tl.store(scores + b * s + key, tl.where(counted, score, 0.0), mask=inside)


def attention_score(request: AttentionRequest) -> torch.Tensor:
    """Float32 scores ``[B, S]`` of keys ``[B, Hkv, S, Dh]`` by queries ``[B, H, Q, Dh]``."""
    q, k, query_rows, key_mask, droppable, causal, scale, mode, heads, queries = request
    q, k = unit_stride(q), unit_stride(k)
    batch, h, all_queries, d = q.shape
    h_kv, s = k.shape[1:3]
    softmax, top = mode == "softmax", heads if isinstance(heads, int) else 0
    scores = torch.empty(batch, s, dtype=torch.float32, device=k.device)
    pdl = launch.has_pdl(k.device)
    score_block = 1024 if INTERPRETED else 64 if s <= 8192 else 256
    for chunk in chunks(q, k):
        n = chunk.stop - chunk.start
        some, rows = q[:, :, chunk], query_rows[:, chunk]
        tile_rows, keys, block_s, block_d, steps = sizes(h // h_kv * all_queries, s, d, k.element_size())
        blocks, tiles = -(-s // keys), -(-(h // h_kv * n) // tile_rows)
        logits = torch.empty(batch, h, n, s, dtype=torch.float32, device=k.device)
        partials = torch.empty(3, batch, h, n, blocks, dtype=torch.float32, device=k.device) if softmax or top else None
        launch.start(
            _attention_logits_fwd_kernel, batch * h_kv * blocks * tiles, k.device,
            logits, partials, some, *some.stride()[:3], k, *k.stride()[:3], rows, *row_strides(rows),
            key_mask, *row_strides(key_mask), droppable, *row_strides(droppable), batch, n, s, blocks, scale,
            H_KV=h_kv, GROUP=h // h_kv, D=d, ALIGN=alignment(some, k), CAUSAL=causal, SOFTMAX=softmax, SHARES=top > 0,
            ROWS=tile_rows, KEYS=keys, BLOCK_S=block_s, BLOCK_D=block_d,
            STEPS=steps, INTERPRETED=INTERPRETED, TRIGGERS=pdl, num_warps=4,
            # The unrolled products of float32 spill when ptxas may take all registers, those of half precision when not.
            **(launch.all_registers(k.device, 4) if k.element_size() <= 2 else {}),
        )  # fmt: skip
        shares, stride, held = None, batch * h * n * blocks, next_power_of_2(blocks)
        if top:
            shares = torch.empty(batch, h, n, dtype=torch.float32, device=k.device)
            launch.start(
                _attention_shares_fwd_kernel, -(-shares.numel() // HEADS_AT_ONCE), k.device,
                shares, partials, shares.numel(), stride, blocks,
                SOFTMAX=softmax, ROWS=HEADS_AT_ONCE, BLOCKS=held, WAITS=pdl, TRIGGERS=pdl, num_warps=4,
            )  # fmt: skip
        launch.start(
            _attention_score_fwd_kernel, batch * -(-s // score_block), k.device,
            scores, logits, partials, shares, query_rows, *row_strides(query_rows), droppable, *row_strides(droppable),
            chunk.start, n, all_queries, s, stride, blocks,
            H=h, REDUCTION=_REDUCTIONS["mean" if top else str(heads)], TOP=top, HEADS=min(HEADS_AT_ONCE, next_power_of_2(h)),
            ALL_HEADS=next_power_of_2(h), L2=queries == "l2", SOFTMAX=softmax, BLOCK_S=score_block, BLOCKS=held,
            WAITS=pdl, num_warps=4, **launch.all_registers(k.device, 4),
        )  # fmt: skip
    return scores


def alignment(*tensors: torch.Tensor) -> int:
    """Bytes, at most 16, to which every row of all tensors is aligned: the width of a kernel's loads."""
    bits = 16
    for x in tensors:
        bits |= x.data_ptr()
        for stride in x.stride()[:-1]:
            bits |= stride * x.element_size()
    return bits & -bits
