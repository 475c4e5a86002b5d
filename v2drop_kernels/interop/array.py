"""The ops for NumPy arrays, and for any array that NumPy or CuPy reads without a copy; torch need not be installed.

An argument is an array with ``__array_interface__``, ``__dlpack__`` or ``__cuda_array_interface__``. Results are NumPy arrays;
where the arguments lie in the memory of a GPU they are CuPy arrays, and the work is enqueued on CuPy's current stream.
Names, arguments, results, order and ties are those of the torch functions, and so is every bit of a result on a CPU.
bfloat16 is what the package ml_dtypes registers. There are no gradients here: see v2drop_kernels.jax for those.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .. import native
from ..core.arguments import host_cu_seqlens, kind
from ..core.layout import TokenLayout, is_packed, n_keep
from ..core.plan import Plan
from ..core.types import Compacted, Dropped, TopK
from . import arrays
from .arrays import GatherSpec, code, rounding

__all__ = ["TokenLayout", "TopK", "Compacted", "Dropped", "compact", "drop_tokens", "n_keep", "segmented_topk", "variation_score",
           "variation_topk"]  # fmt: skip

_SIZES = (1, 2, 4, 8, 16)  # bytes of an element; the library moves any dtype, and goes by its size
_ON_CUDA = 2  # DLPack's kDLCUDA


def variation_score(h_prev: Any, h_cur: Any, *, metric: str = "l2", score_dtype: Any = None, threads: int = 0) -> Any:
    """Score every token by the change that one decoder layer made to it.

    Parameters
    ----------
    h_prev, h_cur : array
        Hidden states before and after the layer, ``[B, N, D]`` or packed ``[T, D]``; float32, float16 or bfloat16. Any
        strides; where the last dimension is not contiguous they are copied once.
    metric : {"l2", "l1", "cosine"}
        The norm of ``h_cur - h_prev``, or ``1 - cos(h_prev, h_cur)``.
    score_dtype : dtype, optional
        Round the difference and the score to this dtype (also by its name); default: float32 throughout.
    threads : int
        CPU threads that the call may use; 0 means all. It changes no result.

    Returns
    -------
    array
        float32 ``[B, N]`` or ``[T]``.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that differ; an unknown metric; the message names the argument.
    RuntimeError
        The native library is not built, or built without CUDA and the arrays lie on a GPU.

    Notes
    -----
    Sums are float32. Equivalent plain NumPy: ``np.linalg.norm(h_cur.astype("f4") - h_prev.astype("f4"), axis=-1)``.

    Examples
    --------
    >>> variation_score(np.zeros((1, 2, 4), np.float32), np.ones((1, 2, 4), np.float32))
    array([[2., 2.]], dtype=float32)
    """
    call = _Call(threads)
    a, b = call.read("h_prev", h_prev), call.read("h_cur", h_cur)
    arrays.pair(a, b, None)
    options = code("metric", metric, native.METRICS), rounding(score_dtype)
    scores = call.empty(b.shape[:-1], np.float32)
    source = None, call.numbers(a), call.numbers(b), None, *options
    call("variation_score", source, call.view(scores), scratch=(scores.size, 0, 0))
    return scores


def segmented_topk(
    scores: Any, k: Any, *, cu_seqlens: Any = None, droppable: Any = None, order: str = "position", threads: int = 0
) -> TopK:
    """Keep the k highest scores of every segment.

    Parameters
    ----------
    scores : array
        ``[B, N]``, or packed ``[T]`` with ``cu_seqlens``; float32, float16 or bfloat16.
    k : int | list of int | integer array
        Tokens to keep, for all segments alike or one count per segment; 0 is allowed, more than a segment has keeps it whole.
    cu_seqlens : sequence of int | integer array, optional
        ``[B + 1]`` offsets of a packed batch. They are read on the host: an array on a GPU is copied first.
    droppable : optional
        Which tokens compete: None for all, one ``(start, stop)`` for every item, a list with the spans of each item (every
        span is a segment), or a :class:`TokenLayout` of spans.
    order : {"position", "score"}
        Indices ascend, or follow the score.
    threads : int
        As in :func:`variation_score`.

    Returns
    -------
    TopK
        ``values`` and int64 ``indices`` ``[G, K]``, one row per segment: positions along ``N`` (padded) or rows of ``T``
        (packed). A segment that keeps fewer than ``K`` is filled at its end with value -inf and index -1.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As in :func:`variation_score`; spans, offsets or counts that cannot be.

    Notes
    -----
    The order is (score descending, index ascending): NaN ranks above +inf, -0.0 equals 0.0. Equivalent plain NumPy for
    one budget and no NaN: ``np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :k])``.

    Examples
    --------
    >>> segmented_topk(np.array([[1, 3, 2]], np.float32), 2).indices
    array([[1, 2]])
    """
    call = _Call(threads)
    x = call.read("scores", scores)
    arrays.plain_scores(x, is_packed(droppable, cu_seqlens))
    source = call.numbers(x, unit_stride=False), None, None, None, 0, 0
    return call.topk(x, source, x.dtype, k, droppable, cu_seqlens, code("order", order, native.ORDERS))


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
    """Keep the k tokens of every segment that one decoder layer changed most; score and select in one call.

    Parameters
    ----------
    h_prev, h_cur, metric, score_dtype, threads
        As in :func:`variation_score`.
    k, cu_seqlens, droppable, order
        As in :func:`segmented_topk`.

    Returns
    -------
    TopK
        As :func:`segmented_topk`; values are float32.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As both.

    Notes
    -----
    Equivalent: ``segmented_topk(variation_score(h_prev, h_cur), k)``.

    Examples
    --------
    >>> h = np.zeros((1, 3, 4), np.float32)
    >>> variation_topk(h, h + np.array([[[1], [3], [2]]], np.float32), 2)
    TopK(values=array([[6., 4.]], dtype=float32), indices=array([[1, 2]]))
    """
    call = _Call(threads)
    a, b = call.read("h_prev", h_prev), call.read("h_cur", h_cur)
    arrays.pair(a, b, is_packed(droppable, cu_seqlens))
    by = code("order", order, native.ORDERS)
    source = None, call.numbers(a), call.numbers(b), None, code("metric", metric, native.METRICS), rounding(score_dtype)
    return call.topk(b, source, np.float32, k, droppable, cu_seqlens, by)


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
    """Gather the kept rows of everything that belongs to a batch, in one pass.

    Parameters
    ----------
    keep : integer array | TopK
        Rows that survive: ``[B, S]`` positions along ``N``, or ``[T']`` rows of ``T`` for a packed batch; -1 is an empty row
        (padding). Any order; each row at most once.
    hidden : array
        ``[B, N, ...]``, or packed ``[T, ...]`` with ``cu_seqlens``; any dtype.
    position_ids : array, optional
        ``[B, N]``, ``[1, N]`` or M-RoPE's ``[3, B, N]`` (packed ``[T]`` or ``[3, T]``).
    kv : array or nested tuples/lists, optional
        K and V of any number of layers, ``[B, H, N, D]`` or ``[B, N, H, D]`` (packed without ``B``); any dtype.
    kv_layout : {"BHSD", "BSHD"}
    attention_mask : array, optional
        ``[B, N]``, any dtype. Padding of the result is 0.
    rope : tuple of array, optional
        (cos, sin) tables ``[B, N, R]``, ``[1, N, R]``, ``[N, R]`` or ``[3, B, N, R]``.
    labels : array, optional
        ``[B, N]`` signed integers. Padding of the result is -100.
    cu_seqlens
        As in :func:`segmented_topk`.
    threads : int
        As in :func:`variation_score`.

    Returns
    -------
    Compacted

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As in :func:`variation_score`; a row of ``keep`` outside the input (on a GPU it gives an empty row).

    Notes
    -----
    Bytes are copied, never interpreted. Equivalent plain NumPy: ``np.take_along_axis(hidden, keep[..., None], axis=1)``.

    Examples
    --------
    >>> compact(np.array([[0, 2]]), np.arange(6.0).reshape(1, 3, 2)).hidden
    array([[[0., 1.],
            [4., 5.]]])
    """
    call = _Call(threads)
    packed = cu_seqlens is not None
    h = call.read("hidden", hidden)
    at = arrays.batch_shape("hidden", h, packed)
    rows = call.read("keep", keep.indices if isinstance(keep, TopK) else keep)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"keep must be integers (or a TopK), got {rows.dtype.name}")
    if rows.ndim != (1 if packed else 2) or (not packed and rows.shape[0] != at.batch):
        raise ValueError(f"keep must be {'[T]' if packed else f'[{at.batch}, S]'}, got shape {list(rows.shape)}")
    rows = call.xp.ascontiguousarray(rows, dtype=np.int64)
    parts, unflatten = arrays.flatten(
        at, call.read, call.broadcast, h, kv_layout, position_ids=position_ids, kv=kv, attention_mask=attention_mask,
        rope=rope, labels=labels,
    )  # fmt: skip
    cu = None
    if packed:
        old = call.array(host_cu_seqlens(arrays.host_ints("cu_seqlens", cu_seqlens), at.rows), np.int64)
        cu = ((rows >= 0) & (rows < old[:, None])).sum(1).astype(np.int32)
    results, described = call.outputs(parts, rows.shape[-1])
    call("compact", call.view(rows), described, scratch=((at.batch or 1) * at.rows, 0, 0))
    return Compacted(keep=rows, cu_seqlens=cu, **unflatten(results))


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
    """Drop all but the k droppable tokens of every segment that the last layer changed most, and compact the rest.

    Parameters
    ----------
    h_prev, h_cur : array
        Hidden states before and after the layer, ``[B, N, D]`` or packed ``[T, D]``; ``h_cur`` is what goes on.
    k, droppable, cu_seqlens
        As in :func:`segmented_topk`; tokens that are not droppable (text, system prompt) are all kept.
    scores : array, optional
        float ``[B, N]`` (packed ``[T]``): rank by these instead; ``h_prev`` may then be None.
    position_ids, kv, kv_layout, attention_mask, rope, labels
        As in :func:`compact`; kept tokens keep their position ids.
    metric, score_dtype, threads
        As in :func:`variation_score`.

    Returns
    -------
    Dropped
        ``hidden`` ``[B, S, D]``, ``keep`` ``[B, S]`` (input rows, ascending, -1 for padding), everything else that was
        given, and ``layout``, the ``droppable=`` of the next stage.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As in :func:`variation_score`; arrays that do not agree, spans or counts that cannot be.

    Notes
    -----
    Order and ties are those of :func:`segmented_topk`. Equivalent plain NumPy for one item and one span ``[a, b)``:
    ``s = np.linalg.norm(h_cur[0, a:b] - h_prev[0, a:b], axis=-1)``, ``i = a + np.sort(np.argsort(-s, kind="stable")[:k])``,
    ``keep = np.r_[:a, i, b:N]``, ``h_cur[:, keep]`` and the same for every other array.

    Examples
    --------
    >>> h = np.zeros((1, 5, 4), np.float32)
    >>> grown = h + np.array([0, 1, 3, 2, 0], np.float32)[None, :, None]
    >>> drop_tokens(h, grown, 2, droppable=(1, 4)).keep
    array([[0, 2, 3, 4]])
    """
    call = _Call(threads)
    packed = is_packed(droppable, cu_seqlens)
    h = call.read("h_cur", h_cur)
    ranked: tuple[Any, ...]
    if scores is None:
        before = call.read("h_prev", h_prev)
        arrays.pair(before, h, packed)
        ranked = None, call.numbers(before), call.numbers(h)
    else:
        arrays.hidden("h_cur", h, packed)
        given = call.read("scores", scores)
        arrays.given_scores(given, h)
        ranked = call.numbers(given, unit_stride=False), None, None
    options = code("metric", metric, native.METRICS), rounding(score_dtype)
    plan, found = arrays.planned("drop", h, k, droppable, cu_seqlens)
    parts, unflatten = arrays.flatten(
        arrays.batch_shape("h_cur", h, packed), call.read, call.broadcast, h, kv_layout, position_ids=position_ids, kv=kv,
        attention_mask=attention_mask, rope=rope, labels=labels,
    )  # fmt: skip
    keep = call.empty((plan.out_rows,) if packed else (plan.batch, plan.out_rows), np.int64)
    results, described = call.outputs(parts, plan.out_rows)
    scratch = plan.batch * plan.rows, plan.groups, 0
    source = *ranked, None, *options
    call("drop_tokens", source, call.segments(plan), None, call.view(keep), None, described, scratch=scratch)
    fields = unflatten(results)
    if plan.ragged and not packed:
        fields.setdefault("attention_mask", keep >= 0)
    cu = call.array(found.out_cu, np.int32) if packed else None
    return Dropped(keep=keep, cu_seqlens=cu, layout=found.after, **fields)


class _Call:
    """One call: where its arrays lie, and how the library is called there."""

    def __init__(self, threads: int) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
            raise (ValueError if isinstance(threads, int) else TypeError)(f"threads must be an int >= 0, got {kind(threads)}")
        self.threads = threads
        self.first = ""  # the argument that says where the arrays lie
        self.on_gpu = False
        self.alive: list[Any] = []  # what the library is told about

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
        """The description of an array that the library reads as numbers; of a copy if it lies in a way that cannot be read."""
        if _address(x) % x.itemsize or (unit_stride and x.shape[-1] > 1 and x.strides[-1] != x.itemsize):
            x = x.copy(order="C")
        return self.view(x)

    def view(self, x: Any) -> Any:
        """The description of an array: address, dtype, shape, strides in elements."""
        item = x.itemsize
        if any(stride % item for stride in x.strides):
            x = x.copy(order="C")
        self.alive.append(x)
        # NumPy gives an empty array any strides, such as 0 for a last dimension that the library wants contiguous.
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

    def outputs(self, parts: list[GatherSpec], rows: int) -> tuple[list[Any], list[Any]]:
        """The results with ``rows`` rows, and the descriptions of the parts that fill them."""
        results, described = [], []
        for x, batch_dim, row_dim, fill in parts:
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


@functools.lru_cache(maxsize=1024)
def _table(plan: Plan) -> Any:
    return np.array(plan.flat_table(), np.int64)


def _library() -> Any:
    module, reason = native.load_library()
    if module is None:
        raise RuntimeError(f"v2drop_kernels.array needs the native library, which is {reason}")
    return module
