"""drop_tokens: score, select and compact in one call; every row and every byte as the oracle says."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.cases import (
    BATCHES,
    COPIED,
    FLOATS,
    KINDS,
    KS,
    LARGE,
    METRICS,
    SIZES,
    STRIDES,
    companions,
    count,
    cross,
    fewer,
    hidden_pair,
    normal,
    random_bytes,
    same,
    scores,
    seeded,
    strided,
    to,
)  # fmt: skip
from support.oracle import check_compacted, exact, position_ids

import v2drop_kernels as vk
from v2drop_kernels.core.types import GatherSpec


def drop(on, prev, cur, k, **given):
    given = {name: to(x, on.device) for name, x in given.items()}
    return vk.drop_tokens(to(prev, on.device), cur.to(on.device), k, backend=on.backend, **given)


def check_facts(got, b, keep, ks):
    """Offsets, mask and layout of the result."""
    if b.packed:
        sizes = [sum(r in item for r in keep.tolist()) for item in b.real]
        assert got.cu_seqlens.dtype == torch.int32
        assert got.cu_seqlens.tolist() == [0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()]
    else:
        assert got.cu_seqlens is None
    after = got.layout
    assert (after.is_packed, after.batch, after.padding_side) == (b.packed, b.batch, b.side)
    assert after.rows == keep.shape[-1]
    droppable, real = after.droppable_rows().cpu(), after.real_rows().cpu()
    competing = [{r for s in item for r in s} for item in b.segments]
    if b.packed:
        want = [any(r in c for c in competing) for r in keep.tolist()]
    else:
        want = [[r in competing[i] for r in rows] for i, rows in enumerate(keep.tolist())]
    same(droppable, torch.tensor(want, dtype=torch.bool).view(keep.shape))
    same(real, keep >= 0)
    assert [s.available for s in after.segments()] == [min(k, len(s)) for k, s in zip(ks, b.flat, strict=True)]


@cross(together="k dtype metric", N=SIZES, k=KS, dtype=FLOATS, metric=["l2", "l1"])
def test_drop_tokens(on, N, k, dtype, metric):
    prev, cur = hidden_pair((2, N, 24), dtype)
    k = count(k, N)
    got = drop(on, prev, cur, k, metric=metric)
    keep = vk.reference.segmented_topk(exact(prev, cur, metric).float(), k).indices
    same(got.keep.cpu(), keep)
    same(got.hidden.cpu(), vk.reference.gather(keep, [(GatherSpec(cur, 0, 1))])[0])
    assert got.attention_mask is None


@cross(b=BATCHES, k=[*KS, "list", "tensor"], key=["flat", "mrope"])
def test_drop_tokens_of_everything(on, b, k, key):
    prev, cur = hidden_pair((*b.lead, 8), torch.bfloat16)
    given = companions(b, key)
    got = drop(on, prev, cur, b.k(k), **b.arguments(), **given)
    keep = oracle.keep(exact(prev, cur, "l2").float(), b, b.ks(k))
    check_compacted(got, keep, cur, given)
    check_facts(got, b, keep, b.ks(k))
    if isinstance(b.droppable, vk.TokenLayout):
        assert b.droppable.after(b.k(k)) == got.layout


@cross(b=fewer(LARGE, LARGE[:2]), dtype=FLOATS)
def test_drop_tokens_of_large_batches(on, b, dtype):
    """Beyond 2048 competing rows, and beyond 8192. In the interpreter a thousand gathered rows take seconds, so there are fewer."""
    prev, cur = hidden_pair((*b.lead, 8), dtype)
    k = fewer([b.k("n/3")], [99])[0]
    got = drop(on, prev, cur, k, **b.arguments(), **companions(b))
    keep = oracle.keep(exact(prev, cur, "l2").float(), b, [k] * len(b.flat))
    check_compacted(got, keep, cur, companions(b))
    check_facts(got, b, keep, [k] * len(b.flat))


@cross(b=[BATCHES[5], BATCHES[9], BATCHES[11], BATCHES[16]], strides=STRIDES, dtype=FLOATS)
def test_drop_tokens_of_strided_tensors(on, b, strides, dtype):
    prev, cur = hidden_pair((*b.lead, 20), dtype)
    given = companions(b)
    got = drop(on, strided(prev, strides), strided(cur, strides), b.k("n/3"), **b.arguments(), **companions(b, strides=strides))
    check_compacted(got, oracle.keep(exact(prev, cur, "l2").float(), b, b.ks("n/3")), cur, given)


@cross(D=[1, 3, 63, 576, 1025], dtype=FLOATS, metric=["l2", "l1"])
def test_drop_tokens_of_odd_widths(on, D, dtype, metric):
    prev, cur = hidden_pair((2, 30, D), dtype)
    got = drop(on, prev, cur, 11, droppable=(2, 29), metric=metric)
    b = BATCHES[0].__class__("odd", 2, 30, (2, 29), [range(30)] * 2, [[list(range(2, 29))]] * 2)
    check_compacted(got, oracle.keep(exact(prev, cur, metric).float(), b, [11, 11]), cur, {})


@cross(dtype=COPIED, layout=["BHSD", "BSHD"])
def test_drop_tokens_of_kv(on, dtype, layout):
    """All 32 layers of a cache whose bytes mean nothing to the kernels."""
    prev, cur = hidden_pair((2, 40, 16), torch.bfloat16)
    shape = (2, 2, 40, 6) if layout == "BHSD" else (2, 40, 2, 6)
    kv = [tuple(random_bytes(shape, dtype, i, s) for s in "kv") for i in range(fewer([32], [3])[0])]
    got = drop(on, prev, cur, 9, droppable=(4, 36), kv=kv, kv_layout=layout)
    same(to(got.kv, "cpu"), vk.reference.drop_tokens(prev, cur, 9, droppable=(4, 36), kv=kv, kv_layout=layout).kv)


@cross(b=BATCHES, mode=["persistent", "compacted", "group"], key=["none", "flat", "mrope"])
def test_drop_tokens_numbers_positions(on, b, mode, key):
    prev, cur = hidden_pair((*b.lead, 4), torch.float32)
    ids = None if key == "none" else companions(b, key)["position_ids"]
    got = drop(on, prev, cur, b.k("n/3"), positions=mode, position_ids=ids, **b.arguments())
    keep = oracle.keep(exact(prev, cur, "l2").float(), b, b.ks("n/3"))
    if mode == "persistent":
        want = None if key == "none" else oracle.gather(ids, keep, ids.dim() - keep.dim(), ids.dim() - 1)
        same(None if key == "none" else got.position_ids.cpu(), want)
    else:
        want = position_ids(b, keep, mode)
        same(got.position_ids.cpu(), want if key != "mrope" else torch.stack([want] * 3))


@cross(kind=["random", "three", "special"], dtype=FLOATS, b=[BATCHES[0], BATCHES[6], BATCHES[12], BATCHES[16]])
def test_drop_tokens_by_given_scores(on, kind, dtype, b):
    """Attention scores, random ones, anything: h_prev is not needed."""
    x = scores(kind, b.lead, dtype)
    cur = random_bytes((*b.lead, 6), torch.bfloat16, "h")
    keep = oracle.keep(x, b, b.ks("n/3"))
    check_compacted(drop(on, None, cur, b.k("n/3"), scores=x, **b.arguments()), keep, cur, {})
    check_compacted(drop(on, None, cur, b.k("n/3"), scores=strided(x, "inner"), **b.arguments()), keep, cur, {})


@cross(metric=METRICS, dtype=FLOATS, b=[BATCHES[0], BATCHES[6], BATCHES[12], BATCHES[16]])
def test_drop_tokens_keeps_what_variation_topk_chooses(on, metric, dtype, b):
    """Real values round differently on different backends; within one, both ops see the same scores."""
    prev, cur = normal((*b.lead, 96), dtype, "a"), normal((*b.lead, 96), dtype, "b")
    top = vk.variation_topk(
        prev.to(on.device), cur.to(on.device), b.k("n/3"), metric=metric, backend=on.backend, **b.arguments(on.device)
    )
    survivors = [set(row) - {-1} for row in top.indices.tolist()]
    ranks = torch.zeros(b.lead)
    for (i, _), rows in zip([(i, s) for i, item in enumerate(b.segments) for s in item], survivors, strict=True):
        (ranks if b.packed else ranks[i])[list(rows)] = 1
    got = drop(on, prev, cur, b.k("n/3"), metric=metric, **b.arguments())
    check_compacted(got, oracle.keep(ranks, b, b.ks("n/3")), cur, {})


@cross(b=[b for b in fewer(BATCHES, KINDS) if b.rows > 9])
def test_drop_tokens_in_three_stages(on, b):
    """The layout of one stage is the droppable of the next: 2/3, then 1/2, then none of the vision tokens."""
    arguments, ids = b.arguments(on.device), torch.arange(b.rows).expand(b.lead).contiguous().to(on.device)
    arguments_there, ids_there = b.arguments(), ids.cpu()
    h = hidden_pair((*b.lead, 8), torch.float32)[1]
    there, got = h, None
    h = h.to(on.device)
    for stage, share in enumerate((2 / 3, 1 / 2, 0)):
        change = hidden_pair((*h.shape[:-1], 8), torch.float32, "stage", stage)[0]
        sizes = [s.available for s in got.layout.segments()] if stage else [len(s) for s in b.flat]
        ks = [vk.n_keep(n, share) for n in sizes]
        got = vk.drop_tokens(h, h + change.to(on.device), ks, position_ids=ids, backend=on.backend, **arguments)
        want = vk.reference.drop_tokens(there, there + change, ks, position_ids=ids_there, **arguments_there)
        same([got.hidden.cpu(), got.keep.cpu(), got.position_ids.cpu()], [want.hidden, want.keep, want.position_ids])
        assert got.layout == want.layout
        h, ids, arguments = got.hidden, got.position_ids, {"droppable": got.layout}
        there, ids_there, arguments_there = want.hidden, want.position_ids, {"droppable": want.layout}
    competing = {(i, r) for i, item in enumerate(b.segments) for s in item for r in s}
    text = [r for i, real in enumerate(b.real) for r in real if (i, r) not in competing]
    real = got.layout.real_rows().cpu()
    assert ids.cpu()[real].tolist() == text


@cross(score_dtype=[torch.bfloat16, torch.float16, torch.float32])
def test_drop_tokens_rounds_to_score_dtype(on, score_dtype):
    prev, cur = hidden_pair((2, 100, 200), torch.bfloat16)
    got = drop(on, prev, cur, 30, droppable=(5, 95), score_dtype=score_dtype)
    rounded = exact(prev, cur, "l2").float().to(score_dtype).float()
    want = vk.reference.drop_tokens(None, cur, 30, droppable=(5, 95), scores=rounded)
    same([got.keep.cpu(), got.hidden.cpu()], [want.keep, want.hidden])


def test_drop_tokens_ignores_padding_and_text(on):
    """Rows that do not compete may hold anything, NaN included; they are kept or padding, never ranked."""
    b = BATCHES[9]
    prev, cur = hidden_pair((*b.lead, 8), torch.float32)
    competing = b.droppable.droppable_rows()
    keep = oracle.keep(exact(prev, cur, "l2").float(), b, [3, 3, 3])
    cur = torch.where(competing[..., None], cur, torch.nan)
    got = drop(on, prev, cur, 3, droppable=b.droppable)
    check_compacted(got, keep, cur, {})
    assert not got.hidden[got.keep < 0].isnan().any()


def test_drop_tokens_makes_a_mask_only_for_ragged_results(on):
    h = torch.ones(2, 6, 4)
    assert drop(on, h, h, 2, droppable=(1, 5)).attention_mask is None
    got = drop(on, h, h, [2, 3], droppable=[(1, 5), (0, 6)])
    assert got.attention_mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert got.attention_mask.dtype == torch.bool


def test_drop_tokens_leaves_its_inputs(on):
    prev, cur = hidden_pair((2, 30, 8), torch.float32, device=on.device)
    given = companions(BATCHES[8], device=on.device)
    before = to([prev, cur, list(given.values())], "cpu")
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in before]
    vk.drop_tokens(
        torch.cat([prev, prev[:1]]),
        torch.cat([cur, cur[:1]]),
        3,
        droppable=BATCHES[8].droppable,
        backend=on.backend,
        **given,
    )
    same([prev.cpu(), cur.cpu(), to(list(given.values()), "cpu")], before)


@pytest.mark.parametrize("repeat", range(3))
def test_drop_tokens_of_alternating_shapes(on, repeat):
    """Plans are cached by what they say: calls that differ in one number must not share one."""
    for N, span, k in ((30, (1, 20), 5), (30, (1, 21), 5), (30, (1, 20), 6), (31, (1, 20), 5), (30, (0, 20), 5)):
        x = torch.rand(1, N, generator=seeded(N, span, k, repeat))
        cur = torch.arange(N * 2.0).view(1, N, 2)
        got = drop(on, None, cur, k, scores=x, droppable=span)
        want = vk.reference.drop_tokens(None, cur, k, scores=x, droppable=span)
        same([got.keep.cpu(), got.hidden.cpu()], [want.keep, want.hidden])
        assert got.layout == want.layout


@cross(b=fewer(BATCHES, KINDS), k=["n/3", "list"], op=["drop_tokens", "compact"])
def test_into_the_tensors_of_an_earlier_result(on, b, k, op):
    """``out``: the same shapes again and again need no new memory; every byte of the earlier step is overwritten."""
    first, cur = hidden_pair((*b.lead, 8), torch.bfloat16)
    x = scores("random", b.lead, torch.float32).to(on.device)

    def run(h, given, out=None):
        given = {name: to(v, on.device) for name, v in given.items()}
        if op == "drop_tokens":
            return vk.drop_tokens(
                None,
                h.to(on.device),
                b.k(k),
                scores=x,
                out=out,
                backend=on.backend,
                **b.arguments(on.device),
                **given,
            )
        keep = vk.segmented_topk(x, b.k(k), backend=on.backend, **b.spans(on.device))
        return vk.compact(keep, h.to(on.device), out=out, backend=on.backend, **b.spans(on.device), **given)

    given = companions(b)
    out = run(first, {n: v if n in ("position_ids", "labels") else to_other_bytes(v) for n, v in given.items()})
    got = run(cur, given, out)
    want = run(cur, given)
    for name in ("hidden", *given):
        same(to(getattr(got, name), "cpu"), to(getattr(want, name), "cpu"))
        assert addresses(getattr(got, name)) == addresses(getattr(out, name))
    same(got.keep.cpu(), want.keep.cpu())


def to_other_bytes(x):
    """The same shapes with other contents."""
    if isinstance(x, list | tuple):
        return type(x)(map(to_other_bytes, x))
    return random_bytes(x.shape, x.dtype, "other") if x.dtype != torch.bool else ~x


def addresses(x):
    return [a for y in x for a in addresses(y)] if isinstance(x, list | tuple) else [x.data_ptr()]


def test_out_that_cannot_be_written_is_refused(on):
    """Wrong shapes, dtypes, strides and structures name the field; a gradient cannot go through reused memory."""
    prev, cur = hidden_pair((1, 12, 4), torch.float32, device=on.device)
    kv = [torch.zeros(1, 2, 12, 3, device=on.device)]
    run = lambda out, k=4, h=cur, **kw: vk.drop_tokens(prev, h, k, kv=kv, out=out, backend=on.backend, **kw)
    good = run(None)
    same(to([run(good).hidden, run(good).kv], "cpu"), to([good.hidden, good.kv], "cpu"))
    strided_hidden = torch.zeros(1, 4, 8, device=on.device)[..., ::2]
    for message, error, out in (
        ("out.hidden must be", ValueError, good._replace(hidden=torch.zeros(1, 5, 4, device=on.device))),
        ("out.hidden must be torch.float32", ValueError, good._replace(hidden=good.hidden.half())),
        ("out.hidden must be contiguous", ValueError, good._replace(hidden=strided_hidden)),
        ("out.kv must be", ValueError, good._replace(kv=[good.kv[0][:, :1]])),
        ("out must be a Dropped", TypeError, (good.hidden,)),
    ):
        with pytest.raises(error, match=message):
            run(out)
    with pytest.raises((ValueError, TypeError), match="kv"):
        run(good._replace(kv=None))
    with pytest.raises((ValueError, TypeError), match="kv"):
        run(good._replace(kv=[good.kv[0], good.kv[0]]))
    with pytest.raises(ValueError, match="hidden"):
        run(good, k=5)
    with pytest.raises(ValueError, match=r"out.* cannot be given where a gradient"):
        run(good, h=cur.clone().requires_grad_())
    with pytest.raises(ValueError, match="share memory"):
        vk.drop_tokens(prev, cur, 12, out=vk.drop_tokens(prev, cur, 12)._replace(hidden=cur), backend=on.backend)
