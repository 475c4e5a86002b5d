"""A captured CUDA graph uses no memory but its own and the caller's, however many plans come after it.

The launches of a call are recorded by address, as a graph has them, and made later. Outside the capture nothing is launched, so
that thousands of plans pass in seconds; what they allocate, keep and give back is real.
"""

from __future__ import annotations

import gc
import random

import pytest
import torch
from support.cases import hidden_pair, same
from support.streams import Dangling, TritonGraph

import v2drop_kernels as vk
from v2drop_kernels.backends import tables
from v2drop_kernels.core.plan import CuPlan

pytestmark = pytest.mark.backends("triton")

B, N, D = 2, 24, 8
OTHER_PLANS, REPLAYS = 10_000, 4


def padded(seed, **options):
    """Two spans in the first item and one in the second, somewhere."""
    at = random.Random(seed)
    first, second = sorted(at.sample(range(N + 1), 4)), sorted(at.sample(range(N + 1), 2))
    return vk.TokenLayout.padded([[(first[0], first[1]), (first[2], first[3])], [tuple(second)]], N, **options)


def packed(seed):
    """Three items of the rows of the batch, wholly droppable but for their first row."""
    cuts = sorted(random.Random(seed).sample(range(1, B * N), 2))
    cu = [0, *cuts, B * N]
    return vk.TokenLayout.packed([(1, b - a) if b - a > 1 else () for a, b in zip(cu[:-1], cu[1:], strict=True)], cu)


def drop_padded(seed, prev, cur, backend="triton"):
    layout = padded(seed, padding_side="left" if seed % 2 else "right")
    extra = {"kv": [cur[:, None]], "attention_mask": cur[..., 0]}
    got = vk.drop_tokens(prev, cur, [2, 1, 3], droppable=layout, backend=backend, **extra)
    return got.keep, got.hidden, got.kv[0], got.attention_mask


def drop_packed(seed, prev, cur, backend="triton"):
    layout = packed(seed)
    k = [2 + seed % 3] * layout.groups
    got = vk.drop_tokens(prev.flatten(0, 1), cur.flatten(0, 1), k, droppable=layout, backend=backend)
    return got.keep, got.hidden, got.cu_seqlens


def topk(seed, prev, cur, backend="triton"):
    return tuple(vk.variation_topk(prev, cur, [2, 1, 3], droppable=padded(seed), order="score", backend=backend))


@pytest.mark.parametrize("call", [drop_padded, drop_packed, topk])
def test_replays_between_ten_thousand_plans(on, monkeypatch, call):
    prev, cur = hidden_pair((B, N, D), torch.float32)
    graph = TritonGraph(monkeypatch)
    call(0, prev, cur)  # the plan of the graph is kept from an eager call before
    got = graph.capture(lambda: call(0, prev, cur))
    for i in range(REPLAYS):
        graph.skipping = True
        for seed in range(i * OTHER_PLANS // REPLAYS, (i + 1) * OTHER_PLANS // REPLAYS):
            call(seed + 1, prev, cur)
        graph.skipping = False
        gc.collect()
        prev.copy_(prev.roll(1, dims=1)), cur.copy_(cur.roll(3, dims=2))  # the caller's memory, with other values
        for x in got:
            x.fill_(-7)
        graph.replay()
        same(list(got), list(call(0, prev, cur, "reference")))


def test_budgets_of_offsets_on_the_device(on, monkeypatch):
    """The budgets of a plan whose lengths only the device knows: written by the graph, while other budgets pass."""
    graph = TritonGraph(monkeypatch)
    upload, device = graph.launch.upload, torch.device("cpu")
    of = lambda *ks: tables.tables_of(CuPlan(90, ks, 50, True), device, upload).ks
    kept = of(1, 2, 3)
    assert of(1, 2, 3) is kept
    got = graph.capture(lambda: of(1, 2, 3))
    graph.skipping = True
    for i in range(1000):
        of(i, i + 5)
    got.fill_(-7)
    graph.replay()
    assert got.tolist() == [1, 2, 3]


def test_a_kept_table_would_be_noticed(on, monkeypatch):
    """A test of the test: a graph that uses a table from before the capture fails after other plans."""
    prev, cur = hidden_pair((B, N, D), torch.float32)
    graph = TritonGraph(monkeypatch)
    monkeypatch.setattr(tables, "may_keep", lambda device: True)
    drop_padded(0, prev, cur)
    graph.capture(lambda: drop_padded(0, prev, cur))
    graph.replay()
    graph.skipping = True
    for seed in range(1, 2000):
        drop_padded(seed, prev, cur)
    gc.collect()
    with pytest.raises(Dangling):
        graph.replay()
