# SPDX-License-Identifier: Apache-2.0
"""The C++ CPU backend: torch tensors in and out, libv2drop in between.

Arguments were checked by the public functions; the library checks once more that no address is out of bounds. Every function
allocates its results, describes the tensors as tuples (see csrc/python/module.cpp) and makes one call without the interpreter lock.
What loads the library and describes tensors serves the ``cuda`` backend as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._load import load_library

if TYPE_CHECKING:
    from .core.plan import Plan
    from .core.types import GatherSpec

# Fresh memory of this size is mapped anew by every call, and faulting it in 4 KB at a time costs more than all the rest of a drop.
_HUGE = 4 << 20
METRICS = {"l2": 0, "l1": 1, "cosine": 2}
ORDERS = {"position": 0, "score": 1}
MODES = {"softmax": 0, "dot": 1}
HEADS = {"mean": 0, "sum": -1, "max": -2}  # a number of heads stands for itself
QUERIES = {"mean": 0, "l2": 1}
ROUND_TO = {None: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _DtypeCodes(dict[torch.dtype, int]):
    """v2drop_dtype of a torch dtype; what the library need not understand goes by its size."""

    def __missing__(self, dtype: torch.dtype) -> int:
        code = self[dtype] = {1: 5, 2: 6, 4: 7, 8: 8, 16: 9}[dtype.itemsize]
        return code


_DTYPES = _DtypeCodes({torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int64: 3, torch.bool: 4, torch.int32: 10})


def available() -> tuple[bool, str]:
    """Whether the library serves, and if not, why."""
    module, reason = load_library()
    return module is not None, reason


def isa() -> str:
    """The instruction set in use: ``"avx512"``, ``"avx2"`` or ``"baseline"``; ``V2DROP_ISA`` caps it."""
    return str(lib().isa())


def version() -> str:
    """The version of libv2drop."""
    return str(lib().version())


def cuda_archs() -> str:
    """The GPU architectures that this build has kernels for, ``"emulated"``, or ``""`` for none."""
    return str(lib().cuda_archs())


def lib() -> Any:
    """The module, or an error that says why there is none."""
    module, reason = load_library()
    if module is None:
        raise RuntimeError(f"the native library is {reason}")
    return module


def view(tensor: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.shape, tensor.stride()


def maybe_view(tensor: Tensor | None) -> tuple[int, int, tuple[int, ...], tuple[int, ...]] | None:
    return None if tensor is None else view(tensor)


def stretches(plan: Plan) -> tuple[int, int]:
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
            if result.is_cpu and result.nbytes >= _HUGE:
                lib().prefer_huge_pages(result.data_ptr(), result.nbytes)
        results.append(result)
        described.append((view(tensor), view(result), batch_dim, row_dim, _fill_bits(tensor.dtype, fill)))
    return results, described


def variation_score(prev: Tensor, cur: Tensor, metric: str, score_dtype: torch.dtype | None) -> Tensor:
    scores = torch.empty(prev.shape[:-1], dtype=torch.float32)
    rounding, threads = ROUND_TO[score_dtype], torch.get_num_threads()
    lib().variation_score(view(prev), view(cur), METRICS[metric], rounding, view(scores), threads)
    return scores


def variation_score_backward(
    grad: Tensor, prev: Tensor, cur: Tensor, metric: str, need_prev: bool, need_cur: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_prev = torch.empty(prev.shape, dtype=prev.dtype) if need_prev else None
    grad_cur = torch.empty(cur.shape, dtype=cur.dtype) if need_cur else None
    lib().variation_score_backward(
        view(grad),
        view(prev),
        view(cur),
        METRICS[metric],
        maybe_view(grad_prev),
        maybe_view(grad_cur),
        torch.get_num_threads(),
    )
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
    lib().topk(
        maybe_view(scores),
        maybe_view(prev),
        maybe_view(cur),
        maybe_view(mask),
        stretches(plan),
        ORDERS[order],
        METRICS[metric],
        ROUND_TO[score_dtype],
        view(values),
        view(indices),
        torch.get_num_threads(),
    )
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
    results, described = outputs(parts, plan.out_rows)
    lib().drop_tokens(
        maybe_view(scores),
        maybe_view(prev),
        maybe_view(cur),
        maybe_view(mask),
        stretches(plan),
        METRICS[metric],
        ROUND_TO[score_dtype],
        view(keep),
        described,
        torch.get_num_threads(),
    )
    return keep, results, None


def compact(keep: Tensor, parts: Sequence[GatherSpec]) -> list[Tensor]:
    results, described = outputs(parts, keep.shape[-1])
    lib().compact(view(keep), described, torch.get_num_threads())
    return results


def compact_backward(keep: Tensor, grads: Sequence[GatherSpec], rows: int) -> list[Tensor]:
    results, described = outputs(grads, rows)
    lib().compact_backward(view(keep), rows, described, torch.get_num_threads())
    return results


def compact_(keep: Tensor, parts: Sequence[GatherSpec]) -> None:
    described = [(view(part.tensor), None, part.batch_dim, part.row_dim, 0) for part in parts]
    lib().compact_inplace(view(keep), described, torch.get_num_threads())


def attention_score(
    q: Tensor, k: Tensor, query_rows: Tensor, key_mask: Tensor | None, droppable: Tensor | None, causal: bool, scale: float,
    mode: str, heads: str | int, queries: str,
) -> Tensor:  # fmt: skip
    scores = torch.empty((k.shape[0], k.shape[2]), dtype=torch.float32)
    how = (causal, scale, MODES[mode], HEADS[heads] if isinstance(heads, str) else heads, QUERIES[queries])
    masks = maybe_view(key_mask), maybe_view(droppable)
    lib().attention_score(view(q), view(k), view(query_rows), *masks, *how, view(scores), torch.get_num_threads())
    return scores


def key_norm(k: Tensor, norm: str) -> Tensor:
    scores = torch.empty((k.shape[0], k.shape[2]), dtype=torch.float32)
    lib().key_norm(view(k), METRICS[norm], view(scores), torch.get_num_threads())
    return scores


def cosine_to_pivots(x: Tensor, pivots: Tensor) -> Tensor:
    cosines = torch.empty((x.shape[0], pivots.shape[1], x.shape[1]), dtype=torch.float32)
    lib().cosine_to_pivots(view(x), view(pivots), view(cosines), torch.get_num_threads())
    return cosines
