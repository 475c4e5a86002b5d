"""Which rows of a sequence every rank holds, as integers on the host that all ranks agree on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..core.arguments import one_of, require_int, shown
from ..core.layout import TokenLayout

KINDS = ("contiguous", "zigzag")


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of the whole sequence, which begin at row ``at`` of the shard of ``rank``.

    ``slot`` numbers the pieces of a rank.
    """

    start: int
    stop: int
    rank: int
    slot: int
    at: int


@dataclass(frozen=True)
class Sharding:
    """The shards of a sequence of ``rows`` rows: ``N`` of a padded batch, whose items are all cut alike, or ``T`` of a packed one.

    Build it with :meth:`contiguous`, :meth:`zigzag` or :meth:`even`. The shard of a rank is its ranges, one after another.

    Attributes
    ----------
    ranges : tuple
        Per rank the ascending ``(start, stop)`` ranges of the sequence that it holds; together they are every row once.
    """

    ranges: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self) -> None:
        at = 0
        for start, stop in sorted(x for own in self.ranges for x in own):
            if start != at or stop < start:
                raise ValueError(f"ranges must hold every row of the sequence once, got {shown(self.ranges)}")
            at = stop

    @staticmethod
    def contiguous(sizes: Sequence[int]) -> Sharding:
        """Rank ``r`` holds ``sizes[r]`` rows behind those of the ranks before it.

        Examples
        --------
        >>> Sharding.contiguous([3, 2]).ranges
        (((0, 3),), ((3, 5),))
        """
        return Sharding(tuple(((start, stop),) for start, stop in _laid_out(_checked(sizes))))

    @staticmethod
    def zigzag(sizes: Sequence[int]) -> Sharding:
        """Rank ``r`` of ``P`` holds the ``r``-th and the ``r``-th last of ``2 P`` chunks, which balances causal attention.

        Of ``sizes[r]`` rows the first chunk has the larger half.

        Examples
        --------
        >>> Sharding.zigzag([2, 2]).ranges
        (((0, 1), (3, 4)), ((1, 2), (2, 3)))
        """
        counts = _checked(sizes)
        first = [(n + 1) // 2 for n in counts]
        laid = _laid_out(first + [n - x for n, x in zip(reversed(counts), reversed(first), strict=True)])
        return Sharding(tuple((laid[r], laid[-1 - r]) for r in range(len(counts))))

    @staticmethod
    def even(rows: int, ranks: int, kind: str = "contiguous") -> Sharding:
        """``rows`` in shards whose sizes differ by one at most, the larger ones first; ``kind`` is "contiguous" or "zigzag"."""
        require_int("rows", rows)
        require_int("ranks", ranks)
        if ranks == 0:
            raise ValueError("ranks must be at least 1, got 0")
        one_of("kind", kind, KINDS)
        sizes = [rows // ranks + (r < rows % ranks) for r in range(ranks)]
        return Sharding.contiguous(sizes) if kind == "contiguous" else Sharding.zigzag(sizes)

    @property
    def ranks(self) -> int:
        """Number of shards."""
        return len(self.ranges)

    @property
    def rows(self) -> int:
        """Rows of the whole sequence."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of every shard."""
        return tuple([sum([stop - start for start, stop in own]) for own in self.ranges])

    @property
    def slots(self) -> int:
        """The largest number of ranges of a rank."""
        return max([len(own) for own in self.ranges], default=0)

    def pieces(self, rank: int | None = None) -> list[Piece]:
        """The pieces of all ranks, or of one, by ``start``."""
        found = []
        for r, own in enumerate(self.ranges):
            at = 0
            for slot, (start, stop) in enumerate(own):
                if rank is None or r == rank:
                    found.append(Piece(start, stop, r, slot, at))
                at += stop - start
        return sorted(found)


class Run(NamedTuple):
    """``n`` competing rows of one segment from row ``row`` of a shard (of all its items) on, in the piece ``slot``."""

    segment: int
    row: int
    n: int
    slot: int


def runs_of(layout: TokenLayout, sharding: Sharding, rank: int) -> list[Run]:
    """The parts of all segments that the shard of ``rank`` holds, in the order of its rows."""
    local, pieces, found = sharding.sizes[rank], sharding.pieces(rank), []
    for g, segment in enumerate(layout.segments()):
        item = 0 if layout.is_packed else segment.item
        start = segment.row - item * layout.rows
        for piece in pieces:
            a, b = max(start, piece.start), min(start + segment.n, piece.stop)
            if a < b:
                found.append(Run(g, item * local + piece.at + a - piece.start, b - a, piece.slot))
    return sorted(found, key=lambda run: run.row)


def local_rows(x: Any, sharding: Sharding, rank: int) -> Any:
    """What the shard of ``rank`` holds of ``x``, whose last dimension is the whole sequence."""
    import torch

    return torch.cat([x[..., start:stop] for start, stop in sharding.ranges[rank]] or [x[..., :0]], dim=-1)


def _checked(sizes: Iterable[int]) -> list[int]:
    counts = list(sizes)
    for r, n in enumerate(counts):
        require_int(f"sizes[{r}]", n)
    if not counts:
        raise ValueError("sizes must have one entry per rank, got none")
    return counts


def _laid_out(sizes: Sequence[int]) -> list[tuple[int, int]]:
    found, at = [], 0
    for n in sizes:
        found.append((at, at + n))
        at += n
    return found
