"""Wrong input raises the documented class, names the argument, and never crashes the process."""

from __future__ import annotations

import pytest
import torch
from support.cases import to

import v2drop_kernels as vk

B, N, D = 2, 6, 4
META = torch.device("meta")  # another device that every machine has


def h(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape or (B, N, D), dtype=dtype, device=device)


def rows(*lists, **kw):
    return torch.tensor(lists, dtype=torch.int64, **kw)


def case(name, error, message, op, *args, **kwargs):
    return pytest.param(op, args, kwargs, error, message, id=f"{op}-{name}")


def batch_cases(op, *lead, data):
    """Errors of k, droppable and cu_seqlens, which three ops read alike; ``data(shape)`` makes their tensors."""
    padded, packed = data(B, N), data(5)

    def one(name, error, message, k=2, at=padded, **kwargs):
        return case(name, error, message, op, *at, k, **kwargs)

    layout = vk.TokenLayout.padded((1, 3), N, batch=B)
    return [
        one("k-negative", ValueError, "k must be >= 0, got -1", -1),
        one("k-float", TypeError, "k must be an int", 2.0),
        one("k-bool", TypeError, "k must be an int", True),
        one("k-none", TypeError, "k must be an int", None),
        one("k-string", TypeError, "k must be an int", "2"),
        one("k-too-few", ValueError, r"k must have one int per segment \(2\), got 1", [1]),
        one("k-too-many", ValueError, r"k must have one int per segment \(2\), got 3", (1, 1, 1)),
        one("k-list-negative", ValueError, "k must be >= 0", [1, -1]),
        one("k-list-float", TypeError, "k must be an int", [1, 0.5]),
        one("k-tensor-float", TypeError, "k as a tensor must be integer", torch.tensor([1.0, 1.0])),
        one("k-tensor-bool", TypeError, "k as a tensor must be integer", torch.tensor([True, True])),
        one(
            "k-tensor-2d",
            TypeError,
            "k as a tensor must be integer with 0 or 1 dim",
            torch.ones(1, 2, dtype=torch.int64),
        ),
        one("k-tensor-negative", ValueError, "k must be >= 0", torch.tensor([1, -4])),
        one(
            "k-tensor-elsewhere",
            ValueError,
            "k must be known on the host",
            torch.ones(2, dtype=torch.int64, device=META),
        ),
        one("k-negative-spans", ValueError, "k must be >= 0", -1, droppable=[(0, 2), (1, 3)]),
        one("k-negative-packed", ValueError, "k must be >= 0", -1, at=packed, cu_seqlens=[0, 5]),
        one("span-reversed", ValueError, r"droppable span \(4, 2\) of item 0 is reversed", droppable=(4, 2)),
        one("span-beyond", ValueError, r"droppable span \(1, 7\).* outside", droppable=(1, 7)),
        one("span-before", ValueError, r"droppable span \(-1, 3\).* outside", droppable=(-1, 3)),
        one("spans-overlap", ValueError, "droppable span .* of item 1 overlaps", droppable=[(0, 2), [(0, 3), (2, 5)]]),
        one("spans-descend", ValueError, "droppable span .* overlaps or precedes", droppable=[[(4, 5), (0, 2)], []]),
        one("spans-reversed-item", ValueError, "droppable span .* of item 1 is reversed", droppable=[(0, 1), (5, 4)]),
        one("spans-too-few", ValueError, "droppable spans must have one entry per item", droppable=[[(0, 1)]]),
        one("spans-floats", TypeError, "droppable spans of item 0", droppable=[(0.0, 2.0), (0, 1)]),
        one("spans-triples", TypeError, "droppable spans of item 0", droppable=[[(0, 1, 2)], []]),
        one("spans-string", TypeError, "droppable", droppable="all"),
        one("spans-int", TypeError, "droppable", droppable=3),
        one("mask-dtype", ValueError, "droppable as a tensor must be bool", droppable=torch.ones(B, N)),
        one("mask-shape", ValueError, "droppable as a tensor must be bool", droppable=torch.ones(B, N + 1).bool()),
        one(
            "mask-elsewhere",
            ValueError,
            "droppable must be on the device",
            droppable=vk.TokenLayout.from_mask(torch.ones(B, N, device=META).bool(), 2),
        ),
        one(
            "layout-of-other-rows",
            ValueError,
            "droppable is a layout",
            droppable=vk.TokenLayout.padded((1, 3), 9, batch=B),
        ),
        one(
            "layout-of-other-batch",
            ValueError,
            "droppable is a layout",
            droppable=vk.TokenLayout.padded((1, 3), N, batch=3),
        ),
        one(
            "layout-padded-for-packed",
            ValueError,
            "droppable|cu_seqlens",
            at=packed,
            droppable=layout,
            cu_seqlens=[0, 5],
        ),
        one(
            "layout-of-other-offsets",
            ValueError,
            "droppable is a layout of other cu_seqlens",
            at=packed,
            droppable=vk.TokenLayout.packed([(0, 1), (0, 1)], [0, 2, 5]),
            cu_seqlens=[0, 3, 5],
        ),
        one(
            "layout-of-other-total",
            ValueError,
            "droppable",
            at=packed,
            droppable=vk.TokenLayout.packed([(0, 1)], [0, 7]),
        ),
        one("cu-descends", ValueError, "cu_seqlens must ascend", at=packed, cu_seqlens=[0, 4, 2, 5]),
        one("cu-short", ValueError, "cu_seqlens must end at T = 5, got 4", at=packed, cu_seqlens=[0, 4]),
        one("cu-long", ValueError, "cu_seqlens must end at T = 5, got 6", at=packed, cu_seqlens=[0, 6]),
        one("cu-start", ValueError, "cu_seqlens must start with 0", at=packed, cu_seqlens=[1, 5]),
        one("cu-negative", ValueError, "cu_seqlens must", at=packed, cu_seqlens=[0, -2, 5]),
        one("cu-empty", ValueError, "cu_seqlens must start with 0", at=packed, cu_seqlens=[]),
        one("cu-floats", TypeError, "cu_seqlens must be an int", at=packed, cu_seqlens=[0, 5.0]),
        one("cu-number", TypeError, "cu_seqlens", at=packed, cu_seqlens=5),
        one("cu-tensor-float", ValueError, "cu_seqlens must be int32", at=packed, cu_seqlens=torch.tensor([0.0, 5.0])),
        one("cu-tensor-2d", ValueError, "cu_seqlens must be int32", at=packed, cu_seqlens=torch.tensor([[0, 5]])),
        one("cu-tensor-descends", ValueError, "cu_seqlens must ascend", at=packed, cu_seqlens=torch.tensor([0, 6, 5])),
        one("cu-tensor-long", ValueError, "cu_seqlens must end at T", at=packed, cu_seqlens=torch.tensor([0, 9])),
        one("cu-tensor-empty", ValueError, "cu_seqlens", at=packed, cu_seqlens=torch.tensor([], dtype=torch.int32)),
        one("packed-without-cu", ValueError, lead[0], at=packed),
        one("padded-with-cu", ValueError, lead[0], cu_seqlens=[0, 5]),
    ]


def pair_cases(op, *k):
    """Errors of h_prev and h_cur, which three ops read alike."""

    def one(name, error, message, prev, cur, **kwargs):
        return case(name, error, message, op, prev, cur, *k, **kwargs)

    return [
        one("prev-shape", ValueError, "h_prev must have the shape of h_cur", h(B, N, D + 1), h()),
        one("prev-rows", ValueError, "h_prev must have the shape of h_cur", h(B, N - 1, D), h()),
        one("prev-dtype", TypeError, "h_prev must have the dtype of h_cur", h(dtype=torch.float16), h()),
        one("prev-elsewhere", ValueError, "h_prev must be on the device of h_cur", h(device=META), h()),
        one("prev-none", TypeError, "h_prev must be a tensor, got NoneType", None, h()),
        one("cur-list", TypeError, "h_cur must be a tensor, got list", h(), [[0.0]]),
        one("cur-integers", TypeError, "h_cur must be float32", h(dtype=torch.int32), h(dtype=torch.int32)),
        one("cur-bool", TypeError, "h_cur must be float32", h(dtype=torch.bool), h(dtype=torch.bool)),
        one("cur-complex", TypeError, "h_cur must be float32", h(dtype=torch.complex64), h(dtype=torch.complex64)),
        one("cur-fp8", TypeError, "h_cur must be float32", h(dtype=torch.float8_e4m3fn), h(dtype=torch.float8_e4m3fn)),
        one("cur-1d", ValueError, "h_cur must be", h(4), h(4)),
        one("cur-4d", ValueError, "h_cur must be", h(1, 1, 1, 1), h(1, 1, 1, 1)),
        one("cur-sparse", TypeError, "h_cur must be a dense", h(), h().to_sparse()),
        one("metric-unknown", ValueError, "metric must be one of 'l2', 'l1', 'cosine', got 'L2'", h(), h(), metric="L2"),
        one("metric-none", ValueError, "metric must be one of", h(), h(), metric=None),
        one("score-dtype", TypeError, "score_dtype must be", h(), h(), score_dtype=torch.float64),
        one("score-dtype-string", TypeError, "score_dtype must be", h(), h(), score_dtype="bf16"),
        one("score-dtype-integer", TypeError, "score_dtype must be", h(), h(), score_dtype=torch.int8),
    ]


def companion_cases(op, *args, of):
    """Errors of what travels along, which two ops read alike."""

    def one(name, error, message, **kwargs):
        return case(name, error, message, op, *args, **kwargs)

    kv = h(B, 2, N, D)
    return [
        one("kv-length", ValueError, "kv must be .*S = N", kv=h(B, 2, N + 1, D)),
        one("kv-length-of-one", ValueError, "kv must be", kv=[(kv, kv), (kv, h(B, 2, N - 1, D))]),
        one("kv-batch", ValueError, "kv must be", kv=h(B + 1, 2, N, D)),
        one("kv-dims", ValueError, "kv must be", kv=h(B, N, D)),
        one("kv-other-layout", ValueError, "kv must be .*kv_layout", kv=kv, kv_layout="BSHD"),
        one("kv-elsewhere", ValueError, f"kv must be on the device of {of}", kv=(kv, h(B, 2, N, D, device=META))),
        one("kv-none-inside", TypeError, "kv must be a tensor", kv=[kv, None]),
        one("kv-dict", TypeError, "kv must be a tensor", kv={"k": kv}),
        one("kv-named-tuple", TypeError, "kv must be plain tuples", kv=vk.TopK(kv, kv)),
        one("kv-sparse", TypeError, "kv must be a dense", kv=[kv.to_sparse()]),
        one("kv-layout", ValueError, "kv_layout must be one of 'BHSD', 'BSHD', got 'bhsd'", kv=kv, kv_layout="bhsd"),
        one("ids-rows", ValueError, "position_ids must be", position_ids=h(B, N + 1).long()),
        one("ids-batch", ValueError, "position_ids must be", position_ids=h(B + 1, N).long()),
        one("ids-dims", ValueError, "position_ids must be", position_ids=h(N).long()),
        one("ids-4d", ValueError, "position_ids must be", position_ids=h(1, 3, B, N).long()),
        one("ids-mrope-rows", ValueError, "position_ids must be", position_ids=h(3, B, N - 1).long()),
        one("ids-list", TypeError, "position_ids must be a tensor", position_ids=[0, 1]),
        one("ids-elsewhere", ValueError, "position_ids must be on the device", position_ids=h(B, N, device=META).long()),
        one("attention-rows", ValueError, "attention_mask must be", attention_mask=h(B, N + 1)),
        one("attention-4d", ValueError, "attention_mask must be", attention_mask=h(B, 1, N, N)),
        one(
            "attention-elsewhere",
            ValueError,
            "attention_mask must be on the device",
            attention_mask=h(B, N, device=META),
        ),
        one("rope-rows", ValueError, "rope must be", rope=(h(B, N, 8), h(B, N + 1, 8))),
        one("rope-dims", ValueError, "rope must be", rope=(h(N), h(N))),
        one("rope-batch", ValueError, "rope must be", rope=(h(B + 1, N, 8),)),
        one("rope-elsewhere", ValueError, "rope must be on the device", rope=(h(N, 8, device=META),)),
        one("labels-rows", ValueError, "labels must be", labels=h(B, N - 1).long()),
        one("labels-dims", ValueError, "labels must be", labels=h(B, N, 1).long()),
        one("labels-float", TypeError, "labels must be signed integers", labels=h(B, N)),
        one("labels-unsigned", TypeError, "labels must be signed integers", labels=h(B, N).to(torch.uint8)),
        one("labels-uint16", TypeError, "labels must be signed integers", labels=h(B, N).to(torch.uint16)),
        one("labels-uint64", TypeError, "labels must be signed integers", labels=h(B, N).to(torch.uint64)),
        one("labels-bool", TypeError, "labels must be signed integers", labels=h(B, N).bool()),
        one("labels-elsewhere", ValueError, "labels must be on the device", labels=h(B, N, device=META).long()),
        one("positions-unknown", ValueError, "positions must be one of", positions="absolute"),
    ]


CASES = [
    *pair_cases("variation_score"),
    case("packed-3d", ValueError, "h_cur must be", "variation_score", h(), h(), cu_seqlens=[0, 2]),
    *batch_cases("segmented_topk", "scores", data=lambda *s: (h(*s),)),
    case("scores-list", TypeError, "scores must be a tensor", "segmented_topk", [[1.0]], 1),
    case("scores-integers", TypeError, "scores must be float32", "segmented_topk", h(B, N).long(), 1),
    case("scores-3d", ValueError, "scores must be", "segmented_topk", h(), 1),
    case(
        "order",
        ValueError,
        "order must be one of 'position', 'score', got 'index'",
        "segmented_topk",
        h(B, N),
        1,
        order="index",
    ),
    *pair_cases("variation_topk", 2),
    *batch_cases("variation_topk", "h_cur", data=lambda *s: (h(*s, D), h(*s, D))),
    case("order", ValueError, "order must be one of", "variation_topk", h(), h(), 1, order=None),
    *pair_cases("drop_tokens", 2),
    *batch_cases("drop_tokens", "h_cur", data=lambda *s: (h(*s, D), h(*s, D))),
    *companion_cases("drop_tokens", h(), h(), 2, of="h_cur"),
    case(
        "scores-shape",
        ValueError,
        "scores must have one value per row of h_cur",
        "drop_tokens",
        None,
        h(),
        2,
        scores=h(B, N + 1),
    ),
    case("scores-3d", ValueError, "scores must have one value", "drop_tokens", None, h(), 2, scores=h(B, N, 1)),
    case("scores-integers", TypeError, "scores must be float32", "drop_tokens", None, h(), 2, scores=h(B, N).long()),
    case(
        "scores-elsewhere",
        ValueError,
        "scores must be on the device of h_cur",
        "drop_tokens",
        None,
        h(),
        2,
        scores=h(B, N, device=META),
    ),
    case(
        "packed-mask",
        ValueError,
        "attention_mask must be",
        "drop_tokens",
        h(5, D),
        h(5, D),
        2,
        cu_seqlens=[0, 5],
        attention_mask=h(5),
    ),
    case("packed-kv", ValueError, "kv must be", "drop_tokens", h(5, D), h(5, D), 2, cu_seqlens=[0, 5], kv=h(1, 2, 5, D)),
    *companion_cases("compact", rows([0], [1]), h(), of="hidden"),
    case("hidden-none", TypeError, "hidden must be a tensor", "compact", rows([0], [1]), None),
    case("hidden-1d", ValueError, "hidden must be", "compact", rows([0], [1]), h(N)),
    case("keep-list", TypeError, "keep must be a tensor", "compact", [[0], [1]], h()),
    case("keep-int32", TypeError, "keep must be int64", "compact", rows([0], [1]).int(), h()),
    case("keep-bool", TypeError, "keep must be int64", "compact", h(B, N).bool(), h()),
    case("keep-batch", ValueError, "keep must be", "compact", rows([0]), h()),
    case("keep-1d", ValueError, "keep must be", "compact", rows([0])[0], h()),
    case("keep-elsewhere", ValueError, "keep must be on the device", "compact", rows([0], [1], device=META), h()),
    case("keep-beyond", ValueError, "keep", "compact", rows([0], [N]), h()),
    case("keep-far-beyond", ValueError, "keep", "compact", rows([2**40], [1]), h()),
    case("keep-beyond-kv", ValueError, "keep", "compact", rows([0, 1], [1, N + 3]), h(), kv=h(B, 2, N, D)),
    case("keep-beyond-packed", ValueError, "keep", "compact", rows([0, 5])[0], h(5, D), cu_seqlens=[0, 5]),
    case(
        "keep-groups",
        ValueError,
        r"keep must have one row per segment \(3\)",
        "compact",
        rows([0], [1]),
        h(),
        droppable=[[(0, 2), (3, 4)], (1, 2)],
    ),
    case("keep-groups-1d", ValueError, "keep must be", "compact", rows([0])[0], h(), droppable=(0, 2)),
    case("k-without-droppable", ValueError, "k .*needs droppable", "compact", rows([0], [1]), h(), k=1),
    case("k-negative", ValueError, "k must be >= 0", "compact", rows([0], [1]), h(), k=-1, droppable=(0, 3)),
    case("span-reversed", ValueError, "droppable span .* is reversed", "compact", rows([0], [1]), h(), droppable=(3, 2)),
    case("cu-descends", ValueError, "cu_seqlens must ascend", "compact", rows([0], [1]), h(5, D), cu_seqlens=[0, 7, 5]),
    case("cu-short", ValueError, "cu_seqlens must end at T", "compact", rows([0], [1]), h(5, D), cu_seqlens=[0, 2, 4]),
    case(
        "cu-descends-flat",
        ValueError,
        "cu_seqlens must ascend",
        "compact",
        rows([0, 1])[0],
        h(5, D),
        cu_seqlens=[0, 7, 5],
    ),
    case("cu-short-flat", ValueError, "cu_seqlens must end at T", "compact", rows([0, 1])[0], h(5, D), cu_seqlens=[0, 4]),
    case(
        "group-without-droppable",
        ValueError,
        "positions 'group' needs droppable",
        "compact",
        rows([0], [1]),
        h(),
        positions="group",
    ),
    case("kv-empty", ValueError, "kv must hold at least one tensor", "compact_", rows([0]), []),
    case("kv-3d", ValueError, "kv must hold tensors of 4", "compact_", rows([0]), h(1, N, D)),
    case("kv-lengths", ValueError, "kv must be", "compact_", rows([0]), [h(1, 2, N, D), h(1, 2, N + 1, D)]),
    case("kv-batches", ValueError, "kv must be", "compact_", rows([0]), [h(1, 2, N, D), h(2, 2, N, D)]),
    case("kv-expanded", ValueError, "kv must not share memory", "compact_", rows([0]), h(1, 1, N, D).expand(1, 3, N, D)),
    case("kv-grad", ValueError, "kv must not require grad", "compact_", rows([0]), h(1, 1, N, D).requires_grad_()),
    case("kv-none", TypeError, "kv must be a tensor", "compact_", rows([0]), None),
    case("kv-layout", ValueError, "kv_layout must be one of", "compact_", rows([0]), h(1, 1, N, D), kv_layout="SBHD"),
    case(
        "kv-elsewhere",
        ValueError,
        "kv must be on the device",
        "compact_",
        rows([0]),
        [h(1, 1, N, D), h(1, 1, N, D, device=META)],
    ),
    case("rows", ValueError, "kv must have rows = 9", "compact_", rows([0]), h(1, 1, N, D), rows=9),
    case("keep-int32", TypeError, "keep must be int64", "compact_", rows([0]).int(), h(1, 1, N, D)),
    case("keep-batch", ValueError, "keep must be", "compact_", rows([0], [1]), h(1, 1, N, D)),
    case("keep-elsewhere", ValueError, "keep must be on the device", "compact_", rows([0], device=META), h(1, 1, N, D)),
    case("keep-beyond", ValueError, "keep", "compact_", rows([0, N]), h(1, 1, N, D)),
    case("keep-descends", ValueError, "keep", "compact_", rows([2, 1]), h(1, 1, N, D)),
]


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize(("op", "args", "kwargs", "error", "message"), CASES)
def test_errors(on, op, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        getattr(vk, op)(*args, backend=on.backend, **kwargs)


# By op and type of error, the first case whose tensors can be moved.
ONE_OF_EACH = list(
    {
        (c.values[0], c.values[3]): c
        for c in reversed(CASES)
        if "keep-" not in c.id and not any(isinstance(x, torch.Tensor) and x.is_sparse for x in c.values[1])
    }.values()
)


@pytest.mark.backends("triton", "cuda")
@pytest.mark.parametrize(("op", "args", "kwargs", "error", "message"), ONE_OF_EACH)
def test_errors_on_a_gpu(on, op, args, kwargs, error, message):
    """The checks are those of the CPU, made before a backend is called: one of every op and type of error shows that they are made.
    (Those of the rows in ``keep`` are not: they would synchronise.)"""
    moved = [x if isinstance(x, torch.Tensor) and x.device == META else to(x, on.device) for x in args]
    host = ("k", "cu_seqlens")
    with pytest.raises(error):
        getattr(vk, op)(*moved, backend=on.backend, **{k: x if k in host else _moved(x, on.device) for k, x in kwargs.items()})


def _moved(x, device):
    if isinstance(x, list | tuple) and not hasattr(x, "_fields"):
        return type(x)(_moved(y, device) for y in x)
    return x if not isinstance(x, torch.Tensor) or x.device == META else x.to(device)


@pytest.mark.backends("triton", "cuda")
def test_compact_reads_rows_out_of_range_as_empty(on):
    """On a GPU looking would synchronise: such a row is padding, and nothing outside the tensor is read."""
    hidden = torch.ones(1, 4, 3, device=on.device)
    keep = rows([3, 4, 2**40, -7, 0], device=on.device)
    got = vk.compact(keep, hidden, labels=torch.ones(1, 4, dtype=torch.int64, device=on.device), backend=on.backend)
    assert got.hidden[0, :, 0].tolist() == [1, 0, 0, 0, 1]
    assert got.labels.tolist() == [[1, -100, -100, -100, 1]]


LAYOUT_CASES = [
    (vk.TokenLayout.padded, ((1, 3), 5), {}, ValueError, "batch must be given"),
    (vk.TokenLayout.padded, ((1, 3), -1), {"batch": 1}, ValueError, "seq_len must be >= 0"),
    (vk.TokenLayout.padded, ((1, 3), 5.0), {"batch": 1}, TypeError, "seq_len must be an int"),
    (vk.TokenLayout.padded, ((1, 6), 5), {"batch": 1}, ValueError, "span"),
    (vk.TokenLayout.padded, ([(0, 1)], 5), {"batch": 2}, ValueError, "one entry per item"),
    (vk.TokenLayout.padded, ([(0, 1)], 5), {"lengths": [5, 5]}, ValueError, "one entry per item"),
    (vk.TokenLayout.padded, ([(0, 1)], 5), {"lengths": [6]}, ValueError, r"lengths\[0\] must be an int in \[0, 5\]"),
    (vk.TokenLayout.padded, ([(0, 1)], 5), {"lengths": [-1]}, ValueError, r"lengths\[0\]"),
    (vk.TokenLayout.padded, ([(0, 1)], 5), {"lengths": [2.5]}, ValueError, r"lengths\[0\]"),
    (vk.TokenLayout.padded, ([(0, 5)], 5), {"lengths": [4]}, ValueError, "span .* outside"),
    (vk.TokenLayout.padded, ([(0, 1)], 5), {"lengths": [4], "padding_side": "left"}, ValueError, "span .* outside"),
    (vk.TokenLayout.padded, ([(0, 1)], 5), {"padding_side": "both"}, ValueError, "padding_side must be"),
    (vk.TokenLayout.packed, ([(0, 3)], [0, 2]), {}, ValueError, "span .* outside"),
    (vk.TokenLayout.packed, ([(0, 1)], [0, 2, 4]), {}, ValueError, "one entry per item"),
    (vk.TokenLayout.packed, ([(0, 1)], [1, 2]), {}, ValueError, "cu_seqlens must start"),
    (vk.TokenLayout.packed, ([(0, 1), (0, 0)], [0, 2, 1]), {}, ValueError, "cu_seqlens must ascend"),
    (vk.TokenLayout.from_mask, ([True],), {}, TypeError, "mask must be a bool tensor"),
    (vk.TokenLayout.from_mask, (torch.ones(1, 2),), {}, TypeError, "mask must be a bool tensor"),
    (vk.TokenLayout.from_mask, (torch.ones(2).bool(),), {}, ValueError, r"mask must be \[B, N\]"),
    (vk.TokenLayout.from_mask, (torch.ones(2).bool(),), {"cu_seqlens": [0, 3]}, ValueError, r"mask must be \[T\]"),
    (
        vk.TokenLayout.from_mask,
        (torch.ones(1, 2).bool(), [3]),
        {},
        ValueError,
        r"counts\[0\] must be an int in \[0, 2\]",
    ),
    (vk.TokenLayout.from_mask, (torch.ones(1, 2).bool(), [-1]), {}, ValueError, r"counts\[0\]"),
    (vk.TokenLayout.from_mask, (torch.ones(1, 2).bool(), [1, 1]), {}, ValueError, "counts must have one int per item"),
    (vk.TokenLayout.from_token_ids, ([1, 2], 1), {}, ValueError, "input_ids must be a tensor"),
    (vk.TokenLayout.from_token_ids, (torch.ones(2), 1), {}, ValueError, r"input_ids must be a tensor \[B, N\]"),
    (
        vk.TokenLayout.from_token_ids,
        (torch.ones(1, 2), 1),
        {"attention_mask": torch.ones(1, 3)},
        ValueError,
        "attention_mask must",
    ),
    (vk.TokenLayout.padded((1, 3), 5, batch=2).after, ([1],), {}, ValueError, "k must have one int per segment"),
    (vk.n_keep, (-1, 0.5), {}, ValueError, "n must be"),
    (vk.n_keep, (5.0, 0.5), {}, ValueError, "n must be"),
    (vk.n_keep, (True, 0.5), {}, ValueError, "n must be"),
    (vk.n_keep, (5, 1.5), {}, ValueError, "ratio must be"),
    (vk.n_keep, (5, -0.1), {}, ValueError, "ratio must be"),
    (vk.n_keep, (5, float("nan")), {}, ValueError, "ratio must be"),
    (vk.n_keep, (5, "0.5"), {}, ValueError, "ratio must be"),
    (vk.n_keep, (5, 0.5, "up"), {}, ValueError, "rounding must be"),
    (vk.n_keep, (5, 0.5), {"at_least": -1}, ValueError, "at_least must be"),
]


@pytest.mark.parametrize(("make", "args", "kwargs", "error", "message"), LAYOUT_CASES)
def test_errors_of_layouts(make, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        make(*args, **kwargs)


def test_token_layout_from_token_ids_refuses_padding_on_the_wrong_side():
    """attention_mask says where padding is; zeros on the other side would silently make real tokens padding."""
    ids = torch.tensor([[9, 9, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask"):
        vk.TokenLayout.from_token_ids(ids, 9, attention_mask=torch.tensor([[0, 1, 1, 1]]), padding_side="right")


def test_a_failed_call_leaves_nothing_behind():
    """An error between two calls changes neither the cached plans nor the forced backend."""
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    want = vk.segmented_topk(scores, 2).indices
    for bad in (-1, [1, 2], "2"):
        with pytest.raises((ValueError, TypeError)):
            vk.segmented_topk(scores, bad)
    assert torch.equal(vk.segmented_topk(scores, 2).indices, want)


def test_k_of_another_type_is_not_found_in_the_cache():
    """lru_cache takes 2, 2.0 and True for the same key: a float after an int of the same value must still be
    refused."""
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    for k in (2, 1):
        vk.segmented_topk(scores, k)
        for bad in (float(k), bool(k)):
            with pytest.raises(TypeError, match="k must be an int"):
                vk.segmented_topk(scores, bad)
