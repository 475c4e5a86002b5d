"""Selection by many programs per segment, in Triton: the same results as by one, whatever the samples hit."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.cases import BATCHES, KINDS, KS, ORDERS, SCORES, count, cross, fewer, same, same_values, scores

import v2drop_kernels as vk
from v2drop_kernels.backends.choice import runner_of
from v2drop_kernels.backends.requests import Source, TopKRequest
from v2drop_kernels.core.plan import CuPlan
from v2drop_kernels.ops.topk.torch_op import OP as TOPK

pytestmark = pytest.mark.backends("triton")


@pytest.fixture
def chunk(monkeypatch):
    """Force the select by many programs, of this many keys each."""
    configs = importlib.import_module("v2drop_kernels.backends.configs")

    def force(size: int) -> None:
        monkeypatch.setattr(configs, "fuses_select", lambda n, batch: False)
        monkeypatch.setattr(configs, "wide_chunk", lambda n, groups, longest: size)

    return force


def check(on, x, k, order="position", **arguments):
    moved = {name: value.to(on.device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    got = vk.segmented_topk(x.to(on.device), k, order=order, backend=on.backend, **moved)
    want = vk.reference.segmented_topk(x, k, order=order, **arguments)
    same(got.indices.cpu(), want.indices)
    same_values(got.values.cpu(), want.values)


@cross(together="values k", N=[1, 31, 300], values=SCORES, k=KS, size=[32, 256])
def test_select(on, chunk, N, values, k, size):
    chunk(size)
    check(on, scores(values, (2, N), torch.float32), count(k, N))


@cross(b=fewer(BATCHES, KINDS), k=[*KS, "list"], order=ORDERS)
def test_select_of_segments(on, chunk, b, k, order):
    chunk(32)
    check(on, scores("three", b.lead, torch.bfloat16), b.k(k), order, **b.arguments("cpu"))


@pytest.mark.parametrize("k", fewer([1, 299, 700], [299]))
def test_no_sample_says_anything(on, chunk, k):
    """Every sample is the smallest key, so all keys are candidates; the last launch reads its list in several steps."""
    chunk(64)
    x = torch.randn(1, 1300, generator=torch.Generator().manual_seed(0))
    x[0, (torch.arange(128) * 1300) // 128] = -9.0
    check(on, x, k)


@pytest.mark.parametrize("k", fewer([500, 900], [900]))
def test_ties_that_no_sample_hits(on, chunk, k):
    """Most keys are tied, none of them a sample: the quota of ties is counted across chunks."""
    chunk(64)
    x = torch.full((1, 1300), 0.5)
    at = (torch.arange(128) * 1300) // 128
    x[0, at] = torch.randn(128, generator=torch.Generator().manual_seed(0))
    check(on, x, k)


@cross(cu=[(0, 20, 21, 390), (0, 0, 390, 390), (0, 390), (0, 0, 0)], order=ORDERS)
def test_select_of_device_lengths(on, chunk, cu, order):
    chunk(32)
    ks = (70, 3, 300)[: len(cu) - 1]
    x = scores("three", (cu[-1],), torch.float32)
    plan = CuPlan(cu[-1], ks, min(max(ks), cu[-1]), False)
    offsets = torch.tensor(cu, dtype=torch.int32, device=on.device)
    values, indices = runner_of(TOPK, on.backend).run(TopKRequest(Source(x.to(on.device), None, None), plan, offsets, order))
    want = vk.reference.segmented_topk(x, list(ks), cu_seqlens=list(cu), order=order)
    pad = plan.out_rows - want.indices.shape[1]
    same(indices.cpu(), torch.nn.functional.pad(want.indices, (0, pad), value=-1))
    same_values(values.cpu(), torch.nn.functional.pad(want.values, (0, pad), value=-torch.inf))


@cross(b=fewer(BATCHES, KINDS))
def test_drop(on, chunk, b):
    """The rows around the survivors are shared by the programs; keys come from the score kernel, masked rows included."""
    chunk(32)
    generator = torch.Generator().manual_seed(0)
    prev, cur = (torch.randn(*b.lead, 8, generator=generator) for _ in range(2))
    got = vk.drop_tokens(prev.to(on.device), cur.to(on.device), b.k("n/3"), backend=on.backend, **b.arguments(on.device))
    want = vk.reference.drop_tokens(prev, cur, b.k("n/3"), **b.arguments("cpu"))
    same([got.keep.cpu(), got.hidden.cpu()], [want.keep, want.hidden])
