"""Offsets beyond 2^31 elements: tensors with gigabytes of addresses, of which only a few pages are touched."""

from __future__ import annotations

import pytest
import torch
from support.cases import METRICS, cross, far_apart, hidden_pair, integers, random_bytes, same, vast

import v2drop_kernels as vk


@cross(dtype=[torch.bfloat16, torch.float16], metric=["l2", "l1"])
def test_variation_score_of_far_items(on, dtype, metric):
    prev, cur = hidden_pair((2, 5, 40), dtype)
    want = vk.reference.variation_score(prev, cur, metric=metric)
    same(vk.variation_score(far_apart(prev, on), cur.to(on.device), metric=metric, backend=on.backend).cpu(), want)
    same(vk.variation_score(prev.to(on.device), far_apart(cur, on), metric=metric, backend=on.backend).cpu(), want)


def test_variation_score_of_far_rows(on):
    prev, cur = hidden_pair((3, 40), torch.bfloat16)
    want = vk.reference.variation_score(prev, cur)
    same(vk.variation_score(far_apart(prev, on), far_apart(cur, on), cu_seqlens=[0, 3], backend=on.backend).cpu(), want)


@pytest.mark.parametrize("metric", METRICS)
def test_variation_score_gradients_of_far_items(on, metric):
    prev, cur = hidden_pair((2, 3, 16), torch.bfloat16)
    found = []
    for a, b in ((prev.to(on.device), cur.to(on.device)), (far_apart(prev, on), far_apart(cur, on))):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        scores = vk.variation_score(a, b, metric=metric, backend=on.backend)
        # Not autograd's sum over leaves of 4 GB strides: only the op's own backward is of interest.
        found.append([g.cpu().contiguous() for g in torch.autograd.grad(scores.sum(), (a, b))])
    same(found[1], found[0])


@cross(order=["position", "score"])
def test_segmented_topk_of_far_items(on, order):
    x = integers((2, 50), torch.bfloat16, "x")
    want = vk.reference.segmented_topk(x, 9, order=order)
    got = vk.segmented_topk(far_apart(x, on), 9, order=order, backend=on.backend)
    same([got.values.cpu(), got.indices.cpu()], list(want))


def test_segmented_topk_of_far_tokens(on):
    x = integers((4,), torch.float16, "x")
    got = vk.segmented_topk(far_apart(x, on), 2, cu_seqlens=[0, 4], backend=on.backend)
    same(got.indices.cpu(), vk.reference.segmented_topk(x, 2, cu_seqlens=[0, 4]).indices)


def test_segmented_topk_of_far_masks(on):
    x, mask = integers((2, 50), torch.float32, "x"), integers((2, 50), torch.int64, "m") > 0
    want = vk.reference.segmented_topk(x, 9, droppable=mask)
    layout = vk.TokenLayout.from_mask(far_apart(mask, on), mask.sum(1).tolist())
    same(vk.segmented_topk(x.to(on.device), 9, droppable=layout, backend=on.backend).indices.cpu(), want.indices)


@cross(dim=[0, 1, 2], dtype=[torch.int8, torch.bfloat16])
def test_compact_of_far_kv(on, dim, dtype):
    """Items, heads or rows that lie 2^31 elements apart, in one [B, H, S, Dh] cache."""
    kv = random_bytes((2, 2, 3, 8), dtype, "kv")
    keep = torch.tensor([[2, 0], [1, -1]])
    want = vk.reference.compact(keep, torch.zeros(2, 3, 1), kv=(kv,)).kv[0]
    hidden = torch.zeros(2, 3, 1, device=on.device)
    got = vk.compact(keep.to(on.device), hidden, kv=(far_apart(kv, on, dim),), backend=on.backend)
    same(got.kv[0].cpu(), want)


@cross(dim=[0, 2], dtype=[torch.int8])
def test_compact_inplace_of_far_kv(on, dim, dtype):
    kv = random_bytes((2, 2, 3, 8), dtype, "kv")
    moved = far_apart(kv, on, dim)
    keep = torch.tensor([[1, 2], [2, -1]])
    vk.compact_(keep.to(on.device), moved, backend=on.backend)
    want = kv.clone()
    want[0, :, 0], want[0, :, 1], want[1, :, 0] = kv[0, :, 1], kv[0, :, 2], kv[1, :, 2]
    same(moved.cpu().contiguous(), want)


def test_compact_gradients_of_far_incoming(on):
    keep = torch.tensor([[2, 0], [1, -1]], device=on.device)
    hidden = torch.zeros(2, 3, 8, dtype=torch.bfloat16, device=on.device, requires_grad=True)
    g = integers((2, 2, 8), torch.bfloat16, "g")
    out = vk.compact(keep, hidden, backend=on.backend).hidden
    (got,) = torch.autograd.grad(out, hidden, far_apart(g, on))
    want = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    want[0, 2], want[0, 0], want[1, 1] = g[0, 0], g[0, 1], g[1, 0]
    same(got.cpu(), want)


def test_drop_tokens_of_far_items(on):
    prev, cur = hidden_pair((2, 30, 16), torch.bfloat16)
    kv = random_bytes((2, 2, 30, 4), torch.int8, "kv")
    want = vk.reference.drop_tokens(prev, cur, 7, droppable=(2, 29), kv=[kv])
    got = vk.drop_tokens(far_apart(prev, on), far_apart(cur, on), 7, droppable=(2, 29), kv=[far_apart(kv, on)], backend=on.backend)
    same([got.keep.cpu(), got.hidden.cpu(), got.kv[0].cpu()], [want.keep, want.hidden, want.kv[0]])


@pytest.mark.backends("cpu", "triton", "cuda")
@pytest.mark.skipif("os.environ.get('TRITON_INTERPRET') == '1'", reason="2^31 elements take the interpreter minutes")
def test_compact_writes_beyond_2_to_the_31(on):
    """A contiguous cache, and a result, of more than 2^31 elements: marked rows at both ends, and between them what memory held."""
    D = 2**16
    N = 2**15 + 8
    hidden = vast(N * D, torch.int8, on.device).view(1, N, D)
    marks = random_bytes((4, D), torch.int8, "marks").to(on.device)
    hidden[0, [0, 1, N - 2, N - 1]] = marks
    keep = torch.arange(N, device=on.device).roll(1)[None]  # the last row comes first
    got = vk.compact(keep, hidden, backend=on.backend).hidden
    assert got.numel() > 2**31
    same(got[0, [1, 2, N - 1, 0]], marks)
    same(got[0, 3 : N - 1 : 4096], hidden[0, 2 : N - 2 : 4096])
