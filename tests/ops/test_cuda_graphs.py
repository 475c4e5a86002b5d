"""Ragged calls in CUDA graphs, captured by hand and by torch.compile; and, without a GPU, what torch asks of captured ops."""

from __future__ import annotations

import gc

import pytest
import torch
from support.cases import hidden_pair, same
from support.ragged import B, D, N, drop_packed, drop_padded, layout_of, topk
from torch.multiprocessing.reductions import StorageWeakRef

from v2drop_kernels import native as library
from v2drop_kernels.backends import tables

OTHER_PLANS = 10_000


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.backends("triton", "cuda")
@pytest.mark.parametrize(("call", "seed"), [(drop_padded, -11), (drop_packed, -12), (topk, -13)])
def test_a_traced_op_keeps_no_table(on, call, seed, monkeypatch):
    """The table of a node of a graph is gone when the node ends, though the plan was not seen before; an eager call keeps it.

    With mode="reduce-overhead" torch.compile runs the nodes in memory of its CUDA graphs, and raises an error if any of it is still
    in use afterwards.
    """
    prev, cur = (x.to(on.device) for x in hidden_pair((B, N, D), torch.float32))
    layout, made, make = layout_of(call, seed), [], tables._plan_tables

    def noted(*args):
        found = make(*args)
        made.append(StorageWeakRef(found.segments.untyped_storage()))
        return found

    monkeypatch.setattr(tables, "_plan_tables", noted)
    got = torch.compile(lambda a, b: call(layout, a, b, on.backend), backend="aot_eager", fullgraph=True)(prev, cur)
    same(list(got), list(call(layout, prev, cur, "reference")))
    gc.collect()
    assert len(made) == (on.backend == "triton")  # the library writes its own into scratch memory
    assert all(table.expired() for table in made)
    call(layout, prev, cur, on.backend)
    gc.collect()
    assert not made[-1].expired()


gpu_backends = pytest.mark.parametrize("backend", ["triton", "cuda"])


def pair(backend, *key):
    if backend == "cuda" and not (library.available()[0] and library.cuda_archs()):
        pytest.skip("the library was built without CUDA")
    return [x.cuda() for x in hidden_pair((B, N, D), torch.float32, *key)]


@pytest.mark.gpu
@gpu_backends
@pytest.mark.parametrize(("call", "seed"), [(drop_padded, -21), (drop_packed, -22), (topk, -23)])
def test_reduce_overhead_of_a_plan_never_seen_before(backend, call, seed):
    """The first call warms up in the memory of the graph, the second captures, the others replay."""
    pair(backend)
    layout = layout_of(call, seed)
    compiled = torch.compile(lambda a, b: call(layout, a, b, backend), mode="reduce-overhead")
    for i in range(5):
        prev, cur = pair(backend, i)
        torch.compiler.cudagraph_mark_step_begin()
        got = [x.clone() for x in compiled(prev, cur)]
        same(got, list(call(layout, prev, cur, "reference")))


@pytest.mark.gpu
@gpu_backends
@pytest.mark.parametrize("call", [drop_padded, drop_packed, topk])
def test_replays_of_a_graph_between_ten_thousand_plans(backend, call):
    prev, cur = pair(backend)
    call(-31, prev, cur, backend)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(-32, prev, cur, backend)  # a plan that was not seen before
    for i in range(4):
        for seed in range(i * OTHER_PLANS // 4, (i + 1) * OTHER_PLANS // 4):
            call(seed, prev, cur, backend)
        other = pair(backend, i)
        prev.copy_(other[0]), cur.copy_(other[1])
        graph.replay()
        same(list(got), list(call(-32, prev, cur, "reference")))


@pytest.mark.gpu
@gpu_backends
def test_new_plans_do_not_synchronise(backend):
    """torch reports every operation of its own that waits for the GPU, copies from pageable memory among them."""
    prev, cur = pair(backend)
    calls = (drop_padded, drop_packed, topk)
    for call in calls:
        call(-41, prev, cur, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            leaf = cur.clone().requires_grad_()
            results = call(-42, prev, leaf, backend)
            torch.autograd.backward(
                [x for x in results if x.requires_grad], [torch.ones_like(x) for x in results if x.requires_grad]
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
