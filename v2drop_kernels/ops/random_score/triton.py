"""random_score: every lane makes the four numbers of one counter of Philox4x32-10."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...backends import launch
from ...backends.requests import RandomRequest

BLOCK = 256  # counters of a program


@triton.jit(do_not_specialize=["seed", "n", "blocks", "total"])
def _random_score_kernel(
    scores,  # float32 [B, n]
    items,  # int64 [B], or None
    seed, n, blocks, total,  # blocks: counters of an item, total: of all
    BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = flat < total
    entry, block = flat // blocks, flat % blocks
    item = entry
    if items is not None:
        item = tl.load(items + entry, mask=inside, other=0)
    low, high = item.to(tl.uint32), (item >> 32).to(tl.uint32)
    words = tl.philox(seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), low, high)
    for word in tl.static_range(4):
        column = 4 * block + word
        score = (words[word] >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2**-24
        tl.store(scores + entry * n + column, score, mask=inside & (column < n))


def run(request: RandomRequest) -> torch.Tensor:
    """Float32 ``[B, N]``."""
    batch, n, seed, items, device = request
    scores = torch.empty((batch, n), dtype=torch.float32, device=device)
    blocks = (n + 3) // 4
    seeds = None if items is None else items.contiguous()
    launch.start(
        _random_score_kernel, -(-batch * blocks // BLOCK), device,
        scores, seeds, seed, n, blocks, batch * blocks, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return scores
