"""v2drop_kernels.array: the same bytes as the torch functions, from NumPy arrays and whatever else shares its memory."""

from __future__ import annotations

import gc
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from support.arrays import SPANS, WRONG, H, same, to_numpy
from support.cases import (
    FLOATS,
    KS,
    METRICS,
    ORDERS,
    SCORES,
    STRIDES,
    companions,
    cross,
    hidden_pair,
    normal,
    scores,
    strided,
)

import v2drop_kernels as vk
import v2drop_kernels.array as va
from v2drop_kernels import native

no_bfloat16 = pytest.mark.skipif(importlib.util.find_spec("ml_dtypes") is None, reason="ml_dtypes is not installed")


def same_as_torch(name, *args, **given):
    """Call both; compare everything."""
    arrays = {key: to_numpy(x) if isinstance(x, torch.Tensor | list | tuple) and key in ARRAYS else x for key, x in given.items()}
    want = getattr(vk, name)(*args, **given, backend="cpu")
    got = getattr(va, name)(*(to_numpy(x) if isinstance(x, torch.Tensor) else x for x in args), **arrays)
    same(got, want)
    return got


ARRAYS = ("position_ids", "kv", "attention_mask", "rope", "labels", "scores")
FLOATS_HERE = [pytest.param(d, marks=no_bfloat16) if d == torch.bfloat16 else d for d in FLOATS]
dtypes = pytest.mark.parametrize("dtype", FLOATS_HERE, ids=["fp32", "fp16", "bf16"])


def bfloat16_to_float16(x):
    """Without ml_dtypes no companion may be bfloat16; its bits are not looked at."""
    if isinstance(x, list | tuple):
        return type(x)(map(bfloat16_to_float16, x))
    return x.view(torch.float16) if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x


def travelling(b, key="", strides="contiguous"):
    return {name: bfloat16_to_float16(x) for name, x in companions(b, key, strides=strides).items()}


@dtypes
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("strides", STRIDES)
def test_variation_score(dtype, metric, strides):
    prev, cur = (strided(normal((3, 21, 40), dtype, i), strides) for i in "pc")
    same_as_torch("variation_score", prev, cur, metric=metric)
    same_as_torch("variation_score", prev[1], cur[1], metric=metric)


@no_bfloat16
@pytest.mark.parametrize("dtype", [np.float16, "float16", np.dtype(np.float16), np.float32, None])
def test_score_dtype(dtype):
    prev, cur = (normal((2, 9, 33), torch.bfloat16, i) for i in "pc")
    rounded = {None: None, np.float32: torch.float32}.get(dtype, torch.float16)
    want = vk.variation_score(prev, cur, score_dtype=rounded, backend="cpu")
    same(va.variation_score(to_numpy(prev), to_numpy(cur), score_dtype=dtype), want)


def test_score_in_bfloat16():
    prev, cur = (normal((2, 9, 33), torch.float16, i) for i in "pc")
    want = vk.variation_score(prev, cur, score_dtype=torch.bfloat16, backend="cpu")
    same(va.variation_score(prev.numpy(), cur.numpy(), score_dtype="bfloat16"), want)


@cross(together="kind k order", dtype=FLOATS, kind=SCORES, k=KS, order=ORDERS)
def test_segmented_topk(dtype, kind, k, order):
    b = SPANS[6]
    same_as_torch("segmented_topk", scores(kind, b.lead, dtype), b.k(k), droppable=b.droppable, order=order)


@pytest.mark.parametrize("b", SPANS, ids=str)
@pytest.mark.parametrize("k", ["n/3", "list"])
def test_topk_of_every_batch(b, k):
    x = scores("three", b.lead, torch.float32)
    arguments = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in b.arguments().items()}
    for order in ORDERS:
        want = vk.segmented_topk(x, b.k(k), **b.arguments(), order=order, backend="cpu")
        same(va.segmented_topk(x.numpy(), np.array(b.k(k), np.int32), **arguments, order=order), want)
    prev, cur = hidden_pair((*b.lead, 5), torch.float16)
    want = vk.variation_topk(prev, cur, b.k(k), **b.arguments(), metric="l1", backend="cpu")
    same(va.variation_topk(prev.numpy(), cur.numpy(), b.k(k), **arguments, metric="l1"), want)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "inner"])
@pytest.mark.parametrize("k", ["0", "n/3", "list"])
@pytest.mark.parametrize("b", SPANS, ids=str)
def test_drop_tokens(b, k, strides):
    prev, cur = (strided(h, strides) if h.numel() else h for h in hidden_pair((*b.lead, 6), torch.float16))
    given = travelling(b, "mrope" if k == "list" else "", strides if prev.numel() else "contiguous")
    first = same_as_torch("drop_tokens", prev, cur, b.k(k), **b.arguments(), **given)
    if first.hidden.size:  # the layout of a result serves the next stage
        before = torch.zeros(first.hidden.shape, dtype=torch.float16)
        same_as_torch("drop_tokens", before, torch.from_numpy(first.hidden), 2, droppable=first.layout)


@dtypes
def test_drop_tokens_of_every_dtype(dtype):
    b = SPANS[2]
    prev, cur = hidden_pair((*b.lead, 48), dtype)
    given = {"position_ids": torch.arange(b.rows)[None], "rope": (torch.rand(b.rows, 4), torch.rand(1, b.rows, 4))}
    same_as_torch("drop_tokens", prev, cur, 20, droppable=b.droppable, kv=travelling(b)["kv"], **given)
    same_as_torch("drop_tokens", None, cur, 20, droppable=b.droppable, scores=scores("special", b.lead, dtype))


def test_kv_layout():
    prev, cur = hidden_pair((2, 9, 4), torch.float32)
    same_as_torch("drop_tokens", prev, cur, 3, kv=(torch.rand(2, 9, 2, 4),), kv_layout="BSHD")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compact(packed):
    b = next(x for x in SPANS if x.packed is packed and x.batch > 1 and x.rows > 5)
    keep = torch.tensor([1, 5, -1, 3, 2])
    given = {"cu_seqlens": [0, 4, b.rows]} if packed else {}
    hidden = normal((*b.lead, 3), torch.float64)
    rows = keep if packed else keep.expand(b.batch, -1)
    got = same_as_torch("compact", rows, hidden, **travelling(b), **given)
    same(va.compact(rows.numpy().astype(np.int32), hidden.numpy(), **given).hidden, torch.from_numpy(got.hidden))


def test_compact_takes_a_topk():
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    got = va.compact(va.segmented_topk(x, 2), x)
    assert got.hidden.tolist() == [[4, 5], [10, 11]]


def test_threads_change_nothing():
    prev, cur = (normal((1, 3000, 257), torch.float32, i).numpy() for i in "pc")
    one, all_ = (va.drop_tokens(prev, cur, 700, threads=n) for n in (1, 0))
    assert one.hidden.tobytes() == all_.hidden.tobytes()
    assert (one.keep == all_.keep).all()


class Foreign:
    """An array of a library that NumPy does not know, which speaks one protocol."""

    def __init__(self, array, protocol):
        self.protocol, self.array = protocol, array

    def __getattr__(self, name):
        if name not in self.protocol:
            raise AttributeError(name)
        return getattr(self.array, name)


@pytest.mark.parametrize("protocol", [("__dlpack__", "__dlpack_device__"), ("__array_interface__",), ("__array__",)])
def test_arrays_of_other_libraries(protocol):
    prev, cur = (normal((2, 7, 5), torch.float32, i).numpy() for i in "pc")
    want = va.variation_topk(prev, cur, 3)
    got = va.variation_topk(Foreign(prev, protocol), Foreign(cur, protocol), 3)
    same(got, vk.TopK(*map(torch.from_numpy, want)))


def test_torch_tensors_are_read_where_they_lie():
    prev, cur = hidden_pair((2, 7, 5), torch.float32)
    same(va.variation_topk(prev, cur, 3), vk.variation_topk(prev, cur, 3, backend="cpu"))
    with pytest.raises(TypeError, match="h_cur cannot be read as an array"):
        va.variation_score(prev, cur.requires_grad_())


def test_unaligned_and_read_only_memory():
    prev, cur = (normal((1, 6, 4), torch.float32, i).numpy() for i in "pc")
    raw = np.frombuffer(b"x" + cur.tobytes(), np.uint8)[1:].view(np.float32).reshape(cur.shape)
    records = np.zeros((1, 6), [("tag", "u1"), ("row", np.float32, 4)])  # rows 17 bytes apart
    records["row"] = prev
    assert not raw.flags.aligned
    assert not raw.flags.writeable
    got, want = va.drop_tokens(records["row"], raw, 2), va.drop_tokens(prev, cur, 2)
    assert got.hidden.tobytes() == want.hidden.tobytes()
    assert (got.keep == want.keep).all()


def test_a_call_leaves_no_garbage():
    """Failure that it pins: a cycle kept results alive until a collection, and every call faulted in fresh pages."""
    b = SPANS[6]
    prev, cur = (h.numpy() for h in hidden_pair((*b.lead, 6), torch.float16))
    given = {name: to_numpy(x) for name, x in travelling(b).items()}
    while gc.collect():  # of other tests, too: what a finalizer leaves behind
        pass
    gc.disable()
    try:
        va.drop_tokens(prev, cur, 3, droppable=b.droppable, **given)
        va.compact(np.zeros((b.batch, 1), np.int32), cur)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_results_come_from_fresh_memory():
    h = np.ones((1, 5, 2), np.float32)
    got = va.drop_tokens(h, h, 5)
    assert not np.shares_memory(got.hidden, h)


@pytest.mark.parametrize(("name", "args", "given", "kind", "message"), WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)])
def test_errors_name_the_argument(name, args, given, kind, message):
    with pytest.raises(kind, match=message) as found:
        getattr(va, name)(*args, **given)
    assert "\n" not in str(found.value)


def stand_in_for_cupy():
    """What v2drop_kernels.array asks of CuPy, for the emulated kernels, whose device memory is the host's."""
    cupy = types.ModuleType("cupy")

    class ndarray(np.ndarray):
        device = 0
        __cuda_array_interface__ = property(lambda self: self.__array_interface__)

        def __dlpack_device__(self):
            return 2, 0

        def get(self):
            return np.array(self)

    def empty(shape, dtype):  # aligned, as CuPy's memory is
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.empty(size + 256, np.uint8)
        first = -raw.ctypes.data % 256
        return raw[first : first + size].view(dtype).reshape(shape)

    def of(function):
        return lambda *args, **given: function(*args, **given).view(ndarray)

    cupy.ndarray = ndarray
    cupy.asarray, cupy.empty, cupy.ascontiguousarray = of(np.asarray), of(empty), of(np.ascontiguousarray)
    cupy.broadcast_to = of(np.broadcast_to)
    cupy.cuda = types.SimpleNamespace(Device=lambda: 0, get_current_stream=lambda: types.SimpleNamespace(ptr=0))
    return cupy


EMULATED = native.available()[0] and native.cuda_archs() == "emulated"


@pytest.fixture(
    params=[pytest.param("emulated", marks=pytest.mark.emulated) if EMULATED else pytest.param("cupy", marks=pytest.mark.gpu)],
)
def cupy(request, monkeypatch):
    if request.param == "emulated":
        monkeypatch.setitem(sys.modules, "cupy", stand_in_for_cupy())
    return pytest.importorskip("cupy", reason="CuPy is not installed")


def there(x, cupy):
    return type(x)(there(y, cupy) for y in x) if isinstance(x, list | tuple) else cupy.asarray(to_numpy(x))


def here(x):
    if isinstance(x, list | tuple):
        found = [here(y) for y in x]
        return type(x)(*found) if hasattr(x, "_fields") else type(x)(found)
    return torch.from_numpy(x.get()) if hasattr(x, "get") else x


@pytest.mark.parametrize("b", SPANS, ids=str)
def test_arrays_on_a_gpu(cupy, b):
    """CuPy in, CuPy out; scores are exact in any order here, so every byte is what the CPU gives."""
    prev, cur = hidden_pair((*b.lead, 6), torch.float16)
    k, given, where = b.k("list"), travelling(b), b.arguments()
    p, c = there([prev, cur], cupy)
    got = va.drop_tokens(p, c, k, **where, **{name: there(x, cupy) for name, x in given.items()})
    assert isinstance(got.hidden, cupy.ndarray)
    want = va.drop_tokens(prev, cur, k, **where, **{name: to_numpy(x) for name, x in given.items()})
    same(want, here(got))
    for order in ORDERS:
        same(va.variation_topk(prev, cur, k, **where, order=order), here(va.variation_topk(p, c, k, **where, order=order)))
    same(va.segmented_topk(cur[..., 0], k, **where), here(va.segmented_topk(c[..., 0], k, **where)))
    same(va.variation_score(prev, cur, metric="l1"), here(va.variation_score(p, c, metric="l1")))
    if not b.packed:
        same(va.compact(want.keep, cur), here(va.compact(got.keep, c)))


def test_arrays_in_two_places(cupy):
    with pytest.raises(ValueError, match="h_prev must lie in the memory of a GPU as h_cur does, got an array in host memory"):
        va.drop_tokens(H, cupy.asarray(H), 2)


@pytest.mark.parametrize("dtype", [np.uint64, np.uint8, np.int64])
def test_compact_refuses_rows_beyond_the_last_of_any_dtype(dtype):
    """2**64 - 1 wrapped to -1, which is padding."""
    h = np.zeros((1, 5, 2), np.float32)
    assert va.compact(np.array([[4, 1]], dtype), h).hidden.shape == (1, 2, 2)
    for row in (np.iinfo(dtype).max, 5):
        with pytest.raises(ValueError, match="keep"):
            va.compact(np.array([[0, row]], dtype), h)


def test_masked_arrays_are_refused():
    """Their masks were ignored."""
    x = np.ma.masked_array(np.zeros((1, 4), np.float32), mask=[[0, 1, 0, 0]])
    with pytest.raises(TypeError, match="scores must be an array without a mask"):
        va.segmented_topk(x, 2)
    with pytest.raises(TypeError, match="hidden must be an array without a mask"):
        va.compact(np.array([[0]]), np.ma.zeros((1, 4, 2), np.float32))
