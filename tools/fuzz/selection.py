"""Properties of the score, the selection, the drop and the compaction."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import torch
from hypothesis import strategies as st
from inputs import CONTENTS, FLOATS, Batch, as_numpy, batches, dtypes, laid_out, numbers

import v2drop_kernels as vk
from v2drop_kernels.positions import MODES

METRICS = st.sampled_from(["l2", "l1", "cosine"])
UNIT = {torch.float64: 2.0**-52}  # of the accumulation: float32 otherwise


def equal(got: torch.Tensor, want: np.ndarray, what: str) -> None:
    """Exact equality; NaN equals NaN, and zeros of both signs are equal."""
    got_values = as_numpy(got)
    assert got_values.shape == want.shape, f"{what} has the shape {got_values.shape}, expected {want.shape}"
    same = got_values == want
    if got_values.dtype.kind == "f":
        same |= np.isnan(got_values) & np.isnan(want)
    assert same.all(), f"{what} differs at {np.argwhere(~same)[:3].tolist()}: {got_values[~same][:3]} for {want[~same][:3]}"


def bits(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """The same bytes."""
    assert got.shape == want.shape, f"{what} has the shape {list(got.shape)}, expected {list(want.shape)}"
    assert got.dtype == want.dtype, f"{what} is {got.dtype}, expected {want.dtype}"
    flat = [x.resolve_neg().contiguous().view(-1).view(torch.uint8) for x in (got, want)] if got.numel() else [got, want]
    assert torch.equal(*flat), f"{what} differs"


def variation_score(backend: str, data: Any) -> None:
    """Within the rounding of a sum of D terms of the definition; NaN and infinities as plain torch has them."""
    draw, packed = data.draw, data.draw(st.booleans())
    dtype, metric = draw(dtypes(backend)), draw(METRICS)
    d = draw(st.integers(0, 70), label="D")
    shape = (draw(st.integers(0, 30)), d) if packed else (draw(st.integers(0, 3)), draw(st.integers(0, 20)), d)
    prev, cur = (laid_out(draw, numbers(draw, shape, dtype)) for _ in range(2))
    cu = [0, shape[0]] if packed else None
    got = as_numpy(vk.variation_score(prev, cur, metric=metric, cu_seqlens=cu, backend=backend))
    with np.errstate(all="ignore"):
        want = oracles.variation(as_numpy(prev), as_numpy(cur), metric)
        large = [np.abs(as_numpy(x).astype(np.float64)).max(-1, initial=0) for x in (prev, cur)]
    unit = UNIT.get(dtype, 2.0**-23)
    if metric == "cosine":  # promised for norms from 1e-30 to 1e30 whose ratio is up to 1e6
        inside = np.isfinite(want) & all_of((x == 0) | ((x > 1e-29) & (x < 1e29)) for x in large)
        inside &= (large[0] <= 1e5 * large[1]) & (large[1] <= 1e5 * large[0]) | (large[0] * large[1] == 0)
        # 1 - cos is subtracted in float64: relative to the result for narrower inputs, to 1 for float64 itself.
        bound = (d + 8) * unit * np.maximum(want, 1) if dtype == torch.float64 else 8 * unit * np.maximum(want, unit)
    else:  # squares leave the range of float32 above 1e19 and below 1e-22
        inside = np.isfinite(want) & all_of(x < 1e18 for x in large) & ((want > 1e-18) | (want == 0))
        bound = (d + 4) * unit * want
    assert (np.abs(got - want)[inside] <= bound[inside]).all(), f"{got[inside]} for {want[inside]}"
    lost = np.isnan(want) & all_of(np.isfinite(x) for x in large) & ~np.isnan(got)
    assert not lost.any(), "a NaN was lost"


def all_of(conditions: Any) -> np.ndarray:
    return np.logical_and.reduce(list(conditions))


def segmented_topk(backend: str, data: Any) -> None:
    """Exact, whatever the content, the layout in memory and the way in which segments are given."""
    draw, batch = data.draw, data.draw(batches())
    dtype, order = draw(dtypes(backend)), draw(st.sampled_from(["position", "score"]))
    shape = (batch.rows,) if batch.packed else (batch.items, batch.rows)
    scores = laid_out(draw, numbers(draw, shape, dtype))
    arguments = {"cu_seqlens": batch.cu_seqlens, "droppable": batch.droppable, "order": order, "backend": backend}
    _check_topk(vk.segmented_topk(scores, batch.k, **arguments), scores, batch, order)


def _check_topk(got: vk.TopK, scores: torch.Tensor, batch: Batch, order: str) -> None:
    values = as_numpy(scores)
    mine = [values if batch.packed else values[i] for i, _ in batch.flat]
    chosen = oracles.topk(mine, [rows for _, rows in batch.flat], batch.ks, order)
    equal(got.indices, oracles.table(chosen, -1, np.int64), "indices")
    want = oracles.table([[s[r] for r in rows] for s, rows in zip(mine, chosen, strict=True)], -np.inf, values.dtype)
    equal(got.values, want, "values")
    assert got.values.dtype == scores.dtype


def variation_topk(backend: str, data: Any) -> None:
    """The selection of the scores that ``variation_score`` gives, bit for bit."""
    draw, batch = data.draw, data.draw(batches(most=24))
    dtype, order, metric = draw(dtypes(backend)), draw(st.sampled_from(["position", "score"])), draw(METRICS)
    rounded = draw(st.sampled_from([None, torch.bfloat16, torch.float16, torch.float32]))
    shape = (batch.rows,) if batch.packed else (batch.items, batch.rows)
    prev, cur = (laid_out(draw, numbers(draw, (*shape, draw(st.just(9))), dtype)) for _ in range(2))
    options = {"metric": metric, "score_dtype": rounded, "backend": backend}
    scores = scores_of(prev, cur, batch, **options)
    arguments = {"cu_seqlens": batch.cu_seqlens, "droppable": batch.droppable, "order": order}
    _check_topk(vk.variation_topk(prev, cur, batch.k, **arguments, **options), scores, batch, order)


def scores_of(prev: torch.Tensor, cur: torch.Tensor, batch: Batch, **options: Any) -> torch.Tensor:
    """The scores of all rows; a packed batch as one item, for scores are row by row."""
    if batch.packed:
        return vk.variation_score(prev[None], cur[None], **options)[0]
    return vk.variation_score(prev, cur, **options)


def extras(draw: Any, batch: Batch) -> dict[str, Any]:
    """What travels with the hidden states: any subset, any dtype that it may have, any layout in memory."""
    n, items, given_ = batch.rows, batch.items, {}
    lead = (n,) if batch.packed else (items, n)
    integers = st.sampled_from([torch.int64, torch.int32])

    def whole(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        return laid_out(draw, torch.from_numpy(rng.integers(0, 100, shape)).to(dtype))

    if draw(st.booleans(), label="position_ids"):
        shapes = [lead, (3, *lead)] if batch.packed else [lead, (1, n), (3, *lead)]
        given_["position_ids"] = whole(draw(st.sampled_from(shapes)), draw(integers))
    if draw(st.booleans(), label="kv"):
        given_["kv_layout"] = layout = draw(st.sampled_from(["BHSD", "BSHD"]))

        def leaf() -> torch.Tensor:
            h, d = draw(st.integers(1, 3)), draw(st.integers(1, 5))
            shape = (h, n, d) if layout == "BHSD" else (n, h, d)
            dtype = draw(st.sampled_from([*FLOATS, torch.int8, torch.uint8, torch.float64, torch.complex64]))
            return whole(shape if batch.packed else (items, *shape), dtype)

        given_["kv"] = draw(st.sampled_from([
            lambda: leaf(), lambda: (leaf(), leaf()), lambda: [(leaf(), leaf()), [leaf(), leaf()]], lambda: ((leaf(),), leaf()),
        ]))()  # fmt: skip
    if not batch.packed and draw(st.booleans(), label="attention_mask"):
        given_["attention_mask"] = whole(lead, draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))
    if not batch.packed and draw(st.booleans(), label="rope"):
        r = draw(st.integers(1, 6))
        shape = draw(st.sampled_from([(items, n, r), (1, n, r), (n, r), (3, items, n, r)]))
        dtype = draw(st.sampled_from(FLOATS))
        given_["rope"] = (whole(shape, dtype), whole(shape, dtype))
    if not batch.packed and draw(st.booleans(), label="labels"):
        given_["labels"] = whole(lead, draw(integers))
    return given_


def check_gathered(got: Any, kept: list[list[int]], batch: Batch, hidden: torch.Tensor, given_: dict[str, Any]) -> None:
    """Every field of the result against rows taken one by one."""
    keep = [r for rows in kept for r in rows] if batch.packed else oracles.table(kept, -1, np.int64, batch.side)
    equal(got.keep, np.array(keep, dtype=np.int64).reshape(np.shape(keep)), "keep")
    rows = [list(keep)] if batch.packed else keep.tolist()

    def check(name: str, x: torch.Tensor, found: torch.Tensor, batch_axis: int | None, axis: int, fill: int = 0) -> None:
        assert isinstance(found, torch.Tensor), f"{name} is {type(found).__name__}"
        source = x.resolve_neg().resolve_conj()
        items = 1 if batch_axis is None else batch.items
        planes = []
        for i in range(items):
            one = source if batch_axis is None else source.select(batch_axis, min(i, source.shape[batch_axis] - 1))
            at = axis if batch_axis is None or batch_axis > axis else axis - 1
            index = torch.tensor(rows[i], dtype=torch.int64)
            if one.shape[at]:
                taken = one.index_select(at, index.clamp(min=0))
            else:
                taken = one.new_zeros([*one.shape[:at], len(index), *one.shape[at + 1 :]])
            empty = (index < 0).view([-1 if j == at else 1 for j in range(taken.dim())])
            planes.append(torch.where(empty, torch.full((), fill, dtype=taken.dtype), taken))
        want = planes[0] if batch_axis is None else torch.stack(planes, batch_axis)
        bits(found, want, name)

    lead = None if batch.packed else 0
    if got.hidden is not None:
        check("hidden", hidden, got.hidden, lead, 0 if batch.packed else 1)
    for name in ("attention_mask", "labels"):
        if name in given_:
            check(name, given_[name], getattr(got, name), lead, 1, -100 if name == "labels" else 0)
    if "kv" in given_:
        axis = {"BHSD": 2, "BSHD": 1}[given_["kv_layout"]] - batch.packed
        _nested(lambda x, y: check("kv", x, y, lead, axis), given_["kv"], got.kv)
    if "position_ids" in given_:
        x = given_["position_ids"]
        check("position_ids", x, got.position_ids, None if batch.packed else x.dim() - 2, x.dim() - 1)
    for x, y in zip(given_.get("rope", ()), got.rope or (), strict=True):
        if x.dim() == 2:  # a table without a batch comes back with one
            x = x[None].expand(len(rows), -1, -1)
        check("rope", x, y, x.dim() - 3, x.dim() - 2)


def _nested(check: Any, want: Any, got: Any) -> None:
    if isinstance(want, torch.Tensor):
        check(want, got)
        return
    assert type(got) is type(want)
    assert len(got) == len(want)
    for a, b in zip(want, got, strict=True):
        _nested(check, a, b)


def drop_tokens(backend: str, data: Any) -> None:
    """The kept rows by the definition, everything else gathered byte by byte, and the layout of the next stage."""
    draw, batch = data.draw, data.draw(batches(most=24))
    shape = (batch.rows,) if batch.packed else (batch.items, batch.rows)
    dtype = draw(dtypes(backend))
    d = draw(st.integers(1, 12), label="D")
    prev, cur = (laid_out(draw, numbers(draw, (*shape, d), dtype)) for _ in range(2))
    given_ = extras(draw, batch)
    arguments: dict[str, Any] = {"cu_seqlens": batch.cu_seqlens, "droppable": batch.droppable, "backend": backend}
    if draw(st.booleans(), label="scores"):
        scores = laid_out(draw, numbers(draw, shape, draw(dtypes(backend))))
        got = vk.drop_tokens(prev if draw(st.booleans()) else None, cur, batch.k, scores=scores, **given_, **arguments)
    else:
        metric = draw(METRICS)
        scores = scores_of(prev, cur, batch, metric=metric, backend=backend)
        got = vk.drop_tokens(prev, cur, batch.k, metric=metric, **given_, **arguments)
    kept = batch.kept(as_numpy(scores))
    check_gathered(got, kept, batch, cur, given_)
    lengths = [len(rows) for rows in kept]
    if batch.packed:
        equal(got.cu_seqlens, np.cumsum([0, *lengths]).astype(np.int32), "cu_seqlens")
    _check_layout(got.layout, kept, batch)


def _check_layout(layout: Any, kept: list[list[int]], batch: Batch) -> None:
    """It marks the kept droppable rows in the result."""
    width, start = max(map(len, kept), default=0), 0
    want: list[Any] = []
    for i, rows in enumerate(kept):
        competing = {r for segment in batch.segments[i] for r in segment}
        mine = [r in competing for r in rows]
        pad = [False] * (0 if batch.packed else width - len(rows))
        want.append(pad + mine if batch.side == "left" else mine + pad)
        start += len(rows)
    flat = np.array([x for row in want for x in row], dtype=bool)
    equal(layout.droppable_rows("cpu"), flat if batch.packed else flat.reshape(batch.items, width), "layout.droppable_rows()")


def position_modes(backend: str, data: Any) -> None:
    """The ids "compacted" and "group" ids, counted by hand."""
    draw, batch = data.draw, data.draw(batches(most=16))
    mode = draw(st.sampled_from(MODES))
    shape = (batch.rows,) if batch.packed else (batch.items, batch.rows)
    hidden, scores = numbers(draw, (*shape, 2), torch.float32), numbers(draw, shape, torch.float32)
    ids = torch.arange(1000, 1000 + scores.numel()).view(shape)
    got = vk.drop_tokens(
        None, hidden, batch.k, scores=scores, positions=mode, position_ids=ids, droppable=batch.droppable,
        cu_seqlens=batch.cu_seqlens, backend=backend,
    )  # fmt: skip
    want = []
    for i, rows in enumerate(batch.kept(as_numpy(scores))):
        competing = {r for segment in batch.segments[i] for r in segment}
        group = oracles.group_ids(batch.real[i], competing)
        given_ids = as_numpy(ids if batch.packed else ids[i])
        want.append([{"persistent": int(given_ids[r]), "compacted": j, "group": group[r]}[mode] for j, r in enumerate(rows)])
    flat = np.array([x for row in want for x in row]) if batch.packed else oracles.table(want, 0, np.int64, batch.side)
    equal(got.position_ids, flat.astype(np.int64), f"{mode} position_ids")


def compact(backend: str, data: Any) -> None:
    """Any rows in any order, with empty rows between them; then in place."""
    draw, packed = data.draw, data.draw(st.booleans())
    items, n = 1 if packed else draw(st.integers(1, 3)), draw(st.integers(0, 20))
    real = [list(range(n))] * items
    kept = []
    width = draw(st.integers(0, n), label="S")
    for _ in range(items):
        rows = list(draw(st.permutations(range(n))))[:width]
        gaps = draw(st.lists(st.integers(0, max(width - 1, 0)), max_size=3)) if width and not packed else []
        kept.append([-1 if j in gaps else r for j, r in enumerate(rows)])
    batch = Batch(packed, n, real, [[] for _ in real], "right", None, [0, n] if packed else None, 0, [])
    shape = (n,) if packed else (items, n)
    hidden = laid_out(draw, numbers(draw, (*shape, draw(st.integers(1, 9))), draw(st.sampled_from([*FLOATS, torch.float64]))))
    given_ = extras(draw, batch)
    keep = torch.tensor(kept[0] if packed else kept, dtype=torch.int64).view(-1 if packed else items, *(() if packed else (width,)))
    got = vk.compact(keep, hidden, **given_, cu_seqlens=batch.cu_seqlens, backend=backend)
    check_gathered(got, kept, batch, hidden, given_)


def compact_inplace(backend: str, data: Any) -> None:
    """The kept rows at the front of every cache; the rows behind them and the memory around them unchanged."""
    draw = data.draw
    items, n, layout = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.sampled_from(["BHSD", "BSHD"]))
    caches, before = [], []
    for _ in range(draw(st.integers(1, 4), label="tensors")):
        h, d = draw(st.integers(1, 3)), draw(st.integers(1, 7))
        x = numbers(draw, (items, h, n, d) if layout == "BHSD" else (items, n, h, d), draw(st.sampled_from(FLOATS)), ("normal",))
        whole = torch.full([s + 2 for s in x.shape], 7.0, dtype=x.dtype)
        inner = whole[tuple(slice(1, -1) for _ in x.shape)]
        inner.copy_(x)
        caches.append(inner)
        before.append((whole, whole.clone()))
    rows = [sorted(draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n))) for _ in range(items)]
    keep = torch.from_numpy(oracles.table(rows, -1, np.int64, draw(st.sampled_from(["right", "left"]))))
    vk.compact_(keep, caches, kv_layout=layout, backend=backend)
    for whole, was in before:
        want = was.clone()
        axis = 2 if layout == "BHSD" else 1
        source, target = (x[tuple(slice(1, -1) for _ in x.shape)].movedim((0, axis), (0, 1)) for x in (was, want))
        for i, mine in enumerate(rows):
            target[i, : len(mine)] = source[i, mine]
        bits(whole, want, "the cache and what surrounds it")


def gradients(backend: str, data: Any) -> None:
    """The gradient of a drop is the gradient of taking the rows."""
    draw, batch = data.draw, data.draw(batches(most=12))
    shape = (batch.rows,) if batch.packed else (batch.items, batch.rows)
    cur = numbers(draw, (*shape, 3), torch.float32, ("normal", "ties")).requires_grad_()
    scores = numbers(draw, shape, torch.float32, CONTENTS)
    got = vk.drop_tokens(None, cur, batch.k, scores=scores, droppable=batch.droppable, cu_seqlens=batch.cu_seqlens, backend=backend)
    weight = numbers(draw, tuple(got.hidden.shape), torch.float32, ("normal",))
    (grad,) = torch.autograd.grad((got.hidden * weight).sum(), cur, allow_unused=True)
    want = np.zeros((*shape, 3), dtype=np.float32)
    kept = batch.kept(as_numpy(scores))
    if batch.packed:
        for j, r in enumerate(r for rows in kept for r in rows):
            want[r] += as_numpy(weight)[j]
    else:
        keep = oracles.table(kept, -1, np.int64, batch.side)
        for i, j in np.argwhere(keep >= 0):
            want[i, keep[i, j]] += as_numpy(weight)[i, j]
    equal(torch.zeros_like(cur) if grad is None else grad, want, "gradient of h_cur")


ALL = (
    variation_score, segmented_topk, variation_topk, drop_tokens, position_modes, compact, compact_inplace, gradients,
)  # fmt: skip
