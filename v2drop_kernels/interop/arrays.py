"""What calls on NumPy and on JAX arrays share: argument checks, plans, and the list of arrays to gather.

No array library is imported here, torch least of all. The rules and the words are those of the torch functions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import native
from ..core.arguments import kind
from ..core.layout import TokenLayout
from ..core.plan import Plan, Resolved, resolve

_FLOATS = ("float32", "float16", "bfloat16")
# N are the rows, B the batch entries (none when packed); an extent of 1 at B of ids and tables stands for every entry.
_FORMS = {
    "position_ids": ("BN", "PBN"),
    "attention_mask": ("BN",),
    "rope": ("BNR", "NR", "PBNR"),
    "labels": ("BN",),
    "BHSD": ("BHND",),
    "BSHD": ("BNHD",),
}


class GatherSpec(NamedTuple):
    """One array to gather: rows lie along ``row_dim``, batch entries along ``batch_dim`` (-1: none)."""

    array: Any
    batch_dim: int
    row_dim: int
    fill: int


class BatchShape(NamedTuple):
    """The rows that every array of a call must agree on: ``rows`` per entry, ``batch`` entries (None when packed)."""

    batch: int | None
    rows: int
    of: str  # the argument that set them


def code(name: str, value: Any, codes: dict[str, int]) -> int:
    """The library's number of a word."""
    if not isinstance(value, str) or value not in codes:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, codes))}, got {value!r}")
    return codes[value]


def rounding(score_dtype: Any) -> int:
    """The library's number of ``score_dtype=``: None, a dtype, a scalar type or the name of one."""
    if score_dtype is None:
        return int(native.DTYPES["float32"])
    name = getattr(score_dtype, "name", getattr(score_dtype, "__name__", score_dtype))
    if name not in _FLOATS:
        raise TypeError(f"score_dtype must be None, float32, float16 or bfloat16, got {score_dtype}")
    return int(native.DTYPES[name])


def floats(name: str, x: Any) -> None:
    """Raise unless the library reads ``x`` as numbers."""
    if x.dtype.name not in _FLOATS:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype.name}")


def hidden(name: str, h: Any, packed: bool | None) -> None:
    """Raise unless ``h`` is ``[B, N, D]`` (``[T, D]`` when packed; either when None) of a served dtype."""
    floats(name, h)
    if h.ndim not in ((2, 3) if packed is None else (2,) if packed else (3,)):
        want = "[B, N, D] or [T, D]" if packed is None else "[T, D] because cu_seqlens is given" if packed else (
            "[B, N, D] (a packed [T, D] needs cu_seqlens)"
        )  # fmt: skip
        raise ValueError(f"{name} must be {want}, got shape {list(h.shape)}")


def pair(h_prev: Any, h_cur: Any, packed: bool | None) -> None:
    """Raise unless both hidden states agree."""
    hidden("h_cur", h_cur, packed)
    hidden("h_prev", h_prev, packed)
    if h_prev.shape != h_cur.shape:
        raise ValueError(f"h_prev must have the shape of h_cur {list(h_cur.shape)}, got {list(h_prev.shape)}")
    if h_prev.dtype != h_cur.dtype:
        raise TypeError(f"h_prev must have the dtype of h_cur {h_cur.dtype.name}, got {h_prev.dtype.name}")


def given_scores(scores: Any, h_cur: Any) -> None:
    """Raise unless ``scores`` has one float per row of ``h_cur``."""
    floats("scores", scores)
    if scores.shape != h_cur.shape[:-1]:
        raise ValueError(f"scores must have one value per row of h_cur {list(h_cur.shape[:-1])}, got {list(scores.shape)}")


def plain_scores(scores: Any, packed: bool) -> None:
    """Raise unless ``scores`` is ``[B, N]``, or ``[T]`` when packed."""
    if scores.ndim != (1 if packed else 2):
        want = "[T] because cu_seqlens is given" if packed else "[B, N] (a packed [T] needs cu_seqlens)"
        raise ValueError(f"scores must be {want}, got shape {list(scores.shape)}")
    floats("scores", scores)


def host_ints(name: str, x: Any) -> Any:
    """``x`` with Python ints in it, which NumPy's integers are not: shapes depend on them, so the host must know them."""
    try:
        x = x.tolist() if hasattr(x, "tolist") else x
        if isinstance(x, list | tuple):
            return [host_ints(name, y) for y in x]
        return x if x is None or isinstance(x, bool) else operator.index(x)  # a bool is refused further on
    except TypeError:
        raise TypeError(f"{name} must be ints that are known on the host, got {kind(x)}") from None


def planned(op: str, h: Any, k: Any, droppable: Any, cu_seqlens: Any) -> tuple[Plan, Resolved]:
    """The plan of ``op`` ("topk" or "drop") on ``h``, and what it says about the result."""
    if isinstance(droppable, TokenLayout):
        if droppable.mask is not None:
            raise TypeError("droppable must be spans or a TokenLayout of spans here, got a TokenLayout with a mask")
    elif "bool" in str(getattr(droppable, "dtype", "")):
        raise TypeError(f"droppable must be spans or a TokenLayout here, got a mask: {kind(droppable)}")
    else:
        droppable = host_ints("droppable", droppable)
    found = resolve(op, h, host_ints("k", k), droppable, host_ints("cu_seqlens", cu_seqlens), traced=False)
    assert isinstance(found.plan, Plan)  # a CuPlan needs offsets in a tensor
    return found.plan, found


def batch_shape(name: str, h: Any, packed: bool) -> BatchShape:
    """The rows that a call is about, from its hidden states."""
    if h.ndim < (1 if packed else 2):
        raise ValueError(f"{name} must be {'[T, ...]' if packed else '[B, N, ...]'}, got shape {list(h.shape)}")
    return BatchShape(None, h.shape[0], name) if packed else BatchShape(h.shape[0], h.shape[1], name)


def flatten(
    at: BatchShape, read: Callable[[str, Any], Any], broadcast: Callable[[Any, Any], Any], hidden: Any, kv_layout: str, **given: Any
) -> tuple[list[GatherSpec], Callable[[list[Any]], dict[str, Any]]]:
    """Check every given array against ``at``; return the parts and the function that puts the results in place.

    ``read`` makes an array of an argument, ``broadcast`` is the array library's ``broadcast_to``.
    """
    code("kv_layout", kv_layout, {"BHSD": 0, "BSHD": 1})
    parts = [_part("hidden", hidden, ("BN" + "D" * (hidden.ndim - (1 if at.batch is None else 2)),), at, broadcast)]

    def add(name: str, value: Any) -> int:
        array = read(name, value)
        if name == "attention_mask" and at.batch is None:
            raise ValueError(f"attention_mask must be None where cu_seqlens is given, got shape {list(array.shape)}")
        if name == "labels" and array.dtype.kind != "i":
            raise TypeError(f"labels must be signed integers (padding is filled with -100), got {array.dtype.name}")
        parts.append(_part(name, array, _FORMS[kv_layout if name == "kv" else name], at, broadcast))
        return len(parts) - 1

    where = {"hidden": 0} | {name: _place(name, value, add) for name, value in given.items() if value is not None}
    return parts, lambda results: {name: _put(spot, results) for name, spot in where.items()}


# Not closures that call themselves: such a cycle would keep all arrays of a call until the garbage collector comes.
def _place(name: str, value: Any, add: Callable[[str, Any], int]) -> Any:
    """The structure of an argument, with the numbers of its parts."""
    if isinstance(value, list | tuple):
        if name not in ("kv", "rope"):
            raise TypeError(f"{name} must be an array, got {type(value).__name__}")
        inner = [_place(name, v, add) for v in value]
        return inner if isinstance(value, list) else tuple(inner)
    return add(name, value)


def _put(spot: Any, results: list[Any]) -> Any:
    return results[spot] if isinstance(spot, int) else type(spot)([_put(s, results) for s in spot])


def _part(name: str, x: Any, forms: tuple[str, ...], at: BatchShape, broadcast: Callable[[Any, Any], Any]) -> GatherSpec:
    packed = at.batch is None
    choices = [form.replace("B", "") if packed else form for form in forms]
    form = next((form for form in choices if len(form) == x.ndim), None)
    if form is not None and not packed and name in ("position_ids", "rope"):
        if "B" not in form:
            form, x = "B" + form, x[None]
        if x.shape[form.index("B")] == 1:
            x = broadcast(x, [at.batch if dim == "B" else size for dim, size in zip(form, x.shape, strict=True)])
    if form is None or x.shape[form.index("N")] != at.rows or (not packed and x.shape[form.index("B")] != at.batch):
        want = " or ".join(f"[{', '.join(choice)}]" for choice in dict.fromkeys(choices))
        size = f"N = {at.rows}" if packed else f"B = {at.batch}, N = {at.rows}"
        raise ValueError(f"{name} must be {want} with {size} to agree with {at.of}, got {list(x.shape)}")
    return GatherSpec(x, form.find("B"), form.index("N"), -100 if name == "labels" else 0)
