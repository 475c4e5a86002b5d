"""variation_score: bit-equal where float32 is exact, else within twice PyTorch's own float32 error against float64."""

from __future__ import annotations

import pytest
import torch
from support.cases import (
    FLOATS,
    METRICS,
    SIZES,
    STRIDES,
    cross,
    fewer,
    hidden_pair,
    integers,
    normal,
    same,
    same_values,
    seeded,
    strided,
)  # fmt: skip
from support.oracle import eager, exact

import v2drop_kernels as vk

ULP = 2.0**-23


def score(on, prev, cur, **options):
    got = vk.variation_score(prev.to(on.device), cur.to(on.device), backend=on.backend, **options)
    assert (got.dtype, got.shape) == (torch.float32, prev.shape[:-1])
    return got.cpu()


@cross(N=SIZES, D=[1, 3, 64, 130], dtype=FLOATS, metric=["l2", "l1"])
def test_variation_score(on, N, D, dtype, metric):
    prev, cur = hidden_pair((2, N, D), dtype)
    same(score(on, prev, cur, metric=metric), exact(prev, cur, metric).float())


@cross(D=[2048, 3584, 4096, 4097], dtype=FLOATS, metric=["l2", "l1"])
def test_variation_score_of_wide_rows(on, D, dtype, metric):
    prev, cur = hidden_pair((1, 5, D), dtype)
    same(score(on, prev, cur, metric=metric), exact(prev, cur, metric).float())


@cross(dtype=FLOATS, metric=["l2", "l1"], prev_strides=STRIDES, cur_strides=STRIDES)
def test_variation_score_of_strided_rows(on, dtype, metric, prev_strides, cur_strides):
    prev, cur = hidden_pair((2, 17, 40), dtype)
    got = score(on, strided(prev.to(on.device), prev_strides), strided(cur.to(on.device), cur_strides), metric=metric)
    same(got, exact(prev, cur, metric).float())


@cross(metric=METRICS, shape=[(0, 4, 8), (2, 0, 8), (2, 4, 0), (0, 8), (5, 0)])
def test_variation_score_of_nothing(on, metric, shape):
    """No rows give no scores; rows without elements did not change, and have no direction: cosine 1."""
    cu = [0, shape[0]] if len(shape) == 2 else None
    got = score(on, torch.zeros(shape), torch.zeros(shape), metric=metric, cu_seqlens=cu)
    same(got, torch.full(shape[:-1], 1.0 if metric == "cosine" else 0.0))


@cross(metric=["l2", "l1"], dtype=FLOATS)
def test_variation_score_of_expanded_and_packed_rows(on, metric, dtype):
    prev, cur = hidden_pair((3, 20, 33), dtype)
    one = prev[:1].expand(3, 20, 33)
    same(score(on, one, cur, metric=metric), exact(one, cur, metric).float())
    packed = score(on, prev.flatten(0, 1), cur.flatten(0, 1), metric=metric, cu_seqlens=[0, 20, 60])
    same(packed, exact(prev, cur, metric).float().flatten())


@cross(D=fewer([64, 576, 4096], [64, 576]), dtype=FLOATS, metric=METRICS)
def test_variation_score_of_real_values(on, D, dtype, metric):
    """At most twice PyTorch's own largest float32 error over 200 rows, and one unit in the last place of the largest
    score: errors are whole units there, so a maximum of one against none would otherwise fail."""
    prev = normal((1, 200, D), dtype, "prev")
    cur = (prev.float() + 0.1 * normal((1, 200, D), torch.float32, "change")).to(dtype)
    want = exact(prev, cur, metric)
    error = (score(on, prev, cur, metric=metric) - want).abs().max()
    assert error <= 2 * (eager(prev, cur, metric) - want).abs().max() + ULP * want.max()


@cross(dtype=FLOATS, closeness=[3e-2, 1e-3])
def test_variation_score_cosine_of_nearly_parallel_rows(on, dtype, closeness):
    """1 - cos in float32 loses every digit when h_prev and h_cur are parallel but for 1e-3: 1 - cos is then 5e-7, eager
    float32 errs by 1e-7, and the ranking is noise. Taken from the difference of the rows, it keeps its digits:
    |a - b|^2 and (|a| - |b|)^2 err by at most D * 2^-24 of their terms."""
    D = 512
    prev = normal((1, 100, D), torch.float32, "prev").to(dtype)
    cur = (prev.float() * (1 + closeness * normal((1, 100, D), torch.float32, "change"))).to(dtype)
    want = exact(prev, cur, "cosine")
    a, b = prev.double().norm(dim=-1), cur.double().norm(dim=-1)
    lost = D * 2.0**-24 * ((prev.double() - cur.double()).square().sum(-1) + 2 * (a - b).abs() * (a + b) + D * 2.0**-24 * a * b)
    error = (score(on, prev, cur, metric="cosine") - want).abs()
    # The reference takes 1 - cos in float64 and rounds it to float32 once.
    assert (error <= lost / (2 * a * b) + ULP * want.abs()).all()


def test_variation_score_cosine_of_zero_parallel_and_opposite_rows(on):
    a = integers((1, 6, 40), torch.float32, "a")
    a[0, 2] = 0
    b = torch.stack([a[0, 0], -a[0, 1], a[0, 2], torch.zeros(40), 2 * a[0, 4], a[0, 5]])[None]
    got = score(on, a, b, metric="cosine")[0]
    assert got[[2, 3]].tolist() == [1.0, 1.0]
    # Parallel rows cancel exactly or to the rounding of |b| - |a| (D = 40 terms); opposite ones are 2 within it.
    torch.testing.assert_close(got[[0, 4, 5]], torch.zeros(3), rtol=0, atol=40 * ULP)
    torch.testing.assert_close(got[1], torch.tensor(2.0), rtol=40 * ULP, atol=0)
    assert (got >= 0).all()


@cross(
    together="dtype score_dtype metric",
    dtype=[torch.float16, torch.bfloat16],
    score_dtype=[torch.float16, torch.bfloat16, torch.float32],
    metric=["l2", "l1"],
)
def test_variation_score_rounds_to_score_dtype(on, dtype, score_dtype, metric):
    """The difference is rounded, then the score: what eager PyTorch in that dtype does. Differences of up to 4096
    round."""
    high = 2048 if dtype == torch.float16 else 256
    prev, cur = integers((2, 30, 16), dtype, "a", high=high), integers((2, 30, 16), dtype, "b", high=high)
    if dtype == torch.float16:  # sixteen squares of twelve bits would not be exact in float32
        cur[..., 1:] = prev[..., 1:]
    d = (cur.float() - prev.float()).to(score_dtype)
    wide = torch.linalg.vector_norm(d.double(), ord={"l2": 2, "l1": 1}[metric], dim=-1)
    want = wide.float().to(score_dtype).float()
    got = score(on, prev, cur, metric=metric, score_dtype=score_dtype)
    same(got, want)
    if dtype == score_dtype:  # the published code
        same(got, torch.linalg.vector_norm(cur - prev, ord={"l2": 2, "l1": 1}[metric], dim=-1).float())


@cross(score_dtype=[torch.float16, torch.bfloat16])
def test_variation_score_cosine_rounds_only_the_score(on, score_dtype):
    prev, cur = normal((1, 100, 32), torch.float32, "a"), normal((1, 100, 32), torch.float32, "b")
    got = score(on, prev, cur, metric="cosine", score_dtype=score_dtype)
    same(got, score(on, prev, cur, metric="cosine").to(score_dtype).float())


@cross(dtype=FLOATS, metric=METRICS)
def test_variation_score_of_nan_and_inf(on, dtype, metric):
    """inf - inf is NaN, and NaN stays NaN: it ranks highest in the selection, so no max may swallow it."""
    prev, cur = torch.ones(1, 6, 9, dtype=dtype), torch.full((1, 6, 9), 2.0, dtype=dtype)
    cur[0, 0, 3], prev[0, 1, 0], cur[0, 2, 8], prev[0, 3, 8] = torch.nan, torch.nan, torch.inf, -torch.inf
    prev[0, 4, 1] = cur[0, 4, 1] = torch.inf
    got = score(on, prev, cur, metric=metric)
    # A row that holds inf has no direction: inf / inf.
    unbounded = torch.nan if metric == "cosine" else torch.inf
    last = {"l2": 3.0, "l1": 9.0, "cosine": 0.0}[metric]
    same_values(got, torch.tensor([[torch.nan, torch.nan, unbounded, unbounded, torch.nan, last]]))


@pytest.mark.parametrize("metric", METRICS)
def test_variation_score_of_negative_zero(on, metric):
    """-0.0 and 0.0 are the same vector."""
    zero = torch.zeros(1, 3, 8)
    got = score(on, zero, -zero, metric=metric)
    same_values(got, torch.full((1, 3), 1.0 if metric == "cosine" else 0.0))


@pytest.mark.backends("reference")
@cross(metric=METRICS, N=[1, 63])
def test_variation_score_of_float64(on, metric, N):
    prev = torch.randn(2, N, 40, generator=seeded("p"), dtype=torch.float64)
    cur = torch.randn(2, N, 40, generator=seeded("c"), dtype=torch.float64)
    got = vk.variation_score(prev, cur, metric=metric)
    assert got.dtype == torch.float64
    # 40 terms in float64, in another order.
    torch.testing.assert_close(got, exact(prev, cur, metric), rtol=40 * 2.0**-52, atol=40 * 2.0**-52)


@pytest.mark.backends("cpu", "triton", "cuda")
def test_variation_score_of_float32_agrees_with_the_reference(on):
    """One row of every length up to two vectors of 16, where remainders begin and end."""
    for D in range(34):
        prev, cur = hidden_pair((1, 2, D), torch.float32)
        same(score(on, prev, cur), vk.reference.variation_score(prev, cur))


def exact_cosine(prev, cur):
    """1 - cos of float64 rows from their unit vectors, which cancels nowhere, and its two gradients."""
    a, b = prev.double(), cur.double()
    long_a, long_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    u, v = a / long_a, b / long_b
    score = (u - v).square().sum(-1) / 2
    cosine = 1 - score[..., None]
    return score, -(v - cosine * u) / long_a, -(u - cosine * v) / long_b


@cross(size=[1e-30, 1e-19, 1.0, 1e19, 1e24], ratio=[1, 2, 100, 1e4, 1e6], dim=[1, 3, 63, 577])
def test_cosine_of_any_norms(on, dim, ratio, size):
    """In float32 it cancelled where norms differ: 1.6e-3 at a ratio of 1e4, 2.003 for opposite rows; beyond 1.8e19 it was NaN.

    8 units in the last place of the score, and of the largest element of a gradient row.
    """
    ulp = 2.0**-23
    for near in (1.0, 1e-2):  # rows in any direction, and nearly parallel ones
        prev = normal((2, 5, dim), torch.float32, "p", dim) * size
        cur = (normal((2, 5, dim), torch.float32, "c", dim) * near * size + (prev if near < 1 else 0)) * ratio
        a, b = (x.to(on.device, copy=True).requires_grad_() for x in (prev, cur))
        got = vk.variation_score(a, b, metric="cosine", backend=on.backend)
        gradients = torch.autograd.grad(got.sum(), (a, b))
        score, *wanted = exact_cosine(prev, cur)
        assert ((got.cpu().double() - score).abs() <= 8 * ulp * score + 1e-15).all()
        for grad, want, of in zip(gradients, wanted, (prev, cur), strict=True):
            noise = 1e-15 / of.double().norm(dim=-1)  # rounding in float64, where the exact gradient is 0
            assert ((grad.cpu().double() - want).abs().amax(-1) <= 8 * ulp * want.abs().amax(-1) + noise).all()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("metric", ["l2", "l1"])
def test_short_rows_have_the_bits_of_long_ones(on, metric):
    """Rows of up to 8 channels are scored many at once; zeros at their end, and a gap between rows, take the other way."""
    for dim in (1, 2, 3, 5, 8):
        size = 10.0 ** torch.linspace(-30, 18, 70)[:, None]  # squares that vanish, and squares that overflow
        prev, cur = (normal((2, 70, dim), torch.float32, name, dim) * size for name in "xy")
        wide = [torch.nn.functional.pad(x, (0, 64 - dim)) for x in (prev, cur)]
        gaps = [torch.nn.functional.pad(x, (0, 1))[..., :dim] for x in (prev, cur)]
        got = vk.variation_score(prev, cur, metric=metric)
        same(got, vk.variation_score(*wide, metric=metric))
        same(got, vk.variation_score(*gaps, metric=metric))
