"""segmented_topk and variation_topk of sequences that are sharded over the ranks of a group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..core import arguments
from ..core.arguments import is_packed, per_segment_k
from ..core.droppable import layout_of
from ..ops.host_ints import host_ints
from ..ops.variation_score import variation_score
from .agreement import Facts, agreed
from .collectives import group_of
from .select import ALGORITHMS, Selection, cheaper, kept_rows, segment_of_rows, selection
from .sharding import Sharding


class ShardedTopK(NamedTuple):
    """The kept tokens of every segment that this rank holds.

    Attributes
    ----------
    values : Tensor
        ``[G, K]`` their scores, ``-inf`` in empty slots, which are the last ones; ``K`` differs between ranks.
    indices : Tensor
        int64 ``[G, K]``: their rows in the whole sequence, ascending, as :func:`v2drop_kernels.segmented_topk` has them; -1 in
        empty slots. Those of all ranks together are the indices of the op on one process.
    local : Tensor
        int64 ``[G, K]``: the same by rows of this rank's shard.
    counts : Tensor
        int64 ``[G]``: how many this rank keeps.
    """

    values: torch.Tensor
    indices: torch.Tensor
    local: torch.Tensor
    counts: torch.Tensor


def segmented_topk(
    scores: torch.Tensor,
    k: Any,
    *,
    group: Any = None,
    sharding: Sharding | None = None,
    droppable: Any = None,
    cu_seqlens: Any = None,
    algorithm: str | None = None,
) -> ShardedTopK:
    """Keep the k highest scores of every segment of a sequence that is sharded over ``group``.

    Parameters
    ----------
    scores : Tensor
        This rank's shard: ``[B, n]``, or ``[n]`` of a packed batch with ``cu_seqlens``; float32, float16, bfloat16 or float64.
    k : int | list of int | CPU tensor
        As in :func:`v2drop_kernels.segmented_topk`, for the segments of the whole sequence.
    group : ProcessGroup | DeviceMesh, optional
        The ranks that hold the sequence; default: all.
    sharding : Sharding, optional
        Which rows every rank holds; default: one range each, in rank order, all of the size of this one.
    droppable, cu_seqlens : optional
        As in :func:`v2drop_kernels.segmented_topk`, in rows of the **whole** sequence; offsets must be known on the host.
    algorithm : {"gather", "radix"}, optional
        Default: the one that receives fewer bytes.

    Returns
    -------
    ShardedTopK
        Values carry the gradient of ``scores``.

    Raises
    ------
    ValueError, TypeError
        Arguments that are wrong, or that differ between ranks: on every rank, before any scores are exchanged.
    RuntimeError
        Another rank raised or did not call, within the timeout of the group.

    Notes
    -----
    The result is that of the single-process op on the whole sequence, whatever the sharding, with the same order of ties and NaN.
    Collectives: one all-gather of scores (gather), or three all-reduces of ``[G, 2048]``, ``[G, 2048]`` and ``[G, 1024]`` int32
    and one all-gather of ``[slots, G]`` int32 (radix); with a check of the ranks one more of 72 bytes per rank
    (:mod:`v2drop_kernels.distributed.agreement`). Without that check nothing synchronises with the host.
    Equivalent for one segment and contiguous shards: ``torch.sort(torch.cat(all_shards), descending=True,
    stable=True).indices[:k]``.
    """
    group, device = group_of(group), _device(scores)

    def prepare() -> tuple[tuple[Selection, str], Facts]:
        arguments.tensor("scores", scores)
        packed = is_packed(droppable, cu_seqlens)
        arguments.score_dims(scores, packed)
        arguments.dtype_in("scores", scores, arguments.HIDDEN_DTYPES)
        return prepared("segmented_topk", scores, scores, k, group, sharding, droppable, cu_seqlens, algorithm)

    chosen, how = agreed("segmented_topk", device, group, prepare)
    return listed(scores, kept_rows(scores, chosen, group, how), chosen)


def variation_topk(
    h_prev: torch.Tensor,
    h_cur: torch.Tensor,
    k: Any,
    *,
    group: Any = None,
    sharding: Sharding | None = None,
    metric: str = "l2",
    droppable: Any = None,
    cu_seqlens: Any = None,
    score_dtype: torch.dtype | None = None,
    algorithm: str | None = None,
    backend: str | None = None,
) -> ShardedTopK:
    """Keep the k tokens of every segment of a sharded sequence that one decoder layer changed most.

    ``h_prev`` and ``h_cur`` are this rank's shards, ``[B, n, D]`` or packed ``[n, D]``; ``metric``, ``score_dtype`` and ``backend``
    as in :func:`v2drop_kernels.variation_topk`, the rest as in :func:`segmented_topk`. Scores are local to a row, so that only
    they are exchanged, never hidden states. Equivalent: ``segmented_topk(variation_score(h_prev, h_cur), k, group=group, ...)``.
    """
    group, device = group_of(group), _device(h_cur)

    def prepare() -> tuple[tuple[Selection, str], Facts]:
        arguments.pair(h_prev, h_cur, is_packed(droppable, cu_seqlens))
        arguments.score_options(metric, score_dtype)
        scores = torch.empty(0, dtype=torch.float32)
        return prepared(
            f"variation_topk {metric} {score_dtype}", h_cur, scores, k, group, sharding, droppable, cu_seqlens, algorithm
        )

    chosen, how = agreed("variation_topk", device, group, prepare)
    scores = variation_score(h_prev, h_cur, metric=metric, score_dtype=score_dtype, backend=backend)
    return listed(scores, kept_rows(scores, chosen, group, how), chosen)


def prepared(
    op: str,
    rows: torch.Tensor,
    scores: torch.Tensor,
    k: Any,
    group: Any,
    sharding: Sharding | None,
    droppable: Any,
    cu_seqlens: Any,
    algorithm: str | None,
) -> tuple[tuple[Selection, str], Facts]:
    """The selection, the algorithm, and what all ranks must agree on; ``rows`` is a shard, of ``scores`` only the dtype is read."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    packed = is_packed(droppable, cu_seqlens)
    batch, local = (None, rows.shape[0]) if packed else (rows.shape[0], rows.shape[1])
    shards = Sharding.contiguous([local] * ranks) if sharding is None else sharding
    if not isinstance(shards, Sharding):
        raise TypeError(f"sharding must be a Sharding, got {type(shards).__name__}")
    if shards.ranks != ranks:
        raise ValueError(f"sharding must have one entry per rank of group ({ranks}), got {shards.ranks}")
    if shards.sizes[rank] != local:
        raise ValueError(f"sharding must give rank {rank} the {local} rows of its tensors, got {shards.sizes[rank]}")
    if algorithm is not None:
        arguments.one_of("algorithm", algorithm, ALGORITHMS)
    if arguments.is_tensor(cu_seqlens) and cu_seqlens.device.type != "cpu":
        raise ValueError("cu_seqlens must be known on the host where a sequence is sharded: pass a list or a CPU tensor")
    layout = layout_of(droppable, batch, shards.rows, cu_seqlens)
    ks = per_segment_k(k, layout.groups)
    chosen = selection(layout, ks, shards, rank)
    how = cheaper(chosen, scores) if algorithm is None else algorithm
    if how == "radix" and scores.dtype == torch.float64:
        raise TypeError("algorithm must be 'gather' for float64 scores: radix orders 32-bit keys")
    facts = {
        "op": op, "batch": batch, "rows": shards.rows, "k": ks, "droppable": layout, "sharding": shards, "dtype": rows.dtype,
        "options": how,
    }  # fmt: skip
    return (chosen, how), facts


def listed(scores: torch.Tensor, kept: torch.Tensor, chosen: Selection) -> ShardedTopK:
    """The kept rows of every segment, from a bool for every row of the shard."""
    groups, device, n = len(chosen.ks), scores.device, chosen.local
    width = max([min(k, n) for k, n in zip(chosen.ks, chosen.per_segment(), strict=True)], default=0)
    rows = segment_of_rows(chosen, device)
    segment = torch.where(kept.flatten(), rows.segment, groups)
    order = segment.argsort(stable=True)  # by segment, and ascending inside it
    segment = segment[order]
    counts = torch.zeros(groups + 1, dtype=torch.int64, device=device).scatter_add(0, segment, torch.ones_like(segment))
    slot = torch.arange(segment.shape[0], device=device) - (counts.cumsum(0) - counts)[segment]
    flat = torch.full((groups + 1, width + 1), -1, dtype=torch.int64, device=device)
    flat[segment, slot.clamp(max=width)] = order
    flat = flat[:groups, :width]
    found = flat >= 0
    if scores.numel() == 0 or width == 0:
        empty = flat.new_full(flat.shape, -1)
        return ShardedTopK(scores.new_full(flat.shape, -torch.inf) + scores.sum() * 0, empty, empty, counts[:groups])
    values = torch.where(found, scores.flatten()[flat.clamp(min=0)], -torch.inf)
    local = torch.where(found, flat % n, -1)
    return ShardedTopK(values, torch.where(found, whole_rows(chosen, device)[local], -1), local, counts[:groups])


def whole_rows(chosen: Selection, device: torch.device) -> torch.Tensor:
    """int64 ``[n]``: the row in the whole sequence of every row of the shard."""
    own = chosen.sharding.ranges[chosen.rank]
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in own] or [host_ints([], device)])


def _device(x: Any) -> torch.device:
    return x.device if isinstance(x, torch.Tensor) else torch.device("cpu")
