"""Plans are cached, bounded by what they hold, and hold nothing of the caller's."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import pytest
import torch

import v2drop_kernels as vk
from v2drop_kernels.core.cache import BoundedCache


def test_a_mask_does_not_outlive_its_layout(on):
    """Dead masks stayed: 159 MB after 300 calls with masks of 512 KB."""
    alive = []
    for i in range(3):
        mask = torch.arange(12, device=on.device).view(2, 6) > i
        layout = vk.TokenLayout.from_mask(mask, mask.sum(1).tolist())
        vk.segmented_topk(torch.zeros(2, 6, device=on.device), 1, droppable=layout, backend=on.backend)
        got = vk.drop_tokens(None, torch.zeros(2, 6, 2, device=on.device), 1, scores=torch.zeros(2, 6, device=on.device),
                             droppable=layout, backend=on.backend)  # fmt: skip
        alive.append(weakref.ref(mask))
        del mask, layout, got
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


# Plans are made and kept alike for all backends; the interpreter and the emulator take up to minutes for 80,000 segments.
@pytest.mark.backends("cpu")
def test_plans_of_many_segments_are_bounded(on):
    """200 calls with fresh offsets of 20000 segments held 1644 MB."""
    groups, held = 400, []
    scores = torch.zeros(3 * groups + 200, device=on.device)
    tracemalloc.start()
    for i in range(200):
        cu = [0, *range(1 + i, 1 + i + 3 * (groups - 1), 3), len(scores)]
        vk.segmented_topk(scores, 1, cu_seqlens=cu, backend=on.backend)
        if i in (99, 199):
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] - held[0] < 4 << 20


def test_bounded_cache_keeps_the_latest_by_weight():
    made = []
    cache = BoundedCache(lambda key: made.append(key) or -key, lambda key: key, most=10)
    assert [cache(x) for x in (4, 5, 4, 3, 4, 5, 11, 11)] == [-4, -5, -4, -3, -4, -5, -11, -11]
    assert made == [4, 5, 3, 5, 11, 11]
    cache.cache_clear()
    assert cache(4) == -4
    assert made[-1] == 4
