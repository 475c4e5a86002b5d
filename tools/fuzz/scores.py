"""Properties of the other scores, the merges, the differentiable top-k and the counts."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import oracles
import torch
from hypothesis import strategies as st
from inputs import as_numpy, dtypes, laid_out, numbers
from selection import UNIT, equal

import v2drop_kernels as vk
from v2drop_kernels.ops.merge_dropped.sparsevlm import recycled_clusters

TAME = ("normal", "ties", "constant")


def near(got: torch.Tensor, want: np.ndarray, bound: Any, what: str) -> None:
    """Within ``bound``, in the float32 (float64 for float64 inputs) that every op returns."""
    values = as_numpy(got)
    assert values.shape == want.shape, f"{what} has the shape {values.shape}, expected {want.shape}"
    wrong = ~(np.abs(values - want) <= bound)
    assert not wrong.any(), f"{what} differs at {np.argwhere(wrong)[:3].tolist()}: {values[wrong][:3]} for {want[wrong][:3]}"


def attention_score(backend: str, data: Any) -> None:
    """Every combination of masks, queries, reductions and layouts."""
    draw = data.draw
    dtype, batch, per_key = draw(dtypes(backend)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    hkv, n, s, d = draw(st.integers(1, 3)), draw(st.integers(0, 4)), draw(st.integers(0, 24)), draw(st.integers(1, 20))
    layout, causal = draw(st.sampled_from(["BHSD", "BSHD"])), draw(st.booleans(), label="causal")
    h = hkv * per_key
    q, k = numbers(draw, (batch, h, n, d), dtype, TAME), numbers(draw, (batch, hkv, s, d), dtype, TAME)
    options: dict[str, Any] = {"causal": causal, "mode": draw(st.sampled_from(["softmax", "dot"])), "backend": backend}
    options["heads"] = heads = draw(st.one_of(st.sampled_from(["mean", "sum", "max"]), st.integers(1, h)))
    options["queries"] = queries = draw(st.sampled_from(["mean", "l2"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    rows = np.tile(np.arange(s - n, s), (batch, 1))
    if draw(st.booleans(), label="query_rows") or n > s:
        rows = rng.integers(-2, max(s, 1), (batch, n))
        options["query_rows"] = torch.from_numpy(rows)
    masks = []
    for name in ("key_mask", "droppable"):
        masks.append(rng.random((batch, s)) < 0.7 if draw(st.booleans(), label=name) else np.ones((batch, s), dtype=bool))
        if not masks[-1].all() or draw(st.booleans()):
            options[name] = torch.from_numpy(masks[-1])
    scale = draw(st.sampled_from([None, 0.5, 1.0]))
    options["scale"] = scale
    swapped = (lambda x: x.transpose(1, 2).contiguous()) if layout == "BSHD" else (lambda x: x)
    got = vk.attention_score(laid_out(draw, swapped(q)), laid_out(draw, swapped(k)), layout=layout, **options)
    want, clear = np.zeros((batch, s)), True
    for b in range(batch):
        want[b], certain = oracles.attention(
            as_numpy(q)[b], as_numpy(k)[b], rows[b], masks[0][b], masks[1][b], causal, d**-0.5 if scale is None else scale,
            options["mode"], heads, queries,
        )  # fmt: skip
        clear &= certain
    # A logit rounds by (d + 2) units of its absolute terms, of which the softmax takes the exponential.
    terms = d * float(np.abs(as_numpy(q)).max(initial=0)) * float(np.abs(as_numpy(k)).max(initial=0)) * (scale or d**-0.5)
    unit = UNIT.get(dtype, 2.0**-23)
    heads_added = h if heads in ("sum",) else 1
    if clear:
        near(got, want, 4 * unit * (d + s + n + 8) * (terms + 1) * heads_added * max(n, 1) ** 0.5, "attention_score")


def key_norm_score(backend: str, data: Any) -> None:
    """Both norms over heads and channels."""
    draw = data.draw
    dtype, layout, norm = draw(dtypes(backend)), draw(st.sampled_from(["BHSD", "BSHD"])), draw(st.sampled_from(["l1", "l2"]))
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 12)), draw(st.integers(1, 20)))
    k = numbers(draw, shape, dtype, (*TAME, "wide"))
    stored = k if layout == "BHSD" else k.transpose(1, 2).contiguous()
    got = vk.key_norm_score(laid_out(draw, stored), norm=norm, layout=layout, backend=backend)
    x = np.abs(as_numpy(k).astype(np.float64))
    want = x.sum((1, 3)) if norm == "l1" else np.sqrt(np.square(x).sum((1, 3)))
    near(got, want, (shape[1] * shape[3] + 4) * UNIT.get(dtype, 2.0**-23) * want, "key_norm_score")


def cosine_to_pivots(backend: str, data: Any) -> None:
    """Cosines with rows that may be none."""
    draw, dtype = data.draw, data.draw(dtypes(backend))
    batch, n, d, p = draw(st.integers(1, 3)), draw(st.integers(0, 16)), draw(st.integers(1, 20)), draw(st.integers(0, 4))
    x = numbers(draw, (batch, n, d), dtype, (*TAME, "wide"))
    pivots = np.random.default_rng(draw(st.integers(0, 2**16))).integers(-1, n + 2, (batch, p))
    got = vk.cosine_to_pivots(laid_out(draw, x), torch.from_numpy(pivots), backend=backend)
    values, want = as_numpy(x), np.zeros((batch, p, n))
    for b, j in np.ndindex(batch, p):
        if 0 <= pivots[b, j] < n:
            want[b, j] = oracles.cosine(np.broadcast_to(values[b, pivots[b, j]], (n, d)), values[b])
    near(got, want, (d + 8) * UNIT.get(dtype, 2.0**-23), "cosine_to_pivots")


def frame_similarity(backend: str, data: Any) -> None:
    """Both ways to choose the partner of a frame."""
    draw, dtype, pairs = data.draw, data.draw(dtypes(backend)), data.draw(st.sampled_from(["previous", "dycoke"]))
    lead = draw(st.sampled_from([(), (1,), (2,)]))
    f, p, d = draw(st.integers(0, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    x = numbers(draw, (*lead, f, p, d), dtype, TAME)
    values = as_numpy(x)
    want = np.full((*lead, f, p), np.inf)
    for frame in range(1, f):
        if pairs == "dycoke" and frame % 4 == 0:
            continue
        partner = frame - 2 if pairs == "dycoke" and frame % 2 == 0 else frame - 1
        want[..., frame, :] = 1 - oracles.cosine(values[..., partner, :, :], values[..., frame, :, :])
    got = vk.frame_similarity(laid_out(draw, x), pairs=pairs, backend=backend)
    finite = np.isfinite(want)
    assert (np.isinf(as_numpy(got)) == ~finite).all(), "frames without a partner"
    near(
        got.masked_fill(~torch.from_numpy(finite), 0), np.where(finite, want, 0), 16 * UNIT.get(dtype, 2.0**-23), "frame_similarity"
    )


def soft_topk(backend: str, data: Any) -> None:
    """The hard mask keeps exactly ``round((1 - a) n)``; the soft mask is the sigmoid of the definition."""
    draw, dtype = data.draw, data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    batch, n = draw(st.integers(1, 3)), draw(st.integers(0, 24))
    scores = numbers(draw, (batch, n), dtype)
    ratio = draw(st.floats(0, 1, width=32), label="ratio")
    valid = np.random.default_rng(draw(st.integers(0, 2**16))).random((batch, n)) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    temperature = draw(st.sampled_from([None, 0.5, 30.0]))
    options = {"valid": torch.from_numpy(valid), "temperature": temperature, "backend": backend}
    hard = vk.soft_topk(laid_out(draw, scores), ratio, **options)
    soft = vk.soft_topk(scores, ratio, hard=False, **options)
    values = as_numpy(scores)
    for b in range(batch):
        rows = [int(i) for i in np.nonzero(valid[b])[0]]
        exact = (1 - Fraction(ratio)) * len(rows)
        if abs(exact - math.floor(exact) - Fraction(1, 2)) > Fraction(1, 10**5):  # not where rounding of the product decides
            want = np.zeros(n)
            want[oracles.best(values[b], rows, round(exact))] = 1
            equal(hard[b].double(), want, "the hard mask")
        scale = max(len(rows), 1) if temperature is None else temperature
        near(soft[b], oracles.soft_mask(values[b], ratio, valid[b], temperature), 4e-7 * (1 + scale), "the soft mask")


def weighted_merge(backend: str, data: Any) -> None:
    """Sums by lists of edges, and their gradients."""
    draw, dtype = data.draw, data.draw(dtypes(backend))
    batch, n, d = draw(st.integers(1, 3)), draw(st.integers(1, 10)), draw(st.integers(1, 12))
    k, e = draw(st.integers(0, 6)), draw(st.integers(0, 16))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    x = numbers(draw, (batch, n, d), dtype, TAME if dtype == torch.float16 else (*TAME, "wide"))  # sums stay below 65504
    offsets, rows = np.sort(rng.integers(0, e + 1, (batch, k + 1)), 1), rng.integers(0, n, (batch, e))
    weights = rng.random((batch, e)).astype(np.float32) if draw(st.booleans(), label="weights") else None
    mean = draw(st.booleans(), label="mean")
    given = None if weights is None else torch.from_numpy(weights)
    got = vk.weighted_merge(laid_out(draw, x), torch.from_numpy(offsets), torch.from_numpy(rows), given, mean=mean, backend=backend)
    assert got.dtype == dtype
    ones = np.ones((batch, e)) if weights is None else weights.astype(np.float64)
    for b in range(batch):
        want, size = oracles.weighted_sum(as_numpy(x)[b], offsets[b], rows[b], ones[b], mean)
        rounding = torch.finfo(dtype).eps * np.abs(want) + torch.finfo(dtype).smallest_normal
        near(got[b].double(), want, rounding + 2 * (e + 4) * UNIT.get(dtype, 2.0**-23) * size, "weighted_merge")


def bipartite_merge(backend: str, data: Any) -> None:
    """Sizes, and means of what went into a row; which pairs, where no cosines are close."""
    draw = data.draw
    batch, n, d, r = draw(st.integers(1, 2)), draw(st.integers(0, 20)), draw(st.integers(1, 6)), draw(st.integers(0, 12))
    protected, order = draw(st.integers(0, 2)), draw(st.sampled_from(["position", "released"]))
    x, keys = numbers(draw, (batch, n, d), torch.float32, TAME), numbers(draw, (batch, n, 5), torch.float32, ("normal",))
    size = torch.randint(1, 5, (batch, n), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).float()
    got = vk.bipartite_merge(laid_out(draw, x), keys, r, size=size, protected=protected, order=order, backend=backend)
    lost = min(r, max(n - protected, 0) // 2)
    assert got.hidden.shape == (batch, n - lost, d)
    for b in range(batch):
        row, values = got.row[b].tolist(), as_numpy(x)[b].astype(np.float64)
        assert sorted(got.keep[b].tolist()) == sorted(set(got.keep[b].tolist())), "a row was kept twice"
        assert [row[i] for i in got.keep[b].tolist()] == list(range(n - lost)), "keep and row disagree"
        assert {*range(min(protected, n))} <= {*got.keep[b].tolist()}, "a protected row was merged"
        for j in range(n - lost):
            members = [i for i in range(n) if row[i] == j]
            total = sum(float(size[b, i]) for i in members)
            assert float(got.size[b, j]) == total
            mean = sum(float(size[b, i]) * values[i] for i in members) / total
            near(got.hidden[b, j], mean, 1e-5 * (1 + np.abs(values).max()), "a mean")
        metric, odd = as_numpy(keys)[b], [i for i in range(1, n, 2) if i >= protected]
        near_ = {}
        for i in range(0, n if odd else 0, 2):
            if i >= protected:
                near_[i] = max(float(oracles.cosine(metric[i], metric[j])) for j in odd)
        gone = {*range(n)} - {*got.keep[b].tolist()}
        assert all(i % 2 == 0 for i in gone), "an odd row was merged into another"
        if gone and set(near_) - gone:
            assert min(near_[i] for i in gone) >= max(near_[i] for i in set(near_) - gone) - 1e-5, "a worse pair was preferred"


def merge_dropped(backend: str, data: Any) -> None:
    """SparseVLM's clusters are whole, and their means stand at their centres; other kept rows are copied exactly."""
    draw = data.draw
    n, d, share = draw(st.integers(1, 30)), draw(st.integers(1, 6)), draw(st.sampled_from([0.0, 0.3, 1.0]))
    x, scores = numbers(draw, (1, n, d), torch.float32, TAME), numbers(draw, (1, n), torch.float32, TAME)
    dropped = np.random.default_rng(draw(st.integers(0, 2**16))).random((1, n)) < 0.6
    clusters = recycled_clusters(x, scores, torch.from_numpy(dropped), share=share)
    m = int(dropped.sum())
    count = min(int(share * m) + 1, m) if share else 0
    found = clusters[0].tolist()
    assert sum(c >= 0 for c in found) == count
    centres = sorted({c for c in found if c >= 0})
    assert all(found[c] == c for c in centres)
    assert len(centres) == (count // 10 + 1 if count else 0)
    keep = sorted([i for i in range(n) if not dropped[0, i]] + centres)
    got = vk.merge_dropped(x, torch.tensor([keep], dtype=torch.int64).view(1, -1), "sparsevlm", clusters=clusters, backend=backend)
    values = as_numpy(x)[0].astype(np.float64)
    for j, i in enumerate(keep):
        members = [r for r in range(n) if found[r] == i] or [i]
        near(got[0, j], values[members].mean(0), 1e-5 * (1 + np.abs(values).max()) if len(members) > 1 else 0, "a row")


def counts(backend: str, data: Any) -> None:
    """``n_keep`` of decimals, of fractions, and between its bounds."""
    draw = data.draw
    n, digits = draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6))
    rounding = draw(st.sampled_from(["floor", "round", "ceil"]))
    ratio = Fraction(digits, 10**6)
    want = {"floor": math.floor, "round": round, "ceil": math.ceil}[rounding](n * ratio)
    at_least = draw(st.integers(0, 10))
    assert vk.n_keep(n, float(ratio), rounding, at_least) == min(n, max(at_least, want))
    small = draw(st.integers(1, 4096))
    k = draw(st.integers(0, small))
    for way in ("floor", "round", "ceil"):
        assert vk.n_keep(small, k / small, way) == k, f"n_keep({small}, {k} / {small}, {way!r})"


def random_score(backend: str, data: Any) -> None:
    """The generator of its docstring in Python's integers."""
    draw = data.draw
    batch, n, seed = draw(st.integers(0, 3)), draw(st.integers(0, 9)), draw(st.integers(-(2**40), 2**40))
    items = draw(st.lists(st.integers(-(2**62), 2**62), min_size=batch, max_size=batch))

    def words(block: int, item: int) -> list[int]:
        c, key = [block % 2**32, block >> 32, item % 2**32, (item >> 32) % 2**32], [seed % 2**32, (seed >> 32) % 2**32]
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ key[0], b % 2**32, (a >> 32) ^ c[3] ^ key[1], a % 2**32]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        return c

    want = [[(words(j // 4, item)[j % 4] >> 8) / 2**24 for j in range(n)] for item in items]
    with vk.backend(backend):
        got = vk.random_score((batch, n), seed, item_seeds=items)
    equal(got, np.array(want, dtype=np.float32).reshape(batch, n), "random_score")


ALL = (
    attention_score, key_norm_score, cosine_to_pivots, frame_similarity, soft_topk, weighted_merge, bipartite_merge, merge_dropped,
    counts, random_score,
)  # fmt: skip
