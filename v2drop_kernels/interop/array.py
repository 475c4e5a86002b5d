"""The ops for NumPy arrays, and for any array that NumPy or CuPy reads without a copy; torch need not be installed.

An argument is an array with ``__array_interface__``, ``__dlpack__`` or ``__cuda_array_interface__``. Results are NumPy arrays;
for arguments in GPU memory they are CuPy arrays, and the work is enqueued on CuPy's current stream.
Names, arguments, results, order and ties are those of the torch functions, and so is every bit of a result on a CPU.
bfloat16 is what the package ml_dtypes registers. There are no gradients here: see v2drop_kernels.jax for those.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import native
from ..core.arguments import FLOATS, array_pair, dtype_in, hidden_array, host_cu_seqlens, is_packed, kind, score_dims, score_shape
from ..core.cache import BoundedCache
from ..core.calls import batch_shape, flatten
from ..core.counts import n_keep
from ..core.layout import TokenLayout
from ..core.packed import kept_max_seqlen
from ..core.plan import Plan
from ..core.types import Compacted, Dropped, GatherSpec, TopK
from . import arrays
from .arrays import code, rounding
from .docs import NUMPY, documented

__all__ = ["TokenLayout", "TopK", "Compacted", "Dropped", "compact", "drop_tokens", "n_keep", "segmented_topk", "variation_score",
           "variation_topk"]  # fmt: skip

_SIZES = (1, 2, 4, 8, 16)  # bytes of an element; the library moves any dtype, and goes by its size
_ON_CUDA = 2  # DLPack's kDLCUDA


@documented(NUMPY)
def variation_score(h_prev: Any, h_cur: Any, *, metric: str = "l2", score_dtype: Any = None, threads: int = 0) -> Any:
    call = _Call(threads)
    a, b = call.read("h_prev", h_prev), call.read("h_cur", h_cur)
    array_pair(a, b, None, FLOATS)
    options = code("metric", metric, native.METRICS), rounding(score_dtype)
    scores = call.empty(b.shape[:-1], np.float32)
    source = None, call.numbers(a), call.numbers(b), None, *options
    call("variation_score", source, call.view(scores), scratch=(scores.size, 0, 0))
    return scores


@documented(NUMPY)
def segmented_topk(
    scores: Any, k: Any, *, cu_seqlens: Any = None, droppable: Any = None, order: str = "position", threads: int = 0
) -> TopK:
    call = _Call(threads)
    x = call.read("scores", scores)
    score_dims(x, is_packed(droppable, cu_seqlens))
    dtype_in("scores", x, FLOATS)
    source = call.numbers(x, unit_stride=False), None, None, None, 0, 0
    return call.topk(x, source, x.dtype, k, droppable, cu_seqlens, code("order", order, native.ORDERS))


@documented(NUMPY)
def variation_topk(
    h_prev: Any,
    h_cur: Any,
    k: Any,
    *,
    metric: str = "l2",
    cu_seqlens: Any = None,
    droppable: Any = None,
    order: str = "position",
    score_dtype: Any = None,
    threads: int = 0,
) -> TopK:
    call = _Call(threads)
    a, b = call.read("h_prev", h_prev), call.read("h_cur", h_cur)
    array_pair(a, b, is_packed(droppable, cu_seqlens), FLOATS)
    by = code("order", order, native.ORDERS)
    source = None, call.numbers(a), call.numbers(b), None, code("metric", metric, native.METRICS), rounding(score_dtype)
    return call.topk(b, source, np.float32, k, droppable, cu_seqlens, by)


@documented(NUMPY)
def compact(
    keep: Any,
    hidden: Any,
    *,
    position_ids: Any = None,
    kv: Any = None,
    kv_layout: str = "BHSD",
    attention_mask: Any = None,
    rope: Any = None,
    labels: Any = None,
    cu_seqlens: Any = None,
    threads: int = 0,
) -> Compacted:
    call = _Call(threads)
    packed = cu_seqlens is not None
    h = call.read("hidden", hidden)
    at = batch_shape("hidden", h, packed, call.read)
    rows = call.read("keep", keep.indices if isinstance(keep, TopK) else keep)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"keep must be integers (or a TopK), got {rows.dtype.name}")
    if rows.ndim != (1 if packed else 2) or (not packed and rows.shape[0] != at.batch):
        raise ValueError(f"keep must be {'[T]' if packed else f'[{at.batch}, S]'}, got shape {list(rows.shape)}")
    if rows.dtype.kind == "u":  # beyond the rows stays beyond them in a signed dtype, where 2**64 - 1 would be padding
        rows = call.xp.minimum(rows, rows.dtype.type(min(at.rows, np.iinfo(rows.dtype).max)))
    rows = call.xp.ascontiguousarray(rows, dtype=np.int64)
    gathers, unflatten = flatten(
        at, hidden=h, position_ids=position_ids, kv=kv, kv_layout=kv_layout,
        attention_mask=attention_mask, rope=rope, labels=labels, read=call.read, broadcast=call.broadcast,
    )  # fmt: skip
    cu = longest = None
    if packed:
        offsets = host_cu_seqlens(arrays.host_ints("cu_seqlens", cu_seqlens), at.rows)
        cu = ((rows >= 0) & (rows < call.array(offsets, np.int64)[:, None])).sum(1).astype(np.int32)
        longest = kept_max_seqlen(rows.shape[0], offsets, traced=False)
    results, described = call.outputs(gathers, rows.shape[-1])
    call("compact", call.view(rows), described, scratch=((at.batch or 1) * at.rows, 0, 0))
    return Compacted(keep=rows, cu_seqlens=cu, max_seqlen=longest, **unflatten(results))


@documented(NUMPY)
def drop_tokens(
    h_prev: Any,
    h_cur: Any,
    k: Any,
    *,
    droppable: Any = None,
    scores: Any = None,
    position_ids: Any = None,
    kv: Any = None,
    kv_layout: str = "BHSD",
    attention_mask: Any = None,
    rope: Any = None,
    labels: Any = None,
    cu_seqlens: Any = None,
    metric: str = "l2",
    score_dtype: Any = None,
    threads: int = 0,
) -> Dropped:
    call = _Call(threads)
    packed = is_packed(droppable, cu_seqlens)
    h = call.read("h_cur", h_cur)
    ranked: tuple[Any, ...]
    if scores is None:
        before = call.read("h_prev", h_prev)
        array_pair(before, h, packed, FLOATS)
        ranked = None, call.numbers(before), call.numbers(h)
    else:
        hidden_array("h_cur", h, packed, FLOATS)
        given = call.read("scores", scores)
        dtype_in("scores", given, FLOATS)
        score_shape(given, h)
        ranked = call.numbers(given, unit_stride=False), None, None
    options = code("metric", metric, native.METRICS), rounding(score_dtype)
    plan, found = arrays.planned("drop", h, k, droppable, cu_seqlens)
    gathers, unflatten = flatten(
        batch_shape("h_cur", h, packed, call.read), hidden=h, position_ids=position_ids, kv=kv, kv_layout=kv_layout,
        attention_mask=attention_mask, rope=rope, labels=labels, read=call.read, broadcast=call.broadcast,
    )  # fmt: skip
    keep = call.empty((plan.out_rows,) if packed else (plan.batch, plan.out_rows), np.int64)
    results, described = call.outputs(gathers, plan.out_rows)
    scratch = plan.batch * plan.rows, plan.groups, 0
    source = *ranked, None, *options
    call("drop_tokens", source, call.segments(plan), None, call.view(keep), None, described, scratch=scratch)
    fields = unflatten(results)
    if plan.ragged and not packed:
        fields.setdefault("attention_mask", keep >= 0)
    cu = call.array(found.out_cu, np.int32) if packed else None
    return Dropped(keep=keep, cu_seqlens=cu, layout=found.after, max_seqlen=found.max_seqlen, **fields)


class _Call:
    """One call: whether its arrays are in host or in GPU memory, and how the library is called for them."""

    def __init__(self, threads: int) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
            raise (ValueError if isinstance(threads, int) else TypeError)(f"threads must be an int >= 0, got {kind(threads)}")
        self.threads = threads
        self.first = ""  # the argument that decides where the arrays must be
        self.on_gpu = False
        self.alive: list[Any] = []  # arrays whose addresses the library gets

    @property
    def xp(self) -> Any:
        """NumPy or CuPy."""
        return _cupy() if self.on_gpu else np

    def read(self, name: str, x: Any) -> Any:
        """``x`` as an array of NumPy or CuPy, without a copy."""
        array = x if type(x) is np.ndarray else _from_protocol(name, x)
        on_gpu = hasattr(array, "__cuda_array_interface__")
        if not self.first:
            self.first, self.on_gpu = name, on_gpu
        if on_gpu != self.on_gpu:
            places = "in host memory", "in the memory of a GPU"
            raise ValueError(f"{name} must lie {places[self.on_gpu]} as {self.first} does, got an array {places[on_gpu]}")
        here: Any = self.xp.cuda.Device() if on_gpu else None
        if on_gpu and array.device != here:
            raise ValueError(f"{name} must lie on CuPy's current device {here.id}, got {array.device}")
        dtype = array.dtype
        if dtype.hasobject or not dtype.isnative or dtype.itemsize not in _SIZES:
            raise TypeError(f"{name} must have a plain dtype of 1, 2, 4, 8 or 16 bytes in native order, got {dtype}")
        return array

    def numbers(self, x: Any, *, unit_stride: bool = True) -> Any:
        """The description of an array that the library reads as numbers; of a copy if it is not aligned or contiguous enough."""
        if _address(x) % x.itemsize or (unit_stride and x.shape[-1] > 1 and x.strides[-1] != x.itemsize):
            x = x.copy(order="C")
        return self.view(x)

    def view(self, x: Any) -> Any:
        """The description of an array: address, dtype, shape, strides in elements."""
        item = x.itemsize
        if any(stride % item for stride in x.strides):
            x = x.copy(order="C")
        self.alive.append(x)
        # NumPy gives an empty array any strides, such as 0 for a last dimension that the library requires to be contiguous.
        strides = tuple(stride // item for stride in x.strides) if x.size else (1,) * x.ndim
        return _address(x), _dtype_code(x.dtype), x.shape, strides

    def empty(self, shape: Any, dtype: Any) -> Any:
        x = self.xp.empty(shape, dtype=dtype)
        if not self.on_gpu and x.nbytes >= native.HUGE_BYTES:
            _library().prefer_huge_pages(_address(x), x.nbytes)
        return x

    def array(self, numbers: Any, dtype: Any) -> Any:
        return self.xp.asarray(numbers, dtype=dtype)

    def broadcast(self, x: Any, shape: Any) -> Any:
        return self.xp.broadcast_to(x, shape)

    def outputs(self, gathers: list[GatherSpec], rows: int) -> tuple[list[Any], list[Any]]:
        """The results with ``rows`` rows, and the descriptions of the tensors that fill them."""
        results, described = [], []
        for x, batch_dim, row_dim, fill, _ in gathers:
            result = self.empty((*x.shape[:row_dim], rows, *x.shape[row_dim + 1 :]), x.dtype)
            results.append(result)
            described.append((self.view(x), self.view(result), batch_dim, row_dim, fill))
        return results, described

    def segments(self, plan: Plan) -> tuple[int, int]:
        table = _table(plan)
        self.alive.append(table)
        return _address(table), plan.groups

    def topk(self, h: Any, source: tuple[Any, ...], dtype: Any, k: Any, droppable: Any, cu_seqlens: Any, order: int) -> TopK:
        plan, _ = arrays.planned("topk", h, k, droppable, cu_seqlens)
        shape = plan.groups, plan.out_rows
        values, indices = self.empty(shape, dtype), self.empty(shape, np.int64)
        results = self.view(values), self.view(indices)
        width = plan.out_rows if order == native.ORDERS["score"] else 0
        scratch = plan.batch * plan.rows, plan.groups, width
        self("topk", source, self.segments(plan), None, order, *results, scratch=scratch)
        return TopK(values, indices)

    def __call__(self, name: str, *args: Any, scratch: tuple[int, int, int]) -> None:
        """Call the library; ``scratch`` (rows, segments, width) is what the size of a GPU's workspace depends on."""
        library = _library()
        if not self.on_gpu:
            getattr(library, name)(*args, native.cpu_context(self.threads))
            return
        workspace = self.xp.empty(library.workspace_bytes(*scratch), dtype=np.uint8)
        stream = self.xp.cuda.get_current_stream().ptr
        getattr(library, name)(*args, native.cuda_context(stream, _address(workspace), workspace.nbytes))


def _from_protocol(name: str, x: Any) -> Any:
    """An array of another library as one of NumPy or CuPy that shares its memory."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, got a MaskedArray: give x.filled(value)")
    try:
        if hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] == _ON_CUDA:
            # Not torch's __cuda_array_interface__, which has no word for bfloat16.
            return x if isinstance(x, _cupy().ndarray) else _cupy().from_dlpack(x)
        if hasattr(x, "__cuda_array_interface__"):
            return _cupy().asarray(x)
        if hasattr(x, "__array_interface__"):
            return np.asarray(x)
        if hasattr(x, "__array__"):  # also where DLPack has no word for the dtype
            return np.asarray(x)
        if hasattr(x, "__dlpack__"):
            return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read as an array: {error}") from error
    raise TypeError(f"{name} must be an array, got {type(x).__name__}")


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError("arrays in the memory of a GPU need CuPy: pip install cupy-cuda12x or cupy-cuda13x") from error
    return cupy


def _dtype_code(dtype: Any) -> int:
    codes = native.DTYPES
    return int(codes[dtype.name] if dtype.name in codes else codes[f"bits{8 * dtype.itemsize}"])


def _address(x: Any) -> int:
    interface = getattr(x, "__cuda_array_interface__", None) or x.__array_interface__
    return int(interface["data"][0])


def _made_table(plan: Plan) -> Any:
    return np.array(plan.flat_table(), np.int64)


_table = BoundedCache(_made_table, lambda plan: 32 + plan.groups)


def _library() -> Any:
    module, reason = native.load_library()
    if module is None:
        raise RuntimeError(f"v2drop_kernels.array needs the native library, which is {reason}")
    return module
