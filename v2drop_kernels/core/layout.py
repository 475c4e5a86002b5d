"""Where the droppable tokens of a batch are, as integers on the host.

A *segment* is a contiguous run of tokens that shares one budget: a batch item, or one image of an item. Everything here is
integers on the host, so that the shapes of results need no synchronisation. torch is imported only where a tensor is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .arguments import (
    check_padding_side,
    check_spans,
    host_cu_seqlens,
    is_pair,
    is_tensor,
    kind,
    per_segment_k,
    require_int,
    sequence_of,
    shown,
)

if TYPE_CHECKING:
    import torch

Spans = tuple[tuple[int, int], ...]


class DroppableSpan(NamedTuple):
    """``n`` rows from row ``row`` of the whole batch on, of which ``available`` are droppable and share one budget."""

    item: int
    row: int
    n: int
    available: int


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens of a batch are droppable (vision), and which rows are real (not padding).

    Build it with :meth:`padded`, :meth:`packed`, :meth:`from_mask` or :meth:`from_token_ids`; the fields are read-only.

    Attributes
    ----------
    spans : tuple
        Per item the ascending ``(start, stop)`` spans, each a segment with a budget of its own. Padded: positions along
        ``N``, left padding included. Packed: positions inside the item. Empty for a text-only item.
    rows : int
        ``N`` of a padded batch, ``T`` of a packed one.
    bounds : tuple
        Per item the ``(start, stop)`` of its real rows: along ``N``, or along ``T`` when packed.
    is_packed : bool
    padding_side : {"right", "left"}
        Where ragged results are padded.
    mask : Tensor | None
        bool ``[B, N]`` or ``[T]`` on the device: within each item the True rows share one budget, wherever they are.
    counts : tuple | None
        With ``mask``: how many rows of each item are True.
    """

    spans: tuple[Spans, ...]
    rows: int
    bounds: tuple[tuple[int, int], ...]
    is_packed: bool = False
    padding_side: str = "right"
    mask: torch.Tensor | None = field(default=None, compare=False, repr=False)
    counts: tuple[int, ...] | None = None

    @property
    def batch(self) -> int:
        """Number of items."""
        return len(self.bounds)

    @staticmethod
    def padded(
        spans: Any,
        seq_len: int,
        *,
        batch: int | None = None,
        lengths: Sequence[int] | None = None,
        padding_side: str = "right",
    ) -> TokenLayout:
        """Layout of a padded batch ``[B, N, ...]``.

        Parameters
        ----------
        spans : (start, stop) | sequence
            One pair for all items, or per item a pair, a list of pairs, or an empty list (text only).
        seq_len : int
            ``N``.
        batch : int, optional
            ``B``; needed only when ``spans`` is one pair for all.
        lengths : sequence of int, optional
            Real tokens per item. Padding rows are then not kept. Without it every row counts as real.
        padding_side : {"right", "left"}
            Where the padding of ``lengths`` is, and where ragged results are padded.

        Raises
        ------
        ValueError
            Spans that are reversed, overlapping, not ascending or outside the item; wrong number of items.

        Examples
        --------
        >>> TokenLayout.padded((35, 611), 640, batch=2).spans
        (((35, 611),), ((35, 611),))
        """
        check_padding_side(padding_side)
        require_int("seq_len", seq_len)
        if batch is not None:
            require_int("batch", batch)
            if batch >= 2**31:
                raise ValueError(f"batch must be less than 2**31, got {batch}")
        elif isinstance(lengths, list | tuple):
            batch = len(lengths)
        per_item = _per_item_spans(spans, batch)
        bounds = _padded_bounds(len(per_item), seq_len, lengths, padding_side)
        for i, (item, (lo, hi)) in enumerate(zip(per_item, bounds, strict=True)):
            check_spans(i, item, lo, hi)
        return TokenLayout(per_item, seq_len, bounds, padding_side=padding_side)

    @staticmethod
    def packed(spans: Any, cu_seqlens: Sequence[int] | torch.Tensor) -> TokenLayout:
        """Layout of a packed batch ``[T, ...]``; spans are positions inside each item.

        Parameters
        ----------
        spans : (start, stop) | sequence
            As in :meth:`padded`.
        cu_seqlens : sequence of int | Tensor
            ``[B + 1]`` cumulative lengths (flash-attn's convention). A tensor on a GPU is read once (one
            synchronisation); make the layout outside the step that is captured or compiled.
        """
        cu = host_cu_seqlens(cu_seqlens)
        per_item = _per_item_spans(spans, len(cu) - 1)
        for i, item in enumerate(per_item):
            check_spans(i, item, 0, cu[i + 1] - cu[i])
        return TokenLayout(per_item, cu[-1], tuple(zip(cu[:-1], cu[1:], strict=True)), is_packed=True)

    @staticmethod
    def from_mask(
        mask: torch.Tensor,
        counts: Sequence[int] | int | None = None,
        *,
        lengths: Sequence[int] | None = None,
        padding_side: str = "right",
        cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    ) -> TokenLayout:
        """Layout from a bool mask, True where a token is droppable; the True tokens of an item share one budget.

        Parameters
        ----------
        mask : Tensor
            bool ``[B, N]``, or ``[T]`` with ``cu_seqlens``.
        counts : sequence of int | int, optional
            True tokens per item. Without it they are counted: **one host synchronisation** when the mask is on a GPU. They are not
            checked: a wrong count keeps a wrong number of tokens, but never reads out of bounds.
        lengths, padding_side, cu_seqlens
            As in :meth:`padded` and :meth:`packed`.
        """
        import torch

        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {kind(mask)}")
        check_padding_side(padding_side)
        if cu_seqlens is not None:
            cu = host_cu_seqlens(cu_seqlens)
            if mask.dim() != 1 or mask.shape[0] != cu[-1]:
                raise ValueError(f"mask must be [T] with T = cu_seqlens[-1] = {cu[-1]}, got {tuple(mask.shape)}")
            bounds = tuple(zip(cu[:-1], cu[1:], strict=True))
            rows, packed = cu[-1], True
        else:
            if mask.dim() != 2:
                raise ValueError(f"mask must be [B, N], or [T] with cu_seqlens, got shape {tuple(mask.shape)}")
            rows, packed = mask.shape[1], False
            bounds = _padded_bounds(mask.shape[0], rows, lengths, padding_side)
        batch = len(bounds)
        if counts is None:
            totals = mask.flatten().cumsum(0).tolist() if packed else mask.cumsum(1).tolist()
            per_item = [totals] * batch if packed else totals
            counts = [t[hi - 1] - (t[lo - 1] if lo else 0) if hi > lo else 0
                      for t, (lo, hi) in zip(per_item, bounds, strict=True)]  # fmt: skip
        elif isinstance(counts, int):
            counts = [counts] * batch
        sequence_of("counts", counts, batch)
        for i, (c, (lo, hi)) in enumerate(zip(counts, bounds, strict=True)):
            if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c <= hi - lo:
                raise ValueError(f"counts[{i}] must be an int in [0, {hi - lo}], got {shown(c)}")
        return TokenLayout(((),) * batch, rows, bounds, packed, padding_side, mask, tuple(counts))

    @staticmethod
    def from_token_ids(
        input_ids: torch.Tensor,
        token_id: int,
        *,
        attention_mask: torch.Tensor | None = None,
        padding_side: str = "right",
    ) -> TokenLayout:
        """Layout from prompt ids: every run of ``token_id`` is a segment. Reads the ids once (a synchronisation on a GPU).

        Parameters
        ----------
        input_ids : Tensor
            ``[B, N]`` integer ids, with one placeholder per vision token.
        token_id : int
            The placeholder (``config.image_token_id``).
        attention_mask : Tensor, optional
            ``[B, N]``, 0 on padding, which must all be on ``padding_side``.
        """
        check_padding_side(padding_side)
        if not is_tensor(input_ids) or input_ids.dim() != 2:
            raise ValueError(f"input_ids must be a tensor [B, N], got {kind(input_ids)}")
        lengths = None
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
                )
            real = attention_mask.ne(0)
            ordered = real.sort(dim=1, descending=padding_side == "right", stable=True).values
            if not bool(real.eq(ordered).all()):
                raise ValueError(f"attention_mask must be 0 on the {padding_side} of each row and 1 elsewhere")
            lengths = real.sum(1).tolist()
        spans = []
        for row in input_ids.eq(token_id).tolist():
            edges = [j for j in range(len(row) + 1) if (j < len(row) and row[j]) != (j > 0 and row[j - 1])]
            spans.append(list(zip(edges[::2], edges[1::2], strict=True)))
        return TokenLayout.padded(spans, input_ids.shape[1], batch=len(spans), lengths=lengths, padding_side=padding_side)

    @property
    def cu_seqlens(self) -> tuple[int, ...] | None:
        """Offsets of a packed batch."""
        return (0, *(hi for _, hi in self.bounds)) if self.is_packed else None

    @property
    def max_seqlen(self) -> int:
        """Real rows of the longest item."""
        return max([hi - lo for lo, hi in self.bounds], default=0)

    @property
    def groups(self) -> int:
        """Number of segments: what a list of ``k`` must have."""
        return self.batch if self.counts is not None else sum(len(s) for s in self.spans)

    def after(self, k: Any) -> TokenLayout:
        """The layout of the result of ``drop_tokens(..., k, droppable=self)``, known before it runs.

        For a layout made from a mask the result has no mask; that of the result is in ``Dropped.layout``.
        """
        return self.after_keeping(per_segment_k(k, self.groups))

    def after_keeping(self, ks: Sequence[int]) -> TokenLayout:
        """:meth:`after` with one count per segment."""
        segments = self.segments()
        kept = [hi - lo for lo, hi in self.bounds]
        spans: list[list[tuple[int, int]]] = [[] for _ in kept]
        for s, k in zip(segments, ks, strict=True):
            lo, hi = self.bounds[s.item]
            first = lo if self.is_packed else s.item * self.rows + lo
            start = s.row - first - (hi - lo - kept[s.item])  # the rows before, less those that were dropped
            survivors = min(k, s.available) + s.n - s.available  # rows of a mask that are not droppable stay
            spans[s.item].append((start, start + survivors))
            kept[s.item] -= s.n - survivors
        if self.is_packed:
            ends = list(itertools.accumulate(kept))
            out_rows, bounds = sum(kept), tuple((end - n, end) for end, n in zip(ends, kept, strict=True))
        else:
            out_rows, left = max(kept, default=0), self.padding_side == "left"
            bounds = tuple((out_rows - n, out_rows) if left else (0, n) for n in kept)
            if left:
                spans = [[(a + lo, b + lo) for a, b in item] for item, (lo, _) in zip(spans, bounds, strict=True)]
        layout = TokenLayout(tuple(map(tuple, spans)), out_rows, bounds, self.is_packed, self.padding_side)
        if self.counts is None:
            return layout
        counts = tuple(min(k, s.available) for k, s in zip(ks, segments, strict=True))
        return replace(layout, spans=((),) * self.batch, counts=counts)

    def droppable_rows(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """bool ``[B, N]`` (``[T]`` packed): which rows are droppable."""
        if self.mask is not None:
            return self.mask.to(device)
        return self._marked([(s.row, s.row + s.n) for s in self.segments()], device)

    def real_rows(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """bool ``[B, N]`` (``[T]`` packed): which rows are not padding."""
        if self.is_packed:
            return self._marked([(0, self.rows)], device)
        return self._marked([(i * self.rows + lo, i * self.rows + hi) for i, (lo, hi) in enumerate(self.bounds)], device)

    def _marked(self, runs: list[tuple[int, int]], device: torch.device | str) -> torch.Tensor:
        """bool ``[B, N]`` (``[T]`` packed), True in these runs of flat rows: filled on the device, not copied to it."""
        import torch

        batch = 1 if self.is_packed else self.batch
        rows = torch.zeros(batch, self.rows, dtype=torch.bool, device=device)
        if batch > 1 and runs and runs == [(runs[0][0] + i * self.rows, runs[0][1] + i * self.rows) for i in range(batch)]:
            rows[:, runs[0][0] : runs[0][1]] = True
        else:
            flat = rows.view(-1)
            for start, stop in runs:
                flat[start:stop] = True
        return rows.view(-1) if self.is_packed else rows

    def segments(self) -> list[DroppableSpan]:
        """The droppable spans, item by item; lists of ``k`` have this order."""
        found = []
        for i, (lo, hi) in enumerate(self.bounds):
            if self.counts is not None:
                base = 0 if self.is_packed else i * self.rows
                found.append(DroppableSpan(i, base + lo, hi - lo, self.counts[i]))
                continue
            base = lo if self.is_packed else i * self.rows
            found += [DroppableSpan(i, base + start, stop - start, stop - start) for start, stop in self.spans[i]]
        return found


def _padded_bounds(batch: int, rows: int, lengths: Sequence[int] | None, padding_side: str) -> tuple[tuple[int, int], ...]:
    if lengths is None:
        return ((0, rows),) * batch
    sequence_of("lengths", lengths, batch)
    for i, n in enumerate(lengths):
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= rows:
            raise ValueError(f"lengths[{i}] must be an int in [0, {rows}], got {shown(n)}")
    return tuple((rows - n, rows) if padding_side == "left" else (0, n) for n in lengths)


def _per_item_spans(spans: Any, batch: int | None) -> tuple[Spans, ...]:
    if is_pair(spans):
        if batch is None:
            raise ValueError("batch must be given when spans is one (start, stop) for every item")
        return ((tuple(spans),),) * batch
    if not isinstance(spans, list | tuple):
        raise TypeError(f"droppable spans must be (start, stop) or a list with one entry per item, got {kind(spans)}")
    if batch is not None and len(spans) != batch:
        raise ValueError(f"droppable spans must have one entry per item ({batch}), got {len(spans)}")
    items = []
    for i, item in enumerate(spans):
        if item is None:
            item = ()
        elif is_pair(item):
            item = (item,)
        if not isinstance(item, list | tuple) or not all(is_pair(s) for s in item):
            raise TypeError(f"droppable spans of item {i} must be (start, stop) pairs of ints, got {shown(item)}")
        items.append(tuple(tuple(s) for s in item))
    return tuple(items)
