"""The plan that a backend executes: which rows of the input it scores, keeps and copies.

A kernel works on *segments*: ``n_prefix`` rows that are kept, ``n`` competing rows of which ``k`` are kept, and ``n_suffix`` rows
that are kept. The segments of an item cover its rows in the input and in the output without gaps, so one table of integers
describes a whole ragged batch. Everything is integer arithmetic on the host, which ``torch.compile`` can trace with symbolic sizes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .layout import DroppableSpan, TokenLayout

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


class TensorTable(Sequence[int]):
    """The table of a plan that was made as an int64 tensor ``[groups, 8]``; integers of it are made where they are looked at."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return self.tensor.numel()

    def __getitem__(self, i: Any) -> Any:
        return self.tensor.view(-1)[i].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.tensor.view(-1).tolist())


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
    table : sequence
        Otherwise ``groups * 8`` ints: the fields of one :class:`Segment` after another.
    """

    batch: int
    rows: int
    out_rows: int
    groups: int
    uniform: tuple[int, int, int, int] | None
    table: Sequence[int] = ()

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
    def slot_starts(self) -> tuple[int, ...]:
        """How many rows compete in all segments before each."""
        return (0, *itertools.accumulate(self.column("n")))[: self.groups]

    @functools.cached_property
    def _host_table(self) -> torch.Tensor:
        if isinstance(self.table, TensorTable):
            return self.table.tensor
        import torch

        return torch.tensor(self.flat_table(), dtype=torch.int64).view(self.groups, WIDTH)

    def host_table(self) -> torch.Tensor:
        """The table as an int64 CPU tensor ``[groups, 8]``, one :class:`Segment` a row, made once."""
        return self._host_table

    @functools.cached_property
    def host_segments(self) -> tuple[int, int]:
        """The table as the compiled library reads it on the host: its address, and the number of segments."""
        return self._host_table.data_ptr(), self.groups

    @functools.cached_property
    def device_tables(self) -> dict[Any, Any]:
        """The tables on devices, by device and stream; ``backends/tables.py`` fills and reads it."""
        return {}


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
