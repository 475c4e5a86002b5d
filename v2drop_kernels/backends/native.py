# SPDX-License-Identifier: Apache-2.0
"""Calls of the compiled library on torch tensors, on the CPU and on CUDA devices.

A function of ``ops/<op>/native.py`` allocates its results, describes the tensors as tuples (see ``csrc/python/module.cpp``) and
makes one call without the interpreter lock. Arguments were checked by the public functions; the library checks once more that no
address is out of bounds. On CUDA a call allocates one piece of scratch memory and enqueues on the current stream of the tensors'
device. An emulated library (see ``tools/cuda_emulator``) takes CPU tensors instead and has no stream, so that tests run the CUDA
kernels without a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native as library
from ..core.plan import COLUMNS, WIDTH, CuPlan, Plan
from ..core.types import GatherSpec
from . import tables
from .requests import KnownGathers, Source

# A tensor as the library reads it: itself, where the library can, or (address, dtype, shape, strides).
View = Tensor | tuple[int, int, tuple[int, ...], tuple[int, ...]]

_WORKSPACE_ALIGNMENT = 256

_forced_mode: contextvars.ContextVar[int] = contextvars.ContextVar("v2drop_launch_mode", default=0)


@contextlib.contextmanager
def launch_mode(name: str) -> Iterator[None]:
    """Launch CUDA drops in this mode inside a ``with`` block, for tests and benchmarks. The results are the same.

    ``"auto"``: by size and device; ``"cooperative"``: one launch; ``"fused"``: score, then a gather whose blocks repeat the
    selection; ``"separate"``: score, select, gather; ``"one_block"``, ``"cluster"`` and ``"grid"``: the same, and who selects
    from a segment of more than 2048 competing rows, here and in top-k: one block, a thread-block cluster, or blocks of a
    cooperative launch.
    """
    token = _forced_mode.set(library.LAUNCH_MODES[name])
    try:
        yield
    finally:
        _forced_mode.reset(token)


def unavailable(place: str, kind: str) -> str | None:
    """Why the library cannot serve tensors of a device kind in a place (``"cpu"`` or ``"cuda"``), or None when it can."""
    built, reason = library.available()
    if place == "cpu":
        return f"serves cpu tensors, not {kind}" if kind != "cpu" else None if built else reason
    if not built:
        return reason
    archs = library.cuda_archs()
    if archs == "emulated":
        return None if kind == "cpu" else f"emulated in this build of the library, which serves cpu tensors, not {kind}"
    if kind != "cuda":
        return f"serves CUDA tensors, not {kind}"
    if torch.version.hip:
        return "serves NVIDIA GPUs, and this torch is built for ROCm"
    if archs and not torch.cuda.is_available():
        return "torch sees no GPU"
    return library.lib().cuda_available() or None


class _DtypeCodes(dict[torch.dtype, int]):
    """v2drop_dtype of a torch dtype; a dtype that the library does not interpret is raw bytes of its size."""

    def __missing__(self, dtype: torch.dtype) -> int:
        codes = library.DTYPES
        name = str(dtype).removeprefix("torch.")
        known = name in codes and not name.startswith("bits")
        code = self[dtype] = int(codes[name if known else f"bits{8 * dtype.itemsize}"])
        return code


_DTYPES = _DtypeCodes()


@functools.cache
def score_code(metric: str, score_dtype: torch.dtype | None) -> tuple[int, int]:
    """The codes of a metric and of the dtype that scores are rounded to."""
    return library.METRICS[metric], _DTYPES[score_dtype or torch.float32]


def view(tensor: Tensor) -> View:
    """A tensor, of a dtype that the library computes with, as it reads it."""
    if type(tensor) is Tensor and library.reads(Tensor):
        return tensor
    return tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.shape, tensor.stride()


def maybe_view(tensor: Tensor | None) -> View | None:
    """:func:`view`, or None."""
    return None if tensor is None else view(tensor)


def unit_stride(h: Tensor) -> Tensor:
    """``h`` with a last dimension of stride 1: as it is, or one contiguous copy."""
    return h if h.stride(-1) == 1 or h.shape[-1] <= 1 else h.contiguous()


def read_source(source: Source) -> tuple[tuple[Any, ...], Source]:
    """A source as the library reads it, and the source to hold until the call is made, for its tensors may be copies."""
    scores, h_prev, h_cur, mask, metric, score_dtype = source
    if h_cur is not None and h_prev is not None and (h_prev.stride(-1) != 1 or h_cur.stride(-1) != 1):
        h_prev, h_cur = unit_stride(h_prev), unit_stride(h_cur)
        source = source._replace(h_prev=h_prev, h_cur=h_cur)
    code, rounding = score_code(metric, score_dtype)
    if scores is None and mask is None and type(h_cur) is type(h_prev) is Tensor and library.reads(Tensor):
        return (None, h_prev, h_cur, None, code, rounding), source  # what most calls are
    return (maybe_view(scores), maybe_view(h_prev), maybe_view(h_cur), maybe_view(mask), code, rounding), source


def _fill_bits(dtype: torch.dtype, fill: int) -> int:
    if not (dtype.is_floating_point or dtype.is_complex):
        return int(fill)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return int(torch.tensor(fill, dtype=dtype).view(bits).item())


def outputs(gathers: Sequence[GatherSpec], rows: int) -> tuple[list[Tensor], Any]:
    """The results with ``rows`` rows, fresh unless given, and the gathers that fill them as the library reads them."""
    if type(gathers) is KnownGathers and library.reads(Tensor):
        prepared = gathers.memo.get("gathers")
        if prepared is None:
            fields = zip(gathers.tensors, gathers.results, gathers.dimensions, strict=True)
            prepared = gathers.memo["gathers"] = library.lib().prepare_gathers([(src, dst, *at) for src, dst, at in fields])
        return gathers.results, (prepared, gathers.addresses)
    results, views = [], []
    for tensor, batch_dim, row_dim, fill, result in gathers:
        size, dtype = tensor.shape, tensor.dtype
        code = _DTYPES[dtype]
        if result is None:
            shape = list(size)
            shape[row_dim] = rows
            result = tensor.new_empty(shape)
            if result.is_cpu and result.nbytes >= library.HUGE_BYTES:
                library.lib().prefer_huge_pages(result.data_ptr(), result.nbytes)
        results.append(result)
        source = (tensor.data_ptr(), code, size, tensor.stride())
        target = (result.data_ptr(), code, result.shape, result.stride())
        views.append((source, target, batch_dim, row_dim, _fill_bits(dtype, fill) if fill else 0))
    return results, views


@functools.lru_cache(maxsize=1024)
def _workspace_bytes(rows: int, groups: int, width: int) -> int:
    return int(library.lib().workspace_bytes(rows, groups, width))


@functools.cache
def _function(name: str) -> Any:
    return getattr(library.lib(), name)


cpu_context = functools.cache(library.cpu_context)


@functools.lru_cache(maxsize=16)
def _counts(ks: tuple[int, ...], rows: int) -> Tensor:
    """Segments of which only ``k`` counts; none has more than all rows."""
    table = torch.zeros(len(ks), WIDTH, dtype=torch.int64)
    table[:, COLUMNS.k] = torch.tensor(ks).clamp(max=rows)
    return table


def segments(plan: Plan | CuPlan) -> tuple[int, int]:
    """The segments of a plan as the library reads them."""
    return (_counts(plan.ks, plan.rows).data_ptr(), len(plan.ks)) if isinstance(plan, CuPlan) else plan.host_segments


def call(
    name: str, place: str, device: torch.device, *arguments: Any, plan: Plan | CuPlan | None = None, workspace: int = 0,
    rows: int = 0, width: int = 0,
) -> None:  # fmt: skip
    """Call a function of the library with its arguments and a context.

    On CUDA the scratch memory has ``workspace`` bytes, or what the plan, or so many rows, and the ranked results need.
    """
    if place == "cpu":
        _function(name)(*arguments, cpu_context(torch.get_num_threads()))
        return
    groups = table = 0
    if plan is not None:
        rows, groups = (plan.rows if isinstance(plan, CuPlan) else plan.batch * plan.rows), plan.groups
        # Where no table may be kept, the library itself uploads one into the scratch memory of this call.
        if isinstance(plan, Plan) and plan.uniform is None and tables.may_keep(device):
            kept = tables.tables_of(plan, device, upload).segments
            table = 0 if kept is None else kept.data_ptr()
    if rows or groups:
        workspace = _workspace_bytes(rows, groups, width)
    start = 0
    if workspace:
        # Memory of the CPU is aligned to 64 bytes only. The allocator does not reuse this piece before the kernels have run.
        memory = torch.empty(workspace + _WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=device)
        start = -(-memory.data_ptr() // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT
    _enqueue(name, device, arguments, library.cuda_context(tables.stream_of(device), start, workspace, _forced_mode.get(), table))


def _enqueue(name: str, device: torch.device, arguments: Sequence[Any], context: tuple[int, ...]) -> None:
    # The library launches on the current device, whatever the tensors say.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _function(name)(*arguments, context)
    else:
        _function(name)(*arguments, context)


def upload(values: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Integers as a new int32 or int64 tensor ``[len(values)]``, written by one launch for every 1024 of them."""
    host = torch.tensor(values, dtype=torch.int64)  # read before the call returns
    out = torch.empty(len(values), dtype=dtype, device=device)
    _enqueue("upload", device, (view(host), view(out)), library.cuda_context(tables.stream_of(device)))
    return out


def device_offsets(cu_seqlens: Tensor | None, plan: Plan | CuPlan) -> Tensor | None:
    """The offsets in the form that the library takes, where they are only on the device."""
    return None if cu_seqlens is None or isinstance(plan, Plan) else cu_seqlens.to(torch.int32).contiguous()
