"""Whatever hypothesis thinks of: segmented_topk and compact against the reference."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import FLOATS, fewer, random_bytes, same, same_values, strided

import v2drop_kernels as vk

SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 65504.0, 6e-8]
# The fixture ``on`` holds no state between examples.
quickly = settings(
    max_examples=fewer([100], [8])[0], deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@st.composite
def packed(draw):
    """Scores of a packed batch, its offsets and a count per segment."""
    lengths = draw(st.lists(st.integers(0, 70), min_size=0, max_size=6))
    total = sum(lengths)
    values = draw(st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=16)), min_size=total, max_size=total))
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    k = draw(st.one_of(st.integers(0, 80), st.lists(st.integers(0, 80), min_size=len(lengths), max_size=len(lengths))))
    return torch.tensor(values, dtype=torch.float32), cu, k


@st.composite
def padded(draw):
    """Scores of a padded batch with random ascending spans, and a count."""
    batch, rows = draw(st.integers(0, 3)), draw(st.integers(0, 60))
    spans = []
    for _ in range(batch):
        cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=6)))
        spans.append(list(zip(cuts[::2], cuts[1::2], strict=False)))
    values = draw(st.lists(st.sampled_from(SPECIAL), min_size=batch * rows, max_size=batch * rows))
    segments = sum(map(len, spans))
    k = draw(st.one_of(st.integers(0, 70), st.lists(st.integers(0, 70), min_size=segments, max_size=segments)))
    return torch.tensor(values, dtype=torch.float32).view(batch, rows), spans, k


@quickly
@given(batch=packed(), dtype=st.sampled_from(FLOATS), order=st.sampled_from(["position", "score"]))
def test_segmented_topk_of_any_packed_batch(on, batch, dtype, order):
    x, cu, k = batch
    x = x.to(dtype)
    got = vk.segmented_topk(x.to(on.device), k, cu_seqlens=cu, order=order, backend=on.backend)
    want = vk.reference.segmented_topk(x, k, cu_seqlens=cu, order=order)
    same(got.indices.cpu(), want.indices)
    same_values(got.values, want.values)
    check_order(x, got, cu)


@quickly
@given(batch=padded(), dtype=st.sampled_from(FLOATS), order=st.sampled_from(["position", "score"]))
def test_segmented_topk_of_any_spans(on, batch, dtype, order):
    x, spans, k = batch
    x = x.to(dtype)
    got = vk.segmented_topk(x.to(on.device), k, droppable=spans, order=order, backend=on.backend)
    want = vk.reference.segmented_topk(x, k, droppable=spans, order=order)
    same(got.indices.cpu(), want.indices)
    same_values(got.values, want.values)


def check_order(x, got, cu):
    """The definition itself: no row that was left out ranks before one that was kept."""
    for g in range(len(cu) - 1):
        kept = [i for i in got.indices[g].tolist() if i >= 0]
        left = [i for i in range(cu[g], cu[g + 1]) if i not in kept]
        rank = lambda i: (0, 0.0, i) if x[i].isnan() else (1, -x[i].item(), i)
        assert not kept or not left or max(map(rank, kept)) < min(map(rank, left))


@quickly
@given(
    batch=padded(),
    positions=st.sampled_from(["persistent", "compacted", "group"]),
    side=st.sampled_from(["left", "right"]),
)
def test_drop_tokens_of_any_spans(on, batch, positions, side):
    x, spans, k = batch
    layout = vk.TokenLayout.padded(spans, x.shape[1], batch=x.shape[0], padding_side=side)
    hidden = random_bytes((*x.shape, 3), torch.bfloat16, "h")
    ids = torch.arange(x.numel()).view(x.shape)
    got = vk.drop_tokens(
        None, hidden.to(on.device), k, scores=x.to(on.device), droppable=layout, position_ids=ids.to(on.device),
        positions=positions, backend=on.backend,
    )  # fmt: skip
    want = vk.reference.drop_tokens(None, hidden, k, scores=x, droppable=layout, position_ids=ids, positions=positions)
    same([got.keep.cpu(), got.hidden.cpu(), got.position_ids.cpu()], [want.keep, want.hidden, want.position_ids])
    assert got.layout == want.layout


@st.composite
def gathers(draw):
    """keep [B, S] with rows in any order and padding, and the shape, dtype and memory of what is gathered."""
    batch, rows, width = draw(st.integers(0, 3)), draw(st.integers(0, 40)), draw(st.integers(0, 50))
    keep = torch.full((batch, width), -1)
    for b in range(batch):
        order = draw(st.permutations(range(rows)))[:width]
        at = draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order)))
        keep[b, : len(order)] = torch.tensor([r if a else -1 for r, a in zip(order, at, strict=True)], dtype=torch.int64)
    dtype = draw(st.sampled_from([torch.int8, torch.float16, torch.float32, torch.int64, torch.complex128, torch.bool]))
    heads, width = draw(st.integers(1, 3)), draw(st.integers(0, 20))
    return (
        keep,
        rows,
        dtype,
        heads,
        width,
        draw(st.sampled_from(["contiguous", "inner", "rows", "batch", "transposed"])),
    )


@quickly
@given(case=gathers(), kv_layout=st.sampled_from(["BHSD", "BSHD"]))
def test_compact_of_anything(on, case, kv_layout):
    keep, rows, dtype, heads, width, strides = case
    batch = keep.shape[0]
    hidden = strided(random_bytes((batch, rows, width), dtype, "h"), strides)
    kv = strided(
        random_bytes((batch, heads, rows, width) if kv_layout == "BHSD" else (batch, rows, heads, width), dtype, "kv"),
        strides,
    )
    got = vk.compact(keep.to(on.device), hidden.to(on.device), kv=[kv.to(on.device)], kv_layout=kv_layout, backend=on.backend)
    want = vk.reference.compact(keep, hidden, kv=[kv], kv_layout=kv_layout)
    same([got.hidden.cpu(), got.kv[0].cpu()], [want.hidden, want.kv[0]])


@quickly
@given(case=gathers())
def test_compact_inplace_of_anything(on, case):
    keep, rows, dtype, heads, width, strides = case
    keep = torch.where(keep < 0, rows, keep).sort(-1).values
    keep = torch.where(keep == rows, -1, keep)
    cache = random_bytes((keep.shape[0], heads, rows, width), dtype, "kv")
    moved = strided(cache.clone(), strides).to(on.device)
    vk.compact_(keep.to(on.device), moved, backend=on.backend)
    want = cache.clone()
    for b, row in enumerate(keep):
        kept = row[row >= 0]
        want[b, :, : len(kept)] = cache[b][:, kept]
    same(moved.cpu().contiguous(), want)
