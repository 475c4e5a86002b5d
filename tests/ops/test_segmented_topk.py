"""segmented_topk: exact on every backend, for ties, NaN, infinities and zeros of both signs."""

from __future__ import annotations

import importlib

import pytest
import torch
from support import oracle
from support.cases import (
    BATCHES,
    FLOATS,
    KS,
    LARGE,
    ORDERS,
    SCORES,
    SIZES,
    STRIDES,
    count,
    cross,
    fewer,
    same,
    same_values,
    scores,
    strided,
)  # fmt: skip

import v2drop_kernels as vk


def check(on, x, segments, ks, got, order, **arguments):
    """The oracle judges the reference; the reference judges the others."""
    if on.backend == "reference":
        values, indices = oracle.topk(x, segments, ks, order)
    else:
        values, indices = vk.reference.segmented_topk(x, ks, order=order, **arguments)
    same(got.indices, indices)
    same_values(got.values, values)


@cross(rounds=2, together="values k order", N=SIZES, values=SCORES, k=KS, dtype=FLOATS, order=ORDERS)
def test_segmented_topk(on, N, values, k, dtype, order):
    x = scores(values, (2, N), dtype)
    k = count(k, N)
    got = vk.segmented_topk(x.to(on.device), k, order=order, backend=on.backend)
    check(on, x, [[list(range(N))]] * 2, [k] * 2, got, order)


@cross(b=BATCHES, k=[*KS, "list", "tensor"], order=ORDERS)
def test_segmented_topk_of_segments(on, b, k, order):
    x = scores("three", b.lead, torch.float32)
    got = vk.segmented_topk(x.to(on.device), b.k(k), order=order, backend=on.backend, **b.arguments(on.device))
    check(on, x, b.segments, b.ks(k), got, order, **b.arguments())


@cross(b=LARGE, values=fewer(SCORES, ["three"]), k=["n/3"], order=ORDERS)
def test_segmented_topk_of_large_segments(on, b, values, k, order):
    x = scores(values, b.lead, torch.bfloat16)
    got = vk.segmented_topk(x.to(on.device), b.k(k), order=order, backend=on.backend, **b.arguments(on.device))
    check(on, x, b.segments, b.ks(k), got, order, **b.arguments())


@cross(b=[BATCHES[0], BATCHES[5], BATCHES[10], BATCHES[13]], strides=STRIDES, dtype=FLOATS)
def test_segmented_topk_of_strided_scores(on, b, strides, dtype):
    x = scores("random", b.lead, dtype)
    y = strided(x.to(on.device), strides)
    got = vk.segmented_topk(y, b.k("n/3"), backend=on.backend, **b.arguments(on.device))
    check(on, x, b.segments, b.ks("n/3"), got, "position", **b.arguments())


def test_segmented_topk_of_expanded_scores(on):
    x = scores("random", (1, 70), torch.float32).expand(3, 70)
    got = vk.segmented_topk(x.to(on.device), 20, backend=on.backend)
    check(on, x, [[list(range(70))]] * 3, [20] * 3, got, "position")


@pytest.mark.backends("reference", "cpu")
@cross(N=SIZES, values=SCORES, order=ORDERS)
def test_segmented_topk_of_float64(on, N, values, order):
    x = scores(values, (2, N), torch.float64)
    got = vk.segmented_topk(x, N // 2, order=order)
    check(on, x, [[list(range(N))]] * 2, [N // 2] * 2, got, order)


@pytest.mark.parametrize("order", ORDERS)
def test_segmented_topk_is_the_stable_sort(on, order):
    """The equivalent plain torch of the docstring, which also ranks NaN above +inf and -0.0 beside 0.0."""
    x = scores("special", (3, 200), torch.float32)
    want = torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :50]
    got = vk.segmented_topk(x.to(on.device), 50, order=order, backend=on.backend)
    same(got.indices, want if order == "score" else want.sort().values)


def test_segmented_topk_ranks_nan_inf_and_zeros(on):
    x = torch.tensor([[-torch.inf, 0.0, -torch.nan, torch.inf, -0.0, torch.nan, -1.0, torch.inf, 0.0]], device=on.device)
    got = vk.segmented_topk(x, 9, order="score", backend=on.backend)
    assert got.indices.tolist() == [[2, 5, 3, 7, 1, 4, 8, 6, 0]]
    assert vk.segmented_topk(x, 5, backend=on.backend).indices.tolist() == [[1, 2, 3, 5, 7]]


def test_segmented_topk_separates_neighbouring_floats(on):
    """Scores one unit in the last place apart, of both signs, around the powers of two where the exponent changes."""
    bits = torch.tensor([0x3F7FFFFE, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 1, 2, 0x7F7FFFFF], dtype=torch.int32)
    x = bits.view(torch.float32)
    x = torch.cat([x, -x])[torch.randperm(14, generator=torch.Generator().manual_seed(0))][None]
    for k in range(15):
        got = vk.segmented_topk(x.to(on.device), k, order="score", backend=on.backend)
        same(got.indices, torch.sort(x, descending=True, stable=True).indices[:, :k])


@pytest.mark.backends("triton")
@cross(N=[300, 9000], values=["equal", "three", "special"], k=["n/3"])
def test_few_distinct_scores_end_the_search_early(on, N, values, k, monkeypatch):
    """A gap between two values is not halved 30 times: the search moves on to real keys."""
    if on.device == "cuda":
        pytest.skip("counts calls of a helper, which only Triton's interpreter makes one by one")
    keys, steps = importlib.import_module("v2drop_kernels.ops.topk.triton_keys"), []
    narrow = keys._narrow
    monkeypatch.setattr(keys, "_narrow", lambda *args: steps.append(1) or narrow(*args))
    x = scores(values, (1, N), torch.float32)
    got = vk.segmented_topk(x, count(k, N), backend=on.backend)
    check(on, x, [[list(range(N))]], [count(k, N)], got, "position")
    assert len(steps) <= 20


def test_segmented_topk_shares_nothing_with_its_input(on):
    x = torch.ones(1, 4, device=on.device)
    got = vk.segmented_topk(x, 4, backend=on.backend)
    x.zero_()
    assert got.values.tolist() == [[1.0] * 4]


def test_segmented_topk_passes_the_gradient_of_its_values(on):
    """Values are a gather of the scores: the gradient goes back to the chosen ones, whatever order they are listed
    in."""
    for b in (BATCHES[0], BATCHES[6], BATCHES[10], BATCHES[16]):
        x = scores("random", b.lead, torch.float32)
        grads = []
        for device, backend in ((on.device, on.backend), ("cpu", "reference")):
            leaf = x.to(device).detach().requires_grad_()
            got = vk.segmented_topk(leaf, b.k("list"), order="score", backend=backend, **b.arguments(device))
            weight = torch.arange(1.0, got.values.numel() + 1, device=device).view(got.values.shape)
            (got.values * weight)[got.indices >= 0].sum().backward()
            assert not got.indices.requires_grad
            grads.append(leaf.grad.cpu())
        assert grads[0].count_nonzero() == sum(min(k, len(s)) for k, s in zip(b.ks("list"), b.flat, strict=True))
        assert torch.equal(*grads)


@pytest.mark.backends("cpu")
def test_segmented_topk_of_doubles_that_are_one_float(on):
    """Scores that differ in the lower half of their bits only, ties among them, and a mask."""
    x = 1 + torch.tensor([[3.0, 1, 2, 3, 0, 2, 3, 1]], dtype=torch.float64) * 2.0**-50
    assert x.float().unique().numel() == 1
    assert vk.segmented_topk(x, 4, order="score").indices.tolist() == [[0, 3, 6, 2]]
    assert vk.segmented_topk(x, 2).indices.tolist() == [[0, 3]]
    among = torch.tensor([[False, True, True, False, True, True, True, True]])
    assert vk.segmented_topk(x, 3, droppable=among).indices.tolist() == [[2, 5, 6]]
    assert vk.segmented_topk(torch.zeros(1, 5, dtype=torch.float64), 3).indices.tolist() == [[0, 1, 2]]


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("kind", ["list", "tuple", "int32", "int64", "strided"])
@pytest.mark.parametrize("k", [0, 1, 3, 2**70])
def test_segmented_topk_of_packed_items(on, kind, k):
    """The table of a packed batch is made by the library; offsets of every kind give what the reference gives."""
    cu, x = [0, 4, 4, 5, 12], scores("three", (12,), torch.float32)
    given = {
        "list": cu, "tuple": tuple(cu), "int32": torch.tensor(cu, dtype=torch.int32), "int64": torch.tensor(cu),
        "strided": torch.tensor([x for at in cu for x in (at, -1)])[::2],
    }[kind]  # fmt: skip
    got, want = vk.segmented_topk(x, k, cu_seqlens=given), vk.reference.segmented_topk(x, min(k, 99), cu_seqlens=cu)
    same(got.indices, want.indices)
    same_values(got.values, want.values)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0, 3, 2, 5], "must ascend"),
        ([1, 5], "must start with 0"),
        ([0, 4], "must end at T"),
        ([0, 2.5, 5], "must be an int"),
        ([], "must start with 0"),
    ],
)
def test_segmented_topk_of_wrong_packed_items(on, cu, message):
    with pytest.raises((ValueError, TypeError), match=message):
        vk.segmented_topk(torch.zeros(5), 1, cu_seqlens=cu)
