"""Memory that a call overwrites: autograd hears of it, and none of it is read, or written twice."""

from __future__ import annotations

import pytest
import torch
from support.cases import hidden_pair, same

import v2drop_kernels as vk
from v2drop_kernels.core import overlap


def rows(on):
    return torch.tensor([[1, 3, 5]], device=on.device)


def cache(on):
    return torch.arange(8.0, device=on.device).view(1, 1, 8, 1)


def test_autograd_refuses_a_value_that_compact_inplace_changed(on):
    """q.grad was the compacted cache."""
    q, k = torch.randn(1, 1, 8, 4, device=on.device, requires_grad=True), torch.randn(1, 1, 8, 4, device=on.device)
    y = (q * k).sum()
    vk.compact_(rows(on), k, backend=on.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_autograd_refuses_a_value_that_out_changed(on):
    prev, cur = hidden_pair((1, 8, 4), torch.float32, device=on.device)
    for call in (
        lambda **given: vk.drop_tokens(prev, cur, 3, backend=on.backend, **given),
        lambda **given: vk.compact(rows(on), cur, backend=on.backend, **given),
    ):
        step = call()
        q = torch.ones_like(step.hidden, requires_grad=True)
        y = (q * step.hidden).sum()
        call(out=step)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_the_version_of_every_overwritten_tensor_counts(on):
    k, v = cache(on), cache(on)
    before = k._version, v[:, :, ::2]._version
    vk.compact_(rows(on), [(k, v)], backend=on.backend)
    assert (k._version, v._version) > before
    with torch.inference_mode():
        inference = cache(on)
        vk.compact_(rows(on), inference, backend=on.backend)
    assert inference.flatten()[:3].tolist() == [1, 3, 5]


@pytest.mark.parametrize("shared", ["tensor", "view"])
def test_a_cache_that_layers_share_moves_once(on, shared):
    """It moved twice: 3, 3, 5 and so on, and with threads both moves at once."""
    c = cache(on)
    other = c if shared == "tensor" else c[:]
    vk.compact_(rows(on), [(c, other), (c, cache(on))], backend=on.backend)
    assert c.flatten()[:3].tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    "parts",
    [
        lambda c: [c[..., :8, :], c[..., 4:12, :]],
        lambda c: [c[..., :8, :], c[..., 1:16:2, :]],
        lambda c: [c.as_strided((1, 1, 8, 2), (16, 16, 1, 1))],
        lambda c: [c[..., :1, :].expand(1, 1, 8, 1)],
    ],
    ids=["half", "every-second", "within", "expanded"],
)
def test_caches_that_share_memory_in_part_are_refused(on, parts):
    whole = torch.arange(16.0, device=on.device).view(1, 1, 16, 1)
    with pytest.raises(ValueError, match="kv must not share memory"):
        vk.compact_(rows(on), parts(whole), backend=on.backend)
    assert whole.flatten().tolist() == list(range(16))


def test_interleaved_caches_share_an_allocation_and_no_memory(on):
    """K and V of one fused buffer ``[B, N, 2, H, D]``: their addresses alternate."""
    fused = torch.arange(48.0, device=on.device).view(1, 8, 2, 1, 3)
    want = fused[0, [1, 3, 5]].clone()
    vk.compact_(rows(on), [(fused[:, :, 0], fused[:, :, 1])], kv_layout="BSHD", backend=on.backend)
    same(fused[0, :3], want)


def dropped(on, **given):
    prev, cur = hidden_pair((2, 12, 8), torch.float32, device=on.device)
    kv = [(torch.randn(2, 3, 12, 4, device=on.device), torch.randn(2, 3, 12, 4, device=on.device))]
    arguments = {"kv": kv, "backend": on.backend, **given}
    return prev, cur, kv, lambda **out: vk.drop_tokens(prev, cur, 4, **arguments, **out)


@pytest.mark.parametrize("what", ["kv", "h_prev", "scores", "twice", "hidden"])
def test_out_that_shares_memory_is_refused(on, what):
    """Only each part's own input was compared: the others were read while they were written."""
    scores = torch.randn(2, 128, device=on.device)[:, :12]
    prev, cur, kv, call = dropped(on, scores=scores)
    step = call()
    part = {
        "kv": lambda: {"hidden": kv[0][0].view(-1)[:64].view(2, 4, 8)},
        "h_prev": lambda: {"hidden": prev.view(-1)[:64].view(2, 4, 8)},
        "scores": lambda: {"hidden": scores.as_strided((2, 4, 8), (32, 8, 1))},
        "twice": lambda: {"kv": [(step.kv[0][0], step.kv[0][0])]},
        "hidden": lambda: {"hidden": cur.view(-1)[64:128].view(2, 4, 8)},
    }[what]()
    if what == "h_prev":
        prev, cur, kv, call = dropped(on)
        part = {"hidden": prev.view(-1)[:64].view(2, 4, 8)}
    with pytest.raises(ValueError, match="out must not share memory"):
        call(out=step._replace(**part))


def test_out_in_one_workspace_with_the_input(on):
    """Disjoint halves of one workspace were refused."""
    whole = torch.randn(2 * 12 * 8 + 2 * 4 * 8, device=on.device)
    h, space = whole[: 2 * 12 * 8].view(2, 12, 8), whole[2 * 12 * 8 :].view(2, 4, 8)
    want = vk.drop_tokens(torch.zeros_like(h), h, 4, backend=on.backend)
    got = vk.drop_tokens(torch.zeros_like(h), h, 4, out=want._replace(hidden=space), backend=on.backend)
    same(got.hidden, want.hidden)
    assert got.hidden.data_ptr() == space.data_ptr()


def addresses(x):
    at = torch.zeros(1, dtype=torch.int64)
    for stride, size in zip(x.stride(), x.shape, strict=True):
        at = (at[:, None] + torch.arange(size) * stride).flatten()
    at = at * x.element_size() + x.data_ptr()
    return set((at[:, None] + torch.arange(x.element_size())).flatten().tolist()), at


def test_overlap_is_exact_for_any_strides():
    random, base = torch.Generator().manual_seed(0), torch.zeros(4000, dtype=torch.int16)
    pick = lambda values: values[int(torch.randint(len(values), (), generator=random))]

    def view():
        shape = [pick([1, 2, 3, 4]) for _ in range(pick([1, 2, 3, 4]))]
        strides = [pick([0, 1, 1, 2, 3, 4, 5, 8, 16, 24, 32, 64]) for _ in shape]
        return pick([base, base.view(torch.int32)]).as_strided(shape, strides, pick(range(150)))

    met = 0
    for _ in range(1500):
        a, b = view(), view()
        (bytes_a, at), (bytes_b, _) = addresses(a), addresses(b)
        assert (overlap.conflict([a], [b]) is not None) == bool(bytes_a & bytes_b)
        assert overlap.conflict([], [a, b]) is None
        assert overlap.overlaps_itself(a) or len(set(at.tolist())) == len(at)
        met += bool(bytes_a & bytes_b)
    assert 100 < met < 1400
