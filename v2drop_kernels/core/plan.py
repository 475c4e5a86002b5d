"""The plan that a backend executes, and how a call's arguments become one.

A kernel works on *segments*: ``n_prefix`` rows that are kept, ``n`` competing rows of which ``k`` are kept, and ``n_suffix`` rows
that are kept. The segments of an item cover its rows in the input and in the output without gaps, so one table of integers
describes a whole ragged batch. Everything is integer arithmetic on the host, which ``torch.compile`` can trace with symbolic sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .arguments import (
    check_offsets,
    check_spans,
    host_cu_seqlens,
    is_int,
    is_packed,
    is_pair,
    is_tensor,
    per_segment_k,
    require_int,
)
from .layout import DroppableSpan, TokenLayout, as_layout

if TYPE_CHECKING:  # plans are made for NumPy and JAX too: torch is imported where a tensor is made
    import torch


class Segment(NamedTuple):
    """One row of a plan's table.

    Attributes
    ----------
    src_start, dst_start : int
        First row in the input and in the output, counted over the whole batch.
    n_prefix, n_suffix : int
        Rows before and after the competing ones, which are kept.
    n, k : int
        Competing rows, and how many of them are kept.
    pad_before, pad_after : int
        Padding rows of the output around the kept rows; ``dst_start`` is the first of ``pad_before``.
    """

    src_start: int
    n_prefix: int
    n: int
    n_suffix: int
    k: int
    dst_start: int
    pad_before: int
    pad_after: int


COLUMNS = Segment(*range(len(Segment._fields)))  # the number of each column, by its name
WIDTH = len(COLUMNS)


@dataclass(frozen=True)
class Plan:
    """What a backend executes; see the module docstring. All host integers.

    Attributes
    ----------
    batch, rows : int
        Batch entries of the tensors (1 when packed) and input rows of each.
    out_rows : int
        Output rows of each batch entry; for top-k the width ``K`` of the ``[groups, K]`` result.
    groups : int
        Number of segments.
    uniform : tuple | None
        ``(n_prefix, n, n_suffix, k)`` when every batch entry is one such segment that starts at its first row.
    table : tuple | None
        Otherwise ``groups * 8`` ints: the fields of one :class:`Segment` after another.
    """

    batch: int
    rows: int
    out_rows: int
    groups: int
    uniform: tuple[int, int, int, int] | None
    table: tuple[int, ...] = ()

    @functools.cached_property
    def max_n(self) -> int:
        """The largest number of competing rows in a segment."""
        if self.uniform is not None:
            return self.uniform[1]
        return max(self.column("n"), default=0)

    @property
    def ragged(self) -> bool:
        """Whether some output rows are padding."""
        if self.uniform is not None:
            n_prefix, _, n_suffix, k = self.uniform
            return n_prefix + k + n_suffix < self.out_rows
        return any(self.column("pad_before")) or any(self.column("pad_after"))

    def column(self, name: str) -> Sequence[int]:
        """One column of :meth:`flat_table`, by its name in :class:`Segment`."""
        return self.flat_table()[getattr(COLUMNS, name) :: WIDTH]

    def flat_table(self) -> Sequence[int]:
        """``table``, spelt out where the plan is uniform."""
        if self.uniform is None:
            return self.table
        n_prefix, n, n_suffix, k = self.uniform
        pad = self.out_rows - n_prefix - k - n_suffix
        return [x for g in range(self.groups) for x in Segment(g * self.rows, n_prefix, n, n_suffix, k, g * self.out_rows, 0, pad)]

    @functools.cached_property
    def _host_table(self) -> torch.Tensor:
        import torch

        return torch.tensor(self.flat_table(), dtype=torch.int64).view(self.groups, WIDTH)

    @functools.cached_property
    def _device_tables(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def host_table(self) -> torch.Tensor:
        """The table as an int64 CPU tensor ``[groups, 8]``, one :class:`Segment` a row, made once."""
        return self._host_table

    def device_table(self, device: torch.device) -> torch.Tensor:
        """The table on ``device``, copied once: the first call must be made outside a CUDA graph capture."""
        found = self._device_tables.get(device)
        if found is None:
            found = self._device_tables[device] = self._host_table.to(device)
        return found


@dataclass(frozen=True)
class CuPlan:
    """A packed plan whose lengths are known on the device only: segment ``g`` is rows ``cu[g]`` to ``cu[g + 1]``.

    It keeps ``min(ks[g], length)`` rows. ``pack=False`` (top-k) gives every group ``out_rows`` slots; ``pack=True`` (drop)
    puts the kept rows one after another into a capacity of ``out_rows``. Wrong offsets are clamped into the tensor.
    """

    rows: int
    ks: tuple[int, ...]
    out_rows: int
    pack: bool

    ragged = False  # a packed result has no padding

    @property
    def groups(self) -> int:
        """Number of segments."""
        return len(self.ks)

    def resolve(self, cu: Sequence[int]) -> Plan:
        """The same plan once the offsets are known on the host, with this plan's capacity."""
        table: list[int] = []
        dst = 0
        for g, k in enumerate(self.ks):
            n = cu[g + 1] - cu[g]
            k = min(k, n)
            last = g == self.groups - 1
            pad = (self.out_rows - dst - k if last else 0) if self.pack else self.out_rows - k
            table += Segment(cu[g], 0, n, 0, k, dst if self.pack else g * self.out_rows, 0, pad)
            dst += k
        return Plan(1, self.rows, self.out_rows, self.groups, None, tuple(table))


def offsets_on(offsets: tuple[int, ...], device: torch.device, *, traced: bool) -> torch.Tensor:
    """Host offsets as a fresh int32 tensor.

    On a GPU a copy that is already there is cloned: one from the host would synchronise, and a graph cannot capture it.
    """
    import torch

    if traced or device.type == "cpu":
        return torch.tensor(offsets, dtype=torch.int32, device=device)
    return _resident_offsets(offsets, device).clone()


@functools.lru_cache(maxsize=1024)
def _resident_offsets(offsets: tuple[int, ...], device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(offsets, dtype=torch.int32, device=device)


def topk_plan(layout: TokenLayout, ks: tuple[int, ...]) -> Plan:
    """Plan of a selection that lists the chosen tokens of every segment."""
    segments = layout.segments()
    ks = tuple(min(x, s.available) for x, s in zip(ks, segments, strict=True))
    width = max(ks, default=0)
    batch = 1 if layout.is_packed else layout.batch
    table: list[int] = []
    for g, (s, x) in enumerate(zip(segments, ks, strict=True)):
        table += Segment(s.row, 0, s.n, 0, x, g * width, 0, width - x)
    return Plan(batch, layout.rows, width, len(segments), None, tuple(table))


class DropPlan(NamedTuple):
    """A plan, the cumulative number of kept rows per item, and the layout of the result."""

    plan: Plan
    cu: tuple[int, ...]
    layout: TokenLayout


def drop_plan(layout: TokenLayout, ks: tuple[int, ...]) -> DropPlan:
    """Plan of a drop: the droppable tokens compete, all other real rows are kept."""
    after = layout.after_keeping(ks)
    kept = [hi - lo for lo, hi in after.bounds]
    packed, left, out_rows = layout.is_packed, layout.padding_side == "left", after.rows
    by_item: list[list[tuple[DroppableSpan, int]]] = [[] for _ in layout.bounds]
    for s, k in zip(layout.segments(), ks, strict=True):
        by_item[s.item].append((s, k))

    segments: list[Segment] = []
    dst = 0
    for i, (lo, hi) in enumerate(layout.bounds):
        row = lo if packed else i * layout.rows + lo
        end = row + (hi - lo)
        pad = 0 if packed else out_rows - kept[i]
        own = []  # the segments of this item, before its padding and its last rows are known
        for s, k in by_item[i]:
            forced = s.n - s.available  # rows of a mask that are not droppable
            own.append(Segment(row, s.row - row, s.n, 0, min(k, s.available) + forced, 0, 0, 0))
            row = s.row + s.n
        if own:
            own[-1] = own[-1]._replace(n_suffix=end - row)
        else:
            own.append(Segment(row, end - row, 0, 0, 0, 0, 0, 0))
        if left:
            own[0] = own[0]._replace(pad_before=pad)
        else:
            own[-1] = own[-1]._replace(pad_after=pad)
        for segment in own:
            segments.append(segment._replace(dst_start=dst))
            dst += segment.pad_before + segment.n_prefix + segment.k + segment.n_suffix + segment.pad_after

    cu = [0]
    for n in kept:
        cu.append(cu[-1] + n)
    table = tuple(x for segment in segments for x in segment)
    plan = Plan(1 if packed else layout.batch, layout.rows, out_rows, len(segments), None, table)
    return DropPlan(_simplify(plan), tuple(cu), after)


def _simplify(plan: Plan) -> Plan:
    """The uniform form of a plan whose segments are alike in every batch entry; otherwise the plan itself."""
    if plan.groups != plan.batch or plan.groups == 0:
        return plan
    segments = [Segment(*plan.table[i : i + WIDTH]) for i in range(0, len(plan.table), WIDTH)]
    _, n_prefix, n, n_suffix, k, *_ = segments[0]
    alike = all(s == (g * plan.rows, n_prefix, n, n_suffix, k, g * plan.out_rows, 0, s.pad_after) for g, s in enumerate(segments))
    return replace(plan, uniform=(n_prefix, n, n_suffix, k), table=()) if alike else plan


class Resolved(NamedTuple):
    """A plan, the droppable mask, the offsets if only the device has them, and the offsets and layout of the result."""

    plan: Plan | CuPlan
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    out_cu: tuple[int, ...] | None
    after: TokenLayout | None


def resolve(op: str, h: torch.Tensor, k: Any, droppable: Any, cu_seqlens: Any, *, traced: bool) -> Resolved:
    """The plan of ``op`` ("topk" or "drop") on ``h`` (``[B, N, ...]`` or packed ``[T, ...]``).

    With ``traced``, sizes may be symbolic and tensors cannot be read, so nothing is cached or counted.
    """
    packed = is_packed(droppable, cu_seqlens)
    everywhere_alike = not packed and h.shape[0] > 0 and (droppable is None or (op == "drop" and is_pair(droppable)))
    if everywhere_alike and is_int(k):
        require_int("k", k)
        batch, rows = h.shape[0], h.shape[1]
        start, stop = (0, rows) if droppable is None else droppable
        if droppable is not None:
            check_spans(0, ((start, stop),), 0, rows)
        return (_uniform if traced else _cached_uniform)(op, batch, rows, start, stop, k)
    if packed and is_tensor(cu_seqlens) and not isinstance(droppable, TokenLayout):
        check_offsets(cu_seqlens)
        if traced or cu_seqlens.device.type != "cpu":
            return _resolve_on_device(op, h, k, droppable, cu_seqlens)
    if packed and isinstance(droppable, TokenLayout) and (cu_seqlens is None or traced):
        cu = droppable.cu_seqlens
    else:
        cu = host_cu_seqlens(cu_seqlens, h.shape[0]) if packed else None
    if traced and is_tensor(droppable):
        raise ValueError("droppable as a mask needs its counts here: pass TokenLayout.from_mask(mask, counts)")
    layout = as_layout(droppable, h.shape[0], h.shape[0] if packed else h.shape[1], cu)
    ks = per_segment_k(k, layout.groups)
    if op == "topk":
        plan = topk_plan(layout, ks) if traced else _cached_topk_plan(layout, ks)
        return Resolved(plan, layout.mask, None, None, None)
    plan, out_cu, after = drop_plan(layout, ks) if traced else _cached_drop_plan(layout, ks)
    # A layout is not a tensor, so a traced graph cannot return one.
    return Resolved(plan, layout.mask, None, out_cu if packed else None, None if traced else after)


def _uniform(op: str, batch: int, rows: int, start: int, stop: int, k: int) -> Resolved:
    k = min(k, stop - start)
    out_rows = k if op == "topk" else rows - (stop - start) + k
    plan = Plan(batch, rows, out_rows, batch, (start, stop - start, rows - stop, k))
    return Resolved(plan, None, None, None, None)


@functools.lru_cache(maxsize=1024)
def _cached_uniform(op: str, batch: int, rows: int, start: int, stop: int, k: int) -> Resolved:
    found = _uniform(op, batch, rows, start, stop, k)
    if op == "topk":
        return found
    k = min(k, stop - start)
    out_rows = found.plan.out_rows
    return found._replace(after=TokenLayout((((start, start + k),),) * batch, out_rows, ((0, out_rows),) * batch))


_cached_topk_plan = functools.lru_cache(maxsize=1024)(topk_plan)
_cached_drop_plan = functools.lru_cache(maxsize=1024)(drop_plan)


def _resolve_on_device(op: str, h: torch.Tensor, k: Any, droppable: Any, cu_seqlens: torch.Tensor) -> Resolved:
    if droppable is not None:
        raise ValueError(
            "droppable with cu_seqlens that only the device knows must be a layout: make TokenLayout.packed(spans, "
            "cu_seqlens) once, outside the step"
        )
    if cu_seqlens.device != h.device:
        raise ValueError(f"cu_seqlens must be on the device of h_cur ({h.device}), got {cu_seqlens.device}")
    ks = per_segment_k(k, cu_seqlens.shape[0] - 1)
    rows = h.shape[0]
    out_rows = min(sum(ks), rows) if op == "drop" else min(max(ks, default=0), rows)
    return Resolved(CuPlan(rows, ks, out_rows, op == "drop"), None, cu_seqlens, None, None)
