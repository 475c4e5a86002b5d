"""variation_topk: the selection of the scores that variation_score gives, in one call."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.cases import (
    BATCHES,
    FLOATS,
    KS,
    LARGE,
    METRICS,
    ORDERS,
    SIZES,
    STRIDES,
    count,
    cross,
    hidden_pair,
    normal,
    same,
    same_values,
    strided,
)  # fmt: skip
from support.oracle import exact

import v2drop_kernels as vk


def check(on, prev, cur, b, k, order, metric="l2"):
    """Integer-valued rows: scores, and so ties, are exact on every backend."""
    got = vk.variation_topk(
        prev.to(on.device),
        cur.to(on.device),
        b.k(k),
        metric=metric,
        order=order,
        backend=on.backend,
        **b.arguments(on.device),
    )
    values, indices = oracle.topk(exact(prev, cur, metric).float(), b.segments, b.ks(k), order)
    same(got.indices, indices)
    same_values(got.values, values)


@cross(together="k dtype metric", N=SIZES, k=KS, dtype=FLOATS, metric=["l2", "l1"], order=ORDERS)
def test_variation_topk(on, N, k, dtype, metric, order):
    prev, cur = hidden_pair((2, N, 24), dtype)
    got = vk.variation_topk(prev.to(on.device), cur.to(on.device), count(k, N), metric=metric, order=order, backend=on.backend)
    want = vk.reference.segmented_topk(exact(prev, cur, metric).float(), count(k, N), order=order)
    same(got.indices, want.indices)
    same_values(got.values, want.values)


@cross(b=[*BATCHES, *LARGE], k=["n/3", "list", "tensor"], order=ORDERS)
def test_variation_topk_of_segments(on, b, k, order):
    prev, cur = hidden_pair((*b.lead, 8), torch.bfloat16)
    check(on, prev, cur, b, k, order)


@cross(b=[BATCHES[5], BATCHES[10], BATCHES[16]], strides=STRIDES, dtype=FLOATS)
def test_variation_topk_of_strided_rows(on, b, strides, dtype):
    prev, cur = (strided(h, strides) for h in hidden_pair((*b.lead, 18), dtype))
    check(on, prev, cur, b, "n/3", "position")


@cross(dtype=FLOATS, metric=METRICS, N=[577], D=[256])
def test_variation_topk_of_real_values(on, dtype, metric, N, D):
    """Two backends may round scores apart, so a token may change sides only where its float64 score lies within the
    rounding of the threshold. A float32 sum of D non-negative terms in any order errs by at most D * 2^-24 of itself;
    the difference, the square and the root by 2^-24 each. Cosine errs by that share of its terms, which are at most
    2."""
    prev, cur = normal((2, N, D), dtype, "a"), normal((2, N, D), dtype, "b")
    k = N // 3
    got = vk.variation_topk(prev.to(on.device), cur.to(on.device), k, metric=metric, backend=on.backend).indices.cpu()
    s = exact(prev, cur, metric)
    rounding = 2 * (D + 4) * 2.0**-24 * (2.0 if metric == "cosine" else s.max())
    threshold = s.sort(-1, descending=True).values[:, k - 1 : k]
    chosen = torch.zeros(s.shape, dtype=torch.bool).scatter(1, got, True)
    assert chosen.sum(1).tolist() == [k, k]
    assert chosen[s > threshold + rounding].all()
    assert not chosen[s < threshold - rounding].any()
    assert ((s - threshold).abs() <= rounding).sum() <= 0.05 * 2 * N, "the bound says nothing if it holds for every token"


@cross(b=[BATCHES[0], BATCHES[6], BATCHES[12], BATCHES[16]], metric=METRICS, dtype=FLOATS)
def test_variation_topk_is_score_then_select(on, b, metric, dtype):
    """On one backend the fused call returns the bits of the two calls that it replaces, and the values of its own
    scores."""
    prev, cur = (h.to(on.device) for h in (normal((*b.lead, 96), dtype, "a"), normal((*b.lead, 96), dtype, "b")))
    arguments = b.arguments(on.device)
    fused = vk.variation_topk(prev, cur, b.k("n/3"), metric=metric, order="score", backend=on.backend, **arguments)
    scores = vk.variation_score(prev, cur, metric=metric, cu_seqlens=[0] if b.packed else None, backend=on.backend)
    apart = vk.segmented_topk(scores, b.k("n/3"), order="score", backend=on.backend, **arguments)
    same(fused.indices, apart.indices)
    same(fused.values, apart.values)


def test_variation_topk_never_reads_rows_that_do_not_compete(on):
    """Rows outside the spans, or False in the mask, hold NaN, which would rank first."""
    prev, cur = hidden_pair((2, 50, 16), torch.float32)
    mask = torch.zeros(2, 50, dtype=torch.bool)
    mask[:, 10:40] = True
    want = vk.reference.variation_topk(prev, cur, 7, droppable=(10, 40))
    cur = torch.where(mask[..., None], cur, torch.nan)
    for droppable in ((10, 40), mask.to(on.device), vk.TokenLayout.from_mask(mask.to(on.device), 30)):
        got = vk.variation_topk(prev.to(on.device), cur.to(on.device), 7, droppable=droppable, backend=on.backend)
        same(got.indices, want.indices)
        same_values(got.values, want.values)


def test_variation_topk_takes_nan_rows_first(on):
    """fp16 activations that overflow give inf - inf = NaN: the token changed beyond measure, so it stays."""
    prev, cur = hidden_pair((1, 20, 8), torch.float16)
    prev[0, 13, 2] = cur[0, 13, 2] = torch.inf
    cur[0, 4, 0] = torch.inf
    got = vk.variation_topk(prev.to(on.device), cur.to(on.device), 2, order="score", backend=on.backend)
    assert got.indices.tolist() == [[13, 4]]
    assert got.values[0, 0].isnan()
    assert got.values[0, 1] == torch.inf


@cross(score_dtype=[torch.bfloat16, torch.float16], N=[577])
def test_variation_topk_rounds_to_score_dtype(on, score_dtype, N):
    """Rounded scores tie many times over at the cut; the smaller index stays."""
    prev, cur = hidden_pair((1, N, 200), torch.bfloat16)
    scores = exact(prev, cur, "l2").float().to(score_dtype).float()
    want = vk.reference.segmented_topk(scores, N // 3)
    got = vk.variation_topk(prev.to(on.device), cur.to(on.device), N // 3, score_dtype=score_dtype, backend=on.backend)
    same(got.indices, want.indices)
    same_values(got.values, want.values)


@pytest.mark.parametrize("metric", METRICS)
def test_variation_topk_passes_gradients(on, metric):
    """The values carry the gradient of the scores of the chosen tokens; all other rows get zero."""
    grads = []
    for device, backend in ((on.device, on.backend), ("cpu", "reference")):
        prev, cur = (h.requires_grad_() for h in hidden_pair((1, 30, 16), torch.float32, device=device))
        got = vk.variation_topk(prev, cur, 5, metric=metric, droppable=(4, 29), backend=backend)
        got.values.sum().backward()
        assert not got.indices.requires_grad
        grads += [prev.grad.cpu(), cur.grad.cpu()]
    for got, want in zip(grads[:2], grads[2:], strict=True):
        # One element: a product and a quotient of float32 numbers of size one, and sums of 16 terms.
        torch.testing.assert_close(got, want, rtol=20 * 2.0**-23, atol=20 * 2.0**-23)
        assert got[0].any(-1).sum() <= 5
