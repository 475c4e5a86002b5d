"""compact: every tensor of a batch, gathered byte by byte; rows of -1 become padding."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.cases import (
    BATCHES,
    COPIED,
    KINDS,
    KS,
    LARGE,
    SIZES,
    STRIDES,
    companions,
    count,
    cross,
    fewer,
    integers,
    random_bytes,
    same,
    scores,
    seeded,
    some_rows,
    strided,
    to,
)  # fmt: skip
from support.oracle import check_compacted, position_ids

import v2drop_kernels as vk

PADDED = [b for b in BATCHES if not b.packed]
PACKED = [b for b in BATCHES if b.packed]


def compact(on, keep, hidden, **given):
    return vk.compact(
        keep.to(on.device), hidden.to(on.device), backend=on.backend, **{k: to(v, on.device) for k, v in given.items()}
    )


@cross(N=SIZES, k=KS, dtype=[torch.float32, torch.bfloat16, torch.int8])
def test_compact(on, N, k, dtype):
    keep = some_rows(2, N, count(k, N))
    hidden = random_bytes((2, N, 12), dtype, "h")
    check_compacted(compact(on, keep, hidden), keep, hidden, {})


@cross(dtype=[*COPIED, torch.float16, torch.bool, torch.int16, torch.complex64], strides=STRIDES, D=[1, 3, 16, 130])
def test_compact_of_any_bytes(on, dtype, strides, D):
    """NaN payloads, signs of zero and every other bit pattern come through."""
    keep = some_rows(3, 19, 9)
    hidden = random_bytes((3, 19, D), dtype, "h")
    check_compacted(compact(on, keep, strided(hidden, strides)), keep, hidden, {})


@cross(b=[*BATCHES, *fewer(LARGE[:1], [])], key=["flat", "mrope"], strides=fewer(STRIDES, ["contiguous", "rows"]))
def test_compact_of_everything(on, b, key, strides):
    keep = some_rows(1, b.rows, b.rows // 2)[0] if b.packed else some_rows(b.batch, b.rows, b.rows // 2)
    hidden = random_bytes((*b.lead, 8), torch.bfloat16, "h")
    given = companions(b, key, strides=strides)
    cu = {"cu_seqlens": [0, b.rows]} if b.packed else {}
    check_compacted(compact(on, keep, hidden, **given, **cu), keep, hidden, companions(b, key))


@pytest.mark.backends("cpu", "triton", "cuda")
@cross(dtype=[torch.int8, torch.bfloat16, torch.complex128], D=[1, 3, 16], strides=["contiguous", "inner", "rows"])
def test_compact_of_batches_behind_the_rows(on, dtype, D, strides):
    """``[N, B, D]``: no public argument is laid out so, but the operator takes any two dimensions."""
    x, keep = random_bytes((11, 3, D), dtype, "x"), some_rows(3, 11, 6)
    (got,) = torch.ops.v2drop.compact(keep.to(on.device), [strided(x, strides).to(on.device)], [1, 0], [0], on.backend)
    same(got.cpu(), oracle.gather(x, keep, 1, 0))


@cross(dtype=COPIED, layout=["BHSD", "BSHD"], strides=STRIDES, D=[1, 5, 128])
def test_compact_of_kv(on, dtype, layout, strides, D):
    keep = some_rows(2, 21, 8)
    hidden = torch.zeros(2, 21, 4)
    shape = (2, 3, 21, D) if layout == "BHSD" else (2, 21, 3, D)
    kv = (random_bytes(shape, dtype, "k"), random_bytes(shape, dtype, "v"))
    got = compact(on, keep, hidden, kv=tuple(strided(x, strides) for x in kv), kv_layout=layout)
    same(to(got.kv, "cpu"), oracle.gather(kv, keep, 0, 2 if layout == "BHSD" else 1))


@cross(layout=["BHSD", "BSHD"])
def test_compact_of_packed_kv(on, layout):
    keep = some_rows(1, 30, 11)[0]
    shape = (3, 30, 8) if layout == "BHSD" else (30, 3, 8)
    kv = [random_bytes(shape, torch.bfloat16, name) for name in "kv"]
    got = compact(on, keep, torch.zeros(30, 2), kv=kv, kv_layout=layout, cu_seqlens=[0, 10, 30])
    same(to(got.kv, "cpu"), oracle.gather(kv, keep, 0, 1 if layout == "BHSD" else 0))


def test_compact_of_32_layers(on):
    """One call takes a whole cache: 64 tensors, head counts that differ, a structure that comes back as it went in."""
    keep = some_rows(2, 26, 10)
    kv = [
        {0: list, 1: tuple}[i % 2](random_bytes((2, 1 + i % 3, 26, 4), torch.bfloat16, i, s) for s in "kv")
        for i in range(fewer([32], [5])[0])
    ]
    got = compact(on, keep, torch.zeros(2, 26, 4), kv=kv)
    same(to(got.kv, "cpu"), oracle.gather(kv, keep, 0, 2))


def test_compact_of_more_tensors_than_one_launch_takes(on):
    """80 layers are 160 tensors, more than the parameters of one GPU kernel hold."""
    keep = some_rows(1, 9, 4)
    kv = [random_bytes((1, 1, 9, 2), torch.float32, i) for i in range(160)]
    same(to(compact(on, keep, torch.zeros(1, 9, 1), kv=kv).kv, "cpu"), oracle.gather(kv, keep, 0, 2))


@cross(shape=["B,N,R", "1,N,R", "N,R", "3,B,N,R", "3,1,N,R"], dtype=[torch.float32, torch.bfloat16])
def test_compact_of_rope(on, shape, dtype):
    """Tables shared by the batch come back one per item: each item keeps other rows."""
    B, N, R = 2, 23, 6
    sizes = {"B": B, "N": N, "R": R, "1": 1, "3": 3}
    rope = tuple(random_bytes([sizes[s] for s in shape.split(",")], dtype, c) for c in ("cos", "sin"))
    keep = some_rows(B, N, 9)
    lead = (3, B, N, R) if shape[0] == "3" else (B, N, R)
    want = oracle.gather(tuple(x.expand(lead) for x in rope), keep, len(lead) - 3, len(lead) - 2)
    same(to(compact(on, keep, torch.zeros(B, N, 2), rope=rope).rope, "cpu"), want)


@cross(shape=["B,N", "1,N", "3,B,N", "4,B,N"], dtype=[torch.int64, torch.int32])
def test_compact_of_position_ids(on, shape, dtype):
    B, N = 2, 23
    ids = integers([{"B": B, "N": N, "1": 1, "3": 3, "4": 4}[s] for s in shape.split(",")], dtype, "ids", high=9999)
    keep = some_rows(B, N, 9)
    planes = ids.dim() == 3
    want = oracle.gather(ids if planes else ids.expand(B, N), keep, planes + 0, planes + 1)
    same(compact(on, keep, torch.zeros(B, N, 2), position_ids=ids).position_ids.cpu(), want)


@cross(dtype=[torch.bool, torch.int64, torch.int32, torch.float32, torch.bfloat16])
def test_compact_of_attention_mask(on, dtype):
    mask = (torch.rand(3, 17, generator=seeded("mask")) < 0.7).to(dtype)
    keep = some_rows(3, 17, 8)
    same(
        compact(on, keep, torch.zeros(3, 17, 2), attention_mask=mask).attention_mask.cpu(),
        oracle.gather(mask, keep, 0, 1),
    )


@cross(dtype=[torch.int64, torch.int32, torch.int16, torch.int8])
def test_compact_of_labels(on, dtype):
    labels = integers((3, 17), dtype, "labels", high=100)
    keep = some_rows(3, 17, 8)
    got = compact(on, keep, torch.zeros(3, 17, 2), labels=labels).labels.cpu()
    same(got, oracle.gather(labels, keep, 0, 1, fill=-100))
    assert (got[keep < 0] == -100).all()


def test_compact_of_hidden_with_more_dimensions(on):
    """Rows may be of any shape: deepstack features [B, N, L, D] travel as hidden states."""
    hidden = random_bytes((2, 11, 3, 5), torch.float32, "h")
    keep = some_rows(2, 11, 6)
    check_compacted(compact(on, keep, hidden), keep, hidden, {})


@cross(b=fewer(BATCHES, KINDS), k=["0", "n-1", "n+5", "list"], given_k=[False, True])
def test_compact_after_topk(on, b, k, given_k):
    """The survivors of every segment, joined by all rows that do not compete: what drop_tokens does in one call."""
    x = scores("random", b.lead, torch.float32)
    arguments = b.spans(on.device)
    keep = vk.segmented_topk(x.to(on.device), b.k(k), backend=on.backend, **arguments)
    hidden, given = random_bytes((*b.lead, 8), torch.bfloat16, "h"), companions(b)
    if given_k:
        arguments["k"] = b.k(k)
    got = vk.compact(keep, hidden.to(on.device), backend=on.backend, **arguments, **companions(b, device=on.device))
    want = oracle.keep(x, b, b.ks(k))
    check_compacted(got, want, hidden, given)
    if b.packed:
        sizes = [sum(r in item for r in want.tolist()) for item in b.real]
        assert got.cu_seqlens.dtype == torch.int32
        assert got.cu_seqlens.tolist() == [0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()]
    if on.backend == "reference":
        arguments.pop("k", None)
        check_compacted(vk.reference.compact(keep, hidden, **arguments, **given), want, hidden, given)


@cross(order=["position", "score"], b=[PADDED[0], PADDED[6], PACKED[0], PACKED[3]])
def test_compact_takes_topk_in_any_order(on, order, b):
    """With ``droppable`` the rows come back ascending, however the top-k listed them."""
    x = scores("random", b.lead, torch.float32)
    keep = vk.segmented_topk(x.to(on.device), b.k("n/3"), order=order, backend=on.backend, **b.arguments(on.device))
    hidden = random_bytes((*b.lead, 2), torch.float32, "h")
    got = vk.compact(keep, hidden.to(on.device), backend=on.backend, **b.spans(on.device))
    check_compacted(got, oracle.keep(x, b, b.ks("n/3")), hidden, {})


def test_compact_makes_a_mask_for_ragged_results(on):
    keep = torch.tensor([[0, 2, -1], [0, 1, 2]], device=on.device)
    hidden = torch.ones(2, 3, 4, device=on.device)
    got = vk.compact(keep, hidden, droppable=(0, 3), backend=on.backend)
    assert got.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert got.hidden[0, 2].eq(0).all()


@pytest.mark.parametrize("mode", ["compacted", "group"])
@cross(b=[b for b in BATCHES if b.rows], key=["none", "flat", "mrope"])
def test_compact_numbers_positions(on, b, mode, key):
    """compacted: 0, 1, 2, ... anew per item. group: vision and text numbered apart, as they stood in the input."""
    x = scores("random", b.lead, torch.float32)
    arguments = b.spans(on.device)
    keep = vk.segmented_topk(x.to(on.device), b.k("n/3"), backend=on.backend, **arguments)
    ids = None if key == "none" else companions(b, key, device=on.device)["position_ids"]
    got = vk.compact(
        keep,
        torch.zeros(*b.lead, 2, device=on.device),
        position_ids=ids,
        positions=mode,
        backend=on.backend,
        **arguments,
    )
    want = position_ids(b, oracle.keep(x, b, b.ks("n/3")), mode)
    same(got.position_ids.cpu(), want if key != "mrope" else torch.stack([want] * 3))


@cross(shape=[(0, 5, 4), (2, 0, 4), (2, 5, 0)], width=[0, 3])
def test_compact_of_nothing(on, shape, width):
    """No items, no rows (every kept row is padding) and rows without elements."""
    keep = torch.full((shape[0], width), -1)
    if shape[1]:
        keep[:, :1] = 2
    hidden = torch.ones(shape)
    kv = [torch.ones(shape[0], 0, shape[1], 2), torch.ones(shape[0], 2, shape[1], 0)]
    got = compact(on, keep, hidden, kv=kv, rope=(), labels=torch.ones(shape[:2], dtype=torch.int64))
    same(got.hidden.cpu(), oracle.gather(hidden, keep, 0, 1))
    same(to(got.kv, "cpu"), oracle.gather(kv, keep, 0, 2))
    assert got.rope == ()
    same(got.labels.cpu(), torch.where(keep >= 0, 1, -100))


def test_compact_returns_fresh_memory(on):
    """Keeping every row in place still copies: the result outlives changes to the input."""
    hidden = torch.ones(1, 3, 2, device=on.device)
    got = vk.compact(torch.arange(3, device=on.device)[None], hidden, backend=on.backend)
    hidden.zero_()
    assert got.hidden.eq(1).all()
