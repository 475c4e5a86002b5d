"""Where a segment lies, for the select kernels, and the rows around its survivors."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.launch import (
    COL_DST_START,
    COL_K,
    COL_N,
    COL_N_PREFIX,
    COL_N_SUFFIX,
    COL_PAD_AFTER,
    COL_PAD_BEFORE,
    COL_SRC_START,
    TABLE_FIELDS,
)


@triton.jit
def segment(g, table, rows, out_rows, n_prefix, n, n_suffix, k):
    """Fields of segment ``g`` of a table, or of the uniform plan that the scalars describe; counts in 32 bits."""
    if table is None:
        src_start = g * rows
        dst_start = g * out_rows
        pad_before = 0
        pad_after = out_rows - n_prefix - k - n_suffix
    else:
        row = table + g * TABLE_FIELDS
        src_start = tl.load(row + COL_SRC_START)
        n_prefix = tl.load(row + COL_N_PREFIX).to(tl.int32)
        n = tl.load(row + COL_N).to(tl.int32)
        n_suffix = tl.load(row + COL_N_SUFFIX).to(tl.int32)
        k = tl.load(row + COL_K).to(tl.int32)
        dst_start = tl.load(row + COL_DST_START)
        pad_before = tl.load(row + COL_PAD_BEFORE).to(tl.int32)
        pad_after = tl.load(row + COL_PAD_AFTER).to(tl.int32)
    return src_start, n_prefix, n, n_suffix, k, dst_start, pad_before, pad_after


@triton.jit
def _cu_length(cu, g, valid, rows):
    """Clamped first row and length of the packed segments ``g``: in bounds whatever ``cu`` holds."""
    first = tl.minimum(tl.maximum(tl.load(cu + g, mask=valid, other=0).to(tl.int64), 0), rows)
    last = tl.minimum(tl.load(cu + g + 1, mask=valid, other=0).to(tl.int64), rows)
    return first, tl.maximum(last - first, 0).to(tl.int32)


@triton.jit
def segment_of_plan(
    g, table, cu, ks, rows, out_rows, n_prefix, n, n_suffix, k, groups, GROUPS: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """The same of any plan; first the batch entry, and the position in it of the first competing row.

    ``PACKED``: segments of device lengths are put one after another; GROUPS is then a power of two that is at least ``groups``.
    """
    if cu is None:
        src_start, n_prefix, n, n_suffix, k, dst_start, pad_before, pad_after = segment(
            g, table, rows, out_rows, n_prefix, n, n_suffix, k
        )
    else:
        src_start, n = _cu_length(cu, g, True, rows)
        k = tl.minimum(tl.load(ks + g).to(tl.int32), n)
        n_prefix = 0
        n_suffix = 0
        pad_before = 0
        dst_start = g * out_rows
        pad_after = out_rows - k
        if PACKED:
            others = tl.arange(0, GROUPS).to(tl.int64)
            before = others < g
            lengths = _cu_length(cu, others, before, rows)[1]
            dst_start = tl.sum(tl.minimum(tl.load(ks + others, mask=before, other=0), lengths.to(tl.int64)))
            pad_after = tl.where(g == groups - 1, out_rows - dst_start.to(tl.int32) - k, 0)
    b = src_start // rows
    return b, src_start - b * rows + n_prefix, n, k, dst_start, n_prefix, n_suffix, pad_before, pad_after


@triton.jit
def store_rows_around(
    keep, values, position, n, k, dst_start, n_prefix, n_suffix, pad_before, pad_after, found, part, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """Part ``part`` of ``parts`` of what lies around the ``found`` survivors: padding, rows before, rows after, padding."""
    before = pad_before + n_prefix
    around = before + (k - found) + n_suffix + pad_after
    first = around * 0 + part * BLOCK
    while first < around:
        j = first + tl.arange(0, BLOCK)  # from dst_start, but for the survivors
        inside = j < around
        j += tl.where(j >= before, found, 0)
        after = j - (before + k)
        source = tl.where(after >= 0, position + n + after, position - n_prefix + j - pad_before)
        source = tl.where((j >= pad_before) & (after < n_suffix) & ((j < before) | (after >= 0)), source, -1)
        tl.store(keep + dst_start + j, source, mask=inside)
        if values is not None:
            tl.store(values + dst_start + j, float("-inf"), mask=inside)
        first += parts * BLOCK
