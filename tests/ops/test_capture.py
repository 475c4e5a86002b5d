"""A captured CUDA graph uses no memory but its own and the caller's, however many plans come after it.

The launches of a call are recorded by address, as a graph has them, and made later. Outside the capture nothing is launched, so
that thousands of plans pass in seconds; what they allocate, keep and give back is real. On a GPU, test_cuda_graphs.py does the same
with graphs.
"""

from __future__ import annotations

import gc

import pytest
import torch
from support.cases import hidden_pair, same
from support.ragged import B, D, N, all_three, drop_padded, forget_plans, other_plans
from support.streams import Dangling, TritonGraph

from v2drop_kernels.backends import tables
from v2drop_kernels.core.plan import CuPlan

pytestmark = pytest.mark.interpreter

OTHER_PLANS, REPLAYS = 10_000, 4


@pytest.fixture(autouse=True)
def clean():
    yield
    forget_plans()


def test_replays_between_ten_thousand_plans(monkeypatch):
    prev, cur = hidden_pair((B, N, D), torch.float32)
    graph = TritonGraph(monkeypatch)
    all_three(prev, cur, "triton")  # the plans of the graph are kept from eager calls before
    got = graph.capture(lambda: all_three(prev, cur, "triton"))
    for i in range(REPLAYS):
        graph.skipping = True
        other_plans(i * OTHER_PLANS // REPLAYS, (i + 1) * OTHER_PLANS // REPLAYS, prev, cur, "triton")
        graph.skipping = False
        gc.collect()
        prev.copy_(prev.roll(1, dims=1)), cur.copy_(cur.roll(3, dims=2))  # the caller's memory, with other values
        for x in got:
            x.fill_(-7)
        graph.replay()
        same(got, all_three(prev, cur, "reference"))


def test_budgets_of_offsets_on_the_device(monkeypatch):
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


def test_a_kept_table_would_be_noticed(monkeypatch):
    """A test of the test: a graph that uses a table from before the capture fails after other plans."""
    prev, cur = hidden_pair((B, N, D), torch.float32)
    graph = TritonGraph(monkeypatch)
    monkeypatch.setattr(tables, "may_keep", lambda device: True)
    drop_padded(0, prev, cur, "triton")
    graph.capture(lambda: drop_padded(0, prev, cur, "triton"))
    graph.replay()
    graph.skipping = True
    for seed in range(1, 2000):
        drop_padded(seed, prev, cur, "triton")
    gc.collect()
    with pytest.raises(Dangling):
        graph.replay()
