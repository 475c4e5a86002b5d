"""drop_tokens of a sequence that is sharded over the ranks of a group: selection across ranks, compaction on each."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from ..core import arguments, calls
from ..core.arguments import is_packed, one_of
from ..core.layout import TokenLayout
from ..ops.compact import compact
from ..ops.variation_score import variation_score
from .agreement import Facts, agreed
from .collectives import group_of
from .rebalance import exchange_of, moved, piece_counts
from .select import Selection, kept_rows
from .sharding import KINDS, Sharding, local_rows
from .topk import prepared, whole_rows

SHARDS = ("padded", "trimmed", *KINDS)


class ShardedDropped(NamedTuple):
    """This rank's part of one drop step.

    Attributes
    ----------
    hidden, position_ids, kv, attention_mask, rope, labels : Tensor
        As in :class:`v2drop_kernels.Dropped`, with this rank's kept rows; rows without a token are 0 (labels -100).
    keep : Tensor
        int64 ``[B, S]`` (``[S]`` packed): the row in the whole sequence before the drop of every row, -1 for none.
    layout : TokenLayout | None
        Of the whole result, as :meth:`TokenLayout.after` gives it: the ``droppable=`` of the next stage where ``sharding`` is
        known; None after a mask.
    sharding : Sharding | None
        Which rows of the whole result every rank holds; None for "padded", and for "trimmed" with several items.
    """

    hidden: torch.Tensor
    keep: torch.Tensor
    position_ids: torch.Tensor | None = None
    kv: Any = None
    attention_mask: torch.Tensor | None = None
    rope: Any = None
    labels: torch.Tensor | None = None
    layout: TokenLayout | None = None
    sharding: Sharding | None = None


def drop_tokens(
    h_prev: torch.Tensor | None,
    h_cur: torch.Tensor,
    k: Any,
    *,
    group: Any = None,
    sharding: Sharding | None = None,
    shards: str = "padded",
    droppable: Any = None,
    scores: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    kv: Any = None,
    kv_layout: str = "BHSD",
    attention_mask: torch.Tensor | None = None,
    rope: Any = None,
    labels: torch.Tensor | None = None,
    cu_seqlens: Any = None,
    metric: str = "l2",
    score_dtype: torch.dtype | None = None,
    algorithm: str | None = None,
    backend: str | None = None,
) -> ShardedDropped:
    """Drop all but the k droppable tokens of every segment of a sharded sequence, and compact what every rank holds.

    Parameters
    ----------
    h_prev, h_cur, scores, position_ids, kv, attention_mask, rope, labels : Tensor
        This rank's shards, otherwise as in :func:`v2drop_kernels.drop_tokens`; position ids stay as they are ("persistent").
    k, group, sharding, droppable, cu_seqlens, algorithm
        As in :func:`v2drop_kernels.distributed.segmented_topk`: spans and offsets count rows of the whole sequence.
    shards : {"padded", "trimmed", "contiguous", "zigzag"}
        What the result looks like. "padded": ``S`` is the most that this rank can keep, without a read on the host. "trimmed": one
        read of the counts, and ``S`` is what its longest item keeps. "contiguous" and "zigzag": rows move in one all-to-all, with
        everything that was given, so that every rank holds equally many rows of the whole result (:meth:`Sharding.even`), in the
        order of the whole sequence.
    kv_layout, metric, score_dtype, backend
        As in :func:`v2drop_kernels.drop_tokens`.

    Returns
    -------
    ShardedDropped
        The kept rows are those of the single-process op. Gradients reach ``h_cur``, ``kv`` and ``rope`` through compaction and
        through the all-to-all.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`v2drop_kernels.distributed.segmented_topk`.

    Notes
    -----
    Collectives: those of the selection; for all but "padded" one all-gather of ``[slots, B]`` int64 that the host reads; to move
    rows one all-to-all, of at most what this rank's new shard holds. Equivalent for contiguous shards:
    ``v2drop_kernels.drop_tokens(torch.cat(all_h_prev, 1), torch.cat(all_h_cur, 1), k)``, of which every rank keeps its part.
    """
    group = group_of(group)
    device = h_cur.device if isinstance(h_cur, torch.Tensor) else torch.device("cpu")
    moving = {
        "position_ids": position_ids, "kv": kv, "kv_layout": kv_layout, "attention_mask": attention_mask, "rope": rope,
        "labels": labels,
    }  # fmt: skip

    def prepare() -> tuple[tuple[Selection, str], Facts]:
        packed = is_packed(droppable, cu_seqlens)
        arguments.ranked(h_prev, h_cur, scores, packed)
        arguments.score_options(metric, score_dtype)
        one_of("shards", shards, SHARDS)
        calls.flatten(calls.batch_shape("h_cur", h_cur, packed), hidden=h_cur, **moving)
        like = torch.empty(0) if scores is None else scores
        (chosen, how), facts = prepared("drop_tokens", h_cur, like, k, group, sharding, droppable, cu_seqlens, algorithm)
        given = [name for name, value in moving.items() if value is not None]
        facts["options"] = (how, shards, metric, score_dtype, scores is None, given)
        return (chosen, how), facts

    chosen, how = agreed("drop_tokens", device, group, prepare)
    if scores is None:
        assert h_prev is not None
        with torch.no_grad():
            scores = variation_score(h_prev, h_cur, metric=metric, score_dtype=score_dtype, backend=backend)
    kept = _with_text(kept_rows(scores, chosen, group, how), chosen)
    counts = None if shards == "padded" else piece_counts(kept, chosen.sharding, chosen.rank, group)
    result = _compacted(h_cur, kept, chosen, counts, moving, backend)
    return _sharded(result, chosen, counts, shards, group, kv_layout)


def _compacted(
    h_cur: torch.Tensor, kept: torch.Tensor, chosen: Selection, counts: Any, moving: dict[str, Any], backend: str | None
) -> ShardedDropped:
    """The kept rows of this rank: as many places as it can keep, or as its longest item keeps by ``counts``."""
    keep = _keep(kept, _capacity(chosen) if counts is None else _longest(counts[chosen.rank]))
    packed = chosen.layout.is_packed
    found = compact(
        keep[0] if packed else keep, h_cur, cu_seqlens=[0, h_cur.shape[0]] if packed else None, backend=backend, **moving
    )
    rows = whole_rows(chosen, h_cur.device)
    origin = torch.where(found.keep < 0, -1, rows[found.keep.clamp(min=0)]) if rows.numel() else found.keep
    after = None if chosen.layout.mask is not None else chosen.layout.after_keeping(chosen.ks)
    hidden = cast(torch.Tensor, found.hidden)
    return ShardedDropped(hidden, origin, found.position_ids, found.kv, found.attention_mask, found.rope, found.labels, after)


def _with_text(kept: torch.Tensor, chosen: Selection) -> torch.Tensor:
    """bool ``[B, n]``: the selected rows, and the real rows that do not compete."""
    layout, device = chosen.layout, kept.device
    always = layout.real_rows(device) & ~layout.droppable_rows(device)
    kept = kept | local_rows(always, chosen.sharding, chosen.rank)
    return kept[None] if layout.is_packed else kept


def _capacity(chosen: Selection) -> int:
    """The most rows that this rank can keep of an item: all that do not compete, and of each segment what it can keep."""
    layout, pieces, batch = chosen.layout, chosen.sharding.pieces(chosen.rank), chosen.batch
    held = [0] * batch
    for item, (lo, hi) in enumerate(layout.bounds):
        held[0 if layout.is_packed else item] += sum(max(0, min(hi, p.stop) - max(lo, p.start)) for p in pieces)
    for segment, k, n in zip(layout.segments(), chosen.ks, chosen.per_segment(), strict=True):
        item = 0 if layout.is_packed else segment.item
        held[item] -= n - min(n, k + segment.n - segment.available)  # rows of a mask that do not compete stay
    return max(held, default=0)


def _longest(counts: list[list[int]]) -> int:
    """Rows of the longest item of a rank, from ``[slot][item]``."""
    return max((sum(own) for own in zip(*counts, strict=True)), default=0)


def _keep(kept: torch.Tensor, width: int) -> torch.Tensor:
    """int64 ``[B, width]``: the rows where ``kept`` is True, ascending; -1 behind them."""
    slot = torch.where(kept, kept.cumsum(1) - 1, width).clamp(max=width)
    keep = torch.full((kept.shape[0], width + 1), -1, dtype=torch.int64, device=kept.device)
    return keep.scatter_(1, slot, torch.arange(kept.shape[1], device=kept.device).expand(kept.shape))[:, :width]


def _sharded(
    result: ShardedDropped, chosen: Selection, counts: list[list[list[int]]] | None, shards: str, group: Any, kv_layout: str
) -> ShardedDropped:
    """The result with its sharding, and its rows moved where that is asked for; a mask where rows are empty."""
    packed, layout = chosen.layout.is_packed, chosen.layout
    if counts is not None and shards in KINDS:
        result = _moved(result, chosen, counts, shards, group, kv_layout)
    elif counts is not None and chosen.batch == 1:
        result = result._replace(sharding=_ranges(counts, chosen.sharding, 0 if packed else layout.after_keeping(chosen.ks).rows))
    if result.attention_mask is None and not packed:
        result = result._replace(attention_mask=result.keep >= 0)
    return result


def _ranges(counts: list[list[list[int]]], old: Sharding, rows: int) -> Sharding | None:
    """Which rows of the result every rank holds after compaction; None if the result has padding, which no rank holds."""
    found: list[list[tuple[int, int]]] = [[] for _ in counts]
    at = 0
    for piece in old.pieces():
        n = counts[piece.rank][piece.slot][0]
        found[piece.rank].append((at, at + n))
        at += n
    return Sharding(tuple(map(tuple, found))) if rows in (0, at) else None


def _moved(
    result: ShardedDropped, chosen: Selection, counts: list[list[list[int]]], kind: str, group: Any, kv_layout: str
) -> ShardedDropped:
    """Every row on the rank that holds it in equal shards of the whole result."""
    after, packed = chosen.layout.after_keeping(chosen.ks), chosen.layout.is_packed
    new = Sharding.even(after.rows, dist.get_world_size(group), kind)
    width = result.keep.shape[-1]
    exchange = exchange_of(counts, chosen.sharding, new, after, chosen.rank, width, result.keep.device, group)
    at = calls.batch_shape("hidden", result.hidden, packed)
    gathers, unflatten = calls.flatten(
        at, hidden=result.hidden, position_ids=result.position_ids, kv=result.kv, kv_layout=kv_layout,
        attention_mask=result.attention_mask, rope=result.rope, labels=result.labels,
    )  # fmt: skip
    keep = calls.flatten(at, hidden=result.keep + 1, position_ids=None, kv=None, kv_layout=kv_layout, attention_mask=None,
                         rope=None, labels=None)[0]  # fmt: skip
    outs = moved(exchange, [*gathers, *keep])  # + 1, so that the fill of 0 stands for no row
    return result._replace(keep=outs[-1] - 1, sharding=new, **unflatten(outs[:-1]))
