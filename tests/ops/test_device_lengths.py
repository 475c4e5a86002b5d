"""Packed batches whose offsets only the device knows: nothing is read back, and no offset, however wrong, leaves the
tensors.

The interpreter and the emulator serve CPU tensors, whose offsets the public ops read; so they are given the plan that a
GPU would get.
"""

from __future__ import annotations

import pytest
import torch
from support.cases import BATCHES, ORDERS, companions, hidden_pair, same, same_values, scores, to

import v2drop_kernels as vk
from v2drop_kernels.backends.choice import runner_of
from v2drop_kernels.backends.requests import DropRequest, Source, TopKRequest
from v2drop_kernels.core import calls
from v2drop_kernels.core import plan as plans
from v2drop_kernels.core.types import GatherSpec
from v2drop_kernels.ops.drop_tokens.torch_op import OP as DROP
from v2drop_kernels.ops.topk.torch_op import OP as TOPK

pytestmark = pytest.mark.backends("triton", "cuda")
OFFSETS = [[0, 20, 21, 90], [0, 0, 90, 90], [0, 90], [0, 30, 60, 90], [0, 0, 0, 0, 0]]
WRONG = [[0, 50, 20, 90], [-5, 40, 90], [0, 200, 90], [0, 40, 2**31 - 1], [90, 0], [0, 10, 20], [-(2**31), 2**31 - 1]]
KS = [7, 0, 5, 100]


def topk(on, source, plan, cu, order="position"):
    return runner_of(TOPK, on.backend).run(TopKRequest(source, plan, offsets(cu, on), order))


def drop(on, source, plan, cu, parts):
    return runner_of(DROP, on.backend).run(DropRequest(source, plan, offsets(cu, on), parts))


def offsets(cu, on):
    return torch.tensor(cu, dtype=torch.int32, device=on.device)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cu", OFFSETS, ids=str)
@pytest.mark.parametrize("kind", ["three", "special"])
def test_topk_of_device_offsets(on, cu, order, kind):
    x, ks = scores(kind, (cu[-1],), torch.float32), KS[: len(cu) - 1]
    width = min(max(ks), cu[-1])
    plan = plans.CuPlan(cu[-1], tuple(ks), width, False)
    values, indices = topk(on, Source(x.to(on.device), None, None), plan, cu, order)
    want = vk.reference.segmented_topk(x, ks, cu_seqlens=cu, order=order)
    pad = width - want.indices.shape[1]  # the capacity is what max(k) and T allow, not what the lengths do
    same(indices.cpu(), torch.nn.functional.pad(want.indices, (0, pad), value=-1))
    same_values(values.cpu(), torch.nn.functional.pad(want.values, (0, pad), value=-torch.inf))


@pytest.mark.parametrize("cu", OFFSETS, ids=str)
def test_drop_of_device_offsets(on, cu):
    rows, ks = cu[-1], KS[: len(cu) - 1]
    prev, cur = hidden_pair((rows, 8), torch.bfloat16)
    kv = torch.randn(2, rows, 4, generator=torch.Generator().manual_seed(0))
    capacity = min(sum(ks), rows)
    plan = plans.CuPlan(rows, tuple(ks), capacity, True)
    parts = [GatherSpec(cur.to(on.device), -1, 0), GatherSpec(kv.to(on.device), -1, 1)]
    keep, outs, new = drop(on, Source(None, prev.to(on.device), cur.to(on.device)), plan, cu, parts)
    want = vk.reference.drop_tokens(prev, cur, ks, cu_seqlens=cu, kv=[kv])
    used = want.keep.shape[0]
    same([new.cpu(), keep[0, :used].cpu()], [want.cu_seqlens, want.keep])
    same([outs[0][:used].cpu(), outs[1][:, :used].cpu()], [want.hidden, want.kv[0]])
    assert keep[0, used:].eq(-1).all()
    assert outs[0][used:].eq(0).all()
    assert outs[1][:, used:].eq(0).all()


@pytest.mark.parametrize("cu", WRONG, ids=str)
def test_wrong_device_offsets_stay_in_bounds(on, cu):
    """Offsets that descend, or lie outside, cannot be refused without a synchronisation: every row that comes back is
    one of the input or empty, and the rows around the tensor are not read."""
    rows, ks = 90, KS[: len(cu) - 1]
    around = torch.full((3 * rows,), torch.nan, device=on.device)
    x = around[rows : 2 * rows].copy_(torch.arange(rows))
    plan = plans.CuPlan(rows, tuple(ks), min(max(ks), rows), False)
    values, indices = topk(on, Source(x, None, None), plan, cu)
    chosen = indices >= 0
    assert (indices[chosen] < rows).all()
    assert torch.equal(values[chosen], x[indices[chosen]])
    plan = plans.CuPlan(rows, tuple(ks), min(sum(ks), rows), True)
    keep, (out,), new = drop(on, Source(x, None, None), plan, cu, [GatherSpec(x[:, None], -1, 0)])
    assert ((keep >= -1) & (keep < rows)).all()
    assert not out.isnan().any()
    assert ((new >= 0) & (new <= plan.out_rows)).all()


@pytest.mark.gpu
def test_public_ops_do_not_read_device_offsets(on):
    """No host synchronisation: the call is captured in a CUDA graph, and replayed on other offsets."""
    prev, cur = to(hidden_pair((90, 8), torch.bfloat16), on.device)
    cu = offsets([0, 20, 21, 90], on)
    run = lambda: vk.drop_tokens(prev, cur, [7, 0, 5], cu_seqlens=cu, kv=cur[None])
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for new in ([0, 20, 21, 90], [0, 40, 60, 90], [0, 3, 3, 90]):
        cu.copy_(torch.tensor(new))
        graph.replay()
        want = vk.reference.drop_tokens(prev.cpu(), cur.cpu(), [7, 0, 5], cu_seqlens=new)
        used = want.keep.shape[0]
        same(
            [got.keep[:used].cpu(), got.hidden[:used].cpu(), got.cu_seqlens.cpu()],
            [want.keep, want.hidden, want.cu_seqlens],
        )


def test_mask_with_a_wrong_count_stays_in_bounds(on):
    """Counts are trusted, never followed out of the tensor: too many, too few, and a mask that is all False."""
    h = torch.arange(40.0, device=on.device).view(2, 20, 1)
    mask = torch.zeros(2, 20, dtype=torch.bool, device=on.device)
    mask[0, 3:9] = True
    for count in ([12, 0], [2, 5], [20, 20]):
        layout = vk.TokenLayout.from_mask(mask, count)
        top = vk.segmented_topk(h[..., 0], 10, droppable=layout, backend=on.backend)
        chosen = top.indices[0][top.indices[0] >= 0]
        assert mask[0, chosen].all()
        assert top.indices[1].eq(-1).all()
        got = vk.drop_tokens(None, h, 2, scores=h[..., 0], droppable=layout, backend=on.backend)
        assert ((got.keep >= -1) & (got.keep < 20)).all()
        assert not got.hidden.isnan().any()


@pytest.mark.parametrize("key", ["flat", "mrope"])
def test_every_part_has_the_offsets_of_the_batch(on, key):
    """ids, M-RoPE ids, KV and rope tables packed along T."""
    b = BATCHES[13]
    hidden = hidden_pair((b.rows, 4), torch.float32, device=on.device)[1]
    at = calls.batch_shape("h_cur", hidden, True)
    given = companions(b, key, device=on.device)
    parts, _ = calls.flatten(at, hidden=hidden, kv_layout="BHSD", attention_mask=None, **given)
    x = scores("random", b.lead, torch.float32).to(on.device)
    plan = plans.CuPlan(b.rows, (5, 1, 9), 15, True)
    keep, outs, _ = drop(on, Source(x, None, None), plan, b.cu_seqlens, parts)
    same(outs, vk.reference.gather(keep, parts))
