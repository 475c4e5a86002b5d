"""The one place that starts a kernel, and the tables that kernels read beside the tensors.

Programmatic dependent launch: a kernel with ``TRIGGERS`` lets the next one start once all its own programs run; a kernel with
``WAITS`` is launched so, and waits for the whole of its predecessor before it reads or writes anything the stream's earlier
kernels touch. The first kernel of a call never waits, so a call begins after all that came before it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..core.plan import COLUMNS, WIDTH, CuPlan, Plan
from . import relaunch, tables
from .tables import Tables

# The columns of Plan.host_table(), for use in kernels.
TABLE_FIELDS = tl.constexpr(WIDTH)
(COL_SRC_START, COL_N_PREFIX, COL_N, COL_N_SUFFIX, COL_K, COL_DST_START, COL_PAD_BEFORE, COL_PAD_AFTER) = map(tl.constexpr, COLUMNS)

# Triton compiles anew for every integer of a tuple that is 1 or a multiple of 16, or outgrows 32 bits, and do_not_specialize
# does not reach into tuples. Odd 64-bit numbers are none of these: x travels as 2 x + 1 with bit 62 set.
_PLAIN = 1 << 62
_PLAIN_BITS = tl.constexpr(_PLAIN - 1)

# Integers that one launch carries. 256 are 2 KB, well under the 4 KB of kernel parameters of CUDA drivers before 12.1; most
# batches have few segments, and every argument costs the host time.
UPLOAD_CHUNKS = (64, 256)


def start(kernel: Any, programs: int, device: torch.device, *args: Any, **meta: Any) -> None:
    """Start ``programs`` programs of ``kernel`` on ``device``; every launch of this backend goes through here."""
    if programs == 0:
        return
    # Triton launches on the current device, whatever the tensors say.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = kernel[(programs,)](*args, **options(meta))
    else:
        compiled = kernel[(programs,)](*args, **options(meta))
    recording = relaunch.recording()
    if recording is not None:
        recording.add(kernel, compiled, programs, args)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor for the launches of a call: every call like this one gets such a tensor of its own."""
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    recording = relaunch.recording()
    if recording is not None:
        recording.made.append(made)
    return made


def options(meta: dict[str, Any]) -> dict[str, Any]:
    """``meta`` and what holds for every kernel. Multiply-adds are fused where written so: no result depends on a default."""
    return meta | {"enable_fp_fusion": False} | ({"launch_pdl": True} if meta.get("WAITS") else {})


def is_nvidia(device: torch.device) -> bool:
    """Whether kernels on ``device`` go through ptxas: no ROCm, no interpreter."""
    return device.type == "cuda" and not torch.version.hip and not triton.knobs.runtime.interpret


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch: ptxas rejects ``griddepcontrol`` below sm_90."""
    return is_nvidia(device) and torch.cuda.get_device_capability(device)[0] >= 9


def all_registers(device: torch.device, num_warps: int) -> dict[str, int]:
    """Options for a kernel that has its SM to itself. Without this cap ptxas spills, to raise an occupancy that is not needed.

    For up to 8 warps only: with 16 warps the cap would be 128 registers, and ptxas then schedules so that it spills.
    """
    return registers(device, 255) if num_warps <= 8 else {}


def registers(device: torch.device, most: int) -> dict[str, int]:
    """Options for a kernel of at most so many registers a thread. Without them ptxas may spill to come to fewer."""
    return {"maxnreg": most} if is_nvidia(device) else {}


def row_strides(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Strides (batch entry, row) of scores or masks ``[B, N]`` or ``[T]``."""
    if tensor is None:
        return 0, 0
    return (tensor.stride(0), tensor.stride(1)) if tensor.dim() == 2 else (0, tensor.stride(0))


def plain(x: int) -> int:
    """``x``, from 0 to 2^61 - 1, as an element of a tuple argument."""
    return _PLAIN | x << 1 | 1


@triton.jit
def decode(x):
    """The integer that :func:`plain` encoded."""
    return (x & _PLAIN_BITS) >> 1


@triton.jit(do_not_specialize=["count"])
def _upload_fwd_kernel(to, values, count, NUM_VALUES: tl.constexpr):
    for i in tl.static_range(NUM_VALUES):
        tl.store(to + i, decode(values[i]).to(to.dtype.element_ty), mask=i < count)


def upload(values: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Integers of 64 bits as a new int32 or int64 tensor ``[len(values)]``, written by one launch for every 256 of them."""
    values = tuple(values)
    if values and not 0 <= min(values) <= max(values) < 1 << 61:
        low, high = (upload([x >> bits & 0xFFFFFFFF for x in values], device, torch.int64) for bits in (0, 32))
        return (low | high << 32).to(dtype)
    out = torch.empty(len(values), dtype=dtype, device=device)
    to = out
    for encoded, count in _chunks(values):
        start(_upload_fwd_kernel, 1, device, to, encoded, count, NUM_VALUES=len(encoded), num_warps=1)
        to = to[count:]
    return out


@functools.lru_cache(maxsize=256)
def _chunks(values: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], int], ...]:
    """For each launch the encoded values, padded to one of UPLOAD_CHUNKS, and how many they are."""
    chunks = []
    for first in range(0, len(values), UPLOAD_CHUNKS[-1]):
        part = values[first : first + UPLOAD_CHUNKS[-1]]
        size = next(size for size in UPLOAD_CHUNKS if size >= len(part))
        chunks.append((tuple(map(plain, part)) + (plain(0),) * (size - len(part)), len(part)))
    return tuple(chunks)


def tables_of(plan: Plan | CuPlan, device: torch.device) -> Tables:
    """The tables of a plan; a call takes them once, before its first launch, so that no upload parts two dependent launches."""
    return tables.tables_of(plan, device, tables.on_host if device.type == "cpu" else upload)
