"""compact_: the kept rows move to the front of a cache, in the memory that they are in."""

from __future__ import annotations

import pytest
import torch
from support.cases import COPIED, KS, SIZES, STRIDES, count, cross, fewer, random_bytes, same, seeded, strided, to

import v2drop_kernels as vk


def ascending_rows(batch: int, rows: int, width: int) -> torch.Tensor:
    """``[batch, width]``: ascending rows of each item, a different number of them, with -1 in between."""
    keep = torch.full((batch, width), -1)
    for i in range(batch):
        gen = seeded(i, rows, width)
        n = max(min(rows, width) - i * 2, 0)
        slots = torch.randperm(width, generator=gen)[:n].sort().values
        keep[i, slots] = torch.randperm(rows, generator=gen)[:n].sort().values
    return keep


def expected(x: torch.Tensor, keep: torch.Tensor, row_dim: int) -> torch.Tensor:
    """Row by row, out of place; the rows behind stay."""
    want = x.clone()
    source, target = x.transpose(1, row_dim), want.transpose(1, row_dim)
    for b, rows in enumerate(keep.tolist()):
        for s, r in enumerate(r for r in rows if r >= 0):
            target[b, s] = source[b, r]
    return want


@cross(N=SIZES, k=KS, dtype=[torch.bfloat16, torch.float32])
def test_compact_inplace(on, N, k, dtype):
    keep = ascending_rows(2, N, count(k, N))
    cache = random_bytes((2, 2, N, 4), dtype, "kv")
    moved = cache.clone().to(on.device)
    assert vk.compact_(keep.to(on.device), moved, backend=on.backend) is None
    same(moved.cpu(), expected(cache, keep, 2))


@cross(rounds=2, dtype=COPIED, layout=["BHSD", "BSHD"], strides=STRIDES, D=[1, 5, 128])
def test_compact_inplace_of_any_bytes(on, dtype, layout, strides, D):
    keep = ascending_rows(2, 37, 16)
    cache = random_bytes((2, 3, 37, D) if layout == "BHSD" else (2, 37, 3, D), dtype, "kv")
    moved = strided(cache.clone().to(on.device), strides)
    vk.compact_(keep.to(on.device), moved, kv_layout=layout, backend=on.backend)
    same(moved.cpu(), expected(cache, keep, 2 if layout == "BHSD" else 1))


@cross(strides=["inner", "rows", "batch"])
def test_compact_inplace_leaves_memory_between_rows(on, strides):
    """A cache is a view: what lies between its elements belongs to somebody else."""
    moved = strided(random_bytes((2, 3, 20, 6), torch.int8, "kv").to(on.device), strides)
    whole = moved.as_strided((moved.untyped_storage().nbytes(),), (1,), 0)
    mine = torch.zeros_like(whole, dtype=torch.bool).as_strided(moved.size(), moved.stride(), moved.storage_offset())
    others = mine.fill_(True).as_strided(whole.size(), (1,), 0).logical_not()
    before = whole[others].clone()
    vk.compact_(ascending_rows(2, 20, 9).to(on.device), moved, backend=on.backend)
    same(whole[others], before)


def test_compact_inplace_of_32_layers(on):
    keep = ascending_rows(2, 40, 20)
    cache = [tuple(random_bytes((2, 1 + i % 2, 40, 4), torch.bfloat16, i, s) for s in "kv") for i in range(fewer([32], [5])[0])]
    moved = to([tuple(x.clone() for x in pair) for pair in cache], on.device)
    addresses = [x.data_ptr() for pair in moved for x in pair]
    vk.compact_(keep.to(on.device), moved, backend=on.backend)
    same(to(moved, "cpu"), [tuple(expected(x, keep, 2) for x in pair) for pair in cache])
    assert [x.data_ptr() for pair in moved for x in pair] == addresses


def test_compact_inplace_takes_topk_and_static_caches(on):
    """A preallocated cache of 64 rows, of which 50 are in use: the kept ones move up, the rest is stale and
    untouched."""
    cache = random_bytes((2, 2, 64, 8), torch.float32, "kv")
    scores = torch.rand(2, 50, generator=seeded("s"))
    top = vk.segmented_topk(scores.to(on.device), 20, backend=on.backend)
    moved = cache.clone().to(on.device)
    vk.compact_(top, moved, backend=on.backend)
    same(moved.cpu(), expected(cache, top.indices.cpu(), 2))


@cross(keep=["nothing", "everything", "only-padding"])
def test_compact_inplace_of_trivial_rows(on, keep):
    rows = {"nothing": torch.zeros(2, 0, dtype=torch.int64), "everything": torch.arange(7).expand(2, 7),
            "only-padding": torch.full((2, 3), -1)}[keep]  # fmt: skip
    cache = random_bytes((2, 2, 7, 3), torch.bfloat16, "kv")
    moved = cache.clone().to(on.device)
    vk.compact_(rows.to(on.device), moved, backend=on.backend)
    same(moved.cpu(), cache)


@cross(shape=[(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3), (2, 2, 5, 0)])
def test_compact_inplace_of_nothing(on, shape):
    keep = torch.full((shape[0], 2), -1 if shape[2] == 0 else 1)
    keep[:, 1:] += shape[2] > 0
    moved = torch.zeros(shape, device=on.device)
    vk.compact_(keep.to(on.device), moved, backend=on.backend)
    assert moved.shape == shape


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("bad", [[3, 1], [1, 1], [2, -1, 1], [0, 5], [0, 2**40]])
def test_compact_inplace_checks_before_it_moves(on, bad):
    """A wrong row in the second item must not leave the first item moved: the caller could not go back."""
    keep = torch.full((2, 3), -1)
    keep[0, :2] = torch.tensor([2, 3])
    keep[1, : len(bad)] = torch.tensor(bad)
    cache = random_bytes((2, 2, 5, 3), torch.float32, "kv")
    first, second = cache.clone(), cache.clone()
    with pytest.raises(ValueError, match="keep"):
        vk.compact_(keep, [first, second], backend=on.backend)
    same([first, second], [cache, cache])


@pytest.mark.backends("triton", "cuda")
@pytest.mark.parametrize("bad", [[3, 1, -1], [1, 1, 1], [0, 5, -1], [0, 2**40, 4], [2**62, 2**62 + 1, -1]])
def test_compact_inplace_stays_in_bounds(on, bad):
    """Looking would synchronise, so a GPU cannot raise; memory around the cache must stay as it was."""
    around = torch.full((6, 2, 5, 3), 7.0, device=on.device)
    vk.compact_(torch.tensor([bad, bad], device=on.device), around[2:4], backend=on.backend)
    assert around[:2].eq(7).all()
    assert around[4:].eq(7).all()
