"""Gradients: gradcheck in float64 on the reference; the same gradients on every backend."""

from __future__ import annotations

import pytest
import torch
from support.cases import (
    BATCHES,
    FLOATS,
    KINDS,
    METRICS,
    SIZES,
    STRIDES,
    companions,
    count,
    cross,
    fewer,
    hidden_pair,
    normal,
    same,
    scores,
    seeded,
    some_rows,
    strided,
)  # fmt: skip
from support.oracle import eager

import v2drop_kernels as vk

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def double(*shape):
    return torch.randn(*shape, generator=seeded(shape), dtype=torch.float64).requires_grad_()


def gradients(function, inputs, device, *incoming):
    """Gradients of the inputs of ``function`` under the given incoming gradients, on the CPU."""
    leaves = [x.detach().to(device).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [g.to(device, o.dtype) for g, o in zip(incoming, outputs, strict=True)]
    return [g.cpu() for g in torch.autograd.grad(outputs, leaves, incoming)]


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck_of_variation_score(metric):
    a, b = double(2, 3, 5), double(1, 3, 5).detach().expand(2, 3, 5).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: vk.variation_score(a, b, metric=metric), (a, b))


@pytest.mark.parametrize("b", [b for b in BATCHES if b.batch and b.rows], ids=str)
def test_gradcheck_of_drop_tokens_and_compact(b):
    """hidden, KV and rope, over every kind of batch; the choice itself carries no gradient."""
    hidden = double(*b.lead, 2)
    kv = double(2, b.rows, 1) if b.packed else double(b.batch, 2, b.rows, 1)
    rope = double(*b.lead, 2)
    x = scores("random", b.lead, torch.float32)

    def drop(hidden, kv, rope):
        got = vk.drop_tokens(None, hidden, b.k("n/3"), scores=x, kv=[kv], rope=(rope,), backend="reference", **b.arguments())
        return got.hidden, got.kv[0], got.rope[0]

    keep = vk.segmented_topk(x, b.k("n/3"), backend="reference", **b.spans())

    def compact(hidden, kv, rope):
        got = vk.compact(keep, hidden, kv=(kv,), rope=(rope,), backend="reference", **b.spans())
        return got.hidden, got.kv[0], got.rope[0]

    assert torch.autograd.gradcheck(drop, (hidden, kv, rope), fast_mode=True)
    assert torch.autograd.gradcheck(compact, (hidden, kv, rope), fast_mode=True)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck_of_topk_values(metric):
    a, b = double(1, 9, 4), (2 * double(1, 9, 4)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: vk.variation_topk(a, b, 4, metric=metric, order="score").values, (a, b))
    assert torch.autograd.gradcheck(lambda s: vk.segmented_topk(s, 3, order="score").values, (double(2, 7),))


def check_score_gradients(got, prev, cur, metric, incoming):
    """At most twice PyTorch's own largest float32 error against float64, and one unit in the last place of the largest
    gradient. For cosine the terms g / |h| cancel, to nothing where the rows are parallel, and their rounding stays:
    each is a product of eight float32 roundings (two roots, the three of cos, two quotients, g), so 8 * 2^-24 of
    itself."""
    own = gradients(lambda a, b: eager(a, b, metric), (prev, cur), "cpu", incoming)
    wide = (prev.double(), cur.double())
    exact = gradients(lambda a, b: vk.reference.variation_score(a, b, metric=metric), wide, "cpu", incoming)
    for g, w, e, h in zip(got, own, exact, wide, strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        largest = (incoming.abs() / h.norm(dim=-1)).max() if metric == "cosine" else e.abs().max()
        rounding = max(ULP[prev.dtype], 8 * 2.0**-24 if metric == "cosine" else 0.0)
        assert (g.double() - e).abs().max() <= 2 * (w.double() - e).abs().max() + rounding * largest


@pytest.mark.backends("cpu", "triton", "cuda")
@cross(together="metric dtype D", metric=METRICS, dtype=FLOATS, D=[1, 7, 64, 1000], strides=STRIDES)
def test_variation_score_gradients(on, metric, dtype, D, strides):
    prev, cur = normal((2, 9, D), dtype, "a"), normal((2, 9, D), dtype, "b")
    incoming = torch.randn(2, 9, generator=seeded("g"))

    def run(a, b):
        return vk.variation_score(strided_view(a, strides), strided_view(b, strides), metric=metric, backend=on.backend)

    check_score_gradients(gradients(run, (prev, cur), on.device, incoming), prev, cur, metric, incoming)


def strided_view(x, kind):
    """Through autograd: a differentiable copy of x into other memory."""
    out = strided(x.detach(), kind)
    return out.copy_(x) if kind not in ("contiguous", "transposed") else out + (x - x.detach())


@cross(metric=METRICS, dtype=FLOATS)
def test_variation_score_subgradient_at_zero(on, metric, dtype):
    """A row that did not change has score 0 and subgradient 0, not 0/0; a zero vector has no direction: cosine gives 0
    too."""
    prev, cur = hidden_pair((1, 4, 8), dtype)
    cur[0, 0] = prev[0, 0]
    prev[0, 1], cur[0, 2] = 0, 0
    prev[0, 3] = cur[0, 3] = 0
    got = gradients(
        lambda a, b: vk.variation_score(a, b, metric=metric, backend=on.backend),
        (prev, cur),
        on.device,
        torch.ones(1, 4),
    )
    zero = [1, 2, 3] if metric == "cosine" else [0, 3]
    for g in got:
        assert g.isfinite().all()
        assert g[0, zero].eq(0).all()
    if metric == "cosine":  # parallel rows: the two terms cancel to rounding, one of the dtype per term
        assert all(g[0, 0].abs().max() <= 2 * ULP[dtype] for g in got)


@cross(metric=METRICS, incoming=["expanded", "inner", "transposed", "zeros"])
def test_variation_score_takes_any_incoming_gradient(on, metric, incoming):
    """``sum()`` sends an expanded gradient whose strides are 0; slices and transposes send strided ones."""
    prev, cur = normal((3, 5, 16), torch.float32, "a"), normal((3, 5, 16), torch.float32, "b")
    g = {
        "expanded": torch.ones(()).expand(3, 5),
        "inner": torch.randn(3, 10, generator=seeded("g"))[:, ::2],
        "transposed": torch.randn(5, 3, generator=seeded("g")).t(),
        "zeros": torch.zeros(3, 5),
    }[incoming]
    run = lambda a, b: vk.variation_score(a, b, metric=metric, backend=on.backend)
    got = gradients(run, (prev, cur), on.device, g)
    want = gradients(run, (prev, cur), on.device, g.contiguous())
    same(got, want)
    check_score_gradients(got, prev, cur, metric, g)


@cross(metric=METRICS, which=["prev", "cur"])
def test_variation_score_of_one_that_requires_grad(on, metric, which):
    prev, cur = hidden_pair((2, 5, 16), torch.float32, device=on.device)
    leaf = {"prev": prev, "cur": cur}[which].requires_grad_()
    vk.variation_score(prev, cur, metric=metric, backend=on.backend).sum().backward()
    other = cur if which == "prev" else prev
    assert other.grad is None
    both = gradients(
        lambda a, b: vk.variation_score(a, b, metric=metric, backend=on.backend),
        (prev, cur),
        on.device,
        torch.ones(2, 5),
    )
    same(leaf.grad.cpu(), both[which == "cur"])


def test_variation_score_records_nothing_without_grad(on):
    prev, cur = hidden_pair((1, 3, 4), torch.float32, device=on.device)
    cur.requires_grad_()
    with torch.no_grad():
        assert vk.variation_score(prev, cur, backend=on.backend).grad_fn is None
        assert vk.drop_tokens(prev, cur, 2, backend=on.backend).hidden.grad_fn is None
    assert vk.variation_score(prev, cur.detach(), backend=on.backend).grad_fn is None


def weights(*outputs):
    """Incoming gradients that tell every element apart."""
    return [torch.arange(1.0, o.numel() + 1, device=o.device).view(o.shape).to(o.dtype) for o in outputs]


def float_companions(b, key, dtype, device):
    """KV and rope that can carry a gradient, beside ids, masks and labels that cannot."""
    found = companions(b, key, device=device)
    lead = (3, *b.lead) if key == "mrope" else b.lead
    heads = (2, b.rows, 3) if b.packed else (b.batch, 2, b.rows, 3)
    leaves = [normal((*b.lead, 6), dtype, "h"), normal(heads, dtype, "k"), normal(heads, torch.float32, "v"),
              normal((*lead, 4), torch.float32, "cos")]  # fmt: skip
    return leaves, {k: found[k] for k in ("position_ids", "labels", "attention_mask") if k in found}


@cross(b=fewer(BATCHES, KINDS), key=["flat", "mrope"], op=["drop_tokens", "compact"])
def test_compaction_gradients(on, b, key, op):
    """The gradient of a gather is a scatter: exact, and zero in every row that was dropped."""
    x = scores("three", b.lead, torch.float32)
    found = []
    for device, backend in ((on.device, on.backend), ("cpu", "reference")):
        leaves, rest = float_companions(b, key, torch.bfloat16, device)
        leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
        hidden, k, v, cos = leaves
        given = {"kv": [(k, v)], "rope": (cos, cos.detach()), **rest}
        if op == "drop_tokens":
            got = vk.drop_tokens(None, hidden, b.k("n/3"), scores=x.to(device), backend=backend, **b.arguments(device), **given)
        else:
            keep = vk.segmented_topk(x.to(device), b.k("n/3"), backend=backend, **b.spans(device))
            got = vk.compact(keep, hidden, backend=backend, **b.spans(device), **given)
        outputs = (got.hidden, *got.kv[0], got.rope[0])
        assert not got.keep.requires_grad
        assert not got.rope[1].requires_grad
        assert not got.labels.requires_grad
        found.append([g.cpu() for g in torch.autograd.grad(outputs, leaves, weights(*outputs))])
    for g, w in zip(*found, strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        assert torch.equal(g, w)
    rows = found[0][0].ne(0).any(-1)
    assert torch.equal(rows, _kept(got, b))


def _kept(got, b):
    kept = torch.zeros(b.lead, dtype=torch.bool)
    for i, rows in enumerate([got.keep] if b.packed else got.keep):
        (kept if b.packed else kept[i])[rows[rows >= 0]] = True
    return kept


@cross(N=SIZES, k=["0", "1", "n"], dtype=FLOATS)
def test_compact_gradients_of_any_rows(on, N, k, dtype):
    """Rows in any order with padding between them: the inverse of a map, not of a sorted list."""
    keep = some_rows(2, N, count(k, N))
    hidden = normal((2, N, 5), dtype, "h")
    incoming = normal((2, keep.shape[1], 5), dtype, "g")
    found = [
        gradients(lambda h: vk.compact(keep.to(h.device), h, backend=backend).hidden, [hidden], device, incoming)  # noqa: B023
        for device, backend in ((on.device, on.backend), ("cpu", "reference"))
    ]
    assert torch.equal(found[0][0], found[1][0])


@cross(incoming=["expanded", "inner", "rows", "transposed", "batch"], dtype=FLOATS)
def test_compact_takes_any_incoming_gradient(on, incoming, dtype):
    keep = some_rows(2, 20, 9)
    shape = (2, 9, 6)
    g = torch.ones((), dtype=dtype).expand(shape) if incoming == "expanded" else strided(normal(shape, dtype, "g"), incoming)
    hidden = normal((2, 20, 6), dtype, "h")
    run = lambda h: vk.compact(keep.to(h.device), h, backend=on.backend).hidden
    got = gradients(run, [hidden], on.device, g)[0]
    want = torch.zeros(2, 20, 6, dtype=dtype)
    for b in range(2):
        for s, r in enumerate(keep[b].tolist()):
            if r >= 0:
                want[b, r] = g[b, s]
    assert torch.equal(got, want)


@cross(which=["hidden", "kv", "rope"])
def test_drop_tokens_of_one_that_requires_grad(on, which):
    """Frozen caches and tables get no gradient, and cost no backward."""
    prev, cur = hidden_pair((2, 12, 6), torch.float32, device=on.device)
    kv, rope = torch.ones(2, 2, 12, 3, device=on.device), torch.ones(12, 4, device=on.device)
    leaves = {"hidden": cur, "kv": kv, "rope": rope}
    leaves[which].requires_grad_()
    got = vk.drop_tokens(prev, cur, 4, droppable=(2, 11), kv=[kv], rope=(rope,), backend=on.backend)
    outputs = {"hidden": got.hidden, "kv": got.kv[0], "rope": got.rope[0]}
    assert {name: x.requires_grad for name, x in outputs.items()} == {name: name == which for name in outputs}
    outputs[which].sum().backward()
    kept = torch.zeros(2, 12, device=on.device).scatter(1, got.keep, 1)
    want = {"hidden": kept[..., None].expand(2, 12, 6), "kv": kept[:, None, :, None].expand(2, 2, 12, 3),
            "rope": kept.sum(0)[:, None].expand(12, 4)}[which]  # fmt: skip
    assert torch.equal(leaves[which].grad, want)


def test_drop_tokens_reaches_the_loss_through_some_outputs(on):
    """A loss that uses the KV alone leaves the other incoming gradients undefined, not zero tensors to be scattered."""
    prev, cur = hidden_pair((1, 8, 4), torch.float32, device=on.device)
    kv = torch.ones(1, 1, 8, 2, device=on.device, requires_grad=True)
    cur.requires_grad_()
    got = vk.drop_tokens(prev, cur, 3, kv=(kv, kv), backend=on.backend)
    got.kv[1].sum().backward()
    assert kv.grad.sum() == 6
    assert cur.grad is None or cur.grad.eq(0).all()


def test_drop_tokens_gives_h_prev_no_gradient(on):
    """Indices carry none, and h_prev only ranks."""
    prev, cur = (h.requires_grad_() for h in hidden_pair((1, 8, 4), torch.float32, device=on.device))
    vk.drop_tokens(prev, cur, 3, backend=on.backend).hidden.sum().backward()
    assert prev.grad is None
    assert cur.grad.sum() == 12


def test_compact_gradients_of_shared_tables(on):
    """A rope table [N, R] shared by the batch: every item adds its rows to the one table."""
    keep = some_rows(3, 10, 6)
    table = torch.ones(10, 4, requires_grad=True, device=on.device)
    got = vk.compact(keep.to(on.device), torch.zeros(3, 10, 1, device=on.device), rope=(table, table), backend=on.backend)
    (got.rope[0].sum() + 2 * got.rope[1].sum()).backward()
    times = torch.bincount(keep[keep >= 0], minlength=10)
    assert torch.equal(table.grad.cpu(), (3.0 * times)[:, None].expand(10, 4))


def test_gradients_of_nothing(on):
    for shape in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        prev, cur = (torch.zeros(shape, device=on.device, requires_grad=True) for _ in range(2))
        vk.variation_score(prev, cur, backend=on.backend).sum().backward()
        got = vk.drop_tokens(prev.detach(), cur, 2, backend=on.backend)
        got.hidden.sum().backward()
        assert prev.grad.shape == cur.grad.shape == shape


@pytest.mark.parametrize(
    "given",
    [
        {"droppable": [[], []]},
        {"droppable": [(0, 3), (6, 6)]},
        {"droppable": [(6, 6), (6, 6)]},
        {"droppable": vk.TokenLayout.padded([(2, 6), []], 6, lengths=[4, 0], padding_side="left")},
        {"droppable": vk.TokenLayout.padded([(2, 6), (6, 6)], 6, lengths=[4, 0], padding_side="left")},
    ],
    ids=["text-only", "empty-at-the-end", "all-empty", "no-tokens", "no-tokens-at-the-end"],
)
def test_gradients_with_nothing_to_select(on, given):
    """IndexError, or an assertion of the device: an empty segment at the end was looked for in an item behind the last."""
    s = normal((2, 6), torch.float32, "s").to(on.device).requires_grad_()
    values, indices = vk.segmented_topk(s, 2, backend=on.backend, **given)
    want = torch.zeros(2, 6)
    values[indices >= 0].sum().backward()
    if given["droppable"] not in ([[], []], [(6, 6), (6, 6)]):
        start = 0 if isinstance(given["droppable"], list) else 2
        stop = 3 if isinstance(given["droppable"], list) else 6
        want[0, start + s[0, start:stop].topk(2).indices.cpu()] = 1
    same(s.grad.cpu(), want)
    h = normal((2, 6, 4), torch.float32, "h").to(on.device).requires_grad_()
    got = vk.variation_topk(torch.zeros_like(h), h, 2, backend=on.backend, **given)
    got.values[got.indices >= 0].sum().backward()
    assert h.grad.isfinite().all()
    assert int(h.grad.any(-1).sum()) == int(want.sum())


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
def test_gradients_of_no_scores(on, shape):
    s = torch.zeros(shape, device=on.device, requires_grad=True)
    values = vk.segmented_topk(s, 2, backend=on.backend).values
    (grad,) = torch.autograd.grad(values.sum(), s)
    same(grad.cpu(), torch.zeros(shape))
