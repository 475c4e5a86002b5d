"""Integers in device memory: the tables of plans and other lists that the host makes and kernels read.

They reach a GPU as arguments of a kernel, never by a copy from host memory. A copy from pageable memory synchronises the stream,
and a captured one, pinned or not, reads the host's address again at every replay; arguments are part of the launch.

A table is kept for the next call on the same stream, except in two cases. While the stream is capturing, the table is written
into memory of the graph, so that every replay writes it again and no replay reads memory that has been given back. Inside a
traced op the memory may be that of torch.compile's CUDA graphs, which accept no tensor that outlives the call.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..core.plan import WIDTH, CuPlan, Plan

# Writes integers into a new tensor of this dtype on this device.
Upload = Callable[[Sequence[int], torch.device, torch.dtype], torch.Tensor]

_keeping: contextvars.ContextVar[bool] = contextvars.ContextVar("v2drop_keep_tables", default=True)


class Tables(NamedTuple):
    """What kernels read of a plan beside its scalars; None where they need none.

    Attributes
    ----------
    segments : Tensor | None
        int64 ``[G, 8]``, one :class:`Segment` a row, of a plan that is not uniform.
    starts : Tensor | None
        int64 ``[G]``: the competing rows of all segments before each.
    ks : Tensor | None
        int64 ``[G]``: the budgets of a :class:`CuPlan`.
    """

    segments: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    ks: torch.Tensor | None = None


NONE = Tables()


@contextlib.contextmanager
def made_anew() -> Iterator[None]:
    """Keep no table that is made inside this ``with`` block, and use none that was kept before."""
    token = _keeping.set(False)
    try:
        yield
    finally:
        _keeping.reset(token)


def stream_of(device: torch.device) -> int:
    """The handle of the current stream of a device; 0 for the CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` is being captured into a graph."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def may_keep(device: torch.device) -> bool:
    """Whether a tensor on ``device`` that is made now may outlive the call."""
    return _keeping.get() and not is_capturing(device)


def tables_of(plan: Plan | CuPlan, device: torch.device, upload: Upload) -> Tables:
    """The tables of a plan on a device, written by ``upload`` unless an earlier call on this stream did."""
    if isinstance(plan, CuPlan):
        return _kept_budgets(plan.ks, device, stream_of(device), upload) if may_keep(device) else _budgets(plan.ks, device, upload)
    if plan.uniform is not None or plan.groups == 0:
        return NONE
    if not may_keep(device):
        return _plan_tables(plan, device, upload)
    # By stream: a kernel on another one could read before the upload has run, or after the memory has been given back.
    key = device, stream_of(device)
    found = plan.device_tables.get(key)
    if found is None:
        found = plan.device_tables[key] = _plan_tables(plan, device, upload)
    return found


def _plan_tables(plan: Plan, device: torch.device, upload: Upload) -> Tables:
    # In one piece: one launch writes both.
    both = upload((*plan.table, *plan.slot_starts), device, torch.int64)
    return Tables(both[: plan.groups * WIDTH].view(plan.groups, WIDTH), both[plan.groups * WIDTH :])


def _budgets(ks: tuple[int, ...], device: torch.device, upload: Upload) -> Tables:
    return Tables(ks=upload(ks, device, torch.int64))


@functools.lru_cache(maxsize=256)
def _kept_budgets(ks: tuple[int, ...], device: torch.device, stream: int, upload: Upload) -> Tables:
    return _budgets(ks, device, upload)


def on_host(values: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The integers as a CPU tensor, for CPU tensors in Triton's interpreter, where a kernel would take milliseconds."""
    return torch.tensor(values, dtype=dtype, device=device)


def fill(values: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """An upload in plain PyTorch, for devices without kernels of this package: scalars, too, are arguments of launches."""
    out = torch.zeros(len(values), dtype=dtype, device=device)
    if values:
        torch._foreach_add_(list(out.unbind()), list(values))
    return out
