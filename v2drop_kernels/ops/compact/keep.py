"""The argument ``keep=`` of compact and compact_: its rules, and the rows that survive with those that it lists."""

from __future__ import annotations

from typing import Any

import torch

from ...core import arguments, calls
from ...core.arguments import is_packed, per_segment_k
from ...core.droppable import layout_of
from ...core.layout import TokenLayout
from ..host_ints import host_ints


def check_keep(keep: Any, at: calls.BatchShape, groups: bool) -> None:
    """Raise unless ``keep`` is int64 ``[B, S]`` (packed ``[T']``), or ``[G, K]`` where groups are listed."""
    arguments.tensor("keep", keep)
    if keep.dtype != torch.int64:
        raise TypeError(f"keep must be int64 (or a TopK), got {keep.dtype}")
    arguments.same_device("keep", keep, at.device, at.of)
    dims = 1 if at.batch is None and not groups else 2
    if keep.dim() != dims or (dims == 2 and not groups and keep.shape[0] != at.batch):
        want = "[G, K]" if groups else "[T']" if at.batch is None else f"[{at.batch}, S]"
        raise ValueError(f"keep must be {want}, got shape {list(keep.shape)}")


def surviving_rows(
    keep: Any, at: calls.BatchShape, k: Any, droppable: Any, cu_seqlens: Any, *, traced: bool
) -> tuple[torch.Tensor, TokenLayout | None, Any, int | None]:
    """All rows that survive (``[B, S]`` or ``[T']``), the layout, the offsets and the rows of the longest item.

    The layout is the one whose segments ``keep`` lists, None where it lists all rows; the longest item is None where it is unknown.
    """
    groups = droppable is not None or (is_packed(droppable, cu_seqlens) and isinstance(keep, torch.Tensor) and keep.dim() == 2)
    check_keep(keep, at, groups)
    keep = keep if traced else arguments.settled(keep)
    if groups:
        layout = layout_of(droppable, at.batch, at.rows, cu_seqlens)
        keep, longest = _with_all_others(keep, k, layout, readable=not traced and keep.device.type == "cpu")
        return keep, layout, layout.cu_seqlens, longest
    if k is not None:
        raise ValueError("k is how many rows of each segment keep lists, so it needs droppable")
    return keep, None, cu_seqlens, None


def _with_all_others(keep: torch.Tensor, k: Any, layout: TokenLayout, *, readable: bool) -> tuple[torch.Tensor, int]:
    """``keep [G, K]`` among the droppable tokens to all rows that survive, ascending, ``[B, S]`` or ``[T']``, and the rows of the
    longest item.
    """
    segments, device = layout.segments(), keep.device
    if keep.shape[0] != len(segments):
        raise ValueError(f"keep must have one row per segment ({len(segments)}), got {keep.shape[0]}")
    ks = per_segment_k((keep >= 0).sum(1).tolist() if k is None else k, len(segments))
    ks = tuple(min(x, s.available) for s, x in zip(segments, ks, strict=True))
    base = [0 if layout.is_packed else s.item * layout.rows for s in segments]
    bounds = [x for s, b, most in zip(segments, base, ks, strict=True) for x in (s.row, s.row + s.n, b, most)]
    first, stop, base_rows, most = host_ints(bounds, device).view(-1, 4, 1).unbind(1)
    droppable = None if layout.mask is None else layout.mask.flatten()

    flat = keep + base_rows
    listed = keep >= 0
    inside = listed & (flat >= first) & (flat < stop)
    if droppable is not None and droppable.numel():
        inside = inside & droppable[flat.clamp(0, droppable.shape[0] - 1)]
    if readable:
        _check_listed(keep, listed, inside, None if k is None else ks)
    inside = inside & (inside.cumsum(1) <= most)
    stays = layout.real_rows(device) & ~layout.droppable_rows(device)
    # A spare slot at the end takes what is empty or elsewhere, so that no count has to come back to the host.
    total = stays.numel()
    flags = torch.nn.functional.pad(stays.flatten(), (0, 1))
    # Not flags[...] = True, which copies that value from host memory.
    flags.index_fill_(0, torch.where(inside, flat, total).flatten(), True)
    return _rows_of(flags[:total].view(stays.shape), ks, layout)


def _rows_of(flags: torch.Tensor, ks: tuple[int, ...], layout: TokenLayout) -> tuple[torch.Tensor, int]:
    """The rows with a flag, ascending, in as many places as the counts say (-1 where there is none), and the longest item."""
    kept = [hi - lo for lo, hi in layout.bounds]
    for s, x in zip(layout.segments(), ks, strict=True):
        kept[s.item] -= s.available - x
    order = torch.sort(flags, dim=-1, descending=True, stable=True).indices
    order = torch.where(torch.arange(flags.shape[-1], device=flags.device) < flags.sum(-1, keepdim=True), order, -1)
    width = max(kept, default=0)
    if layout.is_packed:
        return order[: sum(kept)], width
    rows = torch.full((layout.batch, width), -1, dtype=torch.int64, device=flags.device)
    for i, c in enumerate(kept):
        at = width - c if layout.padding_side == "left" else 0
        rows[i, at : at + c] = order[i, :c]
    return rows, width


def _check_listed(keep: torch.Tensor, listed: torch.Tensor, inside: torch.Tensor, ks: tuple[int, ...] | None) -> None:
    """Raise unless every segment lists droppable rows of its own, each once, and as many as ``k`` says."""
    outside = listed & ~inside
    if bool(outside.any()):
        g, column = outside.nonzero()[0].tolist()
        raise ValueError(f"keep must list droppable rows of its own segment, got row {int(keep[g, column])} for segment {g}")
    ordered = keep.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        g, column = twice.nonzero()[0].tolist()
        raise ValueError(f"keep must list each row once, got row {int(ordered[g, column])} twice for segment {g}")
    for g, (n, k) in enumerate(zip(listed.sum(1).tolist(), ks or (), strict=False)):
        if n != k:
            raise ValueError(f"k must be the number of rows that keep lists of each segment, got {k} for segment {g} of {n}")
