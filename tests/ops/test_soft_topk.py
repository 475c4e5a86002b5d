"""soft_topk against a restatement that counts comparisons; its two gradients; a toy problem that only they can learn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import FLOATS, scores, seeded
from torch.utils._python_dispatch import TorchDispatchMode

import v2drop_kernels as vk
from v2drop_kernels.ops.soft_topk import soft_topk
from v2drop_kernels.ops.soft_topk.reference import DENSITY_CAP

TIES = ["index", "released"]


def above(x, i, j, ties):
    """Whether score i counts as at or above score j."""
    if math.isnan(x[i]) or math.isnan(x[j]):
        higher, equal = math.isnan(x[i]) and not math.isnan(x[j]), math.isnan(x[i]) and math.isnan(x[j])
    else:
        higher, equal = x[i] > x[j], x[i] == x[j]
    if ties == "released" and math.isnan(x[i]) and i != j:
        return higher or i < j  # a NaN equals nothing but itself
    return higher or (equal and (ties == "released" or i <= j))


def naive(x, a, ties, temperature=None):
    """Ranks, soft and hard mask of one item, as the paper writes them: n^2 comparisons, in Python's floats."""
    n = len(x)
    rank = [sum(above(x, i, j, ties) for j in range(n)) / n for i in range(n)]
    sharpness = n if temperature is None else temperature
    soft = [1 / (1 + math.exp(-sharpness * (c - a))) for c in rank]
    if ties == "released":
        hard = [float(torch.tensor(c) > torch.tensor(a)) for c in rank]
    else:
        k = min(max(round((1 - a) * n), 0), n)
        hard = [float(round(n * (1 - c)) < k) for c in rank]
    return rank, soft, hard


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "equal", "three", "special", "ascending", "descending"])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_soft_topk(n, kind, dtype, ties):
    x = scores(kind, (2, n), dtype)
    for a in (0.0, 0.25, 0.5, 0.9, 1.0):
        hard, soft = soft_topk(x, a, ties=ties), soft_topk(x, a, ties=ties, hard=False, temperature=8.0)
        assert hard.dtype == soft.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for b in range(2):
            _, want_soft, want_hard = naive(x[b].tolist(), a, ties, 8.0)
            assert hard[b].tolist() == want_hard
            # The argument, at most 8, is rounded at most four times, and the sigmoid has a slope of at most 1/4.
            torch.testing.assert_close(soft[b], torch.tensor(want_soft).to(soft), rtol=0, atol=8 * 4 * 2**-24 / 4 + 2**-24)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("n", [5, 10, 87, 215, 576])
def test_soft_topk_keeps_k_for_every_ratio(n, ties):
    """a = 1 - k/n keeps k, whether a is rounded to float32 or not."""
    x = torch.randn(1, n, generator=seeded(n))
    order = x.argsort(descending=True)
    for k in range(n + 1):
        want = torch.zeros(1, n).scatter(1, order[:, :k], 1)
        assert torch.equal(soft_topk(x, 1 - k / n, ties=ties), want), k
        assert torch.equal(soft_topk(x, torch.tensor(1 - k / n), ties=ties), want), k
        if ties == "index":
            assert torch.equal(soft_topk(x.double(), 1 - k / n, ties=ties), want.double()), k


def test_soft_topk_ties_released_and_by_index():
    x = torch.tensor([[3.0, 1, 1, 1, 0]])
    assert soft_topk(x, 1 - 2 / 5).tolist() == [[1, 1, 0, 0, 0]]
    # c' = 1, .8, .8, .8, .2: all of the tied are above 0.6, and none is above 0.8.
    assert soft_topk(x, 1 - 2 / 5, ties="released").tolist() == [[1, 1, 1, 1, 0]]
    assert soft_topk(x, 0.8, ties="released").tolist() == [[1, 0, 0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_soft_topk_ragged(data):
    """Items of any lengths, anywhere: each as if it were alone; the rest is 0 and gets no gradient."""
    n, ties = data.draw(st.integers(1, 12)), data.draw(st.sampled_from(TIES))
    values = st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, math.inf, -math.inf, math.nan])
    x = torch.tensor(data.draw(st.lists(st.lists(values, min_size=n, max_size=n), min_size=1, max_size=3)))
    valid = torch.tensor([data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in x])
    a = torch.tensor([data.draw(st.floats(0, 1)) for _ in x])
    leaf, ratio = x.clone().requires_grad_(), a.clone().requires_grad_()
    got = soft_topk(leaf, ratio, valid=valid, ties=ties)
    d_scores, d_ratio = torch.autograd.grad(got.sum(), (leaf, ratio))
    assert d_scores.isfinite().all()
    assert d_scores[~valid].eq(0).all()
    for b in range(len(x)):
        alone, alone_ratio = x[b : b + 1, valid[b]].requires_grad_(), a[b].clone().requires_grad_()
        want = soft_topk(alone, alone_ratio, ties=ties)
        assert torch.equal(got[b, valid[b]], want[0])
        assert got[b, ~valid[b]].eq(0).all()
        if want.numel():
            wanted = torch.autograd.grad(want.sum(), (alone, alone_ratio))
            # Alone and in a wider row the same additions are made; only their vectorised grouping may differ.
            torch.testing.assert_close(d_scores[b, valid[b]], wanted[0][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(d_ratio[b], wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("shape", [(), (3,)], ids=["shared", "per-item"])
@pytest.mark.parametrize("temperature", [None, 3.0])
def test_gradient_to_the_ratio_is_exact(shape, temperature, ties):
    """Of the soft mask by finite differences; of the hard mask the same, bit by bit."""
    x = torch.randint(0, 5, (3, 9), generator=seeded(shape)).double()
    a = torch.full(shape, 0.4, dtype=torch.float64).requires_grad_()
    soft = lambda a: soft_topk(x, a, temperature=temperature, ties=ties, hard=False)
    assert torch.autograd.gradcheck(soft, a)
    weight = torch.randn(3, 9, generator=seeded("w"), dtype=torch.float64)
    hard = soft_topk(x, a, temperature=temperature, ties=ties)
    assert hard.unique().tolist() == [0, 1]
    assert torch.equal(*(torch.autograd.grad((m * weight).sum(), a)[0] for m in (hard, soft(a))))


def naive_gradient(x, a, grad, temperature):
    """The estimator of the docstring as an n x n Jacobian, one item, scores all different."""
    n = len(x)
    sharpness = n if temperature is None else temperature
    order = x.argsort(descending=True)
    v, w = x[order], math.ceil(math.sqrt(n) / 2)
    quarter = (n - 1) // 4
    cap = DENSITY_CAP / (2 * (v[quarter] - v[n - 1 - quarter]))
    jacobian = torch.zeros(n, n, dtype=torch.float64)  # of the ranks in sorted order
    for i in range(n):
        low, high = max(i - w, 0), min(i + w, n - 1)
        p = min((high - low) / n / (v[low] - v[high]), cap)
        jacobian[i, low : high + 1] = -p / (high - low)
        jacobian[i, i] = p
    soft = torch.sigmoid((torch.arange(n, 0, -1, dtype=torch.float64) / n - a) * sharpness)
    found = torch.zeros(n, dtype=torch.float64)
    found[order] = jacobian.T @ (grad[order] * sharpness * soft * (1 - soft))
    return found


@pytest.mark.parametrize("temperature", [None, 5.0])
@pytest.mark.parametrize("n", [2, 3, 10, 577])
def test_gradient_to_the_scores(n, temperature):
    x = torch.randn(2, n, generator=seeded(n), dtype=torch.float64) ** 3
    grad = torch.randn(2, n, generator=seeded("g", n), dtype=torch.float64)
    (got,) = torch.autograd.grad(soft_topk(leaf := x.requires_grad_(), 0.7, temperature=temperature), leaf, grad)
    want = torch.stack([naive_gradient(x[b].detach(), 0.7, grad[b], temperature) for b in range(2)])
    torch.testing.assert_close(got, want)
    # In float32 and below the scores' differences are exact or rounded once, the rest a few times: to 1e-4 of the largest.
    for dtype in FLOATS:
        rounded = x.detach().to(dtype)
        if all(len(row.unique()) == n for row in rounded):
            (got,) = torch.autograd.grad(
                soft_topk(leaf := rounded.requires_grad_(), 0.7, temperature=temperature), leaf, grad.float()
            )
            want = torch.stack([naive_gradient(rounded[b].detach().double(), 0.7, grad[b], temperature) for b in range(2)])
            assert got.dtype == dtype
            assert (got.double() - want).abs().max() <= (1e-4 + torch.finfo(dtype).eps) * want.abs().max()


def test_gradient_estimates_the_density():
    """Scores of a known distribution: the own slope of a rank nears the density, here within 10 % on average.

    The estimate from 2 w neighbours has a relative standard error of 1 / sqrt(2 w), 10 % at w = 50 (n = 10^4)."""
    n = 10_000
    x = torch.distributions.Exponential(1.0).icdf(torch.rand(1, n, generator=seeded("u"), dtype=torch.float64))
    errors = []
    for i in torch.randperm(n, generator=seeded("i"))[:100].tolist():
        grad = torch.zeros(1, n, dtype=torch.float64)
        grad[0, i] = 1
        rank = (x <= x[0, i]).double().mean()
        (found,) = torch.autograd.grad(soft_topk(leaf := x.clone().requires_grad_(), float(rank), temperature=4.0), leaf, grad)
        # temperature * s (1 - s) is 1 where the rank is the ratio.
        errors.append(found[0, i] / torch.exp(-x[0, i]) - 1)
    assert torch.stack(errors).abs().mean() < 0.1
    assert torch.stack(errors).mean().abs() < 0.03


def test_gradient_of_moved_and_stretched_scores():
    x, grad = torch.randn(2, 50, generator=seeded("x"), dtype=torch.float64), torch.randn(2, 50, generator=seeded("g"))

    def gradient(x):
        return torch.autograd.grad(soft_topk(leaf := x.clone().requires_grad_(), 0.5), leaf, grad.double())[0]

    base = gradient(x)
    torch.testing.assert_close(gradient(x + 3), base)
    torch.testing.assert_close(gradient(1e-3 * x), 1e3 * base)
    assert base.abs().max() > 0.1
    assert base.sum(1).abs().max() < 1e-12  # no score gains but another loses


@pytest.mark.parametrize("kind", ["equal", "three", "special", "one off"])
def test_gradient_at_ties_is_bounded(kind):
    n = 64
    x = torch.zeros(1, n) if kind == "one off" else scores(kind, (1, n), torch.float32)
    x[0, 0] = 5.0 if kind == "one off" else x[0, 0]
    (got,) = torch.autograd.grad(soft_topk(leaf := x.requires_grad_(), 0.5), leaf, torch.ones(1, n))
    finite = x.detach()[x.isfinite()]
    middle = finite.sort().values
    spread = 2 * (middle[-1 - (n - 1) // 4] - middle[(n - 1) // 4]) if kind == "three" else finite.max() - finite.min()
    if kind == "equal":
        assert got.eq(0).all()
    elif kind == "special":  # whatever is near an infinity gets none
        assert got.isfinite().all()
    else:
        # |p| <= cap and the slope of the mask is at most n / 4; the window passes on at most as much again.
        assert 0 < got.abs().max() <= 2 * DENSITY_CAP / spread * n / 4


def toy(mode, seed=0, steps=400):
    """32 tokens of which 6 marked ones carry the label; a linear scorer, a mask times the features, their sum, a regression.

    The scorer reads the first half of a token, which tells the marked ones, the regression the second half, which holds the label.

    Returns (share of the kept tokens that are marked, share of the marked ones that are kept, a, loss)."""
    gen = torch.Generator().manual_seed(seed)
    n, marked, width = 32, 6, 4
    scorer = torch.nn.Parameter(0.1 * torch.randn(width, generator=gen))
    head = torch.nn.Parameter(0.1 * torch.randn(width, generator=gen))
    ratio = torch.nn.Parameter(torch.tensor(0.5))
    optimiser = torch.optim.Adam([{"params": [scorer, head], "lr": 0.02}, {"params": [ratio], "lr": 0.005}])
    found = []
    for step in range(steps):
        x = torch.randn(64, n, 2 * width, generator=gen)
        is_marked = torch.zeros(64, n).scatter(1, torch.rand(64, n, generator=gen).argsort(1)[:, :marked], 1)
        x[:, :, 0] = 2 * is_marked - 1 + 0.1 * x[:, :, 0]
        label = (x[:, :, width] * is_marked).sum(1) / marked
        s = x[:, :, :width] @ scorer
        mask = soft_topk(s, ratio, temperature=n / 4)
        mask = mask.detach() if mode == "hard" else mask
        loss = (((mask[:, :, None] * x[:, :, width:]).sum(1) / marked) @ head - label).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            ratio.clamp_(0, 1)
        if step >= steps - 20:
            found.append(
                torch.stack([(mask * is_marked).sum() / mask.sum(), (mask * is_marked).sum() / is_marked.sum(), ratio, loss])
            )
    return torch.stack(found).mean(0).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_soft_topk_learns_which_tokens_and_how_many(seed):
    """Only the marked tokens help, 6 of 32: the scores must find them, and a must go from 1/2 to 26/32.

    Hard top-k trains the head alone."""
    precision, recall, a, loss = toy("soft", seed)
    hard_precision, _, hard_a, hard_loss = toy("hard", seed)
    assert hard_a == 0.5
    assert hard_precision < 0.5
    assert precision > 0.9
    assert recall > 0.9
    assert abs(a - 26 / 32) < 0.08
    assert loss < 0.2 * hard_loss


class Largest(TorchDispatchMode):
    """The most elements that any result of an op has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("ties", TIES)
def test_memory_is_linear(ties):
    n = 6272
    x, a = torch.randn(2, n, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    with Largest() as largest:
        soft_topk(x, a, ties=ties).sum().backward()
    assert largest.numel <= 2 * (n + 1)


@pytest.mark.parametrize("ties", TIES)
def test_soft_topk_compiles_to_one_graph(ties):
    x, a = torch.randn(3, 40, generator=seeded("x")).requires_grad_(), torch.tensor(0.6, requires_grad=True)
    valid = torch.rand(3, 40, generator=seeded("v")) < 0.8
    call = lambda x, a: soft_topk(x, a, valid=valid, ties=ties)
    want = soft_topk(
        x, a, valid=valid, ties=ties, backend="reference"
    )  # a graph holds plain PyTorch, whose sigmoid has other last bits
    assert torch.equal(call(x, a), want)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x, a)
    assert torch.equal(got, want)
    weight = torch.randn(3, 40, generator=seeded("w"))
    for g, w in zip(*(torch.autograd.grad(m, (x, a), weight) for m in (got, want)), strict=True):
        assert torch.equal(g, w)


def test_soft_topk_is_deterministic():
    x, a = torch.randn(2, 300, generator=seeded("x")).requires_grad_(), torch.tensor(0.6, requires_grad=True)
    runs = []
    for _ in range(3):
        mask = soft_topk(x, a)
        runs.append((mask.detach(), *torch.autograd.grad(mask.square().sum(), (x, a))))
    assert all(torch.equal(g, w) for run in runs[1:] for g, w in zip(run, runs[0], strict=True))


def test_soft_topk_leaves_the_host_alone():
    """Meta tensors have no values to wait for."""
    x, valid = torch.empty(2, 30, device="meta", requires_grad=True), torch.empty(2, 30, dtype=torch.bool, device="meta")
    a = torch.empty(2, device="meta", requires_grad=True)
    soft_topk(x, a, valid=valid).sum().backward()
    assert (x.grad.shape, a.grad.shape) == (x.shape, a.shape)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_soft_topk_of_nothing(shape):
    x, a = torch.zeros(shape, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    got = soft_topk(x, a)
    assert got.shape == shape
    got.sum().backward()
    assert x.grad.shape == shape


def test_soft_topk_of_items_without_valid_tokens():
    x, a = torch.randn(2, 5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    got = soft_topk(x, a, valid=torch.tensor([[False] * 5, [True] * 5]))
    got.sum().backward()
    assert got.sum(1).tolist() == [0, 2]
    assert x.grad[0].eq(0).all()
    assert a.grad.isfinite()


def test_gradient_is_taken_once():
    x = torch.randn(1, 9, requires_grad=True)
    (g,) = torch.autograd.grad(soft_topk(x, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="soft_topk is differentiable once"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"scores": [1.0]}, TypeError, "scores must be a tensor"),
        ({"scores": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "scores must be float32"),
        ({"scores": torch.zeros(3)}, ValueError, r"scores must be \[B, N\]"),
        ({"ratio": 1.5}, ValueError, r"ratio must lie in \[0, 1\]"),
        ({"ratio": "half"}, TypeError, "ratio must be a float or a tensor"),
        ({"ratio": torch.zeros(3)}, ValueError, r"ratio must be a scalar or \[B\]"),
        ({"ratio": torch.tensor(1)}, TypeError, "ratio must be floating point"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid must be bool"),
        ({"valid": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "valid must have the shape of scores"),
        ({"temperature": 0.0}, ValueError, "temperature must be greater than 0"),
        ({"ties": "any"}, ValueError, "ties must be one of"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_soft_topk_errors(change, error, said):
    given = {"scores": torch.zeros(2, 3), "ratio": 0.5, **change}
    with pytest.raises(error, match=said):
        soft_topk(given.pop("scores"), given.pop("ratio"), **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="names a device that is not there")
def test_soft_topk_of_a_backend_that_cannot_serve():
    with pytest.raises(RuntimeError, match="'cuda' cannot serve cpu tensors"):
        soft_topk(torch.zeros(1, 3), 0.5, backend="cuda")


def test_soft_topk_keeps_what_segmented_topk_keeps():
    x = scores("three", (3, 40), torch.bfloat16)
    for k in (0, 1, 13, 40):
        want = vk.segmented_topk(x.float(), k).indices
        assert torch.equal(soft_topk(x, 1 - k / 40), torch.zeros(3, 40).scatter(1, want, 1))


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("ties", TIES)
def test_a_ratio_that_is_nan_gives_nan(ties, hard):
    """The hard mask was all zeros."""
    mask = soft_topk(scores("random", (2, 5), torch.float32), torch.tensor([0.4, torch.nan]), ties=ties, hard=hard)
    assert mask[0].isfinite().all()
    assert mask[1].isnan().all()


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_cannot_be(temperature):
    with pytest.raises(ValueError, match="temperature must be greater than 0 and finite"):
        soft_topk(torch.zeros(1, 3), 0.5, temperature=temperature)


@pytest.mark.gpu
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("kind", ["random", "three", "special"])
def test_soft_topk_on_a_gpu(kind, ties):
    """The mask is the CPU's, bit for bit, and nothing waits for the host."""
    found = []
    for device in ("cpu", "cuda"):
        x, a = scores(kind, (3, 577), torch.float32).to(device), torch.tensor([0.25, 0.5, 0.9], device=device, requires_grad=True)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            mask = soft_topk(x, a, ties=ties)
            mask.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((mask.detach().cpu(), a.grad.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    # Sums of 577 positive slopes in another order; each slope is a sigmoid, of a few roundings, times its complement.
    torch.testing.assert_close(found[0][1], found[1][1], rtol=(577 + 16) * 2**-24, atol=0)
