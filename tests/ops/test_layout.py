"""Host-side facts: counts, spans, segments, plans and position ids."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from support.cases import BATCHES, LARGE, same, strided

import v2drop_kernels as vk
from v2drop_kernels.core import plan as plans
from v2drop_kernels.core.arguments import per_segment_k
from v2drop_kernels.core.droppable import as_layout

EVERY = pytest.mark.parametrize("b", [*BATCHES, *LARGE], ids=str)


@pytest.mark.parametrize(
    ("n", "ratio", "options", "want"),
    [
        (576, 0.28, {}, 161),
        (576, 0.28, {"rounding": "round"}, 161),
        (576, 0.28, {"rounding": "ceil"}, 162),
        (100, 0.29, {}, 29),  # int(100 * 0.29) is 28
        (10, 0.7, {"rounding": "ceil"}, 7),  # ceil(10 * 0.7) is 7, but ceil(0.1 * 3 * 10) would be 4
        (10, 0.3, {"rounding": "ceil"}, 3),
        (5, 0.5, {"rounding": "round"}, 2),  # halves go to the even count
        (7, 0.5, {"rounding": "round"}, 4),
        (3, Fraction(1, 3), {}, 1),
        (576, 1 / 3, {}, 192),  # the decimal that 1 / 3 prints as is below a third
        (576, 64 / 576, {}, 64),
        (577, 5e-324, {}, 0),
        (577, 5e-324, {"rounding": "ceil"}, 1),
        (576, 0, {}, 0),
        (576, 0.0, {"at_least": 1}, 1),
        (0, 0.5, {"at_least": 1}, 0),
        (2, 0.1, {"at_least": 9}, 2),
        (576, 1, {}, 576),
        (576, 1.0, {"rounding": "ceil"}, 576),
    ],
)
def test_n_keep(n, ratio, options, want):
    got = vk.n_keep(n, ratio, **options)
    assert got == want
    assert type(got) is int


def test_n_keep_is_exact_for_all_percentages():
    """Every whole percentage of every size: the floor of an integer division, never one less for a binary fraction."""
    for n in (1, 3, 63, 100, 576, 577, 1025):
        for percent in range(101):
            assert vk.n_keep(n, percent / 100) == n * percent // 100
            assert vk.n_keep(n, percent / 100, "ceil") == -(-n * percent // 100)


def test_n_keep_gives_back_every_count_of_a_ratio():
    """258 of the 577 ratios n / 576 lost a token."""
    for n in (576, 577, 6272):
        for count in range(n + 1):
            for rounding in ("floor", "round", "ceil"):
                assert vk.n_keep(n, count / n, rounding) == count


@EVERY
def test_token_layout_tells_rows_apart(b):
    """Segments, droppable and real rows against the rows that the case spells out."""
    layout = b.droppable
    if not isinstance(layout, vk.TokenLayout):
        layout = as_layout(b.droppable, b.batch, b.rows, None if b.cu_seqlens is None else tuple(map(int, b.cu_seqlens)))
    assert (layout.batch, layout.rows, layout.is_packed, layout.groups) == (b.batch, b.rows, b.packed, len(b.flat))
    droppable, real = torch.zeros(b.lead, dtype=torch.bool), torch.zeros(b.lead, dtype=torch.bool)
    for i in range(b.batch):
        (real if b.packed else real[i])[list(b.real[i])] = True
        for rows in b.segments[i]:
            (droppable if b.packed else droppable[i])[rows] = True
    same(layout.droppable_rows(), droppable)
    same(layout.real_rows(), real)
    assert [s.available for s in layout.segments()] == [len(s) for s in b.flat]
    assert hash(layout) == hash(layout)


@EVERY
@pytest.mark.parametrize("k", ["0", "n/3", "n", "list"])
def test_drop_plan_tiles_input_and_output(b, k):
    """Stretches cover every real row and every output row exactly once: that is why each element of a result is
    written."""
    cu = None if b.cu_seqlens is None else tuple(map(int, b.cu_seqlens))
    layout = b.droppable if isinstance(b.droppable, vk.TokenLayout) else as_layout(b.droppable, b.batch, b.rows, cu)
    plan, out_cu, after = plans.drop_plan(layout, tuple(b.ks(k)))
    into, out = [], []
    kept = 0
    for row0, pre, n, post, keep, out0, pad_pre, pad_post in plan.host_table().tolist():
        into += range(row0, row0 + pre + n + post)
        out += range(out0, out0 + pad_pre + pre + keep + post + pad_post)
        kept += pre + keep + post
        assert 0 <= keep <= n <= plan.max_n
    real = layout.real_rows().flatten().nonzero().flatten().tolist()
    assert into == real
    assert out == list(range(plan.batch * plan.out_rows))
    assert (plan.batch, plan.rows) == (1 if b.packed else b.batch, b.rows)
    assert kept == out_cu[-1] == int(after.real_rows().sum())
    assert plan.ragged == (kept < plan.batch * plan.out_rows)


@EVERY
def test_topk_plan_lists_every_segment(b):
    cu = None if b.cu_seqlens is None else tuple(map(int, b.cu_seqlens))
    layout = b.droppable if isinstance(b.droppable, vk.TokenLayout) else as_layout(b.droppable, b.batch, b.rows, cu)
    plan = plans.topk_plan(layout, tuple(b.ks("list")))
    ks = [min(k, len(s)) for k, s in zip(b.ks("list"), b.flat, strict=True)]
    assert plan.out_rows == max(ks, default=0)
    assert plan.host_table()[:, plans.COLUMNS.k].tolist() == ks
    assert plan.host_table()[:, plans.COLUMNS.pad_after].tolist() == [plan.out_rows - k for k in ks]


def test_plan_is_uniform_where_items_are_alike():
    layout = vk.TokenLayout.padded([(3, 9)] * 4, 12)
    plan, _, after = plans.drop_plan(layout, (2,) * 4)
    assert plan.uniform == (3, 6, 3, 2)
    assert after == vk.TokenLayout.padded((3, 5), 8, batch=4)
    assert plans.drop_plan(layout, (2, 2, 2, 1)).plan.uniform is None
    assert plan.host_table().tolist() == [[12 * g, 3, 6, 3, 2, 8 * g, 0, 0] for g in range(4)]
    same_plan = plans.drop_plan(vk.TokenLayout.padded((3, 9), 12, batch=4), (2,) * 4).plan
    assert same_plan == plan
    assert hash(same_plan) == hash(plan)


def test_plan_host_table_is_made_once():
    plan = plans.drop_plan(vk.TokenLayout.padded([(3, 9), (1, 2)], 12), (2, 1)).plan
    assert plan.host_table() is plan.host_table()


@pytest.mark.parametrize("pack", [False, True])
def test_cu_plan_resolves_to_the_host_plan(pack):
    """Offsets that only the device knew give the plan of the same offsets on the host, in the capacity that was
    allocated."""
    cu, ks = (0, 5, 5, 6, 20), (3, 2, 4, 9)
    plan = plans.CuPlan(20, ks, sum(ks) if pack else max(ks), pack).resolve(cu)
    rows = plan.host_table()[:, [0, 2, 4]].tolist()
    assert rows == [[0, 5, 3], [5, 0, 0], [5, 1, 1], [6, 14, 9]]
    out, pad = plan.host_table()[:, plans.COLUMNS.dst_start].tolist(), plan.host_table()[:, plans.COLUMNS.pad_after].tolist()
    assert out == ([0, 3, 3, 4] if pack else [0, 9, 18, 27])
    assert pad == ([0, 0, 0, 5] if pack else [6, 9, 8, 0])


@pytest.mark.parametrize("b", [b for b in BATCHES if getattr(b.droppable, "spans", ()) and b.droppable.mask is None], ids=str)
def test_token_layout_after(b):
    """What the next stage needs is known before this one runs: survivors in the place where the drop puts them."""
    after = b.droppable.after(b.k("list"))
    h = torch.arange(float(b.rows)).expand(b.lead)[..., None]
    got = vk.reference.drop_tokens(None, h, b.k("list"), droppable=b.droppable, scores=h[..., 0])
    assert got.layout == after
    same(after.real_rows(), got.keep >= 0)


def test_token_layout_from_mask():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    layout = vk.TokenLayout.from_mask(mask)
    assert layout.counts == (3, 1)
    assert layout.spans == ((), ())
    assert [(s.row, s.n, s.available) for s in layout.segments()] == [(0, 5, 3), (5, 5, 1)]
    assert vk.TokenLayout.from_mask(strided(mask, "inner"), (3, 1)).counts == (3, 1)
    assert vk.TokenLayout.from_mask(mask, 1).counts == (1, 1)
    padded = vk.TokenLayout.from_mask(mask, lengths=[3, 3], padding_side="left")
    assert padded.counts == (2, 1)
    assert padded.bounds == ((2, 5), (2, 5))
    packed = vk.TokenLayout.from_mask(mask.flatten(), cu_seqlens=[0, 3, 3, 10])
    assert packed.counts == (2, 0, 2)
    assert packed.cu_seqlens == (0, 3, 3, 10)


def test_token_layout_from_token_ids():
    ids = torch.tensor([[7, 9, 9, 1, 9, 9], [1, 2, 3, 9, 0, 0], [9, 9, 9, 9, 9, 9], [1, 1, 1, 1, 1, 1]])
    layout = vk.TokenLayout.from_token_ids(ids, 9)
    assert layout.spans == (((1, 3), (4, 6)), ((3, 4),), ((0, 6),), ())
    attention = torch.ones_like(ids)
    attention[1, 4:] = 0
    layout = vk.TokenLayout.from_token_ids(ids, 9, attention_mask=attention)
    assert layout.bounds == ((0, 6), (0, 4), (0, 6), (0, 6))
    left = vk.TokenLayout.from_token_ids(ids.flip(1), 9, attention_mask=attention.flip(1), padding_side="left")
    assert left.bounds == ((0, 6), (2, 6), (0, 6), (0, 6))
    assert left.spans[1] == ((2, 3),)
    assert vk.TokenLayout.from_token_ids(torch.empty(2, 0, dtype=torch.int64), 9).spans == ((), ())


def test_token_layout_reads_spans():
    want = vk.TokenLayout.padded([[(2, 5)], []], 8)
    for spans in ([(2, 5), None], [[(2, 5)], ()], (((2, 5),), []), [[(2, 5)], None]):
        assert vk.TokenLayout.padded(spans, 8) == want
    assert vk.TokenLayout.padded((2, 5), 8, batch=2).spans == (((2, 5),), ((2, 5),))
    assert vk.TokenLayout.padded((2, 5), 8, lengths=[8, 6]).bounds == ((0, 8), (0, 6))
    assert vk.TokenLayout.packed([(0, 2), [(1, 2), (2, 3)]], torch.tensor([0, 2, 5], dtype=torch.int32)).rows == 5
    with pytest.raises(AttributeError):
        want.rows = 9


def test_per_segment_k():
    assert per_segment_k(3, 2) == (3, 3)
    assert per_segment_k([1, 0], 2) == (1, 0)
    assert per_segment_k(torch.tensor([4, 5]), 2) == (4, 5)
    assert per_segment_k(torch.tensor(4), 2) == (4, 4)
    assert per_segment_k(torch.tensor([4, 5], dtype=torch.uint8), 2) == (4, 5)
    assert per_segment_k([], 0) == ()


def test_group_position_ids():
    """HiDivDrop, Table 10: vision from 0, text from the number of vision tokens on, so generation goes on at N either
    way."""
    layout = vk.TokenLayout.padded([[(1, 3), (4, 5)], []], 6)
    assert vk.positions.group_position_ids(layout).tolist() == [[3, 0, 1, 4, 2, 5], [0, 1, 2, 3, 4, 5]]
    left = vk.TokenLayout.padded([(3, 5)], 6, lengths=[4], padding_side="left")
    assert vk.positions.group_position_ids(left).tolist() == [[0, 0, 2, 0, 1, 3]]
    packed = vk.TokenLayout.packed([(1, 2), (0, 2)], [0, 3, 6])
    assert vk.positions.group_position_ids(packed).tolist() == [1, 0, 2, 0, 1, 2]
    mask = vk.TokenLayout.from_mask(torch.tensor([[True, False, True]]))
    assert vk.positions.group_position_ids(mask).tolist() == [[0, 2, 1]]


def test_compacted_position_ids():
    keep = torch.tensor([[0, 3, 4, -1], [2, -1, -1, -1]])
    assert vk.positions.compacted_position_ids(keep, None).tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert vk.positions.compacted_position_ids(keep.flip(1), None).tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert vk.positions.compacted_position_ids(torch.tensor([1, 4, 6, 7, 9]), cu).tolist() == [0, 1, 0, 1, 2]
    assert vk.positions.compacted_position_ids(torch.tensor([1, 4, 6, 7, 9, -1]), cu).tolist() == [0, 1, 0, 1, 2, 0]


def test_offsets_of_a_packed_result_are_never_shared(on):
    """Writing into one result cannot change the next."""
    h = torch.zeros(7, 4, device=on.device)
    drop = lambda: vk.drop_tokens(h, h, 2, droppable=[(0, 3), (1, 4)], cu_seqlens=(0, 3, 7), backend=on.backend).cu_seqlens
    first = drop()
    assert (first.dtype, first.tolist()) == (torch.int32, [0, 2, 5])
    first.zero_()
    assert drop().tolist() == [0, 2, 5]
