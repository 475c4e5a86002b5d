"""From keyword arguments to a flat list of tensors to compact, and back to the structure that they came in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import arguments, positions
from .arguments import check_offsets, host_cu_seqlens
from .layout import TokenLayout
from .plan import offsets_on
from .types import Compacted, Dropped, GatherSpec

KV_LAYOUTS = ("BHSD", "BSHD")


class BatchShape(NamedTuple):
    """The rows that every tensor of a call must agree on: ``rows`` per entry, ``batch`` entries (None when packed)."""

    batch: int | None
    rows: int
    device: torch.device
    of: str  # the argument that set them

    def describe(self) -> str:
        return f"[T = {self.rows}]" if self.batch is None else f"[B = {self.batch}, N = {self.rows}]"


def flatten(
    at: BatchShape,
    *,
    hidden: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    kv: Any,
    kv_layout: str,
    attention_mask: torch.Tensor | None,
    rope: Any,
    labels: torch.Tensor | None,
    extra: torch.Tensor | None = None,
    out: Compacted | Dropped | None = None,
    out_rows: int = 0,
) -> tuple[list[GatherSpec], Callable[[list[torch.Tensor]], dict[str, Any]]]:
    """Check every given tensor against ``at``; return the parts and the function that puts the results in place.

    ``extra`` is the droppable mask of a layout, which travels along to describe the result. ``out`` is an earlier result whose
    tensors, of ``out_rows`` rows, are written again.
    """
    arguments.one_of("kv_layout", kv_layout, KV_LAYOUTS)
    parts: list[GatherSpec] = []
    where: dict[str, Any] = {}

    def put(name: str, value: Any, make: Callable[[str, torch.Tensor, BatchShape], GatherSpec]) -> None:
        if value is None:
            return
        where[name], leaves = flatten_leaves(name, value)
        for leaf in leaves:
            arguments.tensor(name, leaf)
            arguments.same_device(name, leaf, at.device, at.of)
            parts.append(make(name, leaf, at))
        if out is not None and name != "extra":
            given = getattr(out, name)
            structure, targets = (None, []) if given is None else flatten_leaves(f"out.{name}", given)
            if structure != where[name] or len(targets) != len(leaves):
                raise ValueError(f"out.{name} must have the structure of {name}")
            first = len(parts) - len(leaves)
            parts[first:] = [_into(f"out.{name}", p, t, out_rows) for p, t in zip(parts[first:], targets, strict=True)]

    put("hidden", hidden, _trailing)
    put("position_ids", position_ids, _ids)
    put("kv", kv, _kv_bhsd if kv_layout == "BHSD" else _kv_bshd)
    put("attention_mask", attention_mask, _mask)
    put("rope", rope, _rope)
    put("labels", labels, _labels)
    put("extra", extra, _labels_free)

    def unflatten(results: list[torch.Tensor]) -> dict[str, Any]:
        found = iter(results)
        return {name: _rebuild(structure, found) for name, structure in where.items()}

    return parts, unflatten


def flatten_leaves(name: str, value: Any) -> tuple[Any, list[torch.Tensor]]:
    """Nested lists and tuples of tensors to (structure, leaves); a leaf's structure is None."""
    if isinstance(value, list | tuple):
        if name.removeprefix("out.") not in ("kv", "rope"):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if hasattr(value, "_fields"):
            raise TypeError(f"{name} must be plain tuples or lists of tensors, got {type(value).__name__}")
        inner = [flatten_leaves(name, v) for v in value]
        return (type(value), [s for s, _ in inner]), [leaf for _, leaves in inner for leaf in leaves]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor or nested tuples of tensors, got {type(value).__name__}")
    return None, [value]


def _rebuild(structure: Any, leaves: Iterator[torch.Tensor]) -> Any:
    if structure is None:
        return next(leaves)
    kind, inner = structure
    built = [_rebuild(s, leaves) for s in inner]
    return built if kind is list else tuple(built)


def _wrong(name: str, x: torch.Tensor, want: str, at: BatchShape) -> ValueError:
    return ValueError(f"{name} must be {want} to agree with {at.of} {at.describe()}, got {list(x.shape)}")


def _part(name: str, x: torch.Tensor, at: BatchShape, batch_dim: int, row_dim: int, want: str, fill: int = 0) -> GatherSpec:
    if at.batch is None:
        row_dim, batch_dim = (row_dim - 1 if batch_dim < row_dim else row_dim), -1
    if not row_dim < x.dim() or x.shape[row_dim] != at.rows or (at.batch is not None and x.shape[batch_dim] != at.batch):
        raise _wrong(name, x, want, at)
    return GatherSpec(x, batch_dim, row_dim, fill)


def check_out(out: Any, kind: type, traced: bool) -> None:
    """Raise unless ``out`` is an earlier result, given outside tracing."""
    if out is None:
        return
    if not isinstance(out, kind):
        raise TypeError(f"out must be a {kind.__name__}, got {type(out).__name__}")
    if traced:
        raise ValueError("out cannot be given under torch.compile or torch.export, which plan memory themselves")


def _into(name: str, part: GatherSpec, target: torch.Tensor, out_rows: int) -> GatherSpec:
    shape = list(part.tensor.shape)
    shape[part.row_dim] = out_rows
    if list(target.shape) != shape or target.dtype != part.tensor.dtype or target.device != part.tensor.device:
        want = f"{part.tensor.dtype} {shape} on {part.tensor.device}"
        raise ValueError(f"{name} must be {want}, got {target.dtype} {list(target.shape)} on {target.device}")
    if not target.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(target.stride())}")
    if target.untyped_storage().data_ptr() == part.tensor.untyped_storage().data_ptr() and target.numel():
        raise ValueError(f"{name} must not share memory with the tensor that is read")
    if torch.is_grad_enabled() and (part.tensor.requires_grad or target.requires_grad):
        raise ValueError(f"{name} cannot be given where a gradient is recorded")
    return part._replace(out=target)


def _trailing(name: str, x: torch.Tensor, at: BatchShape) -> GatherSpec:
    return _part(name, x, at, 0, 1, "[B, N, ...] (packed: [T, ...])")


def _labels_free(name: str, x: torch.Tensor, at: BatchShape) -> GatherSpec:
    return _part(name, x, at, 0, 1, "[B, N] (packed: [T])")


def _labels(name: str, x: torch.Tensor, at: BatchShape) -> GatherSpec:
    want = "[B, N] (packed: [T])"
    if x.dim() != (1 if at.batch is None else 2):
        raise _wrong(name, x, want, at)
    if x.is_floating_point() or x.is_complex() or x.dtype in (torch.bool, torch.uint8):
        raise TypeError(f"labels must be signed integers (padding is filled with -100), got {x.dtype}")
    return _part(name, x, at, 0, 1, want, fill=-100)


def _mask(name: str, x: torch.Tensor, at: BatchShape) -> GatherSpec:
    want = "[B, N] (a packed batch needs none)"
    if at.batch is None or x.dim() != 2:
        raise _wrong(name, x, want, at)
    return _part(name, x, at, 0, 1, want)


def _ids(name: str, x: torch.Tensor, at: BatchShape) -> GatherSpec:
    want = "[B, N], [1, N] or [P, B, N] (packed: [T] or [P, T])"
    flat = 1 if at.batch is None else 2
    if x.dim() == flat:
        if at.batch is not None and x.shape[0] == 1:
            x = x.expand(at.batch, -1)
        return _part(name, x, at, 0, 1, want)
    if x.dim() == flat + 1:
        return _part(name, x, at, 1, 2, want)
    raise _wrong(name, x, want, at)


def _rope(name: str, x: torch.Tensor, at: BatchShape) -> GatherSpec:
    want = "[B, N, R], [1, N, R], [N, R] or [P, B, N, R] (packed: [T, R] or [P, T, R])"
    if at.batch is None:
        if x.dim() not in (2, 3):
            raise _wrong(name, x, want, at)
        return _part(name, x, at, x.dim() - 2, x.dim() - 1, want)
    if x.dim() == 2:
        x = x.unsqueeze(0)
    if x.dim() not in (3, 4):
        raise _wrong(name, x, want, at)
    batch_dim = x.dim() - 3
    if x.shape[batch_dim] == 1:
        shape = list(x.shape)
        shape[batch_dim] = at.batch
        x = x.expand(shape)
    return _part(name, x, at, batch_dim, batch_dim + 1, want)


def _kv_bhsd(name: str, x: torch.Tensor, at: BatchShape) -> GatherSpec:
    want = "[B, H, S, Dh] with S = N (packed: [H, T, Dh]; see kv_layout)"
    if x.dim() != (3 if at.batch is None else 4):
        raise _wrong(name, x, want, at)
    return _part(name, x, at, 0, 2, want)


def _kv_bshd(name: str, x: torch.Tensor, at: BatchShape) -> GatherSpec:
    want = "[B, S, H, Dh] with S = N (packed: [T, H, Dh]; see kv_layout)"
    if x.dim() != (3 if at.batch is None else 4):
        raise _wrong(name, x, want, at)
    return _part(name, x, at, 0, 1, want)


def batch_shape(name: str, hidden: Any, packed: bool) -> BatchShape:
    """The rows that a call is about, from its hidden states."""
    arguments.tensor(name, hidden)
    if hidden.dim() < (1 if packed else 2):
        raise ValueError(f"{name} must be {'[T, ...]' if packed else '[B, N, ...]'}, got shape {list(hidden.shape)}")
    if packed:
        return BatchShape(None, hidden.shape[0], hidden.device, name)
    return BatchShape(hidden.shape[0], hidden.shape[1], hidden.device, name)


def check_keep(keep: Any, at: BatchShape, groups: bool) -> None:
    """Raise unless ``keep`` is int64 ``[B, S]`` (packed ``[T']``), or ``[G, K]`` where groups are listed."""
    arguments.tensor("keep", keep)
    if keep.dtype != torch.int64:
        raise TypeError(f"keep must be int64 (or a TopK), got {keep.dtype}")
    arguments.same_device("keep", keep, at.device, at.of)
    dims = 1 if at.batch is None and not groups else 2
    if keep.dim() != dims or (dims == 2 and not groups and keep.shape[0] != at.batch):
        want = "[G, K]" if groups else "[T']" if at.batch is None else f"[{at.batch}, S]"
        raise ValueError(f"keep must be {want}, got shape {list(keep.shape)}")


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
) -> Any:
    """The public result: gathered tensors, new ids if asked for, a mask if the result is ragged, the new layout."""
    if mode == "compacted":
        found["position_ids"] = positions.like(positions.compacted_position_ids(keep, cu_seqlens), position_ids)
    if ragged and cu_seqlens is None and "attention_mask" not in found:
        found["attention_mask"] = keep >= 0
    mask = found.pop("extra", None)
    if mask is not None and after is not None:
        after = dataclasses.replace(after, mask=mask)
    return kind(keep=keep, cu_seqlens=cu_seqlens, layout=after, **found)


def kept_offsets(keep: torch.Tensor, cu_seqlens: Any, rows: int, *, traced: bool) -> torch.Tensor:
    """New offsets of a packed batch from its kept rows, on the device: an item's rows are those inside its old offsets."""
    if isinstance(cu_seqlens, torch.Tensor) and (traced or cu_seqlens.device.type != "cpu"):
        check_offsets(cu_seqlens)
        old = cu_seqlens
    else:
        old = offsets_on(host_cu_seqlens(cu_seqlens, rows), keep.device, traced=traced)
    old = old.to(keep.device)[:, None]
    return ((keep >= 0) & (keep < old)).sum(1).to(torch.int32)
