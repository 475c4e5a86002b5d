# SPDX-License-Identifier: Apache-2.0
"""The C++ CPU backend: torch tensors in and out, the compiled library in between.

Arguments were checked by the public functions; the library checks once more that no address is out of bounds. Every function
allocates its results, describes the tensors as tuples (see csrc/python/module.cpp) and makes one call without the interpreter lock.
What describes tensors is used by the ``cuda`` backend as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native
from .native import lib

if TYPE_CHECKING:
    from .core.plan import Plan
    from .core.types import GatherSpec


@functools.cache
def score_dtypes() -> dict[torch.dtype | None, int]:
    """The codes of ``score_dtype=``."""
    codes = native.DTYPES
    return {None: codes["float32"]} | {getattr(torch, name): codes[name] for name in ("float32", "float16", "bfloat16")}


@functools.cache
def _dtype_code(dtype: torch.dtype) -> int:
    """v2drop_dtype of a torch dtype; one that the library does not interpret goes by its size."""
    codes: dict[str, int] = native.DTYPES
    name = str(dtype).removeprefix("torch.")
    return codes[name if name in codes and not name.startswith("bits") else f"bits{8 * dtype.itemsize}"]


def view(tensor: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), _dtype_code(tensor.dtype), tensor.shape, tensor.stride()


def maybe_view(tensor: Tensor | None) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    return None if tensor is None else view(tensor)


def source(
    scores: Tensor | None,
    prev: Tensor | None,
    cur: Tensor | None,
    mask: Tensor | None,
    metric: str,
    score_dtype: torch.dtype | None,
) -> tuple[Any, ...]:
    """What rows are ranked by, as the library reads it."""
    codes = native.METRICS[metric], score_dtypes()[score_dtype]
    return (maybe_view(scores), maybe_view(prev), maybe_view(cur), maybe_view(mask), *codes)


def _context() -> tuple[int, ...]:
    return native.cpu_context(torch.get_num_threads())


def segments(plan: Plan) -> tuple[int, int]:
    return plan.host_table().data_ptr(), plan.groups


def _fill_bits(dtype: torch.dtype, fill: int) -> int:
    if fill == 0 or not (dtype.is_floating_point or dtype.is_complex):
        return int(fill)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return int(torch.tensor(fill, dtype=dtype).view(bits).item())


def outputs(parts: Sequence[GatherSpec], rows: int) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
    """The results with `rows` rows, fresh unless given, and the descriptions of the parts that fill them."""
    results, described = [], []
    for tensor, batch_dim, row_dim, fill, result in parts:
        if result is None:
            shape = list(tensor.shape)
            shape[row_dim] = rows
            result = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            if result.is_cpu and result.nbytes >= native.HUGE_BYTES:
                lib().prefer_huge_pages(result.data_ptr(), result.nbytes)
        results.append(result)
        described.append((view(tensor), view(result), batch_dim, row_dim, _fill_bits(tensor.dtype, fill)))
    return results, described


def variation_score(prev: Tensor, cur: Tensor, metric: str, score_dtype: torch.dtype | None) -> Tensor:
    scores = torch.empty(prev.shape[:-1], dtype=torch.float32)
    lib().variation_score(source(None, prev, cur, None, metric, score_dtype), view(scores), _context())
    return scores


def variation_score_backward(
    grad: Tensor, prev: Tensor, cur: Tensor, metric: str, need_prev: bool, need_cur: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_prev = torch.empty(prev.shape, dtype=prev.dtype) if need_prev else None
    grad_cur = torch.empty(cur.shape, dtype=cur.dtype) if need_cur else None
    hidden = source(None, prev, cur, None, metric, None)
    lib().variation_score_backward(view(grad), hidden, maybe_view(grad_prev), maybe_view(grad_cur), _context())
    return grad_prev, grad_cur


def topk(
    scores: Tensor | None,
    prev: Tensor | None,
    cur: Tensor | None,
    plan: Plan,
    mask: Tensor | None,
    order: str,
    metric: str,
    score_dtype: torch.dtype | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    values = torch.empty((plan.groups, plan.out_rows), dtype=torch.float32 if scores is None else scores.dtype)
    indices = torch.empty((plan.groups, plan.out_rows), dtype=torch.int64)
    ranked = source(scores, prev, cur, mask, metric, score_dtype)
    lib().topk(ranked, segments(plan), None, native.ORDERS[order], view(values), view(indices), _context())
    return values, indices


def drop(
    scores: Tensor | None,
    prev: Tensor | None,
    cur: Tensor | None,
    plan: Plan,
    mask: Tensor | None,
    parts: Sequence[GatherSpec],
    metric: str,
    score_dtype: torch.dtype | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    keep = torch.empty((plan.batch, plan.out_rows), dtype=torch.int64)
    results, gathers = outputs(parts, plan.out_rows)
    ranked = source(scores, prev, cur, mask, metric, score_dtype)
    lib().drop_tokens(ranked, segments(plan), None, view(keep), None, gathers, _context())
    return keep, results, None


def compact(keep: Tensor, parts: Sequence[GatherSpec]) -> list[Tensor]:
    results, gathers = outputs(parts, keep.shape[-1])
    lib().compact(view(keep), gathers, _context())
    return results


def compact_backward(keep: Tensor, grads: Sequence[GatherSpec], rows: int) -> list[Tensor]:
    results, gathers = outputs(grads, rows)
    lib().compact_backward(view(keep), rows, gathers, _context())
    return results


def compact_(keep: Tensor, parts: Sequence[GatherSpec]) -> None:
    gathers = [(view(part.tensor), None, part.batch_dim, part.row_dim, 0) for part in parts]
    lib().compact_inplace(view(keep), gathers, _context())


def attention_options(causal: bool, scale: float, mode: str, heads: str | int, queries: str) -> tuple[Any, ...]:
    """The options of ``attention_score`` as the library reads them; a number of heads is its own code."""
    return causal, scale, native.MODES[mode], native.HEADS[heads] if isinstance(heads, str) else heads, native.QUERIES[queries]


def attention_score(
    q: Tensor, k: Tensor, query_rows: Tensor, key_mask: Tensor | None, droppable: Tensor | None, causal: bool, scale: float,
    mode: str, heads: str | int, queries: str,
) -> Tensor:  # fmt: skip
    scores = torch.empty((k.shape[0], k.shape[2]), dtype=torch.float32)
    options = attention_options(causal, scale, mode, heads, queries)
    masks = maybe_view(key_mask), maybe_view(droppable)
    lib().attention_score(view(q), view(k), view(query_rows), *masks, *options, view(scores), _context())
    return scores


def key_norm(k: Tensor, norm: str) -> Tensor:
    scores = torch.empty((k.shape[0], k.shape[2]), dtype=torch.float32)
    lib().key_norm(view(k), native.METRICS[norm], view(scores), _context())
    return scores


def cosine_to_pivots(x: Tensor, pivots: Tensor) -> Tensor:
    cosines = torch.empty((x.shape[0], pivots.shape[1], x.shape[1]), dtype=torch.float32)
    lib().cosine_to_pivots(view(x), view(pivots), view(cosines), _context())
    return cosines
