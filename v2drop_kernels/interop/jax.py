"""The ops for JAX arrays, under ``jit`` and ``grad``: custom calls of XLA (its FFI) to the same library, on CPUs and CUDA GPUs.

Names, arguments, results, order and ties are those of the torch functions, and so is every bit of a result on a CPU; torch need not
be installed. What shapes depend on (``k``, ``droppable``, ``cu_seqlens``) is static: Python ints, or NumPy arrays of them.
Row indices are int32, as those of ``jax.lax.top_k``. ``vmap`` calls the library once per element; a batch dimension costs less.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import numpy as np

try:
    import jax
    import jax.numpy as jnp
except ModuleNotFoundError as error:
    raise ImportError("v2drop_kernels.jax needs jax: pip install jax") from error
try:
    from .. import _xla  # type: ignore[attr-defined,unused-ignore]
except ImportError as error:
    raise ImportError(
        "v2drop_kernels.jax needs its native module, which is built where jax is installed: "
        f"pip install jax && pip install --no-build-isolation . in a checkout of v2drop_kernels ({error})"
    ) from error

from .. import native
from ..core.arguments import FLOATS, array_pair, dtype_in, hidden_array, host_cu_seqlens, is_packed, score_dims, score_shape
from ..core.calls import batch_shape, flatten
from ..core.counts import n_keep
from ..core.layout import TokenLayout
from ..core.packed import kept_max_seqlen
from ..core.plan import Plan
from ..core.types import Compacted, Dropped, GatherSpec, TopK
from . import arrays
from .arrays import code, rounding
from .docs import JAX, documented

__all__ = ["TokenLayout", "TopK", "Compacted", "Dropped", "compact", "drop_tokens", "n_keep", "segmented_topk", "variation_score",
           "variation_topk"]  # fmt: skip

for _name, _handler in _xla.cpu.items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")
for _name, _handler in _xla.gpu.items():
    jax.ffi.register_ffi_target(_name, _handler, platform="CUDA")


@documented(JAX)
def variation_score(h_prev: Any, h_cur: Any, *, metric: str = "l2", score_dtype: Any = None) -> Any:
    a, b = _read("h_prev", h_prev), _read("h_cur", h_cur)
    array_pair(a, b, None, FLOATS)
    return _score(code("metric", metric, native.METRICS), rounding(score_dtype), a, b)


@documented(JAX)
def segmented_topk(scores: Any, k: Any, *, cu_seqlens: Any = None, droppable: Any = None, order: str = "position") -> TopK:
    x = _read("scores", scores)
    score_dims(x, is_packed(droppable, cu_seqlens))
    dtype_in("scores", x, FLOATS)
    plan, _ = arrays.planned("topk", x, k, droppable, cu_seqlens)
    return TopK(*_topk(_Select(plan, code("order", order, native.ORDERS), 0, 0), (x,)))


@documented(JAX)
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
) -> TopK:
    a, b = _read("h_prev", h_prev), _read("h_cur", h_cur)
    array_pair(a, b, is_packed(droppable, cu_seqlens), FLOATS)
    options = code("order", order, native.ORDERS), code("metric", metric, native.METRICS), rounding(score_dtype)
    plan, _ = arrays.planned("topk", b, k, droppable, cu_seqlens)
    return TopK(*_topk(_Select(plan, *options), (a, b)))


@documented(JAX)
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
) -> Compacted:
    packed = cu_seqlens is not None
    h = _read("hidden", hidden)
    at = batch_shape("hidden", h, packed, _read)
    rows: Any = _read("keep", keep.indices if isinstance(keep, TopK) else keep)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"keep must be integers (or a TopK), got {rows.dtype.name}")
    if rows.ndim != (1 if packed else 2) or (not packed and rows.shape[0] != at.batch):
        raise ValueError(f"keep must be {'[T]' if packed else f'[{at.batch}, S]'}, got shape {list(rows.shape)}")
    most = min(at.rows, jnp.iinfo(rows.dtype).max)  # beyond the rows stays beyond them in int32, where 2**32 would be row 0
    bounded: Any = jnp.minimum(rows, most) if rows.dtype.kind == "u" else jnp.clip(rows, -1, most)
    rows = bounded.astype(jnp.int32)
    gathers, unflatten = flatten(
        at, hidden=h, position_ids=position_ids, kv=kv, kv_layout=kv_layout,
        attention_mask=attention_mask, rope=rope, labels=labels, read=_read, broadcast=jnp.broadcast_to,
    )  # fmt: skip
    cu: Any = None
    longest = None
    if packed:
        offsets = host_cu_seqlens(arrays.host_ints("cu_seqlens", cu_seqlens), at.rows)
        cu = ((rows >= 0) & (rows < jnp.array(offsets, jnp.int32)[:, None])).sum(1, dtype=jnp.int32)
        longest = kept_max_seqlen(rows.shape[0], offsets, traced=False)
    results = _gather(_Move.of(gathers, at.rows, at.batch or 1), rows, tuple(spec.tensor for spec in gathers))
    return Compacted(keep=cast(Any, rows), cu_seqlens=cast(Any, cu), max_seqlen=longest, **unflatten(list(results)))


@documented(JAX)
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
) -> Dropped:
    packed = is_packed(droppable, cu_seqlens)
    h = _read("h_cur", h_cur)
    if scores is None:
        before = _read("h_prev", h_prev)
        array_pair(before, h, packed, FLOATS)
        ranked: tuple[Any, ...] = before, h
    else:
        hidden_array("h_cur", h, packed, FLOATS)
        given = _read("scores", scores)
        dtype_in("scores", given, FLOATS)
        score_shape(given, h)
        ranked = (given,)
    options = code("metric", metric, native.METRICS), rounding(score_dtype)
    plan, found = arrays.planned("drop", h, k, droppable, cu_seqlens)
    gathers, unflatten = flatten(
        batch_shape("h_cur", h, packed, _read), hidden=h, position_ids=position_ids, kv=kv, kv_layout=kv_layout,
        attention_mask=attention_mask, rope=rope, labels=labels, read=_read, broadcast=jnp.broadcast_to,
    )  # fmt: skip
    move = _Move.of(gathers, plan.rows, plan.batch)
    keep, results = _drop(_Select(plan, 0, *options), move, ranked, tuple(spec.tensor for spec in gathers))
    keep = keep[0] if packed else keep
    fields = unflatten(list(results))
    if plan.ragged and not packed:
        fields.setdefault("attention_mask", keep >= 0)
    cu: Any = jnp.array(found.out_cu, jnp.int32) if packed else None
    return Dropped(keep=keep, cu_seqlens=cu, max_seqlen=found.max_seqlen, **fields)


class _Select(NamedTuple):
    """How a selection is made: the static arguments of a call."""

    plan: Plan
    order: int
    metric: int
    score_dtype: int

    def attributes(self, ranked: tuple[Any, ...]) -> dict[str, Any]:
        table = np.array(self.plan.flat_table(), np.int64)
        return _numbers(ranked=len(ranked), metric=self.metric, score_dtype=self.score_dtype) | {"segments": table}


class _Move(NamedTuple):
    """How arrays are gathered: their row and batch dimensions and the number of rows; the static arguments of a call."""

    batch_dims: tuple[int, ...]
    row_dims: tuple[int, ...]
    fills: tuple[int, ...]
    rows: int
    batch: int

    @classmethod
    def of(cls, gathers: list[GatherSpec], rows: int, batch: int) -> _Move:
        return cls(
            tuple(p.batch_dim for p in gathers), tuple(p.row_dim for p in gathers), tuple(p.fill for p in gathers), rows, batch
        )

    def attributes(self) -> dict[str, Any]:
        return {name: np.array(getattr(self, name), np.int64) for name in ("batch_dims", "row_dims", "fills")}

    def results(self, arrays: tuple[Any, ...], rows: int) -> list[jax.ShapeDtypeStruct]:
        """What the arrays are with another number of rows."""
        return [
            jax.ShapeDtypeStruct((*x.shape[:dim], rows, *x.shape[dim + 1 :]), x.dtype)
            for x, dim in zip(arrays, self.row_dims, strict=True)
        ]

    def of_gradients(self, which: list[int]) -> _Move:
        """The same for some of the tensors, with zeros in rows that were not kept."""
        batch_dims, row_dims = (tuple(dims[i] for i in which) for dims in (self.batch_dims, self.row_dims))
        return self._replace(batch_dims=batch_dims, row_dims=row_dims, fills=(0,) * len(which))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _score(metric: int, score_dtype: int, prev: Any, cur: Any) -> Any:
    scores = jax.ShapeDtypeStruct(prev.shape[:-1], jnp.float32)
    return _call("v2drop_variation_score", [scores], (0, 0, 0), prev, cur, **_numbers(metric=metric, score_dtype=score_dtype))[0]


def _score_forward(metric: int, score_dtype: int, prev: Any, cur: Any) -> Any:
    return _score(metric, score_dtype, prev, cur), (prev, cur)


def _score_backward(metric: int, score_dtype: int, saved: Any, grad: Any) -> Any:
    results = [jax.ShapeDtypeStruct(h.shape, h.dtype) for h in saved]
    return tuple(_call("v2drop_variation_score_backward", results, (0, 0, 0), grad, *saved, **_numbers(metric=metric)))


_score.defvjp(_score_forward, _score_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _topk(how: _Select, ranked: tuple[Any, ...]) -> Any:
    plan = how.plan
    shape = plan.groups, plan.out_rows
    values = jax.ShapeDtypeStruct(shape, ranked[0].dtype if len(ranked) == 1 else jnp.float32)
    scratch = plan.batch * plan.rows, plan.groups, plan.out_rows
    attributes = how.attributes(ranked) | _numbers(order=how.order)
    found, indices = _call("v2drop_topk", [values, _pairs_like(shape)], scratch, *ranked, **attributes)
    return found, indices[..., 0]


def _topk_forward(how: _Select, ranked: tuple[Any, ...]) -> Any:
    values, indices = _topk(how, ranked)
    return (values, indices), (indices, ranked)


def _topk_backward(how: _Select, saved: Any, grads: Any) -> Any:
    indices, ranked = saved
    lead = ranked[0].shape if len(ranked) == 1 else ranked[0].shape[:-1]
    entries = np.array(how.plan.column("src_start"), np.int64) // max(how.plan.rows, 1) * how.plan.rows
    total = int(np.prod(lead))
    rows = jnp.where(indices >= 0, indices + jnp.asarray(entries, jnp.int32)[:, None], total)
    grad = jnp.zeros(total, grads[0].dtype).at[rows].add(grads[0], mode="drop").reshape(lead)
    return ((grad,) if len(ranked) == 1 else _score_backward(how.metric, how.score_dtype, ranked, grad),)


_topk.defvjp(_topk_forward, _topk_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(move: _Move, keep: Any, arrays: tuple[Any, ...]) -> Any:
    results = move.results(arrays, keep.shape[-1])
    return tuple(_call("v2drop_compact", results, (0, 0, 0), _pairs(keep), *arrays, **move.attributes()))


def _gather_forward(move: _Move, keep: Any, arrays: tuple[Any, ...]) -> Any:
    return _gather(move, keep, arrays), keep


def _gather_backward(move: _Move, keep: Any, grads: Any) -> Any:
    """The gradients of what is given; integers have none."""
    which = [i for i, grad in enumerate(grads) if grad.dtype != jax.dtypes.float0]
    some = tuple(grads[i] for i in which)
    back = move.of_gradients(which)
    attributes = back.attributes() | _numbers(rows=move.rows)
    scratch = move.batch * move.rows, 0, 0
    found = _call("v2drop_compact_backward", back.results(some, move.rows), scratch, _pairs(keep), *some, **attributes)
    by_part = dict(zip(which, found, strict=True))
    return None, tuple(by_part.get(i) for i in range(len(grads)))


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _drop(how: _Select, move: _Move, ranked: tuple[Any, ...], arrays: tuple[Any, ...]) -> Any:
    plan = how.plan
    shape = plan.batch, plan.out_rows
    results = [_pairs_like(shape), *move.results(arrays, plan.out_rows)]
    attributes = how.attributes(ranked) | move.attributes()
    keep, *found = _call("v2drop_drop_tokens", results, (plan.batch * plan.rows, plan.groups, 0), *ranked, *arrays, **attributes)
    return keep[..., 0], tuple(found)


def _drop_forward(how: _Select, move: _Move, ranked: tuple[Any, ...], arrays: tuple[Any, ...]) -> Any:
    keep, found = _drop(how, move, ranked, arrays)
    return (keep, found), keep


def _drop_backward(how: _Select, move: _Move, keep: Any, grads: Any) -> Any:
    return None, _gather_backward(move, keep, grads[1])[1]


_drop.defvjp(_drop_forward, _drop_backward)


def _read(name: str, x: Any) -> Any:
    if not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    return jnp.asarray(x)


def _call(name: str, results: list[Any], scratch: tuple[int, int, int], *args: Any, **attributes: Any) -> list[Any]:
    """The results of a custom call; ``scratch`` (rows, segments, width) is what the size of a GPU's workspace depends on."""
    needed = _xla.workspace_bytes(*scratch) + 256  # room to align it
    call = jax.ffi.ffi_call(name, [*results, jax.ShapeDtypeStruct((needed,), jnp.uint8)], vmap_method="sequential")
    return list(call(*args, **attributes))[:-1]


def _numbers(**given: int) -> dict[str, Any]:
    return {name: np.int64(x) for name, x in given.items()}


def _pairs(rows: Any) -> Any:
    """int32 rows as the words of int64 ones, which JAX has only with ``jax_enable_x64``."""
    return jnp.stack([rows, rows >> 31], axis=-1)


def _pairs_like(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct((*shape, 2), jnp.int32)
