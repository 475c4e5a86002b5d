"""weighted_merge: every program sums the edges of one output row, over one block of columns.

The edges of an output row lie together, so a program finds its own without atomics, one fixed order of additions. The gradient in
the rows is the same kernel through the transposed list of edges; that in the weights is one dot product per edge.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...backends import configs, launch
from ...backends.requests import MergeRequest
from ...core.arguments import unit_stride
from ..variation_score.triton import _alignment, _round


@triton.jit(do_not_specialize=["x_b", "x_r", "n", "k", "edges"])
def _weighted_merge_fwd_kernel(
    out,  # [B, k, D] contiguous
    x, x_b, x_r,  # [B, n, D]
    offsets, rows, weights,  # int64 [B, k + 1], int64 [B, edges], float32 [B, edges] or None
    n, k, edges,
    D: tl.constexpr, ALIGN: tl.constexpr, MEAN: tl.constexpr, EDGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    flat = tl.program_id(0).to(tl.int64) // blocks
    b = flat // k
    at = offsets + b * (k + 1) + flat % k
    # Offsets beyond the list would read foreign memory.
    edge = tl.maximum(tl.load(at), 0)
    stop = tl.minimum(tl.load(at + 1), edges)
    cols = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    total = tl.zeros([BLOCK_D], tl.float32)
    whole = 0.0
    while edge < stop:
        lanes = edge + tl.arange(0, EDGES)  # [EDGES]
        row = tl.load(rows + b * edges + lanes, mask=lanes < stop, other=-1)
        used = (row >= 0) & (row < n)
        w = tl.where(used, 1.0, 0.0)
        if weights is not None:
            w = tl.load(weights + b * edges + lanes, mask=used, other=0.0)
        source = tl.multiple_of(x + b * x_b + row[:, None] * x_r + cols[None, :], (ALIGN, ALIGN))
        values = tl.load(source, mask=used[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(w[:, None] * values, axis=0)
        if MEAN:
            whole += tl.sum(w)
        edge += EDGES
    if MEAN:
        total = tl.where(whole == 0, 0.0, tl.div_rn(total, tl.where(whole == 0, 1.0, whole)))
    tl.store(out + flat * D + cols, _round(total, out.dtype.element_ty).to(out.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["x_b", "x_r", "y_b", "y_r", "n", "k", "edges", "total"])
def _row_dots_kernel(
    dots,  # float32 [B, edges]
    x, x_b, x_r,  # [B, n, D]
    y, y_b, y_r,  # [B, k, D]
    rows, targets,  # int64 [B, edges]: rows of x and of y
    n, k, edges, total,
    D: tl.constexpr, ALIGN: tl.constexpr, EDGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)  # [EDGES]
    inside = flat < total
    b = tl.where(inside, flat // edges, 0)
    row = tl.load(rows + flat, mask=inside, other=-1)
    target = tl.load(targets + flat, mask=inside, other=-1)
    used = (row >= 0) & (row < n) & (target >= 0) & (target < k)
    x_row = (x + b * x_b + row * x_r)[:, None]
    y_row = (y + b * y_b + target * y_r)[:, None]
    dot = tl.zeros([EDGES, BLOCK_D], tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
        mask = used[:, None] & (cols < D)
        p = tl.load(tl.multiple_of(x_row + cols, (ALIGN, ALIGN)), mask=mask, other=0.0).to(tl.float32)
        q = tl.load(tl.multiple_of(y_row + cols, (ALIGN, ALIGN)), mask=mask, other=0.0).to(tl.float32)
        dot = tl.fma(p, q, dot)
    tl.store(dots + flat, tl.sum(dot, axis=1), mask=inside)


def _sizes(d: int) -> tuple[int, int]:
    """``(EDGES, BLOCK_D)``: 16 elements per thread at 4 warps, none of them measured; the interpreter pays per program."""
    if configs.INTERPRETED:
        return 64, configs.next_power_of_2(d)
    block_d = min(configs.next_power_of_2(d), 512)
    return min(2048 // block_d, 16), block_d


def run(request: MergeRequest) -> torch.Tensor:
    """The merged rows of a request; its index lists and weights are contiguous."""
    x, offsets, rows, weights, mean = request
    return weighted_merge(unit_stride(x), offsets, rows, weights, mean)


def weighted_merge(
    x: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor | None,
    mean: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``[B, K, D]`` in ``dtype`` (default that of ``x``); the index lists and weights contiguous, rows of ``x`` of stride 1."""
    (batch, n, d), k = x.shape, offsets.shape[1] - 1
    out = torch.empty((batch, k, d), dtype=dtype or x.dtype, device=x.device)
    edges_block, block_d = _sizes(d)
    launch.start(
        _weighted_merge_fwd_kernel, batch * k * -(-d // block_d), x.device,
        out, x, x.stride(0), x.stride(1), offsets, rows, weights, n, k, rows.shape[1],
        D=d, ALIGN=_alignment(x, x), MEAN=mean, EDGES=edges_block, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out


def row_dots(x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Float32 ``[B, E]``: the dot product of row ``rows`` of ``x`` with row ``targets`` of ``y``; 0 where there is no such row."""
    d, edges = x.shape[2], rows.shape[1]
    dots = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
    edges_block, block_d = _sizes(d)
    launch.start(
        _row_dots_kernel, -(-rows.numel() // edges_block), x.device,
        dots, x, x.stride(0), x.stride(1), y, y.stride(0), y.stride(1), rows, targets,
        x.shape[1], y.shape[1], edges, rows.numel(),
        D=d, ALIGN=min(_alignment(x, x), _alignment(y, y)), EDGES=edges_block, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return dots
