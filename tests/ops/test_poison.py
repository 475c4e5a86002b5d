"""A test of the tests: an element that a backend forgets to write is seen."""

from __future__ import annotations

import pytest
import torch
from support.cases import COPIED, cross, same, same_values

import v2drop_kernels as vk


@cross(dtype=[*COPIED, torch.float16, torch.bool, torch.int32])
def test_poison_fills_every_dtype(poison, dtype):
    assert not torch.equal(torch.empty(7, dtype=dtype).view(torch.uint8), torch.zeros(7, dtype=dtype).view(torch.uint8))
    assert torch.empty(0, 3, dtype=dtype).shape == (0, 3)


@pytest.mark.parametrize("make", [torch.empty, torch.ones(1).new_empty, lambda n: torch.empty_like(torch.ones(n))])
def test_poison_catches_an_unwritten_element(poison, make):
    want = torch.arange(5.0)
    forgetful = make(5)
    forgetful[:4] = want[:4]
    for check in (same, same_values):
        with pytest.raises(AssertionError):
            check(forgetful, want)
    forgetful[4] = want[4]
    same(forgetful, want)


def test_poison_is_on_where_a_backend_runs(on):
    """The fixture ``on`` brings it: a backend that leaves its result as allocated returns NaN."""
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int64).eq(2**63 - 1).all()
    h = torch.zeros(1, 2, 4, device=on.device)
    assert not vk.variation_score(h, h, backend=on.backend).isnan().any()


def test_same_tells_bits_apart():
    """Zeros of both signs and NaN of two payloads are equal numbers, but other bytes."""
    zero, nan = torch.tensor([0.0]), torch.tensor([torch.nan])
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    for a, b in ((zero, -zero), (nan, other_nan)):
        same_values(a, b)
        with pytest.raises(AssertionError):
            same(a, b)
    with pytest.raises(AssertionError):
        same(zero, zero.double())
