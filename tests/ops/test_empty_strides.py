"""Empty tensors may have any strides: there is nothing to step over."""

from __future__ import annotations

import pytest
import torch

import v2drop_kernels as vk


@pytest.mark.parametrize("view", [lambda x: x[:0, :, ::2], lambda x: x[:, :0, ::2], lambda x: x[:, :0].mT.contiguous().mT])
def test_ops_of_strided_nothing(on, view):
    """``contiguous()`` returns an empty tensor as it is, and the library refused its strides."""
    x = view(torch.randn(2, 6, 8, device=on.device))
    b = {"backend": on.backend}
    assert vk.variation_score(x, x, **b).shape == x.shape[:2]
    assert vk.variation_topk(x, x, 2, **b).indices.shape[0] == x.shape[0]
    got = vk.drop_tokens(x, x, 2, kv=[(x[:, None], x[:, None])], **b)
    assert got.hidden.shape[::2] == x.shape[::2]
    leaf = x.detach().requires_grad_()
    assert torch.autograd.grad(vk.variation_score(leaf, x, **b).sum(), leaf)[0].shape == x.shape
    q = x[:, None]
    assert vk.attention_score(q, q, causal=False, **b).shape == x.shape[:2]
    assert vk.key_norm_score(q, **b).shape == x.shape[:2]
    assert vk.cosine_to_pivots(x, torch.zeros(x.shape[0], 1, dtype=torch.int64, device=on.device), **b).shape[2] == x.shape[1]


def test_an_empty_result_with_stride_0(on):
    """It was said to overlap itself."""
    cache = torch.zeros(1, device=on.device).expand(2, 3, 0, 4)
    vk.compact_(torch.zeros(2, 0, dtype=torch.int64, device=on.device), cache, backend=on.backend)
    got = vk.compact(
        torch.zeros(2, 0, dtype=torch.int64, device=on.device), torch.zeros(2, 5, 3, device=on.device), backend=on.backend
    )
    out = got._replace(hidden=torch.zeros(1, device=on.device).expand(2, 0, 3))
    again = vk.compact(
        torch.zeros(2, 0, dtype=torch.int64, device=on.device), torch.zeros(2, 5, 3, device=on.device), out=out, backend=on.backend
    )
    assert again.hidden.shape == (2, 0, 3)
