"""Tensor parallelism: attention heads that lie on several ranks, whose scores are reduced before anything is selected.

Hidden states, rotary tables and token ids are equal on all ranks, for the model's own all-reduces give every rank the same bits.
What a policy computes from them alone, such as the variation, needs no collective. Sums over heads are gathered and added in the
order of the ranks, the same way on each, so that scores and hence kept tokens are bit-equal on all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.collectives import all_gather


def tensor_parallel_group(block: Any) -> Any:
    """The process group over which the heads of a decoder block are sharded, or None.

    It is that of the mesh on which a weight of the block's attention is a DTensor sharded along its outputs: with several mesh
    dimensions the one named "tp"; a mesh that ``fully_shard`` made shards storage, not heads.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for weight in getattr(block, "self_attn", block).parameters():
        if not isinstance(weight, DTensor):
            continue
        mesh, names = weight.device_mesh, weight.device_mesh.mesh_dim_names or ()
        sharded = [dim for dim, placement in enumerate(weight.placements) if placement.is_shard(0) and mesh.size(dim) > 1]
        named = [dim for dim in sharded if dim < len(names) and "tp" in names[dim]]
        if not named and isinstance(block, FSDPModule):
            continue
        if named or sharded:
            return mesh.get_group((named or sharded)[0])
    return None


@contextlib.contextmanager
def unsharded(block: Any) -> Iterator[None]:
    """All parameters of a decoder block, which FSDP2 gathers for its forward only, while its projections are computed again."""
    if not dist.is_available() or not dist.is_initialized():
        yield
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not any(isinstance(x, DTensor) for x in block.parameters()) or not isinstance(block, FSDPModule):
        yield
        return
    block.unshard()
    try:
        yield
    finally:
        block.reshard()


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks, added in their order. All ranks compute the same loss from it, so each part has its gradient."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        parts = all_gather(part, group)
        total = parts[0].clone()
        for other in parts[1:]:
            total += other
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class _AllHeads(torch.autograd.Function):
    """Heads of all ranks along dimension 1; backward takes this rank's part, for all ranks compute the same loss."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.at, ctx.heads = dist.get_rank(group), part.shape[1]
        return torch.cat(list(all_gather(part, group)), dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].narrow(1, ctx.at * ctx.heads, ctx.heads), None


def sum_over_ranks(part: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of ``part`` over the ranks of ``group``, bit-equal on all; ``part`` itself without a group. One collective."""
    found: torch.Tensor = part if group is None else _SumOverRanks.apply(part, group)
    return found


def all_heads(part: torch.Tensor, group: Any) -> torch.Tensor:
    """``[B, H, ...]`` of all ranks' heads from this rank's ``[B, H / P, ...]``; ``part`` itself without a group. One collective."""
    found: torch.Tensor = part if group is None else _AllHeads.apply(part, group)
    return found


def score_all_heads(
    score: Callable[..., torch.Tensor], query: torch.Tensor, keys: torch.Tensor, options: dict[str, Any], group: Any
) -> torch.Tensor:
    """``score(query, keys)`` over the heads of all ranks; each holds ``query [B, H / P, Q, Dh]`` and its ``keys``. One collective.

    Means and sums over heads exchange the sums, float32 ``[B, N]``. Other reductions, which are not sums of what the ranks find,
    exchange queries and keys.
    """
    heads, queries = options.get("heads", "mean"), options.get("queries", "mean")
    if heads in ("mean", "sum") and queries == "mean":
        total = sum_over_ranks(score(query, keys, heads="sum"), group)
        return total if heads == "sum" else total / (query.shape[1] * dist.get_world_size(group))
    everything = all_heads(torch.cat([query.flatten(1), keys.flatten(1)], dim=1)[:, None], group)  # [B, P, ...]
    parts = everything.split([query[0].numel(), keys[0].numel()], dim=2)
    query, keys = (x.unflatten(2, y.shape[1:]).flatten(1, 2) for x, y in zip(parts, (query, keys), strict=True))
    return score(query, keys)
