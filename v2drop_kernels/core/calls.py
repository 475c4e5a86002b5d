"""From the arguments of a call to what a backend executes, and from its results to what the caller gets.

``resolve`` finds the plan, ``flatten`` the flat list of arrays to gather and the way back to the structure that they came in. Both
serve torch, NumPy and JAX alike: they read shapes, numbers of dimensions and names of dtypes only. The functions after them finish
the results of the torch ops; they import torch when they are called.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from . import arguments, overwrite, positions
from .arguments import check_offsets, host_cu_seqlens, is_packed, is_tensor, per_segment_k
from .cache import BoundedCache
from .droppable import as_layout
from .layout import TokenLayout
from .plan import CuPlan, Plan, drop_plan, topk_plan
from .types import Compacted, Dropped, GatherSpec

if TYPE_CHECKING:
    import torch


class Resolved(NamedTuple):
    """A plan, the droppable mask, the offsets if only the device has them, and what is known of the result of a drop.

    That is its offsets, its layout, whether some of its rows are padding, and the rows of its longest item where it is packed (an
    upper bound where the lengths are only on the device).
    """

    plan: Plan | CuPlan
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    out_cu: tuple[int, ...] | None
    after: TokenLayout | None
    ragged: bool = False
    max_seqlen: int | None = None


def resolve(op: str, h: torch.Tensor, k: Any, droppable: Any, cu_seqlens: Any, *, traced: bool) -> Resolved:
    """The plan of ``op`` ("topk" or "drop") on ``h`` (``[B, N, ...]`` or packed ``[T, ...]``).

    With ``traced``, sizes may be symbolic and tensors cannot be read, so nothing is cached or counted.
    """
    packed = is_packed(droppable, cu_seqlens)
    shape = h.shape
    everywhere_alike = not packed and shape[0] > 0 and (droppable is None or (op == "drop" and arguments.is_pair(droppable)))
    if everywhere_alike and arguments.is_int(k):
        if type(k) is not int or k < 0:
            arguments.require_int("k", k)
        batch, rows = shape[0], shape[1]
        start, stop = (0, rows) if droppable is None else droppable
        if droppable is not None:
            arguments.check_spans(0, ((start, stop),), 0, rows)
        return (_uniform if traced else _cached_uniform)(op, batch, rows, start, stop, k)
    if packed and is_tensor(cu_seqlens) and not isinstance(droppable, TokenLayout):
        check_offsets(cu_seqlens)
        if traced or cu_seqlens.device.type != "cpu":
            return _resolve_on_device(op, h, k, droppable, cu_seqlens)
    if packed and isinstance(droppable, TokenLayout) and (cu_seqlens is None or traced):
        cu = droppable.cu_seqlens
    else:
        cu = host_cu_seqlens(cu_seqlens, h.shape[0]) if packed else None
    if traced and is_tensor(droppable):
        raise ValueError("droppable as a mask needs its counts here: pass TokenLayout.from_mask(mask, counts)")
    layout = as_layout(droppable, h.shape[0], h.shape[0] if packed else h.shape[1], cu)
    ks, mask = per_segment_k(k, layout.groups), layout.mask
    if mask is not None:  # a plan needs its counts only, and a cache must keep no tensor of the caller's
        layout = dataclasses.replace(layout, mask=None)
    if op == "topk":
        plan = topk_plan(layout, ks) if traced else _cached_topk_plan(layout, ks)
        return Resolved(plan, mask, None, None, None)
    plan, out_cu, after, longest = (_drop_plan if traced else _cached_drop_plan)(layout, ks)
    shown = None if traced else after  # a layout is not a tensor, so a traced graph cannot return one
    if packed:
        return Resolved(plan, mask, None, out_cu, shown, max_seqlen=longest)
    return Resolved(plan, mask, None, None, shown, ragged=plan.ragged)


def _uniform(op: str, batch: int, rows: int, start: int, stop: int, k: int) -> Resolved:
    k = min(k, stop - start)
    out_rows = k if op == "topk" else rows - (stop - start) + k
    plan = Plan(batch, rows, out_rows, batch, (start, stop - start, rows - stop, k))
    return Resolved(plan, None, None, None, None)


@functools.lru_cache(maxsize=1024)
def _cached_uniform(op: str, batch: int, rows: int, start: int, stop: int, k: int) -> Resolved:
    found = _uniform(op, batch, rows, start, stop, k)
    if op == "topk":
        return found
    k = min(k, stop - start)
    out_rows = found.plan.out_rows
    return found._replace(after=TokenLayout((((start, start + k),),) * batch, out_rows, ((0, out_rows),) * batch))


def _weight(layout: TokenLayout, ks: tuple[int, ...]) -> int:
    return 32 + len(ks) + layout.batch


_cached_topk_plan = BoundedCache(topk_plan, _weight)


def _drop_plan(layout: TokenLayout, ks: tuple[int, ...]) -> tuple[Plan, tuple[int, ...], TokenLayout, int]:
    plan, out_cu, after = drop_plan(layout, ks)
    return plan, out_cu, after, after.max_seqlen


_cached_drop_plan = BoundedCache(_drop_plan, _weight)


def _resolve_on_device(op: str, h: torch.Tensor, k: Any, droppable: Any, cu_seqlens: torch.Tensor) -> Resolved:
    if droppable is not None:
        raise ValueError(
            "droppable with cu_seqlens on a device must be a layout: make TokenLayout.packed(spans, "
            "cu_seqlens) once, outside the step"
        )
    if cu_seqlens.device != h.device:
        raise ValueError(f"cu_seqlens must be on the device of h_cur ({h.device}), got {cu_seqlens.device}")
    ks = per_segment_k(k, cu_seqlens.shape[0] - 1)
    rows = h.shape[0]
    longest = min(max(ks, default=0), rows)
    if op == "topk":
        return Resolved(CuPlan(rows, ks, longest, False), None, cu_seqlens, None, None)
    return Resolved(CuPlan(rows, ks, min(sum(ks), rows), True), None, cu_seqlens, None, None, max_seqlen=longest)


# The dimensions of every argument: N are the rows, B the batch entries (none when packed), other letters are free. Hidden states
# may have any number of dimensions after B and N.
_FORMS = {
    "hidden": ("BN", *("BN" + "D" * n for n in range(1, 63))),
    "position_ids": ("BN", "PBN"),
    "attention_mask": ("BN",),
    "rope": ("BNR", "NR", "PBNR"),
    "labels": ("BN",),
    "extra": ("BN",),
    "BHSD": ("BHND",),
    "BSHD": ("BNHD",),
}
KV_LAYOUTS = ("BHSD", "BSHD")
_ONE_FOR_ALL = ("position_ids", "rope")  # an extent of 1 at B, or no B at all, stands for every batch entry


def _packed_form(form: str) -> str:
    return form.replace("B", "").replace("N", "T")


# Where an array of a form with so many dimensions has B (-1: nowhere) and N, or T when packed.
_DIMENSIONS = {
    (name, packed, len(form)): (form.find("B"), form.index("T" if packed else "N"))
    for name, forms in _FORMS.items()
    for packed in (False, True)
    for form in (map(_packed_form, forms) if packed else forms)
}


class BatchShape(NamedTuple):
    """What every array of a call must agree on.

    ``rows`` per batch entry, ``batch`` entries (None when packed), the ``device`` of torch tensors (None for other libraries, which
    check it when they read an array), and ``of``, the argument that these come from.
    """

    batch: int | None
    rows: int
    device: Any
    of: str


def batch_shape(name: str, hidden: Any, packed: bool, read: Callable[[str, Any], Any] | None = None) -> BatchShape:
    """The batch that a call is about, from its hidden states; ``read`` as in :func:`flatten`."""
    if read is None:
        arguments.tensor(name, hidden)
    if hidden.ndim < (1 if packed else 2):
        raise ValueError(f"{name} must be {'[T, ...]' if packed else '[B, N, ...]'}, got shape {list(hidden.shape)}")
    device = hidden.device if read is None else None
    if packed:
        return BatchShape(None, hidden.shape[0], device, name)
    return BatchShape(hidden.shape[0], hidden.shape[1], device, name)


def flatten(
    at: BatchShape,
    *,
    hidden: Any,
    position_ids: Any,
    kv: Any,
    kv_layout: str,
    attention_mask: Any,
    rope: Any,
    labels: Any,
    extra: Any = None,
    out: Compacted | Dropped | None = None,
    out_rows: int = 0,
    read: Callable[[str, Any], Any] | None = None,
    broadcast: Callable[[Any, Any], Any] | None = None,
) -> tuple[list[GatherSpec], Callable[[list[Any]], dict[str, Any]]]:
    """Check every given array against ``at``; return what to gather and the function that puts the results in place.

    ``extra`` is the droppable mask of a layout, which is gathered to describe the result. ``out`` is an earlier result whose
    tensors, of ``out_rows`` rows, are written again. Libraries other than torch give ``read``, which makes an array of an argument,
    and their ``broadcast_to``.
    """
    arguments.one_of("kv_layout", kv_layout, KV_LAYOUTS)
    gathers: list[GatherSpec] = []
    structures: dict[str, Any] = {}

    given = (
        ("hidden", hidden), ("position_ids", position_ids), ("kv", kv), ("attention_mask", attention_mask), ("rope", rope),
        ("labels", labels), ("extra", extra),
    )  # fmt: skip
    for name, value in given:
        if value is None:
            continue
        structures[name], leaves = flatten_leaves(name, value, read)
        specs = [_gather_spec(name, leaf, kv_layout, at, broadcast) for leaf in leaves]
        if out is not None and name != "extra":
            given_out = getattr(out, name)
            targets = (None, []) if given_out is None else flatten_leaves(f"out.{name}", given_out)
            specs = overwrite.into(name, targets, structures[name], specs, out_rows)
        gathers += specs

    def unflatten(results: list[Any]) -> dict[str, Any]:
        found = iter(results)
        return {name: _rebuild(structure, found) for name, structure in structures.items()}

    return gathers, unflatten


def settled_gathers(gathers: list[GatherSpec]) -> list[GatherSpec]:
    """The gathers of torch tensors, each :func:`arguments.settled`."""
    found = []
    for gather in gathers:
        settled = arguments.settled(gather.tensor)
        found.append(gather if settled is gather.tensor else gather._replace(tensor=settled))
    return found


def flatten_leaves(name: str, value: Any, read: Callable[[str, Any], Any] | None = None) -> tuple[Any, list[Any]]:
    """Nested lists and tuples of arrays to (structure, leaves); the structure of a leaf is None."""
    if isinstance(value, list | tuple):
        if name.removeprefix("out.") not in ("kv", "rope"):
            raise TypeError(f"{name} must be {'a tensor' if read is None else 'an array'}, got {type(value).__name__}")
        if hasattr(value, "_fields"):
            raise TypeError(f"{name} must be plain tuples or lists of tensors, got {type(value).__name__}")
        inner = [flatten_leaves(name, v, read) for v in value]
        return (type(value), [s for s, _ in inner]), [leaf for _, leaves in inner for leaf in leaves]
    if read is not None:
        return None, [read(name, value)]
    arguments.tensor(name, value)
    return None, [value]


def _rebuild(structure: Any, leaves: Iterator[Any]) -> Any:
    if structure is None:
        return next(leaves)
    kind, inner = structure
    built = [_rebuild(s, leaves) for s in inner]
    return built if kind is list else tuple(built)


def _gather_spec(name: str, x: Any, kv_layout: str, at: BatchShape, broadcast: Callable[[Any, Any], Any] | None) -> GatherSpec:
    """How ``x`` is gathered; raise unless its dtype, device and shape fit the batch."""
    packed = at.batch is None
    if at.device is not None:
        arguments.same_device(name, x, at.device, at.of)
    if name == "attention_mask" and packed:
        raise ValueError(f"attention_mask must be None where cu_seqlens is given, got shape {list(x.shape)}")
    if name == "labels" and not arguments.dtype_name(x.dtype).startswith("int"):
        raise TypeError(f"labels must be signed integers (padding is filled with -100), got {x.dtype}")
    form = kv_layout if name == "kv" else name
    dimensions = _DIMENSIONS.get((form, packed, x.ndim))
    if dimensions is None:
        raise _disagreement(name, form, x, at)
    batch_dim, row_dim = dimensions
    if not packed and name in _ONE_FOR_ALL:
        if batch_dim < 0:
            x, batch_dim, row_dim = x[None], 0, row_dim + 1
        if x.shape[batch_dim] == 1 != at.batch:
            shape = list(x.shape)
            shape[batch_dim] = at.batch
            x = x.expand(shape) if broadcast is None else broadcast(x, shape)
    shape = x.shape
    if shape[row_dim] != at.rows or (not packed and shape[batch_dim] != at.batch):
        raise _disagreement(name, form, x, at)
    return GatherSpec(x, batch_dim, row_dim, -100 if name == "labels" else 0)


def _disagreement(name: str, form: str, x: Any, at: BatchShape) -> ValueError:
    packed = at.batch is None
    forms = ("BN" + "D" * (x.ndim - (1 if packed else 2)),) if name == "hidden" else _FORMS[form]
    choices = dict.fromkeys(map(_packed_form, forms) if packed else forms)
    want = " or ".join(f"[{', '.join(choice)}]" for choice in choices)
    size = f"T = {at.rows}" if packed else f"B = {at.batch}, N = {at.rows}"
    hint = f" (kv_layout is {form!r}, where S = {'T' if packed else 'N'})" if name == "kv" else ""
    return ValueError(f"{name} must be {want} with {size} to agree with {at.of}, got {list(x.shape)}{hint}")


def input_positions(mode: str, position_ids: torch.Tensor | None, layout: TokenLayout | None, device: torch.device) -> Any:
    """The ids to gather: the given ones, the group ids of the layout, or none when they are numbered anew afterwards."""
    arguments.one_of("positions", mode, positions.MODES)
    if mode == "persistent":
        return position_ids
    if mode == "compacted":
        return None
    if layout is None:
        raise ValueError("positions 'group' needs droppable, to tell vision from text")
    return positions.like(positions.group_position_ids(layout, device), position_ids)


def build_result(
    kind: type[Compacted] | type[Dropped],
    keep: torch.Tensor,
    found: dict[str, Any],
    *,
    mode: str,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    after: TokenLayout | None = None,
    ragged: bool = False,
    max_seqlen: int | None = None,
) -> Any:
    """The public result: gathered tensors, new ids if requested, a mask if the result is ragged, the new layout."""
    if mode == "compacted":
        found["position_ids"] = positions.like(positions.compacted_position_ids(keep, cu_seqlens), position_ids)
    if ragged and cu_seqlens is None and "attention_mask" not in found:
        found["attention_mask"] = keep >= 0
    mask = found.pop("extra", None)
    if mask is not None and after is not None:
        after = dataclasses.replace(after, mask=mask)
    return kind(keep=keep, cu_seqlens=cu_seqlens, layout=after, max_seqlen=max_seqlen, **found)
