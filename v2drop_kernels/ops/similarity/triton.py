"""Key norms, and the cosines of all rows with a few of them: one read of the tensor each, sums in a fixed order.

Norms are summed in float32, cosines in float64, where products of float32 numbers are exact: rows of 1e-30 and 1e30 have cosines
too, and those near 0 keep their digits. csrc/core/score_cuda.cuh says what float64 costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...backends import launch
from ...backends.configs import INTERPRETED, next_power_of_2
from ...backends.launch import row_strides
from ...backends.requests import CosineRequest, KeyNormRequest
from ...core.arguments import unit_stride
from ..attention_score.triton import alignment


@triton.jit(do_not_specialize=["k_b", "k_h", "k_s", "total", "s"])
def _key_norm_fwd_kernel(
    norms,  # float32 [B, S]
    k, k_b, k_h, k_s,
    total, s,
    H: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, L1: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = flat < total
    flat = tl.where(inside, flat, 0)
    at = (k + flat // s * k_b + flat % s * k_s)[:, None]
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for _ in range(0, H):
        for start in tl.static_range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
            keys_at = tl.multiple_of(at + cols, (ALIGN, ALIGN))
            x = tl.load(keys_at, mask=inside[:, None] & (cols < D), other=0.0, eviction_policy="evict_first").to(tl.float32)
            sums = sums + tl.abs(x) if L1 else tl.fma(x, x, sums)
        at += k_h
    norm = tl.sum(sums, axis=1)
    tl.store(norms + flat, norm if L1 else tl.sqrt_rn(norm), mask=inside)


@triton.jit
def _add_squares(sums, x, VECTOR: tl.constexpr):
    """Float64 ``[ROWS, BLOCK_D / VECTOR]`` plus the squares of ``x [ROWS, BLOCK_D]``; VECTOR neighbours lie in one thread."""
    if VECTOR > 1:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        sums = _add_squares(_add_squares(sums, even, VECTOR // 2), odd, VECTOR // 2)
    else:
        sums = tl.fma(x, x, sums)
    return sums


@triton.jit(do_not_specialize=["x_b", "x_n", "pivots_b", "pivots_p", "n", "p"])
def _cosine_to_pivots_fwd_kernel(
    cosines,  # float32 [B, P, N]
    x, x_b, x_n,
    pivots, pivots_b, pivots_p,
    n, p,
    D: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, PIVOTS: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    pivot_tiles = tl.cdiv(p, PIVOTS)  # they read the same rows, one after the other
    tiles = tl.cdiv(n, ROWS)
    b = program // pivot_tiles // tiles
    row = program // pivot_tiles % tiles * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = row < n
    which = program % pivot_tiles * PIVOTS + tl.arange(0, PIVOTS)  # [PIVOTS]
    pivot = tl.load(pivots + b * pivots_b + which * pivots_p, mask=which < p, other=-1)
    there = (pivot >= 0) & (pivot < n)
    row_at = (x + b * x_b + row * x_n)[:, None]
    pivot_at = (x + b * x_b + pivot * x_n)[:, None]

    products = tl.zeros([ROWS, PIVOTS], tl.float64)
    squares = tl.zeros([ROWS, BLOCK_D // VECTOR], tl.float64)
    pivot_squares = tl.zeros([PIVOTS, BLOCK_D // VECTOR], tl.float64)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
        rows_at = tl.multiple_of(row_at + cols, (ALIGN, ALIGN))
        pivots_at = tl.multiple_of(pivot_at + cols, (ALIGN, ALIGN))
        a = tl.load(rows_at, mask=inside[:, None] & (cols < D), other=0.0, eviction_policy="evict_first")
        c = tl.load(pivots_at, mask=there[:, None] & (cols < D), other=0.0, eviction_policy="evict_last")
        wide_a = a.to(tl.float32).to(tl.float64)
        wide_c = c.to(tl.float32).to(tl.float64)
        products = tl.dot(wide_a, tl.trans(wide_c), products, out_dtype=tl.float64)
        squares = _add_squares(squares, wide_a, VECTOR)
        pivot_squares = _add_squares(pivot_squares, wide_c, VECTOR)

    norm = tl.sqrt(tl.sum(squares, axis=1))[:, None]
    pivot_norm = tl.sqrt(tl.sum(pivot_squares, axis=1))[None, :]
    zero = (norm == 0) | (pivot_norm == 0)
    cosine = tl.where(zero, 0.0, products / tl.where(zero, 1.0, norm * pivot_norm)).to(tl.float32)
    at = cosines + (b * p + which)[None, :] * n + row[:, None]
    tl.store(at, cosine, mask=inside[:, None] & (which < p)[None, :])


def key_norm(request: KeyNormRequest) -> torch.Tensor:
    """Float32 norms ``[B, S]`` of keys ``[B, Hkv, S, Dh]``, over heads and channels."""
    k, norm = unit_stride(request.k), request.norm
    batch, h, s, d = k.shape
    norms = torch.empty(batch, s, dtype=torch.float32, device=k.device)
    # A step is 4 KB of 2-byte keys, two 16-byte loads per thread: 8192 tokens make as many programs as an H200 has places.
    block_d = min(next_power_of_2(d), 1024)
    rows = 512 if INTERPRETED else max(2048 // block_d, 1)
    launch.start(
        _key_norm_fwd_kernel, -(-batch * s // rows), k.device,
        norms, k, *k.stride()[:3], batch * s, s,
        H=h, D=d, ALIGN=alignment(k), L1=norm == "l1", ROWS=rows, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return norms


def cosine_to_pivots(request: CosineRequest) -> torch.Tensor:
    """Float32 cosines ``[B, P, N]`` of rows of ``[B, N, D]`` with the rows ``pivots [B, P]``, 0 for what is no row."""
    x, pivots = unit_stride(request.x), request.pivots
    (batch, n, d), p = x.shape, pivots.shape[1]
    cosines = torch.empty(batch, p, n, dtype=torch.float32, device=x.device)
    # 16 is the least that a tensor core multiplies; 32 rows give an H200 a program per SM at 4096 tokens.
    rows, tile, limit = (256, 16, 2048) if INTERPRETED else (32, 16, 64)
    block_d = min(max(next_power_of_2(d), 16), limit)
    launch.start(
        _cosine_to_pivots_fwd_kernel, batch * -(-n // rows) * -(-p // tile), x.device,
        cosines, x, *x.stride()[:2], pivots, *row_strides(pivots), n, p,
        D=d, ALIGN=alignment(x), ROWS=rows, PIVOTS=tile, BLOCK_D=block_d, VECTOR=16 // x.element_size(), num_warps=4,
    )  # fmt: skip
    return cosines
