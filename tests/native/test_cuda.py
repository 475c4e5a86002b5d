"""What only the backend ``cuda`` has: modes of a drop, which must agree; its streams, graphs and errors."""

from __future__ import annotations

import pytest
import torch
from support.cases import BATCHES, LARGE, companions, cross, hidden_pair, same, scores, to

import v2drop_kernels as vk
from v2drop_kernels import native as library
from v2drop_kernels.backends import native

pytestmark = pytest.mark.backends("cuda")
MODES = ["cooperative", "fused", "separate"]
RAGGED = BATCHES[6]


def fields(dropped):
    return to([dropped.keep, dropped.hidden, dropped.position_ids, dropped.kv, dropped.rope, dropped.labels], "cpu")


def drop(on, mode, b, dim=24):
    """The fields of a drop in this mode, and those of the reference."""
    prev, cur = hidden_pair((*b.lead, dim), torch.bfloat16)
    want = vk.reference.drop_tokens(prev, cur, b.k("n/3"), **b.arguments(), **companions(b))
    given = {**b.arguments(on.device), **companions(b, device=on.device)}
    with native.launch_mode(mode):
        got = vk.drop_tokens(*to([prev, cur], on.device), b.k("n/3"), backend=on.backend, **given)
    return fields(got), fields(want)


@cross(mode=["fused", "separate"], b=[*BATCHES, *LARGE])
def test_modes_agree(on, mode, b):
    same(*drop(on, mode, b))


@cross(b=BATCHES)
def test_a_cooperative_drop_agrees(on, b):
    same(*drop(on, "cooperative", b))


@cross(b=LARGE)
def test_a_cooperative_drop_of_large_competitions_is_refused(on, b):
    with pytest.raises(RuntimeError, match="a cooperative drop takes at most 2048 competing rows"):
        drop(on, "cooperative", b)


def test_a_cooperative_drop_of_unaligned_rows_is_refused(on):
    with pytest.raises(RuntimeError, match="rows aligned to 16 bytes"):
        drop(on, "cooperative", BATCHES[2], dim=23)


@cross(mode=MODES, kind=["random", "equal", "special"])
def test_modes_agree_on_given_scores(on, mode, kind):
    x, hidden = scores(kind, (2, 300), torch.bfloat16), hidden_pair((2, 300, 8), torch.float32)[1]
    want = vk.reference.drop_tokens(None, hidden, 77, scores=x, droppable=(3, 290))
    with native.launch_mode(mode):
        got = vk.drop_tokens(None, hidden.to(on.device), 77, scores=x.to(on.device), droppable=(3, 290), backend=on.backend)
    same(to([got.keep, got.hidden], "cpu"), [want.keep, want.hidden])


def test_a_launch_mode_holds_inside_its_block_only():
    with native.launch_mode("fused"):
        with pytest.raises(KeyError), native.launch_mode("four"):
            pass
        assert native._forced_mode.get() == library.LAUNCH_MODES["fused"]
    assert native._forced_mode.get() == library.LAUNCH_MODES["auto"]


def test_errors_of_the_library_name_the_argument(on):
    """What the public functions never pass on, so that it is the library that refuses."""
    h = torch.zeros(1, 3, 4, device=on.device)
    source = None, *map(native.view, (h, h)), None, 9, 0
    with pytest.raises(ValueError, match="metric: unknown code 9"):
        native.call("variation_score", "cuda", h.device, source, native.view(h[..., 0]))
    with pytest.raises(TypeError, match="a tuple"):
        library.lib().compact(native.view(h), [], None)


def test_traced_calls_reach_the_backend(on):
    prev, cur = to(hidden_pair((2, 30, 8), torch.float32), on.device)
    drop = lambda prev, cur: vk.drop_tokens(prev, cur, 7, droppable=(3, 25), kv=(cur[:, None],), backend=on.backend)
    got, want = torch.compile(drop, backend="eager", fullgraph=True)(prev, cur), drop(prev, cur)
    same([got.keep, got.hidden, *got.kv], [want.keep, want.hidden, *want.kv])


@pytest.mark.gpu
def test_calls_follow_the_current_stream(on):
    """The inputs are written late on a stream of our own: a call on another stream would read them too early."""
    prev, cur = hidden_pair((2, 300, 64), torch.bfloat16)
    want = vk.reference.drop_tokens(prev, cur, 77)
    late = [torch.zeros_like(x, device="cuda") for x in (prev, cur)]
    given = [x.to("cuda") for x in (prev, cur)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, given, strict=True):
            target.copy_(source)
        got = vk.drop_tokens(*late, 77, backend=on.backend)
    torch.cuda.synchronize()
    same(to([got.keep, got.hidden], "cpu"), [want.keep, want.hidden])


@pytest.mark.gpu
@pytest.mark.parametrize("b", [BATCHES[2], RAGGED], ids=str)
def test_a_graph_is_captured_by_the_first_call(on, b):
    """Nothing is copied from the host: a table travels in the launches while a graph is captured."""
    prev, cur = hidden_pair((*b.lead, 16), torch.bfloat16)
    static = [torch.zeros_like(x, device="cuda") for x in (prev, cur)]
    ks = [k + 1 for k in b.ks("n/3")]  # a plan of its own, which no other test has put on the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = vk.drop_tokens(*static, ks, backend=on.backend, **b.arguments())
    for pair in ((prev, cur), (cur, prev), (prev, 2 * cur)):
        for target, source in zip(static, pair, strict=True):
            target.copy_(source)
        graph.replay()
        want = vk.reference.drop_tokens(*pair, ks, **b.arguments())
        same(to([got.keep, got.hidden], "cpu"), [want.keep, want.hidden])


@pytest.mark.gpu
def test_calls_do_not_synchronise(on):
    prev, cur = to(hidden_pair((4, 50, 16), torch.bfloat16), "cuda")
    run = lambda: vk.drop_tokens(prev, cur, RAGGED.k("n/3"), backend=on.backend, **RAGGED.arguments())
    run()  # puts the plan's table on the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_calls_run_where_the_tensors_are(on):
    prev, cur = hidden_pair((2, 30, 8), torch.bfloat16)
    want = vk.reference.drop_tokens(prev, cur, 7)
    got = vk.drop_tokens(prev.to("cuda:1"), cur.to("cuda:1"), 7, backend=on.backend)
    assert torch.cuda.current_device() == 0
    same(to([got.keep, got.hidden], "cpu"), [want.keep, want.hidden])
