"""The ops as torch.ops.v2drop.*: schemas and fakes, torch.compile and torch.export; and eager calls that stay out of
it."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.cases import BATCHES, companions, fewer, hidden_pair, integers, random_bytes, same, scores
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import v2drop_kernels as vk
from v2drop_kernels.core import plan as plans
from v2drop_kernels.core.droppable import as_layout
from v2drop_kernels.ops import registration

ops = torch.ops.v2drop
OP_NAMES = [
    "variation_score", "variation_score_backward", "topk", "drop", "compact", "compact_backward", "compact_", "attention_score",
    "key_norm", "cosine_to_pivots",
]  # fmt: skip
PLANS = [
    BATCHES[0],
    BATCHES[1],
    BATCHES[6],
    BATCHES[8],
    BATCHES[9],
    BATCHES[11],
    BATCHES[13],
    BATCHES[16],
    BATCHES[19],
    BATCHES[20],
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def planned(b, op, k="n/3"):
    """What a call passes to its op: the plan, the mask."""
    cu = None if b.cu_seqlens is None else tuple(map(int, b.cu_seqlens))
    layout = as_layout(b.droppable, b.batch, b.rows, cu if cu is not None else getattr(b.droppable, "cu_seqlens", None))
    ks = tuple(b.ks(k))
    plan = plans.topk_plan(layout, ks) if op == "topk" else plans.drop_plan(layout, ks).plan
    return registration.pack_plan(plan), layout.mask


def check(op, *args, grad=True):
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"] + (["test_autograd_registration"] if grad else [])
    torch.library.opcheck(op, args, test_utils=utils)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_opcheck_of_variation_score(on, metric):
    prev, cur = hidden_pair((2, 7, 12), torch.float32)
    for a, b in ((prev, cur), (prev.clone().requires_grad_(), cur.clone().requires_grad_())):
        check(ops.variation_score.default, a, b, metric, None, on.backend)
    check(ops.variation_score.default, prev.bfloat16(), cur.bfloat16(), metric, torch.bfloat16, on.backend)
    check(ops.variation_score.default, prev[0], cur[0], metric, None, on.backend)
    check(ops.variation_score_backward.default, torch.ones(2, 7), prev, cur, metric, on.backend, grad=False)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("b", PLANS, ids=str)
def test_opcheck_of_topk(on, b):
    packed, mask = planned(b, "topk")
    x = scores("three", b.lead, torch.float32)
    check(ops.topk.default, x, None, None, mask, None, *packed, "position", "l2", None, on.backend)
    prev, cur = hidden_pair((*b.lead, 4), torch.bfloat16)
    check(ops.topk.default, None, prev, cur, mask, None, *packed, "score", "l1", None, on.backend)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("b", PLANS, ids=str)
def test_opcheck_of_drop(on, b):
    packed, mask = planned(b, "drop")
    prev, cur = hidden_pair((*b.lead, 4), torch.float32)
    dims = [-1, 0, -1, 0] if b.packed else [0, 1, 0, 1]
    labels = integers(b.lead, torch.int64, "labels")
    for leaf in (cur, cur.clone().requires_grad_()):
        check(
            ops.drop.default,
            None,
            prev,
            leaf.detach(),
            mask,
            None,
            [leaf, labels],
            dims,
            [0, -100],
            *packed,
            "l2",
            None,
            on.backend,
        )
    check(ops.drop.default, cur[..., 0], None, None, mask, None, [cur], dims[:2], [0], *packed, "l2", None, on.backend)


@pytest.mark.backends("cpu")
def test_opcheck_of_offsets(on):
    """Offsets as a tensor: what a compiled graph passes, whose lengths it does not know."""
    prev, cur = hidden_pair((30, 4), torch.float32)
    cu = torch.tensor([0, 10, 10, 30], dtype=torch.int32)
    check(ops.topk.default, None, prev, cur, None, cu, [4, 1, 5], 1, 30, 5, "position", "l2", None, on.backend)
    check(ops.drop.default, None, prev, cur, None, cu, [cur], [-1, 0], [0], [4, 1, 5], 1, 30, 10, "l2", None, on.backend)


@pytest.mark.backends("cpu")
def test_opcheck_of_compact(on):
    keep = torch.tensor([[3, -1, 0], [1, 2, -1]])
    hidden, kv = integers((2, 5, 4), torch.float32, "h"), random_bytes((2, 2, 5, 3), torch.int8, "kv")
    for leaf in (hidden, hidden.clone().requires_grad_()):
        check(ops.compact.default, keep, [leaf, kv], [0, 1, 0, 2], [0, 0], on.backend)
    check(ops.compact_backward.default, keep, [torch.ones(2, 3, 4)], [0, 1], 5, on.backend, grad=False)
    ascending = torch.tensor([[0, 3], [2, -1]])
    torch.library.opcheck(
        ops.compact_.default, (ascending, [hidden.clone(), kv.clone()], [0, 1, 0, 2], on.backend),
        test_utils=["test_schema", "test_faketensor", "test_autograd_registration"],
    )  # fmt: skip


def step(prev, cur, k=7, **given):
    """One drop as a model's forward holds it, with tensor work before and behind."""
    got = vk.drop_tokens(prev * 1, cur + 0, k, **given)
    return [x for x in (got.hidden * 2, got.keep, got.position_ids, got.kv and got.kv[0], got.attention_mask) if x is not None]


def inputs(n, d=8):
    prev, cur = hidden_pair((2, n, d), torch.float32)
    return prev, cur, {
        "position_ids": torch.arange(n).expand(2, n).contiguous(),
        "kv": [random_bytes((2, 2, n, 4), torch.bfloat16, "k")],
        "attention_mask": torch.ones(2, n, dtype=torch.bool),
    }  # fmt: skip


FUNCTIONS = {
    "drop_tokens": lambda prev, cur, given: step(prev, cur, **given),
    "drop_tokens-span": lambda prev, cur, given: step(prev, cur, droppable=(3, prev.shape[1] - 2), **given),
    "drop_tokens-share": lambda prev, cur, given: step(prev, cur, prev.shape[1] // 3, **given),
    "drop_tokens-compacted": lambda prev, cur, given: step(prev, cur, positions="compacted", **given),
    "drop_tokens-scores": lambda prev, cur, given: step(None if prev is None else prev, cur, scores=cur.sum(-1), **given),
    "variation_topk": lambda prev, cur, given: list(vk.variation_topk(prev, cur, 5)),
    "segmented_topk": lambda prev, cur, given: list(vk.segmented_topk(vk.variation_score(prev, cur), 5, order="score")),
    "compact": lambda prev, cur, given: list(vk.compact(vk.variation_topk(prev, cur, 5), cur, kv=given["kv"]))[:1],
}


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(on, name, dynamic):
    """One graph, eager results; with dynamic shapes one compilation serves every length."""
    function = FUNCTIONS[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    lengths = (37, 64, 101, 640) if dynamic else (37,)
    for n in lengths:
        prev, cur, given = inputs(n)
        same(compiled(prev, cur, given), function(prev, cur, given))
    assert counter.frame_count == 1


@pytest.mark.backends("cpu")
def test_compile_without_a_word_on_dynamic_shapes(on):
    """torch.compile's default: the second length makes the shape dynamic, and then no length compiles anew."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FUNCTIONS["drop_tokens-span"], fullgraph=True, backend=counter)
    for n in (40, 50, 61, 77, 200, 641):
        prev, cur, given = inputs(n)
        same(compiled(prev, cur, given), FUNCTIONS["drop_tokens-span"](prev, cur, given))
    assert counter.frame_count <= 2


@pytest.mark.backends("cpu")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor(on):
    compiled = torch.compile(FUNCTIONS["drop_tokens-span"], fullgraph=True, dynamic=True)
    for n in (37, 64):
        prev, cur, given = inputs(n)
        same(compiled(prev, cur, given), FUNCTIONS["drop_tokens-span"](prev, cur, given))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("b", [b for b in PLANS if b.name != "no-items-N12"], ids=str)
def test_compile_of_every_batch(on, b):
    """Spans, padding, masks with counts and packed layouts are host facts: constants of the graph."""
    if isinstance(b.droppable, torch.Tensor):
        pytest.skip("a bare mask must be counted, which a graph cannot")
    given, k = {**b.arguments(), **companions(b)}, b.k("list")
    prev, cur = hidden_pair((*b.lead, 4), torch.float32)

    def function(prev, cur, given):
        got = vk.drop_tokens(prev, cur, k, **given)
        return [
            got.hidden,
            got.keep,
            got.position_ids,
            got.kv,
            got.rope,
            got.labels,
            got.attention_mask,
            got.cu_seqlens,
        ]

    same(torch.compile(function, fullgraph=True, backend="aot_eager")(prev, cur, given), function(prev, cur, given))


@pytest.mark.backends("cpu")
def test_compile_of_offsets_in_a_tensor(on):
    """The graph does not know the lengths; it is compiled once and gives each batch its capacity."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(prev, cur, cu):
        got = vk.drop_tokens(prev, cur, [4, 1, 5], cu_seqlens=cu)
        return [got.hidden, got.keep, got.cu_seqlens]

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    prev, cur = hidden_pair((30, 4), torch.float32)
    for offsets in ([0, 10, 10, 30], [0, 2, 29, 30], [0, 10, 20, 30]):
        cu = torch.tensor(offsets, dtype=torch.int32)
        hidden, keep, new = compiled(prev, cur, cu)
        want = vk.drop_tokens(prev, cur, [4, 1, 5], cu_seqlens=offsets)
        used = want.keep.shape[0]
        same([hidden[:used], keep[:used], new], [want.hidden, want.keep, want.cu_seqlens])
        assert keep[used:].eq(-1).all()
    assert counter.frame_count == 1


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_of_gradients(on, dynamic):
    """Forward and backward are in the graph: gradients of hidden states, KV and scores equal those of eager mode."""

    def loss(prev, cur, kv):
        got = vk.drop_tokens(prev, cur, 5, droppable=(2, prev.shape[1]), kv=(kv,))
        chosen = vk.compact(vk.variation_topk(prev, cur, 4), cur)
        score = vk.variation_score(prev, cur, metric="cosine")
        return got.hidden.square().sum() + got.kv[0].square().sum() + chosen.hidden.sum() + score.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 33) if dynamic else (20,):
        found = []
        for function in (compiled, loss):
            prev, cur = (h.requires_grad_() for h in hidden_pair((2, n, 8), torch.float32))
            kv = integers((2, 2, n, 4), torch.float32, "kv").requires_grad_()
            found.append(torch.autograd.grad(function(prev, cur, kv), (prev, cur, kv)))
        for got, want in zip(*found, strict=True):
            # The three gradients of cur are added in another order: two additions of float32.
            torch.testing.assert_close(got, want, rtol=4 * 2.0**-23, atol=4 * 2.0**-23 * want.abs().max().item())


@pytest.mark.backends("cpu")
def test_compile_of_compact_in_place(on):
    """The mutation of the cache is part of the graph."""
    keep = torch.tensor([[1, 3], [0, 4]])
    cache = random_bytes((2, 2, 6, 3), torch.float32, "kv").nan_to_num()

    def function(keep, cache):
        vk.compact_(keep, cache)
        return cache + 0

    got, want = cache.clone(), cache.clone()
    same(torch.compile(function, fullgraph=True, backend="aot_eager")(keep, got), function(keep, want))
    same(got, want)


class Model(torch.nn.Module):
    def forward(self, prev, cur, kv):
        got = vk.drop_tokens(prev, cur, 6, droppable=(2, 18), kv=(kv,))
        top = vk.variation_topk(prev, cur, 3)
        return got.hidden, got.keep, got.kv[0], top.indices, vk.compact(top, cur).hidden


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(on, strict, dynamic):
    def example(n, batch=2):
        return (*hidden_pair((batch, n, 8), torch.float32), integers((batch, 2, n, 4), torch.float32, "kv"))

    shapes = None
    if dynamic:
        rows = torch.export.Dim("rows", min=18, max=4096)
        shapes = ({1: rows}, {1: rows}, {2: rows})
    program = torch.export.export(Model(), example(24), dynamic_shapes=shapes, strict=strict)
    assert any("v2drop.drop" in str(node.target) for node in program.graph.nodes)
    for n in (24, 18, 100) if dynamic else (24,):
        same(program.module()(*example(n)), Model()(*example(n)))


class Seen(TorchDispatchMode):
    """The names of all ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def eager_calls():
    prev, cur, given = inputs(30)
    keep = vk.variation_topk(prev, cur, 4)
    vk.segmented_topk(vk.variation_score(prev, cur), 3)
    vk.compact(keep, cur, kv=given["kv"])
    vk.compact_(keep, given["kv"])
    got = vk.drop_tokens(prev, cur.requires_grad_(), 4, **given)
    (got.hidden.sum() + vk.variation_score(prev, cur).sum()).backward()
    kv = torch.ones(1, 2, 5, 4, requires_grad=True)
    pivots = torch.zeros(2, 1, dtype=torch.int64)
    found = vk.attention_score(kv[:, :, :1], kv).sum() + vk.key_norm_score(kv).sum() + vk.cosine_to_pivots(kv[0], pivots).sum()
    found.backward()


@pytest.mark.backends("cpu")
def test_eager_calls_bypass_the_dispatcher(on):
    """The dispatcher costs microseconds per call: no v2drop op may appear, forward or backward."""
    with Seen() as seen:
        eager_calls()
        ops.variation_score(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), "l2", None, on.backend)
    found = [name for name in seen.names if "v2drop" in name]
    assert found == ["v2drop.variation_score.default"], "only the one that was called by name"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        eager_calls()
    assert not [e.key for e in profile.key_averages() if "v2drop::" in e.key]


@pytest.mark.backends("cpu")
def test_tensor_subclasses_go_through_the_dispatcher(on):
    """FakeTensor and its like see one op each, not a launcher that asks for addresses."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        prev, cur = (mode.from_tensor(h) for h in hidden_pair((2, 30, 8), torch.float32))
        got = vk.drop_tokens(prev, cur, 4, droppable=(3, 30))
        assert (got.hidden.shape, got.keep.shape, got.keep.dtype) == ((2, 7, 8), (2, 7), torch.int64)
        top = vk.variation_topk(prev, cur, 4)
        assert (top.values.shape, top.values.dtype, top.indices.dtype) == ((2, 4), torch.float32, torch.int64)


def test_every_op_is_registered():
    for name in OP_NAMES:
        assert hasattr(ops, name)
        assert "backend" in [a.name for a in getattr(ops, name).default._schema.arguments]


def test_large_plans_are_served(on):
    """A table plan of thousands of stretches is a list of ints to the op; eager mode passes the plan itself."""
    stretches = fewer([1000], [40])[0]  # the interpreter takes 50 ms for each
    layout = vk.TokenLayout.padded([[(8 * i, 8 * i + 7) for i in range(stretches)], []], 8 * stretches + 1)
    x = scores("three", (2, 8 * stretches + 1), torch.float32)
    got = vk.drop_tokens(None, x[..., None].to(on.device), 2, scores=x.to(on.device), droppable=layout, backend=on.backend)
    want = vk.reference.drop_tokens(None, x[..., None], 2, scores=x, droppable=layout)
    same([got.keep.cpu(), got.hidden.cpu()], [want.keep, want.hidden])
