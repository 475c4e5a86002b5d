"""attention_score and what is made of it: against loops over items, queries and heads in float64, with keys repeated."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import DYNAMIC, FLOATS, INTERPRETED, cross, far_apart, fewer, integers, normal, same, seeded, strided
from torch._dynamo.testing import CompileCounterWithBackend

import v2drop_kernels as vk
from v2drop_kernels.ops.attention_score import queries as chunking
from v2drop_kernels.reference import attention_score as attention

ULP = 2.0**-23
HEADS = ["mean", "sum", "max", 2]
# Attention's B, H, Hkv, Q, S, Dh.
SHAPES = {
    "mha": (2, 4, 4, 1, 63, 16),
    "gqa": (2, 8, 2, 3, 150, 40),
    "mqa": (1, 8, 1, 5, 300, 64),
    "wide": (1, 2, 1, 1, 577, 300),
    "long": (1, 4, 2, 2, 1025, 8),
}


def inputs(shape, dtype, *key):
    b, h, h_kv, n, s, d = SHAPES[shape] if isinstance(shape, str) else shape
    return normal((b, h, n, d), dtype, "q", *key), normal((b, h_kv, s, d), dtype, "k", *key)


def masks(b, n, s, *key):
    """Ragged queries, padding and droppable rows. All queries see row 0, which is text: no head gives vision all it has."""
    gen = seeded("masks", b, n, s, *key)
    rows = torch.randint(min(3, s - 1), s, (b, n), generator=gen)
    rows[torch.rand(b, n, generator=gen) < 0.2] = -1
    rows[0, 0] = s - 1
    key_mask, droppable = torch.rand(b, s, generator=gen) < 0.8, torch.rand(b, s, generator=gen) < 0.6
    key_mask[:, 0], droppable[:, 0] = True, False
    return {"query_rows": rows, "key_mask": key_mask, "droppable": droppable}


def oracle(
    q, k, *, query_rows=None, key_mask=None, droppable=None, causal=True, scale=None, mode="softmax", heads="mean", queries="mean"
):
    """The definition, one item, one query and one head after the other, in float64; and how far float32 may stray from it.

    A logit is a product of Dh terms: in any order of summation, even one that truncates as tensor cores do, it is off by at most
    (Dh + 2) ULP of the sum of the terms' magnitudes, ``d``. A weight is e^(x - top) / sum: relative to it the logits of both
    count, the exponents' rounding (ULP of their size each), and an ULP for each of the S terms of the sum and a handful more.
    Reductions add an ULP for each term.
    """  # fmt: skip
    b, h, n, width = q.shape
    s = k.shape[2]
    scale = width**-0.5 if scale is None else scale
    k = k.repeat_interleave(h // k.shape[1], 1)
    scores, bound = torch.zeros(b, s, dtype=torch.float64), torch.zeros(b, s, dtype=torch.float64)
    for i in range(b):
        rows = range(s - n, s) if query_rows is None else query_rows[i].tolist()
        every, off = [], []
        for at, row in enumerate(rows):
            if row < 0:
                continue
            seen = [j for j in range(s) if (not causal or j <= row) and (key_mask is None or key_mask[i, j])]
            counted = [j for j in seen if droppable is None or droppable[i, j]]
            weight, error = torch.zeros(2, h, s, dtype=torch.float64)
            for head in range(h):
                terms = q[i, head, at].double() * k[i, head, seen].double()
                x, d = terms.sum(-1) * scale, terms.abs().sum(-1) * abs(scale) * (width + 2) * ULP
                if mode == "softmax" and seen:
                    d = 2 * d.max() + (2 * (x.max() - x) + s + 16) * ULP
                    x = x.softmax(0)
                    d = x * torch.expm1(d) + 2.0**-120  # what underflows is lost
                weight[head, seen], error[head, seen] = x, d
            weight, error = (torch.zeros(h, s, dtype=torch.float64).index_copy(1, torch.tensor(counted, dtype=int), y[:, counted])
                             for y in (weight, error))  # fmt: skip
            if isinstance(heads, int):
                totals = weight.sum(1)
                order = sorted(range(h), key=lambda head: (-totals[head], head))
                if counted and heads < h:
                    gap = totals[order[heads - 1]] - totals[order[heads]]
                    assert gap > 2 * error.sum(1).max() or gap == 0, "a near-tie of heads: rounding chooses"
                weight, error = weight[order[:heads]], error[order[:heads]]
            if heads == "max":
                every.append(weight.amax(0))
                off.append(error.amax(0))
            else:
                share = 1 if heads == "sum" else len(weight)
                every.append(weight.sum(0) / share)
                off.append((error.sum(0) + (h + 2) * ULP * weight.abs().sum(0)) / share)
        if every:
            every, off = torch.stack(every), torch.stack(off)
            if queries == "mean":
                scores[i], bound[i] = every.mean(0), off.mean(0) + len(every) * ULP * every.abs().mean(0)
            else:
                scores[i] = every.square().sum(0).sqrt()
                bound[i] = off.square().sum(0).sqrt() + (len(every) + 2) * ULP * scores[i]
    return scores, bound


def score(on, q, k, **options):
    moved = {name: x.to(on.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    got = vk.attention_score(q.to(on.device), k.to(on.device), backend=on.backend, **moved)
    assert (got.dtype, got.shape) == (torch.float32, (k.shape[0], k.shape[2]))
    return got.cpu()


def within(got, q, k, **options):
    want, bound = oracle(q, k, **options)
    assert ((got - want).abs() <= bound).all(), ((got - want).abs() - bound).max()


@cross(together="dtype mode heads", shape=list(SHAPES), dtype=FLOATS, mode=["softmax", "dot"], heads=HEADS)
def test_attention_score(on, shape, dtype, mode, heads):
    q, k = inputs(shape, dtype)
    options = {**masks(k.shape[0], q.shape[2], k.shape[2], shape), "mode": mode, "heads": heads}
    within(score(on, q, k, **options), q, k, **options)


@cross(queries=["mean", "l2"], causal=[True, False], masked=[True, False], heads=["mean", "max"])
def test_attention_score_of_several_queries(on, queries, causal, masked, heads):
    q, k = inputs((2, 4, 2, 7, 90, 24), torch.bfloat16)
    options = {**(masks(2, 7, 90) if masked else {}), "causal": causal, "queries": queries, "heads": heads}
    within(score(on, q, k, **options), q, k, **options)


@cross(side=["left", "right"], dtype=FLOATS)
def test_attention_score_of_padding(on, side, dtype):
    """Padding holds NaN, of keys and of queries that are not there, and takes no part."""
    (q, k), lengths = inputs((3, 4, 2, 2, 40, 16), dtype), [40, 25, 0]
    key_mask = torch.stack([torch.arange(40) >= 40 - n if side == "left" else torch.arange(40) < n for n in lengths])
    rows = torch.tensor([[38, 39], [-1, 39 if side == "left" else 24], [-1, -1]])
    q, k = q.masked_fill((rows < 0)[:, None, :, None], torch.nan), k.masked_fill(~key_mask[:, None, :, None], torch.nan)
    options = {"query_rows": rows, "key_mask": key_mask}
    got = score(on, q, k, **options)
    assert not got.isnan().any()
    assert got[2].eq(0).all()
    within(got, q, k, **options)
    torch.testing.assert_close(got.sum(1), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=(40 + 16) * ULP)


@cross(heads=["sum", "max", 1, 2, 4], queries=["mean", "l2"], dtype=FLOATS)
def test_attention_score_of_integers_is_exact(on, heads, queries, dtype):
    """Dot products of integers, reduced by powers of two: every bit is determined, and equal heads are chosen from the lowest."""
    q, k = integers((2, 4, 4, 8), dtype, "q", high=3), integers((2, 2, 50, 8), dtype, "k", high=3)
    q[:, 1], q[0, 2:] = q[:, 0], 0  # equal totals; in item 0 of other heads than their scores
    options = {"mode": "dot", "scale": 0.5, "heads": heads, "queries": queries}
    want, _ = oracle(q, k, **options)
    same(score(on, q, k, **options), want.float().abs() + 0.0 if queries == "l2" else want.float() + 0.0)


def test_attention_score_of_equal_keys_is_their_share(on):
    """A softmax over n equal logits is 1 / n; the row of a query bounds n."""
    q, k = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 64, 8)
    got = score(on, q, k, query_rows=torch.tensor([[0, 31, 63]]), queries="mean")
    want = (torch.arange(64) < 1) + (torch.arange(64) < 32) / 32 + 1 / 64
    torch.testing.assert_close(got[0], want / 3, rtol=8 * ULP, atol=0)


@cross(size=[1e-4, 1.0, 30.0], dtype=[torch.float32, torch.bfloat16])
def test_attention_score_of_peaked_softmax(on, size, dtype):
    """Logits of up to some thousand: nothing overflows, and all but the first keys underflow."""
    q, k = inputs((1, 4, 2, 2, 400, 32), dtype)
    q = q * size
    got = score(on, q, k, heads="sum")
    assert got.isfinite().all()
    within(got, q, k, heads="sum")


@cross(dtype=FLOATS, kind=["inner", "rows", "batch", "transposed"], layout=["BHSD", "BSHD"])
def test_attention_score_of_strided_keys(on, dtype, kind, layout):
    q, k = inputs((2, 4, 2, 3, 70, 24), dtype)
    lay = (lambda x: x.transpose(1, 2)) if layout == "BSHD" else (lambda x: x)
    given = [strided(lay(x).contiguous().to(on.device), kind) for x in (q, k)]
    got = vk.attention_score(*given, layout=layout, backend=on.backend).cpu()
    within(got, q, k)
    if on.backend != "reference":  # whose product is PyTorch's, in an order that depends on the strides
        same(got, score(on, q, k))


@cross(dim=[0, 1, 2], far=["q", "k"])
def test_attention_score_of_far_keys(on, dim, far):
    """Items, heads or rows 2^31 elements apart."""
    given = {"q": normal((2, 4, 2, 8), torch.bfloat16, "q"), "k": normal((2, 2, 3, 8), torch.bfloat16, "k")}
    want = score(on, **given)
    moved = {name: x.to(on.device) for name, x in given.items()} | {far: far_apart(given[far], on, dim)}
    same(vk.attention_score(**moved, backend=on.backend).cpu(), want)


def test_attention_score_of_strided_masks(on):
    q, k = inputs((2, 4, 2, 3, 70, 16), torch.float32)
    given = masks(2, 3, 70)
    want = score(on, q, k, **given)
    same(score(on, q, k, **{name: torch.stack([x, x], -1)[..., 0] for name, x in given.items()}), want)
    one = {"query_rows": given["query_rows"][:1].expand(2, 3), "key_mask": given["key_mask"][:1].expand(2, 70)}
    same(score(on, q, k, **one), score(on, q, k, **{name: x.clone() for name, x in one.items()}))


@cross(mode=["softmax", "dot"], heads=["mean", "max"])
def test_attention_score_of_nan_and_inf(on, mode, heads):
    """A visible NaN spoils the queries that see it, as in torch.softmax, and no maximum swallows it."""
    q, k = inputs((1, 4, 2, 2, 30, 8), torch.float32)
    k[0, 0, 20, 3] = torch.nan
    got = score(on, q, k, query_rows=torch.tensor([[10, 15]]), mode=mode, heads=heads)
    assert not got.isnan().any()
    got = score(on, q, k, query_rows=torch.tensor([[10, 25]]), mode=mode, heads=heads)
    assert got[0, 20].isnan()
    assert got[0, :26].isnan().all() == (mode == "softmax")
    assert not got[0, 26:].isnan().any()


@cross(chunk=[1, 3, 100], queries=["mean", "l2"], heads=["mean", 3])
def test_attention_score_does_not_depend_on_the_chunks(on, chunk, queries, heads, monkeypatch):
    """Queries go through in pieces; how many fit depends on the batch, of which no item may know."""
    q, k = inputs((2, 8, 2, 7, 60, 16), torch.bfloat16)
    options = {**masks(2, 7, 60), "queries": queries, "heads": heads}
    want = score(on, q, k, **options)
    monkeypatch.setattr(chunking, "LOGITS_AT_ONCE", chunk * 2 * 8 * 60)
    got = score(on, q, k, **options)
    alone = score(on, q[1:], k[1:], **{name: x[1:] if isinstance(x, torch.Tensor) else x for name, x in options.items()})
    if on.backend == "reference" or INTERPRETED:  # whose products are BLAS's, in an order that depends on the sizes
        within(got, q, k, **options)
    else:
        same(got, want)
        same(alone, want[1:])


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 9, 8), (2, 4, 2, 0, 9, 8), (2, 4, 2, 1, 0, 8)], ids=["items", "queries", "rows"])
def test_attention_score_of_nothing(on, shape):
    b, _, _, n, s, _ = shape
    q, k = inputs(shape, torch.float32)
    same(score(on, q, k, query_rows=torch.zeros(b, n, dtype=torch.int64)), torch.zeros(b, s))
    assert score(on, q, k, causal=False).eq(0).all()


def test_attention_score_without_droppable_rows_or_queries(on):
    q, k = inputs((2, 4, 2, 2, 20, 8), torch.float32)
    for options in (
        {"droppable": torch.zeros(2, 20, dtype=torch.bool)},
        {"key_mask": torch.zeros(2, 20, dtype=torch.bool)},
        {"query_rows": torch.full((2, 2), -1)},
    ):
        for heads in HEADS:
            assert score(on, q, k, heads=heads, queries="l2", **options).eq(0).all()


quickly = settings(
    max_examples=fewer([60], [6])[0], deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@st.composite
def calls(draw):
    """Any sizes, with integers that are exact: dot products of three channels of up to 3, by heads that are powers of two."""
    b, h_kv, group, n, s = (draw(st.integers(1, high)) for high in (3, 3, 4, 5, 40))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    q, k = (torch.randint(-3, 4, (b, h, m, 3), generator=gen).float() for h, m in ((h_kv * group, n), (h_kv, s)))
    options = {
        "query_rows": torch.randint(-2, s + 2, (b, n), generator=gen),
        "causal": draw(st.booleans()),
        "heads": draw(st.one_of(st.sampled_from(["sum", "max"]), st.sampled_from([x for x in (1, 2, 4) if x <= h_kv * group]))),
        "queries": "l2",
        "mode": "dot",
        "scale": 1.0,
    }
    for name in ("key_mask", "droppable"):
        if draw(st.booleans()):
            options[name] = torch.rand(b, s, generator=gen) < 0.7
    return q, k, options


@quickly
@given(call=calls())
def test_attention_score_of_any_integers(on, call):
    q, k, options = call
    want, _ = oracle(q, k, **options)
    same(score(on, q, k, **options), want.float())


# --- gradients


@pytest.mark.backends("reference")
@pytest.mark.parametrize(("mode", "heads", "queries"), list(itertools.product(["softmax", "dot"], HEADS, ["mean", "l2"])))
def test_attention_gradcheck(on, mode, heads, queries):
    q, k = (x.requires_grad_() for x in inputs((2, 4, 2, 3, 7, 4), torch.float64))
    given = masks(2, 3, 7)

    def function(q, k):
        return vk.attention_score(q, k, mode=mode, heads=heads, queries=queries, **given)

    torch.autograd.gradcheck(function, (q, k))


@cross(mode=["softmax", "dot"], heads=HEADS, queries=["mean", "l2"])
def test_attention_gradient_equals_that_of_the_reference(on, mode, heads, queries, monkeypatch):
    """The shared backward, whose formulas are its own, against autograd through the reference in float64, whole and in pieces."""
    shape = (2, 8, 2, 5, 33, 12)
    given = masks(2, 5, 33)
    options = {**given, "mode": mode, "heads": heads, "queries": queries}
    wide = [x.requires_grad_() for x in inputs(shape, torch.float64)]
    up = normal((2, 33), torch.float64, "up")
    want = torch.autograd.grad(vk.attention_score(*wide, backend="reference", **options), wide, up)
    for at_once in (1 << 24, 2 * 8 * 33 * 2):
        monkeypatch.setattr(chunking, "LOGITS_AT_ONCE", at_once)
        narrow = [x.detach().float().to(on.device).requires_grad_() for x in wide]
        moved = {name: x.to(on.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        got = torch.autograd.grad(vk.attention_score(*narrow, backend=on.backend, **moved), narrow, up.float().to(on.device))
        for g, w in zip(got, want, strict=True):
            # Inputs are rounded to float32 and sums have up to S * Dh terms of mixed sign: their magnitude, not the result's, errs.
            torch.testing.assert_close(g.cpu().double(), w, rtol=0, atol=33 * 12 * ULP * w.abs().max().item())


def test_attention_gradient_passes_padding(on):
    """NaN in padded keys and absent queries reaches no gradient; their own gradient is 0."""
    q, k = inputs((2, 4, 2, 2, 20, 8), torch.float32)
    key_mask = torch.arange(20).expand(2, 20) >= torch.tensor([[0], [5]])
    rows = torch.tensor([[19, -1], [18, 19]])
    q[0, :, 1], k[1, :, :5] = torch.nan, torch.nan
    leaves = [x.to(on.device).requires_grad_() for x in (q, k)]
    got = vk.attention_score(*leaves, query_rows=rows.to(on.device), key_mask=key_mask.to(on.device), backend=on.backend)
    for g in torch.autograd.grad(got.square().sum(), leaves):
        assert g.isfinite().all()
        assert g.abs().sum() > 0
    assert torch.autograd.grad(score_of(leaves, rows, key_mask, on), leaves[0])[0][0, :, 1].eq(0).all()


def score_of(leaves, rows, key_mask, on):
    return vk.attention_score(*leaves, query_rows=rows.to(on.device), key_mask=key_mask.to(on.device), backend=on.backend).sum()


@cross(dtype=[torch.float16, torch.bfloat16])
def test_attention_gradient_has_the_dtype_of_its_tensor(on, dtype):
    leaves = [x.to(on.device).requires_grad_() for x in inputs((1, 4, 2, 2, 20, 8), dtype)]
    wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
    got = torch.autograd.grad(vk.attention_score(*leaves, backend=on.backend).square().sum(), leaves)
    want = torch.autograd.grad(vk.attention_score(*wide, backend="reference").square().sum(), wide)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        # One rounding to the dtype; what is below its least normal number has absolute errors only.
        torch.testing.assert_close(g.cpu().double(), w, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


# --- torch.compile, determinism


@pytest.mark.backends("cpu", "triton")
def test_attention_opcheck(on):
    q, k = (x.to(on.device) for x in inputs((2, 4, 2, 3, 20, 8), torch.float32))
    given = {name: x.to(on.device) for name, x in masks(2, 3, 20).items()}
    ops = torch.ops.v2drop
    for heads in ("mean", "3"):
        for a, b in ((q, k), (q.clone().requires_grad_(), k.clone().requires_grad_())):
            rest = (given["query_rows"], given["key_mask"], None, True, 0.3, "softmax", heads, "l2")
            torch.library.opcheck(ops.attention_score.default, (a, b, *rest, on.backend))
        backward = (torch.ones(2, 20, device=on.device), q, k, *rest)
        utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(ops.attention_score_backward.default, backward, test_utils=utils)


@pytest.mark.parametrize("dynamic", DYNAMIC, ids=["static", "dynamic"][: len(DYNAMIC)])
def test_attention_compiles(on, dynamic):
    """One graph, forward and backward; with dynamic shapes one compilation serves every length."""
    torch._dynamo.reset()

    def function(q, k, query_rows, key_mask, droppable):
        given = {"query_rows": query_rows, "key_mask": key_mask, "droppable": droppable, "backend": on.backend}
        score = vk.attention_score(q * 1, k, heads=2, **given)
        if dynamic and on.backend == "reference":  # some thirty operations a call instead of one, compiled for every length
            return score
        score = score + vk.attention_score(q, k, queries="l2", causal=False, **given)
        return score + vk.attention_score(q, k, backend=on.backend)

    counter = CompileCounterWithBackend("aot_eager")
    # The reference is traced operation by operation: with symbols for the sizes that stay as well, that takes half a minute.
    only_keys = dynamic and on.backend == "reference"
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic and not only_keys, backend=counter)
    for s in (30, 41, 77) if dynamic else (30,):
        given = [x.to(on.device) for x in masks(2, 3, s).values()]
        found = []
        for call in (compiled, function):
            leaves = [x.to(on.device).requires_grad_() for x in inputs((2, 4, 2, 3, s, 8), torch.float32)]
            if only_keys:
                for x, dim in ((leaves[1], 2), (given[1], 1), (given[2], 1)):
                    torch._dynamo.mark_dynamic(x, dim)
            out = call(*leaves, *given)
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        for got, want in zip(*found, strict=True):
            # The three gradients are added in another order; forwards are the same launches.
            torch.testing.assert_close(got, want, rtol=4 * ULP, atol=4 * ULP * want.abs().max().item())
    assert counter.frame_count == 1 or on.backend == "reference"  # whose pieces are a loop of the graph
    torch._dynamo.reset()


@pytest.mark.backends("cpu", "triton")
def test_compiled_graph_holds_the_attention_op(on):
    torch._dynamo.reset()
    seen = []

    def keep(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    q, k = (x.to(on.device) for x in inputs((1, 4, 2, 1, 20, 8), torch.float32))
    got = torch.compile(lambda q, k: vk.attention_score(q, k, backend=on.backend), fullgraph=True, backend=keep)(q, k)
    same(got, vk.attention_score(q, k, backend=on.backend))
    assert [name for name in seen if "v2drop" in name] == ["v2drop.attention_score"]
    torch._dynamo.reset()


def test_attention_gives_the_same_bits(on):
    q, k = inputs((2, 8, 2, 3, 200, 64), torch.bfloat16)
    options = {**masks(2, 3, 200), "heads": 3, "queries": "l2"}
    first = score(on, q, k, **options)
    for _ in range(fewer([20], [2])[0]):
        same(score(on, q, k, **options), first)


@pytest.mark.backends("reference", "triton", "cpu")  # the scratch of "cuda" is bounded in C++: see the next test
def test_keys_are_not_expanded_nor_squares_formed(on):
    """No tensor of the call is larger than the logits of the queries that go through at a time, or the keys in float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
            return out

    q, k = (x.to(on.device) for x in inputs((1, 8, 2, 16, 256, 32), torch.float32))
    known = {x.untyped_storage().data_ptr() for x in (q, k)}
    with Largest() as largest, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "LOGITS_AT_ONCE", 8 * 256)
        vk.attention_score(q, k, heads=3, backend=on.backend)
    assert largest.numel <= max(8 * 256, k.numel()) < 256 * 256


@pytest.mark.backends("cuda")
def test_scratch_on_the_device_is_bounded(on):
    """Logits of many queries take 64 MB, those of one query all that they need; partial sums and the totals of heads add little."""
    from v2drop_kernels.ops.attention_score.native import workspace_bytes

    for heads, rows in ((32, 6272), (32, 65536), (28, 1 << 20)):
        held = workspace_bytes(1, heads, rows, rows)
        assert held <= 1.25 * max(64 << 20, 4 * heads * rows)
        assert held < 4 * heads * rows * rows / 8


# --- the methods' forms


@cross(form=["mean", "sum", "single-head"], dtype=FLOATS)
def test_cls_attention_score(on, form, dtype):
    """Against the row of [CLS] of the whole attention matrix, as the published code takes it."""
    b, h, s, d = 2, 4, 50, 16
    features = normal((b, s, 2 * h * d), dtype, "tower")
    q, k = (x.unflatten(-1, (h, d)).transpose(1, 2) for x in features.chunk(2, -1))
    got = vk.cls_attention_score(q[:, :, :1].to(on.device), k.to(on.device), form=form, backend=on.backend).cpu()
    q, k = q.double(), k.double()
    if form == "single-head":
        q, k = (x.transpose(1, 2).reshape(b, 1, s, h * d) for x in (q, k))
    logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    heads = logits.softmax(-1)[:, :, 0, 1:]
    want = heads.sum(1) if form == "sum" else heads.mean(1)
    assert got.dtype == torch.float32
    # The relative bound of `oracle`: twice that of the largest logit, whose terms' magnitudes are at most 4 times its size here.
    worst = (q.abs() @ k.abs().transpose(2, 3)).max() * q.shape[-1] ** -0.5 * (q.shape[-1] + 2) * ULP
    spread = logits.amax() - logits.amin()
    torch.testing.assert_close(got.double(), want, rtol=(2 * worst + (2 * spread + s + 16 + h) * ULP).item(), atol=0)


@cross(dtype=FLOATS, masks=[True, False])
def test_text_raters(on, dtype, masks):
    """Item by item: text tokens whose mean share of the vision tokens' softmax exceeds the average one."""
    b, n, d = 3, 30, 8
    embeds = normal((b, n, d), dtype, "embeds")
    vision = [list(range(5, 20)), list(range(2, 9)), []]
    text = [[*range(5), *range(20, 30)], [9, 12, 20], [1, 2]]
    want = []
    for i in range(b):
        v, t = embeds[i, vision[i]].double(), embeds[i, text[i]].double()
        mean = (v @ t.T).softmax(-1).mean(0)
        want.append([row for row, m in zip(text[i], mean, strict=True) if m > mean.mean()])
    assert [len(x) > 0 for x in want] == [True, True, False]

    def table(rows):
        if masks:
            return torch.stack([torch.isin(torch.arange(n), torch.tensor(x)) for x in rows]).to(on.device)
        return torch.tensor([x + [-1] * (20 - len(x)) for x in rows]).to(on.device)

    got = vk.text_raters(table(vision), table(text), embeds.to(on.device)).cpu()
    assert [[row for row in x if row >= 0] for x in got.tolist()] == want
    assert got.shape == (b, n if masks else 20)


def test_text_raters_of_one_text_token(on):
    """It has the whole softmax, and so has the average: it does not rate."""
    embeds = normal((1, 4, 8), torch.float32, "embeds").to(on.device)
    rows = torch.tensor([[0, 1, 2], [3, -1, -1]]).to(on.device)
    assert vk.text_raters(rows[:1], rows[1:], embeds).eq(-1).all()


def test_text_rater_score(on):
    """The mean over heads and raters of the attention weights, for items with different raters."""
    q, k = inputs((2, 4, 2, 6, 40, 16), torch.float32)
    raters = torch.tensor([[34, -1, 36, -1, -1, 39], [-1, 35, -1, -1, -1, -1]])
    droppable = (torch.arange(40) < 30).expand(2, 40)
    given = [x.to(on.device) for x in (q, k, raters)]
    got = vk.text_rater_score(*given, droppable=droppable.to(on.device), backend=on.backend).cpu()
    within(got, q, k, query_rows=raters, droppable=droppable)
    wide = (q.double() @ k.repeat_interleave(2, 1).double().transpose(2, 3) / 4).masked_fill(
        torch.arange(40) > torch.arange(34, 40)[:, None], -torch.inf
    )
    want = wide.softmax(-1).mean(1)[0, [0, 2, 5]].mean(0)[:30]
    torch.testing.assert_close(got[0, :30].double(), want, rtol=1e-5, atol=0)


@cross(alignment=["number", "each"], dtype=FLOATS)
def test_cross_modal_score(on, alignment, dtype):
    text, cls = integers((2, 6), dtype, "text").to(on.device), integers((2, 6), dtype, "cls").to(on.device)
    weight = 0.5 if alignment == "number" else torch.tensor([0.25, -2.0], device=on.device)
    got = vk.cross_modal_score(text, cls, weight, scale=2.0)
    want = 2.0 * (weight if alignment == "number" else weight[:, None]) * text.float() + cls.float()
    same(got.cpu(), want.cpu())


@pytest.mark.backends("reference")
def test_cross_modal_score_is_differentiable(on):
    text, cls = (torch.rand(2, 4, generator=seeded(x), dtype=torch.float32).requires_grad_() for x in "ab")
    alignment = torch.tensor([0.3, 0.7], requires_grad=True)
    vk.cross_modal_score(text, cls, alignment, torch.tensor(2.0)).sum().backward()
    torch.testing.assert_close(text.grad, 2 * alignment.detach()[:, None].expand(2, 4))
    torch.testing.assert_close(alignment.grad, 2 * text.detach().sum(1))
    assert cls.grad.eq(1).all()


# --- bad input


def bad(**given):
    q, k = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 9, 8)
    return vk.attention_score(given.pop("q", q), given.pop("k", k), **given)


FLAGS = torch.zeros(2, 9, dtype=torch.bool)
BAD = {
    "q-type": (TypeError, "q must be a tensor", {"q": [1.0]}),
    "q-dims": (ValueError, "q must have four dimensions", {"q": torch.zeros(4, 1, 8)}),
    "k-dims": (ValueError, "k must have four dimensions", {"k": torch.zeros(2, 9, 8)}),
    "k-dtype": (TypeError, "k must be float32", {"k": torch.zeros(2, 2, 9, 8, dtype=torch.int8)}),
    "dtypes": (TypeError, "q must have the dtype of k", {"k": torch.zeros(2, 2, 9, 8, dtype=torch.float16)}),
    "devices": (ValueError, "q must be on the device of k", {"k": torch.zeros(2, 2, 9, 8, device="meta")}),
    "batch": (ValueError, "q must have the batch and head size of k, 3 and 8, got 2 and 8", {"k": torch.zeros(3, 2, 9, 8)}),
    "head-size": (ValueError, "q must have the batch and head size", {"k": torch.zeros(2, 2, 9, 4)}),
    "heads-of-k": (ValueError, r"q must have a multiple of the heads of k \(3\), got 4", {"k": torch.zeros(2, 3, 9, 8)}),
    "no-heads": (ValueError, "q must have a multiple of the heads of k", {"k": torch.zeros(2, 0, 9, 8)}),
    "no-channels": (ValueError, "k must have heads of at least one", {"q": torch.zeros(2, 4, 1, 0), "k": torch.zeros(2, 2, 9, 0)}),
    "too-many-queries": (ValueError, "q must have at most as many queries", {"q": torch.zeros(2, 4, 10, 8)}),
    "rows-dtype": (TypeError, "query_rows must be torch.int64", {"query_rows": torch.zeros(2, 1)}),
    "rows-shape": (ValueError, r"query_rows must have shape \[2, 1\]", {"query_rows": torch.zeros(2, 3, dtype=torch.int64)}),
    "mask-dtype": (TypeError, "key_mask must be torch.bool", {"key_mask": torch.zeros(2, 9)}),
    "mask-shape": (ValueError, r"key_mask must have shape \[2, 9\]", {"key_mask": FLAGS[:1]}),
    "mask-device": (ValueError, "key_mask must be on cpu", {"key_mask": FLAGS.to("meta")}),
    "droppable-shape": (ValueError, "droppable must have shape", {"droppable": FLAGS[:, 1:]}),
    "droppable-type": (TypeError, "droppable must be a tensor", {"droppable": (0, 3)}),
    "scale": (TypeError, "scale must be a float", {"scale": torch.tensor(1.0)}),
    "mode": (ValueError, "mode must be one of 'softmax', 'dot', got 'sigmoid'", {"mode": "sigmoid"}),
    "heads-word": (ValueError, "heads must be one of", {"heads": "median"}),
    "heads-bool": (ValueError, "heads must be one of", {"heads": True}),
    "heads-zero": (ValueError, "heads must be from 1 to the 4 heads of q, got 0", {"heads": 0}),
    "heads-many": (ValueError, "heads must be from 1 to the 4 heads of q, got 5", {"heads": 5}),
    "queries": (ValueError, "queries must be one of", {"queries": "max"}),
    "layout": (ValueError, "layout must be one of", {"layout": "SBHD"}),
    "backend": (ValueError, "backend must be one of", {"backend": "numpy"}),
}


@pytest.mark.parametrize(("error", "message", "given"), BAD.values(), ids=BAD)
def test_attention_of_bad_input(error, message, given):
    with pytest.raises(error, match=message):
        bad(**given)


def test_bad_input_of_the_forms():
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 3, 4)
    embeds = torch.zeros(1, 5, 4)
    rows = torch.zeros(1, 2, dtype=torch.int64)
    for error, message, call in (
        (ValueError, "form must be one of", lambda: vk.cls_attention_score(q, k, form="max")),
        (ValueError, "q must hold the one query", lambda: vk.cls_attention_score(k, k)),
        (ValueError, "k must have the key of", lambda: vk.cls_attention_score(q, k[:, :, :0])),
        (ValueError, "k must have the 2 heads of q", lambda: vk.cls_attention_score(q, k[:, :1], form="single-head")),
        (ValueError, r"embeds must be \[B, N, D\]", lambda: vk.text_raters(rows, rows, embeds[0])),
        (TypeError, "vision_rows must be int64 or bool", lambda: vk.text_raters(rows.int(), rows, embeds)),
        (ValueError, "text_rows must be int64", lambda: vk.text_raters(rows, rows[0], embeds)),
        (ValueError, "text_rows must be int64", lambda: vk.text_raters(rows, rows.bool(), embeds)),
        (ValueError, "cls must have the shape of text", lambda: vk.cross_modal_score(embeds[0], embeds[0, :2], 1.0)),
        (ValueError, r"text must be \[B, N\]", lambda: vk.cross_modal_score(embeds, embeds, 1.0)),
        (TypeError, "text must be floating point", lambda: vk.cross_modal_score(rows, rows, 1.0)),
        (TypeError, "alignment must be a number", lambda: vk.cross_modal_score(embeds[0], embeds[0], "cosine")),
        (ValueError, "scale must be one number", lambda: vk.cross_modal_score(embeds[0], embeds[0], 1.0, torch.ones(3))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_scale_defaults_to_the_root_of_the_head_size():
    q, k = inputs("gqa", torch.float32)
    same(vk.attention_score(q, k), vk.attention_score(q, k, scale=1 / math.sqrt(40)))


def test_reference_takes_a_backends_arguments():
    """What a backend is called with, the reference takes in the same order."""
    q, k = inputs("gqa", torch.float32)
    rows = vk.reference.last_rows(q, k)
    same(
        attention(q, k, rows, None, None, True, 40**-0.5, "softmax", "mean", "mean"), vk.attention_score(q, k, backend="reference")
    )


@cross(everything=["none", "droppable", "masked"], heads=[1, 3], queries=["mean", "l2"], dtype=FLOATS)
def test_heads_that_give_all_are_chosen_from_the_lowest(on, everything, heads, queries, dtype):
    """Every head of a softmax gives 1 in total where all visible rows are droppable: rounding chose among them."""
    q, k = normal((2, 8, 2, 16), dtype, "q"), normal((2, 2, 70, 16), dtype, "k")
    given = {"key_mask": torch.arange(70).expand(2, -1) > 4, "queries": queries}
    if everything != "none":
        given["droppable"] = torch.ones(2, 70, dtype=torch.bool)
    if everything == "masked":
        given["droppable"] = given["key_mask"]
    alone = torch.cat([q[:, :heads], q[:, :1].expand(-1, 8 - heads, -1, -1)], 1)
    per_head = [score(on, q[:, h : h + 1], k[:, :1], **given) for h in range(heads)]
    got = score(on, q, k, heads=heads, **given)
    if queries == "mean":
        torch.testing.assert_close(got, torch.stack(per_head).mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got, score(on, alone, k, heads=heads, **given), rtol=1e-5, atol=1e-7)
