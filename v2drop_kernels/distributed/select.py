"""The exact top-k of segments whose rows lie on several ranks: two algorithms with one result.

*gather*: all ranks gather all scores and each selects for itself. *radix*: the scores become integers of the same order, and three
all-reduced histograms of 11, 11 and 10 bits give the key of the last row that is kept; rows with that very key are shared out by
their positions, after one all-gather of how many each piece holds. Both follow the order of :func:`v2drop_kernels.segmented_topk`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..core.layout import TokenLayout
from ..ops.host_ints import host_ints
from ..ops.topk import segmented_topk
from .collectives import all_gather, all_reduce
from .sharding import Run, Sharding, local_rows, runs_of

DIGITS = ((21, 11), (10, 11), (0, 10))  # shift and bits, from the highest
ALGORITHMS = ("gather", "radix")


class Selection(NamedTuple):
    """What the host knows of a selection: the whole sequence, and this rank's part of it."""

    layout: TokenLayout
    ks: tuple[int, ...]  # at most what a segment has
    sharding: Sharding
    rank: int
    runs: list[Run]

    @property
    def local(self) -> int:
        """Rows of this rank's shard, of one item."""
        return self.sharding.sizes[self.rank]

    @property
    def batch(self) -> int:
        """Items of a padded batch, 1 for a packed one."""
        return 1 if self.layout.is_packed else self.layout.batch

    def per_segment(self) -> list[int]:
        """How many competing rows of each segment this rank holds (with a mask, at most)."""
        found = [0] * len(self.ks)
        for run in self.runs:
            found[run.segment] += run.n
        return found


def selection(layout: TokenLayout, ks: Sequence[int], sharding: Sharding, rank: int) -> Selection:
    """The selection of ``ks`` tokens of the segments of ``layout``."""
    most = tuple(min(k, s.available) for k, s in zip(ks, layout.segments(), strict=True))
    return Selection(layout, most, sharding, rank, runs_of(layout, sharding, rank))


def cost(algorithm: str, *, ranks: int, rows: int, batch: int, groups: int, itemsize: int, slots: int = 1) -> int:
    """Bytes that one rank receives to select from ``batch`` sequences of ``rows`` rows with ``groups`` segments in all.

    ``rows`` counts the largest shard times ``ranks``; ``slots`` are the pieces of a shard.

    Examples
    --------
    >>> cost("gather", ranks=2, rows=576, batch=1, groups=1, itemsize=4)
    1152
    >>> cost("radix", ranks=2, rows=576, batch=1, groups=1, itemsize=4)
    20484
    """
    if algorithm == "gather":
        return (ranks - 1) * -(-rows // ranks) * batch * itemsize
    histograms = sum(2 * (ranks - 1) * groups * (4 << bits) // ranks for _, bits in DIGITS)
    return histograms + (ranks - 1) * slots * groups * 4


def cheaper(chosen: Selection, scores: torch.Tensor) -> str:
    """The algorithm that receives fewer bytes; float64 scores, whose keys have 64 bits, are always gathered."""
    if scores.dtype == torch.float64:
        return "gather"
    sizes = chosen.sharding.sizes
    facts = {
        "ranks": len(sizes), "rows": max(sizes) * len(sizes), "batch": chosen.batch, "groups": len(chosen.ks),
        "itemsize": scores.element_size(), "slots": chosen.sharding.slots,
    }  # fmt: skip
    return min(ALGORITHMS, key=lambda name: cost(name, **facts))


def kept_rows(scores: torch.Tensor, chosen: Selection, group: Any, algorithm: str) -> torch.Tensor:
    """bool, of the shape of ``scores`` (this rank's shard): the rows that are kept."""
    if not chosen.ks:
        return torch.zeros_like(scores, dtype=torch.bool)
    return (_gather if algorithm == "gather" else _radix)(scores.detach(), chosen, group)


def _gather(scores: torch.Tensor, chosen: Selection, group: Any) -> torch.Tensor:
    sharding, layout = chosen.sharding, chosen.layout
    padded = torch.nn.functional.pad(scores, (0, max(sharding.sizes) - chosen.local))
    shards = all_gather(padded, group)
    whole = torch.cat([shards[p.rank][..., p.at : p.at + p.stop - p.start] for p in sharding.pieces()], dim=-1)
    indices = segmented_topk(whole, list(chosen.ks), droppable=layout, cu_seqlens=layout.cu_seqlens).indices
    if not layout.is_packed:
        items = host_ints([s.item * layout.rows for s in layout.segments()], scores.device)
        indices = torch.where(indices < 0, indices, indices + items[:, None])
    kept = torch.zeros(whole.numel() + 1, dtype=torch.bool, device=scores.device)
    kept[torch.where(indices < 0, whole.numel(), indices).flatten()] = True
    return local_rows(kept[:-1].view(whole.shape), sharding, chosen.rank)


class _Rows(NamedTuple):
    """Per row of the shard, of all items: its segment (the number of segments for none), run, and whether it competes."""

    segment: torch.Tensor
    run: torch.Tensor
    competes: torch.Tensor


def segment_of_rows(chosen: Selection, device: torch.device) -> _Rows:
    """The segment of every row of the shard, flat over its items."""
    n, groups, runs = chosen.batch * chosen.local, len(chosen.ks), chosen.runs
    place = torch.arange(n, device=device)
    if not runs:
        return _Rows(place * 0 + groups, place * 0, place < 0)
    starts = host_ints([run.row for run in runs], device)
    run = (torch.bucketize(place, starts, right=True) - 1).clamp(min=0)
    ends = host_ints([run.row + run.n for run in runs], device)
    competes = (place >= starts[run]) & (place < ends[run])
    if chosen.layout.mask is not None:
        competes &= local_rows(chosen.layout.mask.to(device), chosen.sharding, chosen.rank).flatten()
    segment = torch.where(competes, host_ints([x.segment for x in runs], device)[run], groups)
    return _Rows(segment, run, competes)


def _sortable(scores: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2**32): the order of the scores, NaN above +inf, -0.0 equal to 0.0."""
    wide = scores.float()
    bits = torch.where(wide == 0, 0.0, wide).view(torch.int32).long()
    keys = torch.where(bits < 0, -1 - bits, bits + (1 << 31))
    return torch.where(wide.isnan(), (1 << 32) - 1, keys)


def _radix(scores: torch.Tensor, chosen: Selection, group: Any) -> torch.Tensor:
    groups, device = len(chosen.ks), scores.device
    rows, keys = segment_of_rows(chosen, device), _sortable(scores).flatten()
    need, threshold = host_ints(chosen.ks, device), torch.zeros(groups + 1, dtype=torch.int64, device=device)
    for shift, bits in DIGITS:
        digit = (keys >> shift) & ((1 << bits) - 1)
        live = rows.competes & (keys >> (shift + bits) == threshold[rows.segment])
        counts = torch.zeros((groups + 1) << bits, dtype=torch.int32, device=device)
        counts = counts.scatter_add(0, (rows.segment << bits) + digit, live.int()).view(groups + 1, -1)[:groups]
        upward = all_reduce(counts, group).flip(1).cumsum(1).flip(1)  # rows with this digit or a higher one
        last = ((upward >= need[:, None]).sum(1) - 1).clamp(min=0)  # upward falls: the highest digit that has enough
        above = torch.nn.functional.pad(upward, (0, 1)).gather(1, last[:, None] + 1)[:, 0]
        need = need - above
        threshold = torch.cat([(threshold[:groups] << bits) | last, threshold[groups:]])
    bound = threshold[rows.segment]
    ties = rows.competes & (keys == bound)
    quota = _quotas(ties, rows, need, chosen, group)
    before = torch.nn.functional.pad(ties.cumsum(0), (1, 0))
    starts = host_ints([run.row for run in chosen.runs] or [0], device)
    nth = before[:-1] - before[starts][rows.run]  # of the ties in its run
    kept = (rows.competes & (keys > bound)) | (ties & (nth < quota[rows.run]))
    return kept.view(scores.shape)


def _quotas(ties: torch.Tensor, rows: _Rows, need: torch.Tensor, chosen: Selection, group: Any) -> torch.Tensor:
    """int64 per run: how many of its ties are kept, which is what the ties of earlier pieces leave of ``need``."""
    device, groups, slots = ties.device, len(chosen.ks), chosen.sharding.slots
    cell = host_ints([run.slot * groups + run.segment for run in chosen.runs] or [0], device)
    counts = torch.zeros(slots * groups, dtype=torch.int32, device=device).scatter_add(0, cell[rows.run], ties.int())
    everywhere = all_gather(counts, group).view(-1, groups)  # a row per rank and slot
    order = [p.rank * slots + p.slot for p in chosen.sharding.pieces()]
    ordered = everywhere[host_ints(order, device)].long()
    left = (need - (ordered.cumsum(0) - ordered)).clamp(min=0)
    mine = torch.zeros(dist.get_world_size(group) * slots, groups, dtype=torch.int64, device=device)
    mine = mine.index_copy(0, host_ints(order, device), left).view(-1)
    return mine[cell + chosen.rank * slots * groups]
