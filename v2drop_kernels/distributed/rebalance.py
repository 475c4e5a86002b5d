"""Kept rows of a sharded sequence to shards of equal size: one all-to-all moves every tensor of a batch, bytes and all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..core.layout import TokenLayout
from ..core.types import GatherSpec
from .collectives import all_gather, all_to_all
from .sharding import Sharding


class Exchange(NamedTuple):
    """Which rows a rank sends and receives.

    ``send`` are flat rows (item, row) of its shard in the order of the ranks that they go to, ``sent[r]`` of them to rank ``r``;
    ``receive`` are the flat rows of its new shard, of ``rows`` rows per item, in the order in which they arrive.
    """

    send: torch.Tensor
    sent: list[int]
    receive: torch.Tensor
    received: list[int]
    rows: int
    group: Any


def piece_counts(kept: torch.Tensor, sharding: Sharding, rank: int, group: Any) -> list[list[list[int]]]:
    """``[rank][slot][item]``: kept rows of every piece, from bool ``[B, n]``. One small all-gather, and one read on the host."""
    parts, at = [], 0
    for start, stop in sharding.ranges[rank]:
        parts.append(kept[:, at : at + stop - start].sum(1))
        at += stop - start
    parts += [kept.new_zeros(kept.shape[0], dtype=torch.int64)] * (sharding.slots - len(parts))
    found: list[list[list[int]]] = all_gather(torch.stack(parts), group).tolist()
    return found


def exchange_of(
    counts: list[list[list[int]]], old: Sharding, new: Sharding, after: TokenLayout, rank: int, width: int, device: Any, group: Any
) -> Exchange:
    """The exchange from compacted shards, whose items have ``width`` rows on this rank, to the shards of ``new``."""
    sent: list[list[tuple[int, int]]] = [[] for _ in range(new.ranks)]
    received: list[list[tuple[int, int]]] = [[] for _ in range(new.ranks)]
    rows, targets, batch = new.sizes[rank], new.pieces(), len(counts[0][0])
    for item in range(batch):
        at = 0 if after.is_packed else after.bounds[item][0]  # padding on the left comes before the kept rows
        local = [0] * new.ranks
        for piece in old.pieces():
            n = counts[piece.rank][piece.slot][item]
            for target in targets:
                a, b = max(at, target.start), min(at + n, target.stop)
                if a >= b:
                    continue
                if piece.rank == rank:
                    begin = item * width + local[rank] + a - at
                    sent[target.rank].append((begin, begin + b - a))
                if target.rank == rank:
                    begin = item * rows + target.at + a - target.start
                    received[piece.rank].append((begin, begin + b - a))
            local[piece.rank] += n
            at += n
    return Exchange(_rows(sent, device), _sizes(sent), _rows(received, device), _sizes(received), rows, group)


def _rows(ranges: list[list[tuple[int, int]]], device: Any) -> torch.Tensor:
    parts = [torch.arange(a, b) for own in ranges for a, b in own]
    return torch.cat([*parts, torch.empty(0, dtype=torch.int64)]).to(device)


def _sizes(ranges: list[list[tuple[int, int]]]) -> list[int]:
    return [sum(b - a for a, b in own) for own in ranges]


def moved(exchange: Exchange, gathers: Sequence[GatherSpec]) -> list[torch.Tensor]:
    """Every tensor with the rows of the new shard; rows that no rank sends hold the fill of the tensor."""
    if not gathers:
        return []
    front = [_to_front(spec.tensor, spec) for spec in gathers]
    outs: Sequence[torch.Tensor] = _Move.apply(exchange, [spec.fill for spec in gathers], *front)
    return [_from_front(out, spec) for out, spec in zip(outs, gathers, strict=True)]


def _to_front(x: torch.Tensor, spec: GatherSpec) -> torch.Tensor:
    """``[B, n, ...]``, with a batch of one where ``x`` has none."""
    return x.movedim(spec.row_dim, 0)[None] if spec.batch_dim < 0 else x.movedim((spec.batch_dim, spec.row_dim), (0, 1))


def _from_front(x: torch.Tensor, spec: GatherSpec) -> torch.Tensor:
    moved_back = x[0].movedim(0, spec.row_dim) if spec.batch_dim < 0 else x.movedim((0, 1), (spec.batch_dim, spec.row_dim))
    return moved_back.contiguous()


class _Move(torch.autograd.Function):
    """The exchange of several tensors ``[B, n, ...]`` as bytes; backward sends the gradients back in one all-to-all too."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, fills: list[int], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.exchange, ctx.shapes = exchange, [x.shape for x in tensors]
        packed = _packed([x.reshape(-1, *x.shape[2:])[exchange.send] for x in tensors])
        arrived = all_to_all(packed, exchange.received, exchange.sent, exchange.group)
        outs = []
        for x, fill, rows in zip(tensors, fills, _unpacked(arrived, tensors), strict=True):
            shape = (x.shape[0], exchange.rows, *x.shape[2:])
            out = torch.full((x.shape[0] * exchange.rows, *x.shape[2:]), fill, dtype=x.dtype, device=x.device)
            out[exchange.receive] = rows
            outs.append(out.view(shape))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        exchange = ctx.exchange
        wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[i + 2]]
        found: list[Any] = [None] * len(grads)
        if wanted:
            given = [grads[i] for i in wanted]
            packed = _packed([x.reshape(-1, *x.shape[2:])[exchange.receive] for x in given])
            arrived = all_to_all(packed, exchange.sent, exchange.received, exchange.group)
            for i, x, rows in zip(wanted, given, _unpacked(arrived, given), strict=True):
                shape = ctx.shapes[i]
                out = torch.zeros((shape[0] * shape[1], *shape[2:]), dtype=x.dtype, device=x.device)
                out[exchange.send] = rows
                found[i] = out.view(shape)
        return None, None, *found


def _packed(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 ``[R, W]``: the bytes of the rows of all tensors side by side."""
    return torch.cat([_bytes(x) for x in rows], dim=1)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    width = x.shape[1:].numel() * x.element_size()
    return x.contiguous().reshape(-1).view(torch.uint8).view(x.shape[0], width)


def _unpacked(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The rows of all tensors, whose other dimensions and dtypes are those of ``like [B, n, ...]``."""
    found, at = [], 0
    for x in like:
        width = x.shape[2:].numel() * x.element_size()
        # A copy: views as wider dtypes need its alignment.
        part = packed[:, at : at + width].clone(memory_format=torch.contiguous_format)
        found.append(part.reshape(-1).view(x.dtype).view(packed.shape[0], *x.shape[2:]))
        at += width
    return found
