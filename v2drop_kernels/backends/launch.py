"""The one place that starts a kernel, and the tables that kernels read beside the tensors.

Programmatic dependent launch: a kernel with ``TRIGGERS`` lets the next one start once all its own programs run; a kernel with
``WAITS`` is launched so, and waits for the whole of its predecessor before it reads or writes anything the stream's earlier
kernels touch. The first kernel of a call never waits, so a call begins after all that came before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ..core.plan import COLUMNS, WIDTH, Plan

# The columns of Plan.host_table(), for use in kernels.
TABLE_FIELDS = tl.constexpr(WIDTH)
(COL_SRC_START, COL_N_PREFIX, COL_N, COL_N_SUFFIX, COL_K, COL_DST_START, COL_PAD_BEFORE, COL_PAD_AFTER) = map(tl.constexpr, COLUMNS)


def start(kernel: Any, programs: int, device: torch.device, *args: Any, **meta: Any) -> None:
    """Start ``programs`` programs of ``kernel`` on ``device``; every launch of this backend goes through here."""
    if programs == 0:
        return
    # Triton launches on the current device, whatever the tensors say.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **options(meta))
    else:
        kernel[(programs,)](*args, **options(meta))


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
    return {"maxnreg": 255} if is_nvidia(device) and num_warps <= 8 else {}


def row_strides(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Strides (batch entry, row) of scores or masks ``[B, N]`` or ``[T]``."""
    if tensor is None:
        return 0, 0
    return (tensor.stride(0), tensor.stride(1)) if tensor.dim() == 2 else (0, tensor.stride(0))


@functools.lru_cache(maxsize=256)
def slot_starts(plan: Plan, device: torch.device) -> torch.Tensor:
    """Exclusive prefix sum ``[G + 1]`` of the segments' competing rows."""
    n = plan.host_table()[:, COLUMNS.n]
    return torch.cat([n.new_zeros(1), n.cumsum(0)]).to(device)


@functools.lru_cache(maxsize=256)
def device_ints(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Host integers as an int64 tensor on the device."""
    return torch.tensor(values, dtype=torch.int64).to(device)
