"""The arguments ``droppable=`` and ``cu_seqlens=`` in all their forms, as one :class:`TokenLayout`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .arguments import host_cu_seqlens, is_tensor
from .layout import TokenLayout


def whole(batch: int, rows: int) -> TokenLayout:
    """Layout of a padded batch in which every token is droppable."""
    return TokenLayout((((0, rows),),) * batch, rows, ((0, rows),) * batch)


def as_layout(droppable: Any, batch: int, rows: int, cu_seqlens: Sequence[int] | None) -> TokenLayout:
    """Normalise ``droppable=``; ``cu_seqlens`` are host ints for a packed batch, None for a padded one."""
    if isinstance(droppable, TokenLayout):
        shape = ("packed", droppable.rows) if droppable.is_packed else (droppable.batch, droppable.rows)
        want = ("packed", rows) if cu_seqlens is not None else (batch, rows)
        if shape != want:
            raise ValueError(f"droppable is a layout of (batch, rows) = {shape}, but h_cur has {want}")
        if cu_seqlens is not None and droppable.bounds != tuple(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
            raise ValueError("droppable is a layout of other cu_seqlens than the ones given")
        return droppable
    if is_tensor(droppable):
        import torch

        want_shape = (rows,) if cu_seqlens is not None else (batch, rows)
        if droppable.dtype != torch.bool or tuple(droppable.shape) != want_shape:
            raise ValueError(
                f"droppable as a tensor must be bool {list(want_shape)}, got {droppable.dtype} {list(droppable.shape)}"
            )
        return TokenLayout.from_mask(droppable, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        if droppable is None:
            droppable = [(0, b - a) for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
        return TokenLayout.packed(droppable, cu_seqlens)
    if droppable is None:
        return whole(batch, rows)
    return TokenLayout.padded(droppable, rows, batch=batch)


def layout_of(droppable: Any, batch: int | None, rows: int, cu_seqlens: Any) -> TokenLayout:
    """Normalise ``droppable=`` and ``cu_seqlens=`` together; ``batch`` is None for a packed batch. Reads the offsets."""
    if batch is not None:
        return as_layout(droppable, batch, rows, None)
    if cu_seqlens is None:
        return as_layout(droppable, 0, rows, droppable.cu_seqlens)
    return as_layout(droppable, 0, rows, host_cu_seqlens(cu_seqlens, rows))
