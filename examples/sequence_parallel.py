"""A drop between two attention layers whose sequence is sharded as DeepSpeed-Ulysses shards it, on gloo and the CPU.

``torchrun --nproc-per-node 2 -m examples.sequence_parallel`` runs three layers. Every rank holds a part of the rows; for attention,
an all-to-all gives it all rows of a part of the heads, and a second one gives the rows back. Between the second and the third
layer ``v2drop_kernels.distributed.drop_tokens`` drops most image tokens and rebalances the rest. The result is that of one process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

import v2drop_kernels as vk
from v2drop_kernels import distributed as vd

ROWS, DIM, HEADS, KEEP, IMAGE = 96, 32, 4, 12, (8, 72)


def heads_to_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``[H / P, N, Dh]`` of all rows to ``[H, N / P, Dh]`` of all heads."""
    world = dist.get_world_size()
    parts = list(x.split(rows, dim=1))
    found = [torch.empty_like(parts[0]) for _ in range(world)]
    dist.all_to_all(found, [part.contiguous() for part in parts])
    return torch.cat(found, dim=0)


def rows_to_heads(x: torch.Tensor) -> torch.Tensor:
    """``[H, N / P, Dh]`` to ``[H / P, N, Dh]``."""
    world = dist.get_world_size()
    parts = [part.contiguous() for part in x.chunk(world, dim=0)]
    found = [torch.empty_like(parts[0]) for _ in range(world)]
    dist.all_to_all(found, parts)
    return torch.cat(found, dim=1)


def layer(hidden: torch.Tensor, weight: torch.Tensor, *, sharded: bool) -> torch.Tensor:
    """One block of causal attention on ``hidden [1, N, D]``, or on this rank's rows."""
    q, k, v = (hidden @ weight).view(hidden.shape[1], 3, HEADS, -1).permute(1, 2, 0, 3)
    if sharded:
        q, k, v = rows_to_heads(q), rows_to_heads(k), rows_to_heads(v)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if sharded:
        out = heads_to_rows(out, hidden.shape[1])
    return hidden + out.transpose(0, 1).reshape(hidden.shape)


def main() -> None:
    """Run both, compare, and print what the drop exchanged."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    weights, whole = torch.randn(3, DIM, 3 * DIM) / DIM**0.5, torch.randn(1, ROWS, DIM)
    rows = whole.chunk(world, dim=1)[rank]

    first = layer(rows, weights[0], sharded=True)
    second = layer(first, weights[1], sharded=True)
    ids = torch.arange(ROWS)[None].chunk(world, dim=1)[rank]
    with vd.record() as calls:
        dropped = vd.drop_tokens(first, second, KEEP, droppable=IMAGE, position_ids=ids, shards="contiguous")
    third = layer(dropped.hidden, weights[2], sharded=True)

    before = layer(whole, weights[0], sharded=False)
    after = layer(before, weights[1], sharded=False)
    expected = vk.drop_tokens(before, after, KEEP, droppable=IMAGE)
    last = layer(expected.hidden, weights[2], sharded=False)
    torch.testing.assert_close(dropped.keep, expected.keep.chunk(world, dim=1)[rank])
    torch.testing.assert_close(third, last.chunk(world, dim=1)[rank], rtol=1e-4, atol=1e-5)
    if rank == 0:
        print(f"{ROWS} rows on {world} ranks became {expected.keep.shape[1]}, as on one process; this rank received:")
        for call in calls:
            print(f"  {call.kind}: {call.received} bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
