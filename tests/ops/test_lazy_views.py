"""Tensors whose negation or conjugation is carried out lazily: their memory does not hold their values."""

from __future__ import annotations

import pytest
import torch
from support.cases import METRICS, fewer, normal, same

import v2drop_kernels as vk

KEEP = torch.tensor([[0, 3, 5], [2, 4, -1]])


def negated(x: torch.Tensor) -> torch.Tensor:
    """The values of x, held in memory with the other sign."""
    lazy = torch._neg_view(-x)
    assert lazy.is_neg()
    return lazy


def conjugated(x: torch.Tensor) -> torch.Tensor:
    """The values of a complex x, held in memory with the other imaginary part."""
    lazy = x.conj().resolve_conj().conj()
    assert lazy.is_conj()
    return lazy


def results(on, metric, lazy):
    """Every op that reads floating-point tensors, with each of them in turn made by ``lazy``."""
    device, b = on.device, {"backend": on.backend}
    prev, cur = (normal((2, 7, 8), torch.float32, c).to(device) for c in "pc")
    keep = KEEP.to(device)
    q, k = normal((2, 4, 1, 8), torch.float32, "q").to(device), normal((2, 2, 7, 8), torch.float32, "k").to(device)
    ids = torch.arange(14, device=device).view(2, 7)
    return [
        vk.variation_score(lazy(prev), cur, metric=metric, **b),
        vk.variation_score(prev, lazy(cur), metric=metric, **b),
        *vk.segmented_topk(lazy(cur[..., 0]), 3, **b),
        *vk.variation_topk(lazy(prev), lazy(cur), 3, metric=metric, **b),
        *vk.drop_tokens(lazy(prev), cur, 3, metric=metric, **b)[:2],
        *vk.drop_tokens(prev, lazy(cur), 3, metric=metric, kv=[(lazy(k), k)], rope=(lazy(cur),), labels=lazy(ids), **b)[:2],
        *vk.drop_tokens(None, cur, 3, scores=lazy(cur[..., 1]), position_ids=lazy(ids), **b)[:3],
        *vk.compact(lazy(keep), lazy(cur), kv=(k, lazy(k)), attention_mask=lazy(ids), **b)[:5],
        vk.attention_score(lazy(q), k, **b),
        vk.attention_score(q, lazy(k), query_rows=lazy(torch.full((2, 1), 6, device=device)), **b),
        vk.key_norm_score(lazy(k), **b),
        vk.cosine_to_pivots(lazy(cur), lazy(keep[:, :1]), **b),
        vk.frame_similarity(lazy(cur), **b),
        vk.weighted_merge(
            lazy(cur), lazy(torch.tensor([[0, 1, 3]] * 2, device=device)), lazy(keep.clamp(min=0)), lazy(cur[:, :3, 0]), **b
        ),
        vk.soft_topk(lazy(cur[..., 0]), 0.5, **b),
        *vk.bipartite_merge(lazy(cur), lazy(prev), 2, **b),
    ]


@pytest.mark.parametrize("metric", fewer(METRICS, ["l2"]))
def test_a_negated_view_is_read_as_its_values(on, metric):
    """It was read as its memory: the lowest scores were kept."""
    for got, want in zip(results(on, metric, negated), results(on, metric, lambda x: x), strict=True):
        same(got, want)


def test_a_conjugated_view_is_gathered_as_its_values(on):
    x = torch.complex(normal((2, 7, 3), torch.float32, "r"), normal((2, 7, 3), torch.float32, "i")).to(on.device)
    same(
        vk.compact(KEEP.to(on.device), conjugated(x), backend=on.backend).hidden,
        vk.compact(KEEP.to(on.device), x, backend=on.backend).hidden,
    )
    both = torch._neg_view(conjugated(-x))
    same(
        vk.compact(KEEP.to(on.device), both, backend=on.backend).hidden,
        vk.compact(KEEP.to(on.device), x, backend=on.backend).hidden,
    )


def test_a_cache_that_is_a_negated_view_moves_in_place(on):
    cache = normal((2, 2, 7, 4), torch.float32, "kv").to(on.device)
    want = cache.clone()
    keep = torch.tensor([[1, 3, 5], [0, 2, 6]], device=on.device)
    vk.compact_(keep, want, backend=on.backend)
    moved = negated(cache)
    vk.compact_(keep, moved, backend=on.backend)
    same(moved.resolve_neg(), want)


def incoming(shape, device):
    """A gradient as autograd delivers it behind ``torch.complex(...).conj()``."""
    return torch.complex(torch.zeros(shape), normal(shape, torch.float32, "g")).to(device).conj().imag


GRADIENTS = {
    "variation_score": lambda x, y, b: vk.variation_score(x, y, backend=b),
    "variation_topk": lambda x, y, b: vk.variation_topk(x, y, 3, backend=b).values,
    "segmented_topk": lambda x, y, b: vk.segmented_topk(x[..., 0], 3, backend=b).values,
    "compact": lambda x, y, b: vk.compact(KEEP.to(x.device), x, backend=b).hidden,
    "drop_tokens": lambda x, y, b: vk.drop_tokens(y, x, 3, backend=b).hidden,
    "key_norm_score": lambda x, y, b: vk.key_norm_score(x[:, None], backend=b),
    "attention_score": lambda x, y, b: vk.attention_score(y[:, None, -1:], x[:, None], backend=b),
    "cosine_to_pivots": lambda x, y, b: vk.cosine_to_pivots(x, KEEP[:, :1].to(x.device), backend=b),
    "soft_topk": lambda x, y, b: vk.soft_topk(x[..., 0], 0.5, backend=b),
    "weighted_merge": lambda x, y, b: vk.weighted_merge(
        x, torch.tensor([[0, 1, 3]] * 2, device=x.device), KEEP.clamp(min=0).to(x.device), backend=b
    ),
}


@pytest.mark.parametrize("op", GRADIENTS)
def test_a_negated_gradient_has_its_own_sign(on, op):
    """Gradients came out with the other sign; so did those of zeros that have no memory at all."""
    x = normal((2, 7, 8), torch.float32, "x").to(on.device).requires_grad_()
    y = normal((2, 7, 8), torch.float32, "y").to(on.device)
    out = GRADIENTS[op](x, y, on.backend)
    grad = incoming(out.shape, on.device)
    assert grad.is_neg()
    got = torch.autograd.grad(out, x, grad, retain_graph=True)[0]
    same(got, torch.autograd.grad(out, x, grad.clone(), retain_graph=True)[0])
    none = torch.autograd.grad(out, x, torch._efficientzerotensor(out.shape, device=on.device), retain_graph=True)[0]
    assert not none.any()


def test_the_gradient_behind_a_conjugate(on):
    h = normal((1, 6, 8), torch.float32, "h").to(on.device).requires_grad_()
    w = torch.complex(normal((1, 2, 8), torch.float32, "re"), normal((1, 2, 8), torch.float32, "im")).to(on.device)

    def gradient(backend):
        x = vk.compact(torch.tensor([[1, 3]], device=on.device), h, backend=backend).hidden
        y = torch.complex(torch.zeros_like(x), x).conj()
        return torch.autograd.grad((y * w).real.sum(), h)[0]

    same(gradient(on.backend), gradient("reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_negated_view_after_a_call_like_it(on, dtype):
    """Calls like an earlier one are not checked again; a negated view is none of them."""
    prev, cur = (torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(seed)).to(dtype).to(on.device) for seed in (0, 1))
    want = vk.variation_score(prev, -cur, backend=on.backend), vk.drop_tokens(prev, -cur, 3, backend=on.backend).hidden
    for _ in range(3):
        vk.variation_score(prev, cur, backend=on.backend)
        vk.drop_tokens(prev, cur, 3, backend=on.backend)
    negated = torch._neg_view(cur)
    assert torch.equal(vk.variation_score(prev, negated, backend=on.backend), want[0])
    assert torch.equal(vk.drop_tokens(prev, negated, 3, backend=on.backend).hidden, want[1])
