# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ backend: torch tensors in and out, the compiled library in between.

A call allocates its results and one piece of scratch memory, and enqueues on the current stream of the tensors' device. An emulated
library (see ``tools/cuda_emulator``) takes CPU tensors instead and has no stream: so tests run these very kernels without a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from ._native import attention_options, maybe_view, outputs, segments, source, view
from .core.plan import COLUMNS, WIDTH, CuPlan, Plan
from .core.types import GatherSpec
from .native import lib

_WORKSPACE_ALIGNMENT = 256

_forced_mode: contextvars.ContextVar[int] = contextvars.ContextVar("v2drop_launch_mode", default=0)


@contextlib.contextmanager
def launch_mode(name: str) -> Iterator[None]:
    """Launch drops in this mode inside a ``with`` block, for tests and benchmarks. The results are the same.

    ``"auto"``: by size and device; ``"cooperative"``: one launch; ``"fused"``: score, then a gather whose blocks repeat the
    selection; ``"separate"``: score, select, gather.
    """
    token = _forced_mode.set(native.LAUNCH_MODES[name])
    try:
        yield
    finally:
        _forced_mode.reset(token)


@contextlib.contextmanager
def design(name: str) -> Iterator[None]:
    """:func:`launch_mode` under the names of the benchmarks: ``"two"`` is ``"fused"``, ``"three"`` is ``"separate"``."""
    with launch_mode({"two": "fused", "three": "separate"}.get(name, name)):
        yield


def why_not(kind: str) -> str | None:
    """Why this backend cannot serve tensors of a device kind, or None when it can."""
    built, reason = native.available()
    if not built:
        return reason
    archs = native.cuda_archs()
    if archs == "emulated":
        return None if kind == "cpu" else f"emulated in this build of the library, which serves cpu tensors, not {kind}"
    if kind != "cuda":
        return f"serves CUDA tensors, not {kind}"
    if torch.version.hip:
        return "serves NVIDIA GPUs, and this torch is built for ROCm"
    if archs and not torch.cuda.is_available():
        return "torch sees no GPU"
    return lib().cuda_available() or None


@functools.lru_cache(maxsize=1024)
def _workspace_bytes(rows: int, groups: int, width: int) -> int:
    return int(lib().workspace_bytes(rows, groups, width))


def _enqueue(
    function: Callable[..., None], device: torch.device, *arguments: Any,
    rows: int = 0, groups: int = 0, width: int = 0, table: int = 0, size: int = 0,
) -> None:  # fmt: skip
    """Call ``function`` with its arguments and a context.

    Scratch memory is what so many rows, groups and ranked results need, or ``size`` bytes; ``table`` is the address of the
    segments on the device.
    """
    workspace = 0
    if rows or groups:
        size = _workspace_bytes(rows, groups, width)
    if size:
        # Memory of the CPU is aligned to 64 bytes only. The allocator gives this piece to nobody before the kernels are done.
        memory = torch.empty(size + _WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=device)
        workspace = -(-memory.data_ptr() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
    if device.type != "cuda":
        function(*arguments, native.cuda_context(0, workspace, size, _forced_mode.get(), table))
        return
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    context = native.cuda_context(stream, workspace, size, _forced_mode.get(), table)
    # The library launches on the current device, whatever the tensors say.
    if device.index == torch.cuda.current_device():
        function(*arguments, context)
    else:
        with torch.cuda.device(device):
            function(*arguments, context)


@functools.lru_cache(maxsize=256)
def _counts(ks: tuple[int, ...], rows: int) -> Tensor:
    """Segments of which only ``k`` counts; none has more than all rows."""
    table = torch.zeros(len(ks), WIDTH, dtype=torch.int64)
    table[:, COLUMNS.k] = torch.tensor(ks).clamp(max=rows)
    return table


def _table(plan: Plan | CuPlan, device: torch.device) -> tuple[tuple[int, int], dict[str, int]]:
    """The segments of a plan, and what else ``_enqueue`` must know of it."""
    if isinstance(plan, CuPlan):
        return (_counts(plan.ks, plan.rows).data_ptr(), plan.groups), {"rows": plan.rows, "groups": plan.groups}
    known = {"rows": plan.batch * plan.rows, "groups": plan.groups}
    # A captured graph may outlive the plan's copy on the device; without one the table travels in the launches.
    if plan.uniform is None and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        known["table"] = plan.device_table(device).data_ptr()
    return segments(plan), known


def _offsets(cu_seqlens: Tensor | None, plan: Plan | CuPlan) -> Any:
    """The offsets as the library wants them, where only the device knows them."""
    if cu_seqlens is None or isinstance(plan, Plan):
        return None
    return cu_seqlens.to(torch.int32).contiguous()


def variation_score(prev: Tensor, cur: Tensor, metric: str, score_dtype: torch.dtype | None) -> Tensor:
    scores = torch.empty(prev.shape[:-1], dtype=torch.float32, device=cur.device)
    _enqueue(lib().variation_score, cur.device, source(None, prev, cur, None, metric, score_dtype), view(scores))
    return scores


def variation_score_backward(
    grad: Tensor, prev: Tensor, cur: Tensor, metric: str, need_prev: bool, need_cur: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_prev = torch.empty(prev.shape, dtype=prev.dtype, device=cur.device) if need_prev else None
    grad_cur = torch.empty(cur.shape, dtype=cur.dtype, device=cur.device) if need_cur else None
    hidden = source(None, prev, cur, None, metric, None)
    _enqueue(lib().variation_score_backward, cur.device, view(grad), hidden, maybe_view(grad_prev), maybe_view(grad_cur))
    return grad_prev, grad_cur


def topk(
    scores: Tensor | None,
    prev: Tensor | None,
    cur: Tensor | None,
    plan: Plan | CuPlan,
    mask: Tensor | None,
    order: str,
    metric: str,
    score_dtype: torch.dtype | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    device = (cur if scores is None else scores).device  # type: ignore[union-attr]
    values = torch.empty((plan.groups, plan.out_rows), dtype=torch.float32 if scores is None else scores.dtype, device=device)
    indices = torch.empty((plan.groups, plan.out_rows), dtype=torch.int64, device=device)
    table, known = _table(plan, device)
    offsets = _offsets(cu_seqlens, plan)
    _enqueue(
        lib().topk,
        device,
        source(scores, prev, cur, mask, metric, score_dtype),
        table,
        maybe_view(offsets),
        native.ORDERS[order],
        view(values),
        view(indices),
        width=plan.out_rows if order == "score" else 0,
        **known,
    )
    return values, indices


def drop(
    scores: Tensor | None,
    prev: Tensor | None,
    cur: Tensor | None,
    plan: Plan | CuPlan,
    mask: Tensor | None,
    parts: Sequence[GatherSpec],
    metric: str,
    score_dtype: torch.dtype | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    device = (cur if scores is None else scores).device  # type: ignore[union-attr]
    batch = plan.batch if isinstance(plan, Plan) else 1
    keep = torch.empty((batch, plan.out_rows), dtype=torch.int64, device=device)
    offsets = _offsets(cu_seqlens, plan)
    new_cu = None if offsets is None else torch.empty(plan.groups + 1, dtype=torch.int32, device=device)
    results, gathers = outputs(parts, plan.out_rows)
    table, known = _table(plan, device)
    _enqueue(
        lib().drop_tokens,
        device,
        source(scores, prev, cur, mask, metric, score_dtype),
        table,
        maybe_view(offsets),
        view(keep),
        maybe_view(new_cu),
        gathers,
        **known,
    )
    return keep, results, new_cu


def compact(keep: Tensor, parts: Sequence[GatherSpec]) -> list[Tensor]:
    results, gathers = outputs(parts, keep.shape[-1])
    _enqueue(lib().compact, keep.device, view(keep), gathers)
    return results


def compact_backward(keep: Tensor, grads: Sequence[GatherSpec], rows: int) -> list[Tensor]:
    results, gathers = outputs(grads, rows)
    _enqueue(lib().compact_backward, keep.device, view(keep), rows, gathers, rows=keep.shape[0] * rows)
    return results


def compact_(keep: Tensor, parts: Sequence[GatherSpec]) -> None:
    gathers = [(view(part.tensor), None, part.batch_dim, part.row_dim, 0) for part in parts]
    _enqueue(lib().compact_inplace, keep.device, view(keep), gathers)


@functools.lru_cache(maxsize=1024)
def _attention_bytes(batch: int, heads: int, queries: int, rows: int) -> int:
    return int(lib().attention_workspace_bytes(batch, heads, queries, rows))


def attention_score(
    q: Tensor, k: Tensor, query_rows: Tensor, key_mask: Tensor | None, droppable: Tensor | None, causal: bool, scale: float,
    mode: str, heads: str | int, queries: str,
) -> Tensor:  # fmt: skip
    scores = torch.empty((k.shape[0], k.shape[2]), dtype=torch.float32, device=k.device)
    options = attention_options(causal, scale, mode, heads, queries)
    masks = maybe_view(key_mask), maybe_view(droppable)
    size = _attention_bytes(*q.shape[:3], k.shape[2])
    _enqueue(lib().attention_score, k.device, view(q), view(k), view(query_rows), *masks, *options, view(scores), size=size)
    return scores


def key_norm(k: Tensor, norm: str) -> Tensor:
    scores = torch.empty((k.shape[0], k.shape[2]), dtype=torch.float32, device=k.device)
    _enqueue(lib().key_norm, k.device, view(k), native.METRICS[norm], view(scores))
    return scores


def cosine_to_pivots(x: Tensor, pivots: Tensor) -> Tensor:
    cosines = torch.empty((x.shape[0], pivots.shape[1], x.shape[1]), dtype=torch.float32, device=x.device)
    _enqueue(lib().cosine_to_pivots, x.device, view(x), view(pivots), view(cosines))
    return cosines
