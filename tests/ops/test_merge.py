"""The merges against restatements in loops; their gradients; what each does with ties, padding and nothing at all."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import FLOATS, INTERPRETED, STRIDES, cross, fewer, integers, normal, same, seeded, strided

from v2drop_kernels.ops.bipartite_merge import bipartite_merge
from v2drop_kernels.ops.merge_dropped import merge_dropped
from v2drop_kernels.ops.merge_dropped.sparsevlm import recycled_clusters
from v2drop_kernels.ops.merge_dropped.visionzip import contextual_targets
from v2drop_kernels.ops.weighted_merge import weighted_merge
from v2drop_kernels.ops.weighted_merge.groups import groups
from v2drop_kernels.ops.weighted_merge.reference import weighted_merge as plain_merge

if not INTERPRETED:  # the interpreter counts as CPU too
    backends = pytest.mark.backends("reference", "triton", "cuda", "cpu")
else:
    backends = pytest.mark.backends("triton")


WIDTHS = [1, 7, 64, 200 if INTERPRETED else 1000]


def naive_merge(x, offsets, rows, weights=None, mean=False):
    """The definition, edge by edge, in float64."""
    out = torch.zeros(x.shape[0], offsets.shape[1] - 1, x.shape[2], dtype=torch.float64)
    for b in range(x.shape[0]):
        for k, (first, stop) in enumerate(itertools.pairwise(offsets[b].tolist())):
            whole = 0.0
            for e in range(first, stop):
                w = 1.0 if weights is None else float(weights[b, e])
                out[b, k] += w * x[b, rows[b, e]].double()
                whole += w
            if mean:
                out[b, k] = out[b, k] / whole if whole else 0.0
    return out


def edges(batch, n, k, count, *key):
    """Ragged lists: empty output rows, rows used twice and never, unused edges on both ends with rows that do not exist."""
    gen = seeded(*key, batch, n, k, count)
    offsets = torch.randint(0, count + 1, (batch, k + 1), generator=gen).sort(1).values
    rows = torch.randint(0, max(n, 1), (batch, count), generator=gen)
    edge = torch.arange(count)
    return offsets, torch.where((edge < offsets[:, :1]) | (edge >= offsets[:, -1:]), -(10**9), rows)


def moved(on, *tensors):
    return [t if t is None else t.to(on.device) for t in tensors]


@backends
@cross(
    together="dtype weighted mean",
    dtype=FLOATS,
    strides=STRIDES,
    weighted=[True, False],
    mean=[False, True],
    D=[1, 7, 64, fewer([1000], [200])[0]],
)
def test_weighted_merge(on, dtype, strides, weighted, mean, D):
    """Integer rows and weights: sums are exact in float32 in any order; only the quotient of a mean, and the dtype, round."""
    x = integers((3, 9, D), dtype, "x")
    offsets, rows = edges(3, 9, 5, 40, dtype, D)
    weights = integers((3, 40), torch.float32, "w", high=3).abs() if weighted else None
    got = weighted_merge(strided(x, strides).to(on.device), *moved(on, offsets, rows, weights), mean=mean, backend=on.backend)
    want = naive_merge(x, offsets, rows, weights, mean)
    same(got.cpu(), (want.float() if not mean else want.to(torch.float32)).to(dtype))


@backends
@pytest.mark.parametrize(
    ("batch", "n", "k", "count", "d"), [(0, 4, 2, 3, 5), (2, 4, 0, 3, 5), (2, 4, 3, 0, 5), (2, 4, 3, 5, 0), (2, 0, 3, 0, 5)]
)
def test_weighted_merge_of_nothing(on, batch, n, k, count, d):
    offsets, rows = edges(batch, n, k, count)
    x, weights = torch.ones(batch, n, d), torch.ones(batch, count)
    x, weights, offsets, rows = moved(on, x, weights, offsets, rows)
    got = weighted_merge(x.requires_grad_(), offsets, rows, weights, backend=on.backend)
    assert torch.equal(got.cpu().double(), naive_merge(x.detach().cpu(), offsets, rows, weights))
    got.sum().backward()
    assert x.grad.shape == x.shape


@backends
def test_weighted_merge_reads_only_the_used_edges(on):
    """NaN in rows of unused edges, and weights of 0 that sum to 0."""
    x = torch.tensor([[[math.nan], [1.0], [3.0]]])
    offsets, rows = torch.tensor([[1, 3, 3]]), torch.tensor([[0, 1, 2, 0]])
    x, offsets, rows = moved(on, x, offsets, rows)
    weights = torch.ones(1, 4, device=on.device, requires_grad=True)
    got = weighted_merge(x.requires_grad_(), offsets, rows, weights, backend=on.backend)
    assert got.flatten().tolist() == [4, 0]
    got.sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 1]
    assert weights.grad.flatten().tolist() == [0, 1, 3, 0]
    assert weighted_merge(x, offsets, rows, 0 * weights, mean=True, backend=on.backend).flatten().tolist() == [0, 0]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_weighted_merge_properties(data):
    """Any lists at all: as the loop has it, linear in the rows, and a mean of equal rows is that row."""
    n, k, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 9))
    offsets = torch.tensor([sorted(data.draw(st.lists(st.integers(0, count), min_size=k + 1, max_size=k + 1)))])
    rows = torch.tensor([data.draw(st.lists(st.integers(0, n - 1), min_size=count, max_size=count))]).long()
    x = torch.arange(1.0, 3 * n + 1).view(1, n, 3)
    got = weighted_merge(x, offsets, rows, backend="reference")
    assert torch.equal(got.double(), naive_merge(x, offsets, rows))
    assert torch.equal(weighted_merge(2 * x, offsets, rows, backend="reference"), 2 * got)
    same_rows = weighted_merge(torch.ones(1, n, 3), offsets, rows, mean=True, backend="reference")
    assert torch.equal(same_rows, (offsets.diff() > 0).float()[:, :, None].expand(1, k, 3))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_of_weighted_merge(mean, weighted):
    x = torch.randn(2, 5, 3, generator=seeded("x"), dtype=torch.float64).requires_grad_()
    offsets, rows = edges(2, 5, 4, 12)
    weights = (0.5 + torch.rand(2, 12, generator=seeded("w"), dtype=torch.float64)).requires_grad_() if weighted else None
    inputs = (x, weights) if weighted else (x,)
    assert torch.autograd.gradcheck(lambda x, w=None: weighted_merge(x, offsets, rows, w, mean=mean), inputs)


@backends
@cross(dtype=FLOATS, mean=[False, True], weighted=[True, False], incoming=["plain", "expanded", "transposed"])
def test_weighted_merge_gradients(on, dtype, mean, weighted, incoming):
    """As float64 autograd has them. A gradient in x sums at most 40 products, one in a weight (twice, for a mean) 33; each term is
    rounded a few times and each addition once: under 64 units of 2^-24 of the terms' magnitudes, and one rounding to the dtype."""
    x = normal((2, 7, 33), dtype, "x")
    offsets, rows = edges(2, 7, 5, 40, "g")
    weights = (0.5 + torch.rand(2, 40, generator=seeded("w"))) if weighted else None
    grad = {
        "plain": torch.randn(2, 5, 33, generator=seeded("g")).to(dtype),
        "expanded": torch.ones((), dtype=dtype).expand(2, 5, 33),
        "transposed": torch.randn(2, 33, 5, generator=seeded("g")).to(dtype).transpose(1, 2),
    }[incoming]

    def gradients(x, weights, grad, device, **options):
        leaves = [t.detach().to(device).requires_grad_() for t in (x, weights) if t is not None]
        out = weighted_merge(leaves[0], offsets.to(device), rows.to(device), *leaves[1:], mean=mean, **options)
        return [g.cpu() for g in torch.autograd.grad(out, leaves, grad.to(device))]

    got = gradients(x, weights, grad, on.device, backend=on.backend)
    want = gradients(x.double(), None if weights is None else weights.double(), grad.double(), "cpu", backend="reference")
    for g, w, leaf in zip(got, want, (x, weights), strict=False):
        assert (g.shape, g.dtype) == (leaf.shape, leaf.dtype)
        largest = float(grad.abs().max())
        scale = 40 * 1.5 * largest if leaf is x else 33 * 2 * largest * float(x.abs().max())
        eps = torch.finfo(leaf.dtype).eps
        assert (g.double() - w).abs().max() <= 64 * 2**-24 * scale + eps * w.abs().max()


@backends
def test_weighted_merge_gradients_that_are_not_asked_for(on):
    x, weights = torch.ones(1, 3, 4, device=on.device), torch.ones(1, 5, device=on.device)
    offsets, rows = moved(on, *edges(1, 3, 2, 5))
    with torch.no_grad():
        assert weighted_merge(x.requires_grad_(), offsets, rows, backend=on.backend).grad_fn is None
    weighted_merge(x, offsets, rows, weights, backend=on.backend).sum().backward()
    assert x.grad is not None
    assert weights.grad is None
    weighted_merge(x.detach(), offsets, rows, weights.requires_grad_(), backend=on.backend).sum().backward()
    assert weights.grad is not None


@backends
def test_weighted_merge_is_deterministic(on):
    x = normal((2, 40, 65), torch.float32, "x").to(on.device).requires_grad_()
    offsets, rows = moved(on, *edges(2, 40, 9, 300))
    runs = []
    for _ in range(3):
        out = weighted_merge(x, offsets, rows, mean=True, backend=on.backend)
        runs.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.equal(g, w) for run in runs[1:] for g, w in zip(run, runs[0], strict=True))


@backends
def test_weighted_merge_compiles_to_one_graph(on):
    x, weights = normal((2, 6, 8), torch.float32, "x").to(on.device), torch.rand(2, 12, generator=seeded("w")).to(on.device)
    offsets, rows = moved(on, *edges(2, 6, 4, 12))
    call = lambda x, w: weighted_merge(x, offsets, rows, w, mean=True, backend=on.backend)
    found = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = run(*leaves)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for g, w in zip(*found, strict=True):
        # A compiled graph may group additions anew: at most 12 per element.
        torch.testing.assert_close(g, w, rtol=12 * 2**-24, atol=12 * 2**-24)


@pytest.mark.backends("triton", "cuda", "cpu")
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_of_weighted_merge(on, weighted):
    """Schema, fake and autograd of the op that a compiled graph holds."""
    x = normal((2, 6, 8), torch.float32, "x").to(on.device).requires_grad_()
    weights = torch.rand(2, 12, generator=seeded("w")).to(on.device).requires_grad_() if weighted else None
    offsets, rows = moved(on, *edges(2, 6, 4, 12))
    # test_aot_dispatch_dynamic compares gradients with those of a compiled graph, too.
    torch.library.opcheck(torch.ops.v2drop.weighted_merge.default, (x, offsets, rows, weights, True, on.backend))
    grad = torch.ones(2, 4, 8, device=on.device)
    args = (grad, x.detach(), offsets, rows, weights if weights is None else weights.detach(), True, weighted, on.backend)
    torch.library.opcheck(torch.ops.v2drop.weighted_merge_backward.default, args)


@given(st.lists(st.integers(0, 4), max_size=12))
@settings(max_examples=40, deadline=None)
def test_groups(target):
    offsets, rows = groups(torch.tensor([target]).long(), 4)
    for k in range(4):
        assert rows[0, offsets[0, k] : offsets[0, k + 1]].tolist() == [i for i, t in enumerate(target) if t == k]
    assert sorted(rows[0].tolist()) == list(range(len(target)))


# --- ToMe


def cosine(a, b):
    product = a.norm() * b.norm()
    return float(a @ b / product) if product else 0.0


def naive_bipartite(x, features, r, size, protected, order):
    """One item: proposals as (cosine descending, row ascending), one merge after the other."""
    n = len(x)
    proposals = []
    for a in range(0, n, 2):
        partners = [(-cosine(features[a], features[b]), b) for b in range(1, n, 2) if b >= protected]
        if a >= protected and partners:
            proposals.append((*min(partners), a))
    r = min(r, max(n - protected, 0) // 2)
    best = sorted(proposals, key=lambda p: (p[0], p[2]))
    into = {a: b for _, b, a in best[:r]}
    keep = [i for i in range(n) if i not in into]
    if order == "released" and r:
        even, odd = [i for i in keep if i % 2 == 0], [i for i in keep if i % 2]
        if not protected:
            even = [a for _, _, a in best if a in even]
        first = [i for i in sorted(keep) if i < protected]
        keep = first + [i for i in even + odd if i not in first]
    members = [[i] + [a for a, b in into.items() if b == i] for i in keep]
    total = [sum(float(size[i]) for i in m) for m in members]
    hidden = [sum(float(size[i]) * x[i].double() for i in m) / t for m, t in zip(members, total, strict=True)]
    row = [keep.index(into.get(i, i)) for i in range(n)]
    return torch.stack(hidden) if hidden else x.new_zeros(0, x.shape[1]).double(), total, keep, row


@backends
@cross(
    together="n r protected", n=[1, 2, 9, 50], r=[0, 1, 7, 100], protected=[0, 1, 2], ties=[False, True],
    order=["position", "released"],
)  # fmt: skip
def test_bipartite_merge(on, n, r, protected, ties, order):
    x = normal((2, n, 6), torch.float32, "x")
    features = normal((2, n, 5), torch.float32, "m")
    if ties:  # four directions, of lengths that are powers of two: cosines are exact, and tie
        pick = torch.randint(0, 4, (2, n), generator=seeded("t", n))
        features = torch.eye(5)[pick] * 2.0 ** torch.randint(-2, 3, (2, n, 1), generator=seeded("s", n))
        features[:, n // 2] = 0
    size = torch.randint(1, 5, (2, n), generator=seeded("size", n)).float()
    options = {"protected": protected, "order": order, "backend": on.backend}
    got = bipartite_merge(*moved(on, x, features), r, size=size.to(on.device), **options)
    for b in range(2):
        hidden, total, keep, row = naive_bipartite(x[b], features[b], r, size[b], protected, order)
        assert got.keep[b].tolist() == keep
        assert got.row[b].tolist() == row
        assert got.size[b].tolist() == total
        # A mean of at most n rows: a product and an addition each, and a quotient.
        torch.testing.assert_close(got.hidden[b].cpu(), hidden.float(), rtol=0, atol=2 * (n + 1) * 2**-24 * float(x.abs().max()))


def test_bipartite_merge_leaves_the_protected_alone():
    """The class token, row 0, is even: it would propose itself."""
    x = torch.ones(1, 5, 2)
    assert bipartite_merge(x, x, 2).keep.tolist() == [[0, 1, 3]]
    assert bipartite_merge(x, x, 2, protected=0).keep.tolist() == [[1, 3, 4]]
    assert bipartite_merge(x, x, 2, protected=3).keep.tolist() == [[0, 1, 2, 3]]


def test_bipartite_merge_again_and_again():
    """Sizes add up to the tokens that were there, and the mean over sizes is the mean of all tokens."""
    x = normal((2, 33, 4), torch.float32, "x")
    hidden, size, place = x, None, torch.arange(33).expand(2, -1)
    for r in (10, 5, 5):
        merged = bipartite_merge(hidden, hidden, r, size=size)
        hidden, size, place = merged.hidden, merged.size, merged.row.gather(1, place)
    assert size.sum(1).tolist() == [33, 33]
    for b in range(2):
        assert torch.equal(torch.bincount(place[b], minlength=13), size[b].long())
        for k in range(13):  # every token is in the mean that it is said to be in
            torch.testing.assert_close(hidden[b, k], x[b, place[b] == k].mean(0))


def test_gradcheck_of_bipartite_merge():
    x = torch.randn(2, 9, 3, generator=seeded("x"), dtype=torch.float64).requires_grad_()
    size = (1 + torch.rand(2, 9, generator=seeded("s"), dtype=torch.float64)).requires_grad_()
    features = torch.randn(2, 9, 3, generator=seeded("m"))
    assert torch.autograd.gradcheck(lambda x, s: bipartite_merge(x, features, 3, size=s)[:2], (x, size))


# --- PruMerge, VisionZip, SparseVLM


def kept_rows(batch, n, k, *key, pad=0):
    keep = torch.rand(batch, n, generator=seeded(*key, n)).argsort(1)[:, :k]
    keep[:, k - pad :] = -1
    return keep


def naive_prumerge(x, keep, features, scores, targets, droppable, neighbours):
    out = torch.zeros(len(keep), x.shape[1], dtype=torch.float64)
    kept = [i for i in keep if i >= 0]
    for j, i in enumerate(keep):
        if i < 0:
            continue
        out[j] = x[i].double()
        if targets[i]:
            members = [t for t in range(len(x)) if droppable[t] and (t not in kept or targets[t])]
            out[j] = sum((float(scores[t]) * x[t].double() for t in members), torch.zeros(x.shape[1]).double())
        elif droppable[i]:
            others = sorted((-cosine(features[i], features[t]), t) for t in range(len(x)) if t != i and droppable[t])
            for _, t in others[:neighbours]:
                out[j] += float(scores[t]) * x[t].double()
    return out


@backends
@cross(n=[1, 5, 60], neighbours=[0, 4, 32], extra=[False, True], masked=[False, True])
def test_prumerge(on, n, neighbours, extra, masked):
    k = max(1, n // 3)
    x, features = normal((2, n, 8), torch.float32, "x"), normal((2, n, 12), torch.float32, "m")
    scores = torch.rand(2, n, generator=seeded("s", n))
    keep = kept_rows(2, n, k, "k", pad=1 if n > 5 else 0)
    droppable = torch.rand(2, n, generator=seeded("d", n)) < 0.7 if masked else torch.ones(2, n, dtype=torch.bool)
    targets = torch.zeros(2, n, dtype=torch.bool)
    if extra:
        targets[0, keep[0, 0]] = True
        droppable[0, keep[0, 0]] = True
    got = merge_dropped(
        *moved(on, x, keep), "prumerge", features=features.to(on.device), scores=scores.to(on.device),
        targets=targets.to(on.device) if extra else None, droppable=droppable.to(on.device) if masked else None,
        neighbours=neighbours, backend=on.backend,
    )  # fmt: skip
    for b in range(2):
        want = naive_prumerge(x[b], keep[b].tolist(), features[b], scores[b], targets[b], droppable[b], neighbours)
        # At most n terms of at most max|x|, each a product and an addition.
        torch.testing.assert_close(got[b].cpu(), want.float(), rtol=0, atol=2 * n * n * 2**-24 * float(x.abs().max()))


def naive_targets(kept, count, droppable):
    left = [i for i in range(len(kept)) if droppable[i] and not kept[i]]
    return left[:: max(1, len(left) // count)][:count] if count else []


@given(st.integers(0, 20), st.integers(0, 25), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_contextual_targets(n, count, seed):
    kept, droppable = (torch.rand(2, n, generator=seeded(seed, name)) < 0.6 for name in "kd")
    got = contextual_targets(kept, count, droppable=droppable)
    each = contextual_targets(kept, torch.tensor([count, max(count - 1, 0)]), droppable=droppable)
    for b in range(2):
        assert got[b].nonzero()[:, 0].tolist() == naive_targets(kept[b], count, droppable[b])
        assert each[b].nonzero()[:, 0].tolist() == naive_targets(kept[b], max(count - b, 0), droppable[b])


def naive_visionzip(x, keep, features, targets, droppable):
    out = torch.zeros(len(keep), x.shape[1], dtype=torch.float64)
    came = {j: [] for j, i in enumerate(keep) if i >= 0 and targets[i]}
    for t in range(len(x)):
        if droppable[t] and t not in keep and came:
            came[min(came, key=lambda j: (-cosine(features[t], features[keep[j]]), j))].append(t)
    for j, i in enumerate(keep):
        if i >= 0:
            out[j] = x[i].double()
            if came.get(j):
                out[j] += sum(x[t].double() for t in came[j]) / len(came[j])
    return out


@backends
@cross(n=[2, 40], dominant=[0, 1, 10], count=[0, 1, 5], masked=[False, True])
def test_visionzip(on, n, dominant, count, masked):
    x, features = normal((3, n, 8), torch.float32, "x"), normal((3, n, 6), torch.float32, "m")
    droppable = torch.rand(3, n, generator=seeded("d", n)) < 0.8 if masked else torch.ones(3, n, dtype=torch.bool)
    kept = torch.zeros(3, n, dtype=torch.bool).scatter(1, kept_rows(3, n, min(dominant, n), "k"), True)
    targets = contextual_targets(kept, count, droppable=droppable)
    rows = [row.nonzero()[:, 0].tolist() for row in kept | targets]
    keep = torch.tensor([row + [-1] * (max(map(len, rows)) - len(row)) for row in rows], dtype=torch.int64)
    got = merge_dropped(
        *moved(on, x, keep), "visionzip", features=features.to(on.device), targets=targets.to(on.device),
        droppable=droppable.to(on.device) if masked else None, backend=on.backend,
    )  # fmt: skip
    for b in range(3):
        want = naive_visionzip(x[b], keep[b].tolist(), features[b], targets[b], droppable[b])
        # A share, a product and an addition for each of at most n rows, and the target.
        torch.testing.assert_close(got[b].cpu(), want.float(), rtol=0, atol=3 * (n + 1) * 2**-24 * float(x.abs().max()))


def naive_clusters(x, scores, dropped, share, neighbours):
    """DPC-KNN of one item, as the docstring has it."""
    pool = [i for i in range(len(x)) if dropped[i]]
    count = min(int(share * len(pool)) + 1, len(pool)) if share else 0
    pool = sorted(sorted(pool, key=lambda i: (-float(scores[i]), i))[:count])
    found = torch.full((len(x),), -1)
    if not pool:
        return found
    centres = count // 10 + 1
    distance = {(i, j): float((x[i].double() - x[j].double()).norm()) / math.sqrt(x.shape[1]) for i in pool for j in pool}
    near = min(centres if neighbours is None else neighbours, count)
    density = {i: math.exp(-sum(sorted(distance[i, j] ** 2 for j in pool)[:near]) / near) for i in pool}
    peak = {}
    for i in pool:
        denser = [distance[i, j] for j in pool if (density[j], -j) > (density[i], -i)]
        peak[i] = density[i] * min(denser, default=max(distance.values()))
    chosen = sorted(pool, key=lambda i: (-peak[i], i))[:centres]
    for i in pool:
        found[i] = i if i in chosen else min(chosen, key=lambda c: (distance[i, c], c))
    return found


@pytest.mark.parametrize("neighbours", [None, 1, 5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 7, 100])
def test_recycled_clusters(n, share, neighbours):
    """Items of different lengths in one batch."""
    x, scores = normal((3, n, 4), torch.float32, "x"), normal((3, n), torch.float32, "s")
    dropped = torch.rand(3, n, generator=seeded("d", n)) < torch.tensor([[0.9], [0.5], [0.0]])
    got = recycled_clusters(x, scores, dropped, share=share, neighbours=neighbours)
    for b in range(3):
        assert torch.equal(got[b], naive_clusters(x[b], scores[b], dropped[b], share, neighbours)), b


def test_recycled_clusters_of_equal_tokens():
    """Without noise: equal rows have equal densities, and the lower one counts as denser; integer distances are exact."""
    x = torch.zeros(1, 40, 4)
    x[:, 20:] = 1
    got = recycled_clusters(x, torch.zeros(1, 40), torch.ones(1, 40, dtype=torch.bool), share=1.0, neighbours=3)
    assert got[0].tolist() == naive_clusters(x[0], torch.zeros(40), torch.ones(40), 1.0, 3).tolist()
    assert got[0, :20].eq(0).sum() >= 16  # the first of each half leads it
    assert got[0, 20:].eq(20).sum() >= 16


@pytest.mark.parametrize("distinct", [3, 25])
@pytest.mark.parametrize("d", [3, 64, 1000])
def test_recycled_clusters_of_duplicates(d, distinct):
    """Equal densities, and distances that a product of matrices does not make 0 by itself; 8 centres, so some repeat a row."""
    x = normal((1, distinct, d), torch.float32, "x").repeat(1, 75 // distinct, 1)
    got = recycled_clusters(x, torch.zeros(1, 75), torch.ones(1, 75, dtype=torch.bool), share=1.0)
    assert torch.equal(got[0], naive_clusters(x[0], torch.zeros(75), torch.ones(75), 1.0, None))


@backends
def test_sparsevlm(on):
    n = 90
    x, scores = normal((2, n, 8), torch.float32, "x"), normal((2, n), torch.float32, "s")
    kept = torch.zeros(2, n, dtype=torch.bool).scatter(1, scores.topk(12).indices, True)
    dropped = ~kept
    dropped[:, -6:] = False  # text
    clusters = recycled_clusters(x, scores, dropped)
    centres = clusters == torch.arange(n)
    assert centres.sum(1).tolist() == [(int(0.3 * d) + 1) // 10 + 1 for d in dropped.sum(1).tolist()]
    rows = [row.nonzero()[:, 0].tolist() for row in ~dropped | centres]
    width = max(map(len, rows)) + 1
    keep = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    got = merge_dropped(*moved(on, x, keep), "sparsevlm", clusters=clusters.to(on.device), backend=on.backend).cpu()
    for b in range(2):
        for j, i in enumerate(keep[b].tolist()):
            if i < 0:
                assert got[b, j].eq(0).all()
            elif centres[b, i]:
                members = x[b, clusters[b] == i].double()
                # A mean of at most n rows.
                torch.testing.assert_close(got[b, j].double(), members.mean(0), rtol=0, atol=n * 2**-24 * float(x.abs().max()))
            else:
                assert torch.equal(got[b, j], x[b, i])


@pytest.mark.parametrize("how", ["prumerge", "visionzip", "sparsevlm"])
def test_gradcheck_of_merge_dropped(how):
    n, keep = 12, torch.tensor([[0, 3, 7, -1], [11, 2, 5, 6]])
    x = torch.randn(2, n, 3, generator=seeded("x"), dtype=torch.float64).requires_grad_()
    scores = torch.rand(2, n, generator=seeded("s"), dtype=torch.float64).requires_grad_()
    features = torch.randn(2, n, 4, generator=seeded("m"))
    targets = torch.zeros(2, n, dtype=torch.bool)
    targets[0, 3] = targets[1, 2] = True
    clusters = torch.full((2, n), -1)
    clusters[0, [3, 4, 5]], clusters[1, [2, 9]] = 3, 2
    given = {"prumerge": {"targets": targets}, "visionzip": {"targets": targets}, "sparsevlm": {"clusters": clusters}}[how]
    call = lambda x, s: merge_dropped(x, keep, how, features=features, scores=s, neighbours=3, **given)
    assert (
        torch.autograd.gradcheck(call, (x, scores)) if how == "prumerge" else torch.autograd.gradcheck(lambda x: call(x, scores), x)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["prumerge", "visionzip", "sparsevlm"])
def test_merge_dropped_in_half_precision(how, dtype):
    """The decisions and the sums are those of float32 on the same values; only the result is rounded."""
    x, features, scores = normal((2, 30, 8), dtype, "x"), normal((2, 30, 6), dtype, "m"), normal((2, 30), dtype, "s")
    keep, dropped = torch.arange(0, 30, 3).expand(2, -1), torch.arange(30).expand(2, -1) % 3 > 0
    targets = torch.arange(30).expand(2, -1) % 9 == 0
    if how == "sparsevlm":
        clusters = recycled_clusters(x, scores, dropped, share=0.8)
        assert torch.equal(clusters, recycled_clusters(x.float(), scores.float(), dropped, share=0.8))
        keep = torch.cat([keep, torch.stack([row[row >= 0].unique() for row in clusters])], 1)
        given = {"clusters": clusters}
    else:
        given = {"features": features, "scores": scores, **({"targets": targets} if how == "visionzip" else {})}
    got = merge_dropped(x, keep, how, **given)
    widened = {name: t.float() if t.is_floating_point() else t for name, t in given.items()}
    same(got, merge_dropped(x.float(), keep, how, **widened).to(dtype))


def test_merges_leave_the_host_alone():
    """Meta tensors have no values to wait for."""
    x, features = torch.empty(2, 20, 4, device="meta", requires_grad=True), torch.empty(2, 20, 3, device="meta")
    scores = torch.empty(2, 20, device="meta")
    mask, rows = torch.empty(2, 20, dtype=torch.bool, device="meta"), torch.empty(2, 5, dtype=torch.int64, device="meta")
    clusters = recycled_clusters(x, scores, mask)
    assert contextual_targets(mask, 3).shape == clusters.shape == (2, 20)
    for how in ("prumerge", "visionzip", "sparsevlm"):
        got = merge_dropped(x, rows, how, features=features, scores=scores, targets=mask, clusters=clusters)
        assert got.shape == (2, 5, 4)
        got.sum().backward()
    assert bipartite_merge(x, features, 4).hidden.shape == (2, 16, 4)


def test_merges_under_autocast():
    """Where tokens go, and their sums, are those without autocast."""
    x, features = normal((2, 40, 16), torch.float32, "x"), normal((2, 40, 64), torch.float32, "m")
    scores, keep = normal((2, 40), torch.float32, "s"), torch.arange(0, 40, 4).expand(2, -1)
    dropped, targets = torch.arange(40).expand(2, -1) % 4 > 0, torch.arange(40).expand(2, -1) % 12 == 0

    def everything():
        clusters = recycled_clusters(x, scores, dropped, share=0.9)
        return [clusters, *bipartite_merge(x, features, 12), *(
            merge_dropped(x, keep, how, features=features, scores=scores, targets=targets, clusters=clusters)
            for how in ("prumerge", "visionzip", "sparsevlm")
        )]  # fmt: skip

    with torch.autocast("cpu", torch.bfloat16):
        got = everything()
    same(got, everything())


@pytest.mark.parametrize("how", ["prumerge", "visionzip", "sparsevlm"])
def test_merge_dropped_compiles_to_one_graph(how):
    x, features = normal((2, 20, 8), torch.float32, "x"), normal((2, 20, 6), torch.float32, "m")
    scores, keep = normal((2, 20), torch.float32, "s"), torch.arange(0, 20, 4).expand(2, -1)
    dropped, targets = torch.arange(20).expand(2, -1) % 4 > 0, torch.arange(20).expand(2, -1) % 8 == 0

    def call(x):
        clusters = recycled_clusters(x, scores, dropped, share=0.9)
        merged = bipartite_merge(x, features, 3)
        return merge_dropped(x, keep, how, features=features, scores=scores, targets=targets, clusters=clusters), *merged

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    same(list(got), list(call(x)))


@pytest.mark.parametrize("how", ["prumerge", "visionzip", "sparsevlm"])
@pytest.mark.parametrize(("batch", "n", "k"), [(0, 5, 2), (2, 5, 0), (2, 0, 0), (2, 0, 2)])
def test_merge_dropped_of_nothing(how, batch, n, k):
    x, keep = torch.ones(batch, n, 3), torch.full((batch, k), -1)
    mask = torch.zeros(batch, n, dtype=torch.bool)
    got = merge_dropped(x, keep, how, features=x, scores=torch.ones(batch, n), targets=mask, clusters=torch.full((batch, n), -1))
    assert torch.equal(got, torch.zeros(batch, k, 3))
    assert bipartite_merge(x, x, 2).hidden.shape == (batch, n - min(2, max(n - 1, 0) // 2), 3)


X = torch.zeros(2, 4, 3)
INDEX, MASK, SCORES = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: weighted_merge(X[0], INDEX, INDEX), ValueError, "x must be"),
        (lambda: weighted_merge(X.int(), INDEX, INDEX), TypeError, "x must be float32"),
        (lambda: weighted_merge(X, INDEX.int(), INDEX), TypeError, "offsets must be int64"),
        (lambda: weighted_merge(X, INDEX[:, :0], INDEX), ValueError, "offsets must be .* at least one column"),
        (lambda: weighted_merge(X, INDEX, INDEX[:1]), ValueError, r"rows must be \[B, E\] with B = 2"),
        (lambda: weighted_merge(X, INDEX, INDEX, SCORES[:, :3]), ValueError, r"weights must be \[2, 4\]"),
        (lambda: weighted_merge(X, INDEX, INDEX, INDEX), TypeError, "weights must be floating point"),
        (lambda: weighted_merge(X, INDEX, INDEX, backend="gpu"), ValueError, "backend must be one of"),
        (lambda: bipartite_merge(X, X[:, :3], 1), ValueError, r"features must be \[B, N, C\]"),
        (lambda: bipartite_merge(X, INDEX, 1), TypeError, "features must be floating point"),
        (lambda: bipartite_merge(X, X, -1), ValueError, "r must be an integer of at least 0"),
        (lambda: bipartite_merge(X, X, 1, order="score"), ValueError, "order must be one of 'position', 'released'"),
        (lambda: bipartite_merge(X, X, 1, protected=-1), ValueError, "protected must be"),
        (lambda: bipartite_merge(X, X, 1, size=SCORES[:1]), ValueError, "size must be"),
        (lambda: merge_dropped(X, INDEX, "any"), ValueError, "how must be one of"),
        (lambda: merge_dropped(X, INDEX.float(), "prumerge"), TypeError, "keep must be int64"),
        (lambda: merge_dropped(X, INDEX, "prumerge"), ValueError, "features must be given for how='prumerge'"),
        (lambda: merge_dropped(X, INDEX, "prumerge", features=X), ValueError, "scores must be given"),
        (lambda: merge_dropped(X, INDEX, "visionzip", features=X), ValueError, "targets must be given"),
        (lambda: merge_dropped(X, INDEX, "visionzip", features=X, targets=INDEX), TypeError, "targets must be bool"),
        (lambda: merge_dropped(X, INDEX, "sparsevlm"), ValueError, "clusters must be given"),
        (lambda: merge_dropped(X, INDEX, "sparsevlm", clusters=INDEX[:, :2]), ValueError, r"clusters must be \[B, N\]"),
        (lambda: merge_dropped(X, INDEX, "sparsevlm", clusters=INDEX, droppable=MASK[:, :2]), ValueError, "droppable must be"),
        (lambda: contextual_targets(SCORES, 2), TypeError, "kept must be bool"),
        (lambda: recycled_clusters(X, SCORES, MASK, share=2.0), ValueError, "share must lie"),
        (lambda: recycled_clusters(X, X, MASK), ValueError, "scores must be"),
        (lambda: recycled_clusters(X, SCORES, None), TypeError, "dropped must be a tensor"),
    ],
)  # fmt: skip
def test_merge_errors(call, error, said):
    with pytest.raises(error, match=said):
        call()


@pytest.mark.parametrize(
    ("offsets", "rows", "message"),
    [
        ([[-1, 2]], [[0, 1, 2]], "offsets must ascend"),
        ([[0, 4]], [[0, 1, 2]], "offsets must ascend"),
        ([[2, 1]], [[0, 1, 2]], "offsets must ascend"),
        ([[0, 3]], [[0, 3, 2]], r"rows must lie in \[0, 3\), got 3"),
        ([[0, 3]], [[0, -1, 2]], r"rows must lie in \[0, 3\), got -1"),
    ],
)
def test_edges_that_do_not_exist(on, offsets, rows, message):
    """A negative offset read before the buffer, and a row beyond the last one the next item."""
    x = torch.tensor([[[1.0], [2.0], [4.0]], [[torch.nan]] * 3], device=on.device)
    lists = torch.tensor(offsets * 2, device=on.device), torch.tensor(rows * 2, device=on.device)
    with pytest.raises(ValueError, match=message):
        weighted_merge(x, *lists, backend=on.backend)
    unread = plain_merge(x[:1].expand(2, 3, 1), *lists)
    assert unread.isfinite().all()
    assert unread.max() <= 7


def test_cosines_of_tiny_rows(on):
    """The squares of 1e-25 are nothing in float32: cosines reached 1e13, and the wrong pair merged."""
    metric = normal((2, 10, 8), torch.float32, "tiny").to(on.device)
    x = normal((2, 10, 4), torch.float32, "x").to(on.device)
    for scale in (2.0**-83, 2.0**-120, 2.0**90):
        got = bipartite_merge(x, metric * scale, 3, backend=on.backend)
        same(list(got), list(bipartite_merge(x, metric, 3, backend=on.backend)))


def test_features_under_their_old_name():
    """``metric`` is passed on for one release, with a warning."""
    x, keep = normal((1, 12, 4), torch.float32, "x"), torch.tensor([[0, 3, 7]])
    with pytest.warns(DeprecationWarning, match=r"bipartite_merge\(metric=\) is deprecated .* use features="):
        got = bipartite_merge(x, metric=x, r=3)
    same(list(got), list(bipartite_merge(x, x, 3)))
    given = {"scores": torch.ones(1, 12)}
    with pytest.warns(DeprecationWarning, match=r"merge_dropped\(metric=\)"):
        got = merge_dropped(x, keep, "prumerge", metric=x, **given)
    same(got, merge_dropped(x, keep, "prumerge", features=x, **given))
    with pytest.raises(TypeError, match="both features and metric"):
        merge_dropped(x, keep, "prumerge", features=x, metric=x, **given)
