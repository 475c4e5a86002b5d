"""Tracing of every kind: the right graph, or one sentence; never the recorded allocation of a result."""

from __future__ import annotations

import pytest
import torch
from support.cases import normal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import v2drop_kernels as vk

PREV, CUR, OTHER = (normal((2, 8, 4), torch.float32, name) for name in "pco")
KEEP = torch.tensor([[1, 3], [2, 4]])


def moved(x, keep, b):
    cache = x[:, None].clone()
    vk.compact_(keep, cache, backend=b)
    return cache


# Each op in h_prev, h_cur [2, 8, 4] and keep [2, 2].
OPS = {
    "variation_score": lambda p, x, keep, b: vk.variation_score(p, x, backend=b),
    "variation_topk": lambda p, x, keep, b: tuple(vk.variation_topk(p, x, 3, backend=b)),
    "segmented_topk": lambda p, x, keep, b: tuple(vk.segmented_topk(x[..., 0], 3, droppable=[(0, 5), (1, 8)], backend=b)),
    "compact": lambda p, x, keep, b: vk.compact(keep, x, kv=[x[:, None]], backend=b).kv[0],
    "compact-droppable": lambda p, x, keep, b: vk.compact(keep, x, droppable=(0, 6), k=2, backend=b).hidden,
    "drop_tokens": lambda p, x, keep, b: tuple(vk.drop_tokens(p, x, 3, droppable=[(0, 5), (1, 8)], kv=[x[:, None]], backend=b)[:4]),
    "drop_tokens-alike": lambda p, x, keep, b: tuple(vk.drop_tokens(p, x, 3, droppable=(0, 5), backend=b)),
    "compact_": lambda p, x, keep, b: moved(x, keep, b),
    "attention_score": lambda p, x, keep, b: vk.attention_score(x[:, None, -1:], p[:, None], backend=b),
    "key_norm_score": lambda p, x, keep, b: vk.key_norm_score(x[:, None], backend=b),
    "cosine_to_pivots": lambda p, x, keep, b: vk.cosine_to_pivots(x, keep, backend=b),
    "frame_similarity": lambda p, x, keep, b: vk.frame_similarity(x, backend=b),
    "weighted_merge": lambda p, x, keep, b: vk.weighted_merge(x, keep.clamp(max=2).sort(1).values, keep, backend=b),
    "soft_topk": lambda p, x, keep, b: vk.soft_topk(x[..., 0], 0.5, hard=False, backend=b),
}
ops = pytest.mark.parametrize("op", OPS)


def tensors(x):
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, torch.Tensor)]


def function(on, op):
    return lambda p, x, keep: OPS[op](p, x, keep, on.backend)


def arguments(on, other=False):
    return tuple(x.to(on.device) for x in (PREV, OTHER if other else CUR, KEEP.flip(1).sort(1).values if other else KEEP))


@pytest.mark.backends("cpu", "triton", "cuda")
@ops
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx(on, op, mode):
    """The graph held the allocation of a result that a kernel had filled while it was made."""
    call = function(on, op)
    graph = make_fx(call, tracing_mode=mode)(*arguments(on))
    allocations = [node for node in graph.graph.nodes if "empty" in str(node.target)]
    assert not allocations
    for got, want in zip(tensors(graph(*arguments(on, True))), tensors(call(*arguments(on, True))), strict=True):
        torch.testing.assert_close(got, want)


@ops
def test_jit_trace_is_refused(on, op):
    """torch.jit.trace recorded ``torch.empty``: the traced module returned memory that nobody had written."""
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record the ops of v2drop_kernels"):
        torch.jit.trace(function(on, op), arguments(on), check_trace=False)


@pytest.mark.backends("cpu", "triton", "cuda")
@ops
def test_fake_and_meta_tensors(on, op):
    want = [(x.shape, x.dtype) for x in tensors(function(on, op)(*arguments(on)))]
    with FakeTensorMode() as mode:
        got = function(on, op)(*(mode.from_tensor(x) for x in arguments(on)))
    assert [(x.shape, x.dtype) for x in tensors(got)] == want
    call = lambda *given: OPS[op](*given, None)
    got = call(*(x.to("meta") for x in arguments(on)))
    assert [(x.shape, x.dtype, x.device.type) for x in tensors(got)] == [(*w, "meta") for w in want]


@ops
def test_a_mode_of_the_user_changes_nothing(on, op):
    call = function(on, op)
    with FlopCounterMode(display=False):
        got = call(*arguments(on))
    for g, want in zip(tensors(got), tensors(call(*arguments(on))), strict=True):
        torch.testing.assert_close(g, want)


@pytest.mark.backends("cpu", "triton", "cuda")
@pytest.mark.parametrize("place", ["h_prev", "kv", "scores", "keep"])
def test_fake_tensors_among_plain_ones(on, place):
    """The library said that the data of a part is NULL."""
    prev, cur, keep = arguments(on)
    with FakeTensorMode() as mode:
        pass
    fake = lambda x: mode.from_tensor(x)
    calls = {
        "h_prev": lambda: vk.variation_score(fake(prev), cur, backend=on.backend),
        "kv": lambda: vk.drop_tokens(prev, cur, 3, kv=[fake(cur[:, None])], backend=on.backend),
        "scores": lambda: vk.drop_tokens(None, cur, 3, scores=fake(cur[..., 0]), backend=on.backend),
        "keep": lambda: vk.compact(fake(keep), cur, backend=on.backend),
    }
    with pytest.raises((TypeError, RuntimeError, AssertionError), match="FakeTensor"):
        calls[place]()


def test_scores_of_eight_bits_are_refused(on):
    scores = torch.zeros(1, 4, device=on.device).to(torch.float8_e4m3fn)
    for call in (
        lambda: vk.segmented_topk(scores, 2, backend=on.backend),
        lambda: vk.drop_tokens(None, torch.zeros(1, 4, 2, device=on.device), 2, scores=scores, backend=on.backend),
    ):
        with pytest.raises(TypeError, match=r"scores must be float32, float16, bfloat16 or float64, got torch\.float8"):
            call()
