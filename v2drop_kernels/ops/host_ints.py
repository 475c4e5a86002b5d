"""Host integers as tensors on any device, without a copy from host memory; in traced graphs as ``torch.ops.v2drop.host_ints``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch

from .._ops import ops
from ..backends import native, tables
from ..backends.choice import why_not
from ..core.arguments import check_offsets, host_cu_seqlens, is_tensor
from ..core.packed import kept_max_seqlen
from . import registration


def host_ints(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """``torch.tensor(values, dtype=dtype, device=device)`` for int32 and int64 in one dimension.

    On a GPU the integers travel as arguments of a kernel: nothing synchronises, and a captured graph writes them again at every
    replay. In a traced graph they stay arguments of one node.
    """
    if torch.compiler.is_compiling():
        return ops.host_ints(list(values), dtype, device)
    return _upload_for(device.type)(values, device, dtype)


@functools.cache
def _upload_for(kind: str) -> tables.Upload:
    """The first upload that serves tensors of this device kind."""
    if kind == "cpu":
        return tables.on_host
    if why_not("cuda", kind, torch.float32) is None:
        return native.upload
    if why_not("triton", kind, torch.float32) is None:
        return importlib.import_module("..backends.launch", __package__).upload  # needs triton
    return tables.fill


def kept_offsets(keep: torch.Tensor, cu_seqlens: Any, rows: int, *, traced: bool) -> torch.Tensor:
    """New offsets of a packed batch from its kept rows, on the device: an item's rows are those inside its old offsets."""
    if is_tensor(cu_seqlens) and (traced or cu_seqlens.device.type != "cpu"):
        check_offsets(cu_seqlens)
        old = cu_seqlens
    else:
        old = host_ints(host_cu_seqlens(cu_seqlens, rows), keep.device, torch.int32)
    return ((keep >= 0) & (keep < old.to(keep.device)[:, None])).sum(1).int()


def kept_items(keep: torch.Tensor, cu_seqlens: Any, rows: int, longest: int | None, *, traced: bool) -> tuple[torch.Tensor, int]:
    """:func:`kept_offsets`, and the rows of the longest item: ``longest`` where they are known, else :func:`kept_max_seqlen`."""
    new = kept_offsets(keep, cu_seqlens, rows, traced=traced)
    return new, kept_max_seqlen(keep.shape[0], cu_seqlens, traced=traced) if longest is None else longest


def _host_ints(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return _upload_for(device.type)(values, device, dtype)


def _host_ints_fake(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(len(values), dtype=dtype, device=device)


registration.define("host_ints(SymInt[] values, ScalarType dtype, Device device) -> Tensor", _host_ints_fake, _host_ints)
