"""key_norm_score, cosine_to_pivots, frame_similarity and random_score, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import DYNAMIC, FLOATS, cross, far_apart, fewer, integers, normal, same, seeded, strided
from torch._dynamo.testing import CompileCounterWithBackend

import v2drop_kernels as vk

ULP = 2.0**-23
STRIDES = ["contiguous", "inner", "rows", "batch", "transposed"]


def norm(on, k, **options):
    got = vk.key_norm_score(k.to(on.device), backend=on.backend, **options)
    assert got.dtype == torch.float32
    return got.cpu()


def cosine(on, x, pivots):
    got = vk.cosine_to_pivots(x.to(on.device), pivots.to(on.device), backend=on.backend)
    assert (got.dtype, got.shape) == (torch.float32, (*pivots.shape, x.shape[1]))
    return got.cpu()


def cosines(x, pivots):
    """Item by item, pivot by pivot; and how far float32 may be off: a product of D terms in any order, even one that truncates as
    tensor cores do, by D ULP of |a| |b|, the norms by D ULP of theirs, and two divisions."""
    want = torch.zeros(*pivots.shape, x.shape[1], dtype=torch.float64)
    for i, item in enumerate(x.double()):
        for j, pivot in enumerate(pivots[i].tolist()):
            for row in range(len(item)):
                length = item[row].norm() * (item[pivot].norm() if 0 <= pivot < len(item) else 0)
                want[i, j, row] = (item[row] @ item[pivot]) / length if length > 0 else 0
    return want, (2 * x.shape[2] + 4) * ULP


@cross(shape=[(2, 3, 63, 16), (1, 8, 577, 128), (3, 1, 1, 300), (2, 2, 40, 1)], dtype=FLOATS, which=["l1", "l2"])
def test_key_norm_score_of_integers_is_exact(on, shape, dtype, which):
    k = integers(shape, dtype, "k")
    order = 1 if which == "l1" else 2
    want = torch.linalg.vector_norm(k.double().transpose(1, 2).flatten(2), ord=order, dim=-1)
    same(norm(on, k, norm=which), want.float())


@cross(dtype=FLOATS, which=["l1", "l2"])
def test_key_norm_score(on, dtype, which):
    """H * Dh terms of one sign are off by that many ULP at most, in any order; the root halves it and adds one."""
    k = normal((2, 4, 90, 80), dtype, "k")
    want = k.double().abs().sum((1, 3)) if which == "l1" else k.double().square().sum((1, 3)).sqrt()
    torch.testing.assert_close(norm(on, k, norm=which).double(), want, rtol=(320 + 1) * ULP, atol=0)


@cross(dtype=FLOATS, kind=STRIDES, layout=["BHSD", "BSHD"])
def test_key_norm_score_of_strided_keys(on, dtype, kind, layout):
    k = integers((2, 3, 50, 24), dtype, "k")
    given = strided((k if layout == "BHSD" else k.transpose(1, 2)).contiguous().to(on.device), kind)
    same(vk.key_norm_score(given, layout=layout, backend=on.backend).cpu(), norm(on, k))


@cross(which=["l1", "l2"], shape=[(0, 2, 5, 4), (2, 2, 0, 4), (2, 0, 5, 4), (2, 2, 5, 0)])
def test_key_norm_score_of_nothing(on, which, shape):
    same(norm(on, torch.ones(shape), norm=which), torch.zeros(shape[0], shape[2]))


def test_key_norm_score_of_nan_and_inf(on):
    k = torch.ones(1, 2, 4, 8)
    k[0, 0, 1, 3], k[0, 1, 2, 7] = torch.nan, -torch.inf
    for which in ("l1", "l2"):
        got = norm(on, k, norm=which)[0]
        assert [got[1].isnan(), got[2].isposinf(), got[3].isfinite()] == [True] * 3


@cross(shape=[(2, 63, 16), (1, 577, 300), (3, 1, 8), (1, 40, 1024)], p=[1, 8, 20], dtype=FLOATS)
def test_cosine_to_pivots(on, shape, p, dtype):
    x = normal(shape, dtype, "x")
    x[0, shape[1] // 2] = 0
    pivots = torch.randint(-2, shape[1] + 1, (shape[0], p), generator=seeded("pivots", shape, p))
    pivots[0, 0] = shape[1] // 2
    want, bound = cosines(x, pivots)
    got = cosine(on, x, pivots)
    assert ((got - want).abs() <= bound).all()
    assert got[(want == 0).all(-1)].eq(0).all()  # no pivot, or a row of zeros


@cross(dim=[0, 1, 2])
def test_similarity_of_far_rows(on, dim):
    """Items, heads or rows 2^31 elements apart."""
    k = integers((2, 2, 3, 8), torch.bfloat16, "k")
    same(vk.key_norm_score(far_apart(k, on, dim), backend=on.backend).cpu(), norm(on, k))
    if dim < 2:
        pivots = torch.tensor([[0, -1], [2, 1]])
        got = vk.cosine_to_pivots(far_apart(k[:, 0], on, dim), pivots.to(on.device), backend=on.backend)
        same(got.cpu(), cosine(on, k[:, 0].contiguous(), pivots))


@cross(dtype=FLOATS, kind=STRIDES)
def test_cosine_to_pivots_of_strided_rows(on, dtype, kind):
    x, pivots = normal((2, 50, 24), dtype, "x"), torch.tensor([[3, -1, 49], [0, 7, 7]])
    got = vk.cosine_to_pivots(strided(x.to(on.device), kind), strided(pivots.to(on.device), "inner"), backend=on.backend).cpu()
    want, bound = cosines(x, pivots)
    assert ((got - want).abs() <= bound).all()


@cross(shape=[(0, 5, 4), (2, 0, 4), (2, 5, 0)])
def test_cosine_to_pivots_of_nothing(on, shape):
    assert cosine(on, torch.ones(shape), torch.zeros(shape[0], 3, dtype=torch.int64)).eq(0).all()
    assert cosine(on, torch.ones(shape), torch.zeros(shape[0], 0, dtype=torch.int64)).shape == (shape[0], 0, shape[1])


def test_cosine_to_pivots_of_large_and_small_rows(on):
    """A row's length is no part of its cosine; that of a row with itself is 1 within the rounding of its norm."""
    x = normal((1, 30, 64), torch.float32, "x")
    pivots = torch.arange(30)[None]
    scaled = x * torch.logspace(-12, 12, 30)[None, :, None]
    got, want = cosine(on, scaled, pivots), cosine(on, x, pivots)
    torch.testing.assert_close(got, want, rtol=0, atol=(4 * 64 + 8) * ULP)
    torch.testing.assert_close(got[0].diagonal(), torch.ones(30), rtol=0, atol=(2 * 64 + 4) * ULP)


@cross(size=[1e-30, 1e-20, 1.0, 1e20, 1e30], ratio=[1, 100, 1e6], dim=[1, 3, 63, 577])
def test_cosine_to_pivots_of_any_norms(on, size, ratio, dim):
    """8 units in the last place of the cosine, also where it is nearly 0; in float32 it was NaN beyond 1.8e19 and 0 below 1e-19."""
    x = normal((2, 9, dim), torch.float32, "x", dim) * (size / (ratio if size > 1 else 1))
    x[:, ::2] *= ratio
    x[:, 3] = -x[:, 0]
    pivots = torch.tensor([[0, 8, 3], [5, 0, 1]])
    want, _ = cosines(x, pivots)
    leaf = x.to(on.device, copy=True).requires_grad_()
    got = vk.cosine_to_pivots(leaf, pivots.to(on.device), backend=on.backend)
    assert ((got.cpu().double() - want).abs() <= 8 * ULP * want.abs() + 1e-15).all()
    # A gradient is the larger the smaller the row, and cancels where rows are parallel.
    exact = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(vk.cosine_to_pivots(exact, pivots, backend="reference").sum(), exact)
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    noise = 1e-15 * 6 / x.double().norm(dim=-1)
    assert ((grad.cpu().double() - wanted).abs().amax(-1) <= 8 * ULP * wanted.abs().amax(-1) + noise).all()


@settings(
    max_examples=fewer([60], [6])[0], deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(sizes=st.tuples(*[st.integers(1, high) for high in (3, 40, 30, 18)]), seed=st.integers(0, 1 << 30))
def test_similarity_of_any_sizes(on, sizes, seed):
    b, n, d, p = sizes
    gen = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (b, n, d), generator=gen).float()
    pivots = torch.randint(-2, n + 2, (b, p), generator=gen)
    want, bound = cosines(x, pivots)
    assert ((cosine(on, x, pivots) - want).abs() <= bound).all()
    same(norm(on, x[:, None]), x.abs().sum(-1))


# --- gradients, torch.compile, determinism


@pytest.mark.backends("reference")
def test_similarity_gradcheck(on):
    x = normal((2, 6, 5), torch.float64, "x").requires_grad_()
    pivots = torch.tensor([[0, 2, -1], [3, 3, 5]])
    torch.autograd.gradcheck(lambda x: vk.cosine_to_pivots(x, pivots), (x,))
    for which in ("l1", "l2"):
        torch.autograd.gradcheck(lambda x: vk.key_norm_score(x[:, None], norm=which), (x,))  # noqa: B023
    for pairs in ("previous", "dycoke"):
        video = x.view(1, 6, 2, 5)

        def finite(video):
            return vk.frame_similarity(video, pairs=pairs).nan_to_num(posinf=0)  # noqa: B023

        torch.autograd.gradcheck(finite, (video,))


@cross(dtype=FLOATS)
def test_similarity_gradient_equals_that_of_the_reference(on, dtype):
    """The shared backward against autograd through the reference in float64; a row of zeros gets no gradient, and makes no NaN."""
    x = normal((2, 9, 12), dtype, "x")
    x[0, 4] = 0
    pivots = torch.tensor([[0, 4, -1, 0], [8, 3, 3, 20]])

    def loss(x, pivots, backend):
        cos = vk.cosine_to_pivots(x, pivots, backend=backend)
        norms = [vk.key_norm_score(x.unflatten(-1, (3, 4)).transpose(1, 2), norm=which, backend=backend) for which in ("l1", "l2")]
        return cos.square().sum() + cos.sum() + norms[0].sum() + norms[1].sum()

    leaf, wide = x.to(on.device).requires_grad_(), x.double().requires_grad_()
    (got,) = torch.autograd.grad(loss(leaf, pivots.to(on.device), on.backend), leaf)
    (want,) = torch.autograd.grad(loss(wide, pivots, "reference"), wide)
    assert got.dtype == dtype
    # Three gradients, each rounded to the dtype; those of cosines come from some 9 * 4 terms of mixed sign.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), want, rtol=4 * eps, atol=(4 * eps + 100 * ULP) * want.abs().max().item())
    assert got[0, 4].eq(0).all()


@pytest.mark.backends("cpu", "triton")
def test_similarity_opcheck(on):
    ops, x = torch.ops.v2drop, normal((2, 6, 8), torch.float32, "x").to(on.device)
    pivots = torch.tensor([[0, 2, -1], [3, 3, 5]]).to(on.device)
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    for leaf in (x, x.clone().requires_grad_()):
        torch.library.opcheck(ops.cosine_to_pivots.default, (leaf, pivots, on.backend))
        torch.library.opcheck(ops.key_norm.default, (leaf[:, None], "l2", on.backend))
    up = torch.ones(2, 3, 6, device=on.device)
    torch.library.opcheck(ops.cosine_to_pivots_backward.default, (up, x, pivots), test_utils=utils)
    torch.library.opcheck(ops.key_norm_backward.default, (up[:, 0], x[:, None], "l1"), test_utils=utils)


@pytest.mark.parametrize("dynamic", DYNAMIC, ids=["static", "dynamic"][: len(DYNAMIC)])
def test_similarity_compiles(on, dynamic):
    """One graph, forward and backward; with dynamic shapes one compilation serves every length."""
    torch._dynamo.reset()

    def function(x, pivots):
        video = vk.frame_similarity(x.unflatten(1, (-1, 2)), pairs="dycoke", backend=on.backend).nan_to_num(posinf=0)
        norms = vk.key_norm_score(x[:, None] * 1, norm="l2", backend=on.backend) + video.flatten(1)
        noise = vk.random_score(norms, 3, item_seeds=pivots[:, 0])
        return vk.cosine_to_pivots(x, pivots, backend=on.backend) + (norms * noise)[:, None]

    counter = CompileCounterWithBackend("aot_eager")
    # The reference is traced operation by operation, which takes long with symbols also for the sizes that stay.
    only_rows = dynamic and on.backend == "reference"
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic and not only_rows, backend=counter)
    pivots = torch.tensor([[0, 2, -1], [3, 3, 5]]).to(on.device)
    for n in (24, 44) if dynamic else (24,):
        found = []
        for call in (compiled, function):
            leaf = normal((2, n, 8), torch.float32, "x").to(on.device).requires_grad_()
            if only_rows:
                torch._dynamo.mark_dynamic(leaf, 1)
            out = call(leaf, pivots)
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaf)])
        for got, want in zip(*found, strict=True):
            # The three gradients are added in another order; forwards are the same launches.
            torch.testing.assert_close(got, want, rtol=4 * ULP, atol=4 * ULP * want.abs().max().item())
    assert counter.frame_count == 1 or on.backend == "reference"  # which asks whether there are rows at all
    torch._dynamo.reset()


def test_similarity_gives_the_same_bits_whatever_the_batch(on):
    x, pivots = normal((3, 90, 200), torch.bfloat16, "x"), torch.tensor([[0, 5, -1]] * 3)
    k = x.unflatten(-1, (4, 50)).transpose(1, 2)
    first = [cosine(on, x, pivots), norm(on, k), norm(on, k, norm="l2")]
    for _ in range(fewer([20], [2])[0]):
        same([cosine(on, x, pivots), norm(on, k), norm(on, k, norm="l2")], first)
    if on.backend != "reference":  # whose sums are PyTorch's, in an order that depends on the sizes
        alone = [cosine(on, x[1:2], pivots[:1]), norm(on, k[1:2]), norm(on, k[1:2], norm="l2")]
        same(alone, [y[1:2] for y in first])


# --- frames and chance


def partner(f, pairs):
    """The earlier frame that frame f is compared with, as the released loops have it."""
    if pairs == "previous":
        return f - 1 if f else None
    return f - 1 if f % 2 else f - 2 if f % 4 == 2 else None


@cross(shape=[(2, 7, 3, 24), (1, 8, 5, 16), (3, 1, 4, 8), (2, 2, 1, 8), (1, 5, 2, 64)], pairs=["previous", "dycoke"], dtype=FLOATS)
def test_frame_similarity(on, shape, pairs, dtype):
    b, frames, patches, d = shape
    x = normal(shape, dtype, "x")
    got = vk.frame_similarity(x.to(on.device), pairs=pairs, backend=on.backend).cpu()
    assert (got.shape, got.dtype) == (shape[:3], torch.float32)
    for i in range(b):
        same(got[i], vk.frame_similarity(x[i].to(on.device), pairs=pairs, backend=on.backend).cpu())
        for f in range(frames):
            p = partner(f, pairs)
            if p is None:
                assert got[i, f].isposinf().all()
                continue
            for patch in range(patches):
                a, c = x[i, p, patch].double(), x[i, f, patch].double()
                want = 1 - (a @ c) / (a.norm() * c.norm())
                assert abs(got[i, f, patch] - want) <= (2 * d + 4) * ULP  # products and norms, as for pivots


def test_frame_similarity_of_a_still_is_zero(on):
    """Frames that repeat differ in nothing: they go first."""
    x = normal((1, 1, 4, 32), torch.float32, "x").expand(1, 6, 4, 32).to(on.device)
    got = vk.frame_similarity(x, backend=on.backend)
    assert got[:, 0].isposinf().all()
    torch.testing.assert_close(got[:, 1:].cpu(), torch.zeros(1, 5, 4), rtol=0, atol=4 * ULP)


@cross(shape=[(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)], pairs=["previous", "dycoke"])
def test_frame_similarity_of_nothing(on, shape, pairs):
    assert vk.frame_similarity(torch.ones(shape).to(on.device), pairs=pairs, backend=on.backend).shape == shape[:3]


def philox(block, item, seed):
    """Four words of Philox4x32-10, in Python's integers."""
    c, key = [block % 2**32, block >> 32, item % 2**32, item >> 32], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ key[0], b % 2**32, (a >> 32) ^ c[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c


@cross(seed=[0, 1, -5, 2**63, 2**64 - 1])
def test_random_score(on, seed):
    """The generator in Python's integers, whose numbers for a counter and a key of 0 are published."""
    assert philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    with vk.backend(on.backend):
        got = vk.random_score((3, 20), seed, item_seeds=[4, -1, 4], device=on.device).cpu()
        narrow = vk.random_score((2, 5), seed, device=on.device).cpu()
    for i, item in enumerate([4, -1, 4]):
        want = [philox(j // 4, item % 2**64, seed % 2**64)[j % 4] // 256 / 2**24 for j in range(20)]
        assert got[i].tolist() == want
    assert narrow[1].tolist() == [philox(j // 4, 1, seed % 2**64)[j % 4] // 256 / 2**24 for j in range(5)]


def test_random_score_does_not_depend_on_neighbours(on):
    like = torch.empty(4, 300, device=on.device)
    got = vk.random_score(like, 7, item_seeds=[10, 11, 12, 13])
    same(vk.random_score((1, 50), 7, item_seeds=torch.tensor([12]), device=on.device).cpu(), got[2:3, :50].cpu())
    same(vk.random_score(like, 7).cpu(), vk.random_score(like, 7, item_seeds=range(4)).cpu())
    assert not torch.equal(got[0], got[1])
    assert not torch.equal(got, vk.random_score(like, 8, item_seeds=[10, 11, 12, 13]))


def test_random_score_is_uniform():
    """Tenths of a million draws hold 100000 each, within six standard deviations of 300; neighbours do not follow one another."""
    got = vk.random_score((1000, 1000)).double()
    counts = torch.bincount((got.flatten() * 10).long(), minlength=10)
    assert (counts - 100000).abs().max() < 6 * 300
    for a, b in ((got[:, 1:], got[:, :-1]), (got[1:], got[:-1])):
        assert (12 * ((a - 0.5) * (b - 0.5)).mean()).abs() < 6e-3  # the correlation of a million pairs has deviation 1e-3


def test_similarity_of_bad_input():
    k, x = torch.zeros(2, 2, 5, 4), torch.zeros(2, 5, 4)
    rows = torch.zeros(2, 3, dtype=torch.int64)
    for error, message, call in (
        (TypeError, "k must be a tensor", lambda: vk.key_norm_score([1.0])),
        (ValueError, "k must have four dimensions", lambda: vk.key_norm_score(x)),
        (TypeError, "k must be float32", lambda: vk.key_norm_score(k.int())),
        (ValueError, "norm must be one of 'l1', 'l2', got 'max'", lambda: vk.key_norm_score(k, norm="max")),
        (ValueError, "layout must be one of", lambda: vk.key_norm_score(k, layout="SBHD")),
        (ValueError, r"x must be \[B, N, D\]", lambda: vk.cosine_to_pivots(x[0], rows)),
        (TypeError, "x must be float32", lambda: vk.cosine_to_pivots(x.int(), rows)),
        (TypeError, "pivots must be a tensor", lambda: vk.cosine_to_pivots(x, [0])),
        (ValueError, r"pivots must be \[B, P\]", lambda: vk.cosine_to_pivots(x, rows[0])),
        (ValueError, r"pivots must have shape \[2, 3\]", lambda: vk.cosine_to_pivots(x, rows[:1])),
        (TypeError, "pivots must be torch.int64", lambda: vk.cosine_to_pivots(x, rows.int())),
        (ValueError, "pivots must be on cpu", lambda: vk.cosine_to_pivots(x, rows.to("meta"))),
        (ValueError, r"x must be \[B, F, P, D\]", lambda: vk.frame_similarity(x[0])),
        (TypeError, "x must be a tensor", lambda: vk.frame_similarity(None)),
        (ValueError, "pairs must be one of", lambda: vk.frame_similarity(k, pairs="next")),
        (ValueError, "like must be a tensor", lambda: vk.random_score((3,))),
        (ValueError, "item_seeds must be one int64 per item", lambda: vk.random_score((3, 4), item_seeds=[1, 2])),
        (ValueError, "item_seeds must be one int64 per item", lambda: vk.random_score((2, 4), item_seeds=torch.rand(2))),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_random_score_refuses_a_seed_that_is_no_int(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        vk.random_score((1, 4), seed)
