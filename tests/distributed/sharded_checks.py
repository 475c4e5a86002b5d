"""Checks of the sharded ops, run by every rank of a group (support/ranks.py). Expected: the op of one process, cut into shards."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import time

import torch
import torch.distributed as dist

import v2drop_kernels as vk
from v2drop_kernels import distributed as vd
from v2drop_kernels.core.droppable import layout_of
from v2drop_kernels.distributed.drop import SHARDS
from v2drop_kernels.distributed.sharding import local_rows

CASES = 240  # of each world size


def case(seed):
    """A whole sequence and how it is cut, the same on every rank: scores with ties, NaN and both zeros; empty shards; any k."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = [rng.choice([0, rng.randint(0, 20), rng.randint(0, 200)]) for _ in range(dist.get_world_size())]
    sharding = rng.choice([vd.Sharding.contiguous, vd.Sharding.zigzag])(sizes)
    n, batch, packed = sharding.rows, rng.randint(1, 3), rng.random() < 0.3
    scores = torch.randn((n,) if packed else (batch, n), generator=generator)
    if seed % 3 == 0:
        scores = (scores * 2).round() / 2
    if seed % 5 == 0:
        scores[scores > 1] = float("nan")
    if seed % 7 == 0:
        scores = torch.where(scores.abs() < 0.3, -0.0, scores)
    if seed % 11 == 0:
        scores[scores < -1] = -torch.inf
    scores = scores.to(rng.choice([torch.float32, torch.bfloat16, torch.float16]))

    def spans(rows):
        cuts = sorted(rng.sample(range(rows + 1), min((rows + 1) // 2 * 2, 2 * rng.randint(0, 3))))
        return list(zip(cuts[::2], cuts[1::2], strict=True))

    cu, droppable = None, None
    if packed:
        cu = sorted([0, n, *(rng.randint(0, n) for _ in range(rng.randint(0, 3)))])
        if rng.random() < 0.5:
            droppable = [spans(b - a) for a, b in zip(cu[:-1], cu[1:], strict=True)]
    elif rng.random() < 0.2:
        droppable = vk.TokenLayout.from_mask(torch.rand(batch, n, generator=generator) < 0.5)
    elif rng.random() < 0.5:
        droppable = [spans(n) for _ in range(batch)]
    layout = layout_of(droppable, None if packed else batch, n, cu)
    k = [rng.choice([0, rng.randint(0, n + 3), rng.randint(0, 10)]) for _ in range(layout.groups)]
    return sharding, scores, k, {"droppable": droppable, "cu_seqlens": cu}, rng, generator


def mine(x, sharding, dim=-1):
    """This rank's shard of ``x``, whose rows lie along ``dim``."""
    return local_rows(x.movedim(dim, -1), sharding, dist.get_rank()).movedim(-1, dim).contiguous()


def held(indices, values, sharding):
    """The rows of a segment that this rank holds, with their scores as bits."""
    own = sharding.ranges[dist.get_rank()]
    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16)
    return [
        (i, v) for i, v in zip(indices.tolist(), bits.tolist(), strict=True)
        if i >= 0 and any(a <= i < b for a, b in own)
    ]  # fmt: skip


@contextlib.contextmanager
def unchecked():
    """Without the collective that compares arguments, which other checks cover and which takes half of the time."""
    os.environ["V2DROP_CHECK_RANKS"] = "0"
    try:
        yield
    finally:
        del os.environ["V2DROP_CHECK_RANKS"]


@unchecked()
def check_topk():
    for seed in range(CASES):
        sharding, scores, k, where, _, _ = case(seed)
        want = vk.segmented_topk(scores, k, **where)
        for algorithm in ("gather", "radix"):
            got = vd.segmented_topk(mine(scores, sharding), k, sharding=sharding, algorithm=algorithm, **where)
            shard, flat = (
                got.local.clamp(min=0),
                torch.tensor([i for a, b in sharding.ranges[dist.get_rank()] for i in range(a, b)]),
            )
            for g in range(len(k)):
                expected = held(want.indices[g], want.values[g], sharding)
                assert held(got.indices[g], got.values[g], sharding) == expected, (seed, algorithm, g)
                assert int(got.counts[g]) == len(expected) == int((got.indices[g] >= 0).sum())
                present = got.local[g] >= 0
                assert torch.equal(flat[shard[g][present]], got.indices[g][present])


@unchecked()
def check_drop():
    """hidden, ids, K and V of the kept rows; all forms of the result."""
    for seed in range(CASES, CASES + CASES // 2):
        sharding, scores, k, where, rng, generator = case(seed)
        packed, n = scores.dim() == 1, sharding.rows
        row = 0 if packed else 1
        hidden = torch.randn(*scores.shape, 3, generator=generator)
        ids = torch.arange(n).expand(scores.shape).contiguous()
        keys = torch.randn(*scores.shape[:-1], 2, n, 4, generator=generator).to(torch.bfloat16)
        want = vk.drop_tokens(None, hidden, k, scores=scores, position_ids=ids, kv=[(keys,)], **where)
        how = rng.choice(SHARDS)
        got = vd.drop_tokens(
            None, mine(hidden, sharding, row), k, scores=mine(scores, sharding), sharding=sharding, shards=how,
            position_ids=mine(ids, sharding), kv=[(mine(keys, sharding, -2),)], **where,
        )  # fmt: skip
        if how in ("contiguous", "zigzag"):
            assert got.sharding == vd.Sharding.even(want.keep.shape[-1], dist.get_world_size(), how)
            for a, b, dim in (
                (want.hidden, got.hidden, row), (want.keep, got.keep, -1), (want.position_ids, got.position_ids, -1),
                (want.kv[0][0], got.kv[0][0], -2),
            ):  # fmt: skip
                assert torch.equal(mine(a, got.sharding, dim), b), (seed, how)
            continue
        if got.sharding is not None:
            assert torch.equal(mine(want.hidden, got.sharding, row), got.hidden), seed
        own = sharding.ranges[dist.get_rank()]
        for b in range(1 if packed else scores.shape[0]):
            at = () if packed else (b,)
            rows = got.keep[at]
            present = rows >= 0
            expected = [i for i in want.keep[at].tolist() if any(start <= i < stop for start, stop in own)]
            assert rows[present].tolist() == expected, (seed, how)
            assert torch.equal(got.hidden[at][present], hidden[at][rows[present]])
            assert bool((got.hidden[at][~present] == 0).all())
            assert torch.equal(got.kv[0][0][at][:, present], keys[at][:, rows[present]])
            assert torch.equal(got.position_ids[at][present], rows[present])


def check_stages():
    """Two stages, each on the shards that the one before left, with droppable= from the result."""
    sharding = vd.Sharding.even(90, dist.get_world_size(), "zigzag")
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(2, 90, 8, generator=generator) for _ in range(3)]
    want = vk.drop_tokens(states[0], states[1], 30, droppable=(10, 80))
    later = torch.randn(*want.hidden.shape, generator=generator)
    want_last = vk.drop_tokens(want.hidden, later, 11, droppable=want.layout)
    got = vd.drop_tokens(mine(states[0], sharding, 1), mine(states[1], sharding, 1), 30, sharding=sharding, droppable=(10, 80),
                         shards="contiguous")  # fmt: skip
    assert got.layout == want.layout
    last = vd.drop_tokens(
        got.hidden, mine(later, got.sharding, 1), 11, sharding=got.sharding, droppable=got.layout, shards="zigzag"
    )
    assert torch.equal(last.hidden, mine(want_last.hidden, last.sharding, 1))
    found = vd.variation_topk(mine(states[0], sharding, 1), mine(states[1], sharding, 1), 7, sharding=sharding, droppable=(10, 80))
    whole = vk.variation_topk(states[0], states[1], 7, droppable=[(10, 80)] * 2)
    for g in range(2):
        assert held(found.indices[g], found.values[g], sharding) == held(whole.indices[g], whole.values[g], sharding)


def check_gradients():
    """Through values, compaction and the all-to-all: the gradient of the loss that the ranks share."""
    world, n = dist.get_world_size(), 24
    sharding = vd.Sharding.contiguous([n * (r + 1) // (world * (world + 1) // 2) for r in range(world - 1)] + [0])
    sharding = vd.Sharding.contiguous([*sharding.sizes[:-1], n - sum(sharding.sizes)])
    generator = torch.Generator().manual_seed(2)
    hidden, scores = torch.randn(2, n, 4, generator=generator), torch.randn(2, n, generator=generator)
    weight = torch.randn(2, 10, 4, generator=generator)
    for how in ("contiguous", "zigzag"):
        whole = hidden.clone().requires_grad_()
        (vk.drop_tokens(None, whole, 10, scores=scores).hidden * weight).sum().backward()
        part = mine(hidden, sharding, 1).requires_grad_()
        got = vd.drop_tokens(None, part, 10, scores=mine(scores, sharding), sharding=sharding, shards=how)
        (got.hidden * mine(weight, got.sharding, 1)).sum().backward()
        assert torch.equal(part.grad, mine(whole.grad, sharding, 1))
    part = mine(scores, sharding).requires_grad_()
    vd.segmented_topk(part, 5, sharding=sharding).values.clamp(min=-9).sum().backward()
    chosen = torch.zeros_like(scores).scatter_(1, vk.segmented_topk(scores, 5).indices, 1.0)
    assert torch.equal(part.grad, mine(chosen, sharding))


def check_counts():
    """Collectives and bytes are those of the docstrings and of cost()."""
    world = dist.get_world_size()
    scores = torch.randn(1, 60)
    check = vd.Collective("all_gather", (world - 1) * 72)
    for algorithm, kinds in (("gather", ["all_gather"]), ("radix", ["all_reduce"] * 3 + ["all_gather"])):
        with vd.record() as calls:
            vd.segmented_topk(scores, 9, algorithm=algorithm)
        assert calls[0] == check
        assert [call.kind for call in calls[1:]] == kinds
        said = vd.cost(algorithm, ranks=world, rows=60 * world, batch=1, groups=1, itemsize=4)
        assert abs(sum(call.received for call in calls[1:]) - said) <= len(kinds), (calls, said)
    for n, expected in ((60, 1), (60000, 4)):  # the one that receives fewer bytes
        with vd.record() as calls:
            vd.segmented_topk(torch.randn(1, n), 9)
        assert len(calls) == 1 + expected
    with vd.record() as calls:
        vd.drop_tokens(torch.zeros(1, 60, 2), torch.randn(1, 60, 2), 9, shards="contiguous")
    assert [call.kind for call in calls] == ["all_gather"] * 3 + ["all_to_all"]
    with vd.record() as calls:
        vd.drop_tokens(torch.zeros(1, 60, 2), torch.randn(1, 60, 2), 9)
    assert [call.kind for call in calls] == ["all_gather"] * 2


def refused(kind, words, call):
    try:
        call()
    except kind as error:
        text = str(error)
        assert words in text, text
        assert "\n" not in text, text
    else:
        raise AssertionError(f"not refused: {words}")


def check_disagreement():
    """One sentence on every rank, before data are exchanged, and the group works afterwards."""
    rank, s = dist.get_rank(), torch.randn(1, 12)
    topk = vd.segmented_topk
    refused(ValueError, "k must be equal on all ranks of group", lambda: topk(s, 3 + (rank == 1)))
    refused(ValueError, "rows must be equal on all ranks", lambda: topk(s[:, : 12 - (rank == 1)], 3))
    refused(ValueError, "batch must be equal on all ranks", lambda: topk(s.repeat(1 + (rank == 1), 1), 3))
    refused(ValueError, "dtype of the tensors", lambda: topk(s.half() if rank == 1 else s, 3))
    refused(ValueError, "droppable must be equal", lambda: topk(s, 3, droppable=(0, 12 - (rank == 1))))
    refused(ValueError, "options must be equal", lambda: topk(s, 3, algorithm="radix" if rank == 1 else "gather"))
    h = torch.randn(1, 12, 2)
    refused(ValueError, "the op that is called", lambda: vd.variation_topk(h, h, 3) if rank == 1 else topk(s, 3))
    # A wrong argument on one rank: its own error there, and a sentence that names it on the others.
    wrong = lambda: topk(s, -1 if rank == 1 else 3)
    refused(*((ValueError, "k must be >= 0") if rank == 1 else (RuntimeError, "raised an error on rank 1")), wrong)
    wrong = lambda: topk(s if rank == 1 else None, 3)
    refused(*((RuntimeError, "raised an error on rank 0") if rank == 1 else (TypeError, "scores must be a tensor")), wrong)
    world = dist.get_world_size()
    refused(ValueError, "sharding must have one entry per rank", lambda: topk(s, 3, sharding=vd.Sharding.contiguous([12])))
    refused(ValueError, "the 12 rows of its tensors", lambda: topk(s, 3, sharding=vd.Sharding.contiguous([11] * world)))
    refused(TypeError, "float64", lambda: topk(s.double(), 3, algorithm="radix"))
    refused(ValueError, "algorithm must be one of", lambda: topk(s, 3, algorithm="fast"))
    assert int(topk(s, 3).counts) >= 0


def check_absent_rank():
    """A rank that never calls, or calls another op in a group without the check: an error within the timeout, no hang."""
    rank = dist.get_rank()
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    before = time.monotonic()
    if rank != 1:
        refused(
            RuntimeError,
            "another rank raised, left, or called another op",
            lambda: vd.segmented_topk(torch.randn(1, 12), 3, group=group),
        )
        assert time.monotonic() - before < 30
    dist.barrier()
    others = dist.new_group([0])
    if rank != 0:
        refused(ValueError, "group must be a process group of which this process is a member",
                lambda: vd.segmented_topk(torch.randn(1, 12), 3, group=others))  # fmt: skip
    else:
        assert vd.segmented_topk(torch.randn(1, 12), 3, group=others).counts.item() == 3


@unchecked()
def check_compiled():
    """The collectives are in the graph, which does not break, and the compiled result is the eager one."""
    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    prev, cur = torch.randn(1, 16 * world, 4, generator=generator), torch.randn(1, 16 * world, 4, generator=generator)
    sharding = vd.Sharding.contiguous([16] * world)
    for algorithm in ("gather", "radix"):
        step = lambda a, b, algorithm=algorithm: vd.drop_tokens(a, b, 9, droppable=(2, 14 * world), algorithm=algorithm).hidden
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        given = mine(prev, sharding, 1), mine(cur, sharding, 1)
        assert torch.equal(compiled(*given), step(*given))
