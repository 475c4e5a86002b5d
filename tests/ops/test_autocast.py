"""Autocast changes no result: what is documented as float32 is computed in float32."""

from __future__ import annotations

import pytest
import torch
from support.cases import fewer, normal, same

import v2drop_kernels as vk
from v2drop_kernels.ops.merge_dropped.sparsevlm import recycled_clusters

DTYPES = fewer([torch.bfloat16, torch.float16], [torch.bfloat16])


def results(on):
    b = {"backend": on.backend}
    x, y = (normal((2, 40, 64), torch.float32, name).to(on.device).requires_grad_() for name in "xy")
    q = normal((2, 4, 3, 16), torch.float32, "q").to(on.device).requires_grad_()
    k = normal((2, 2, 40, 16), torch.float32, "k").to(on.device).requires_grad_()
    pivots = torch.tensor([[0, 5], [7, -1]], device=on.device)
    outputs = [
        *(vk.variation_score(x, y, metric=metric, **b) for metric in ("l2", "l1", "cosine")),
        vk.attention_score(q, k, **b),
        vk.attention_score(q, k, heads=2, queries="l2", droppable=torch.arange(40, device=on.device).expand(2, -1) > 9, **b),
        vk.key_norm_score(k, **b),
        vk.cosine_to_pivots(x, pivots, **b),
        vk.frame_similarity(x, **b),
        vk.soft_topk(x[..., 0], 0.5, hard=False, **b),
        vk.drop_tokens(y, x, 9, **b).hidden,
    ]
    targets = torch.arange(40, device=on.device).expand(2, -1) % 5 == 1
    keep = torch.arange(0, 40, 2, device=on.device).expand(2, -1)
    merged = vk.bipartite_merge(x, y, 9, **b)
    outputs += [merged.hidden, vk.merge_dropped(x, keep + 1, "visionzip", metric=y, targets=targets, **b)]
    outputs += [vk.merge_dropped(x, keep, "prumerge", metric=y, scores=x[..., 1], **b)]
    chosen = [merged.keep, merged.row, recycled_clusters(x, y[..., 0], targets, share=0.9)]
    chosen += [vk.text_raters(targets, ~targets, x), vk.random_score(x[..., 0])]
    return outputs, chosen, (x, y, q, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_under_autocast(on, dtype):
    """text_raters chose other raters in 11 of 200 prompts; scores of the reference moved by 2e-3 to 7e-3."""
    want, chosen, _ = results(on)
    with torch.autocast(on.device, dtype):
        got, also, _ = results(on)
    same([x.detach() for x in got], [x.detach() for x in want])
    same(also, chosen)


@pytest.mark.backends("cpu", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_under_autocast(on, dtype):
    """Also where the backward pass runs inside."""
    outputs, _, leaves = results(on)
    want = [torch.autograd.grad(x.square().sum(), leaves, allow_unused=True) for x in outputs[:10]]
    with torch.autocast(on.device, dtype):
        outputs, _, leaves = results(on)
        got = [torch.autograd.grad(x.square().sum(), leaves, allow_unused=True) for x in outputs[:10]]
    for g, w in zip(got, want, strict=True):
        same([x for x in g if x is not None], [x for x in w if x is not None])
