"""compact and compact_ in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...backends.choice import is_traced
from ...backends.requests import CompactRequest
from ...core import calls
from ...core.arguments import is_packed, per_segment_k
from ...core.droppable import layout_of
from ...core.packed import longest_item
from ...core.types import Compacted, GatherSpec, TopK
from ..host_ints import kept_items
from ..topk.reference import segment_rows


def run(request: CompactRequest) -> list[torch.Tensor]:
    """The gathered tensors of a request."""
    _check_rows(request, ascending=False)
    return gather(request.keep, request.gathers)


def run_inplace(request: CompactRequest) -> None:
    """Move the kept rows of the tensors of a request to the front."""
    _check_rows(request, ascending=True)
    for tensor, batch_dim, row_dim, *_ in request.gathers:
        move_to_front(request.keep, tensor.movedim((batch_dim, row_dim), (0, 1)))


def _check_rows(request: CompactRequest, *, ascending: bool) -> None:
    """Raise unless the rows of ``keep`` lie inside the input (and ascend); only where reading them costs no synchronisation."""
    keep, gathers = request.keep, request.gathers
    if keep.device.type != "cpu" or is_traced(keep):
        return
    rows = gathers[0].tensor.shape[gathers[0].row_dim]
    if keep.numel() and int(keep.max()) >= rows:
        raise ValueError(f"keep must list rows below {rows}, got {int(keep.max())}")
    if ascending:
        for item in keep:
            kept = item[item >= 0]
            if bool((kept[1:] <= kept[:-1]).any()):
                raise ValueError(f"keep must ascend strictly within each item, got {kept.tolist()}")


def gather(keep: torch.Tensor, gathers: Sequence[GatherSpec]) -> list[torch.Tensor]:
    """Rows ``keep [Bt, S]`` of every tensor; rows of ``fill`` where ``keep`` is negative."""
    found = [_gather(spec, keep) for spec in gathers]
    return [x if spec.out is None else spec.out.copy_(x) for x, spec in zip(found, gathers, strict=True)]


def _gather(spec: GatherSpec, keep: torch.Tensor) -> torch.Tensor:
    x = spec.tensor
    if x.element_size() == 1 and x.is_floating_point():  # float8: few ops support it, and a gather only moves bytes
        return _gather(spec._replace(tensor=x.view(torch.uint8)), keep).view(x.dtype)
    if spec.batch_dim < 0:
        return _gather(GatherSpec(x.unsqueeze(0), 0, spec.row_dim + 1, spec.fill), keep).squeeze(0)
    x = x.movedim((spec.batch_dim, spec.row_dim), (0, 1))
    if x.shape[1] == 0:  # nothing to index; every row of the result is empty
        x = torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), spec.fill)], dim=1)
    rows = x[torch.arange(x.shape[0], device=x.device)[:, None], keep.clamp(min=0)]
    empty = (keep < 0).view(*keep.shape, *[1] * (x.dim() - 2))
    out = rows.masked_fill(empty, spec.fill)
    return out.movedim((0, 1), (spec.batch_dim, spec.row_dim)).contiguous()


def compact(
    keep: torch.Tensor | TopK,
    hidden: torch.Tensor,
    *,
    droppable: Any = None,
    cu_seqlens: Any = None,
    k: Any = None,
    position_ids: torch.Tensor | None = None,
    positions: str = "persistent",
    kv: Any = None,
    kv_layout: str = "BHSD",
    attention_mask: torch.Tensor | None = None,
    rope: Any = None,
    labels: torch.Tensor | None = None,
    out: Compacted | None = None,
) -> Compacted:
    """Only the kept rows of everything; with ``droppable``, all rows that do not compete are kept as well."""
    packed = is_packed(droppable, cu_seqlens)
    at = calls.batch_shape("hidden", hidden, packed)
    keep = keep.indices if isinstance(keep, TopK) else keep
    layout = None
    if droppable is not None or (packed and keep.dim() == 2):
        layout = layout_of(droppable, at.batch, at.rows, cu_seqlens)
        keep = _with_all_others(keep, layout, k)
        cu_seqlens = layout.cu_seqlens
    ids = calls.input_positions(positions, position_ids, layout, at.device)
    gathers, unflatten = calls.flatten(
        at, hidden=hidden, position_ids=ids, kv=kv, kv_layout=kv_layout, attention_mask=attention_mask, rope=rope,
        labels=labels, out=out, out_rows=keep.shape[-1],
    )  # fmt: skip
    outs = gather(keep[None] if packed else keep, gathers)
    cu, longest = kept_items(keep, cu_seqlens, at.rows, None, traced=False) if packed else (None, None)
    if cu is not None and layout is not None:
        longest = longest_item(cu.tolist())
    return calls.build_result(
        Compacted, keep, unflatten(outs), mode=positions, position_ids=position_ids, cu_seqlens=cu, ragged=layout is not None,
        max_seqlen=longest,
    )  # fmt: skip


def _with_all_others(keep: torch.Tensor, layout: Any, k: Any) -> torch.Tensor:
    stays = layout.real_rows() & ~layout.droppable_rows()
    flat, segments = stays.view(-1), layout.segments()
    ks = [None] * len(segments) if k is None else per_segment_k(k, len(segments))
    for g, (s, own, rows, x) in enumerate(zip(segments, segment_rows(layout), keep.tolist(), ks, strict=True)):
        listed, base = [row for row in rows if row >= 0], 0 if layout.is_packed else s.item * layout.rows
        for i, row in enumerate(listed):
            if row + base not in own.tolist():
                raise ValueError(f"keep must list droppable rows of its own segment, got row {row} for segment {g}")
            if row in listed[:i]:
                raise ValueError(f"keep must list each row once, got row {row} twice for segment {g}")
        if x is not None and min(x, s.available) != len(listed):
            raise ValueError(
                f"k must be the number of rows that keep lists of each segment, got {x} for segment {g} of {len(listed)}"
            )
        flat[torch.tensor(listed, dtype=torch.int64) + base] = True
    if layout.is_packed:
        return stays.nonzero().flatten().to(keep.device)
    return pad_rows([row.nonzero().flatten() for row in stays], layout.padding_side).to(keep.device)


def pad_rows(rows: list[torch.Tensor], side: str) -> torch.Tensor:
    """Lists of rows to one ``[B, S]``, -1 for padding."""
    width = max((len(r) for r in rows), default=0)
    out = torch.full((len(rows), width), -1, dtype=torch.int64)
    for i, r in enumerate(rows):
        at = width - len(r) if side == "left" else 0
        out[i, at : at + len(r)] = r
    return out


def compact_(keep: torch.Tensor | TopK, kv: Any, *, kv_layout: str = "BHSD") -> None:
    """Move the kept rows of every tensor to the front, in place; the rows behind them stay as they are."""
    keep = keep.indices if isinstance(keep, TopK) else keep
    for x in calls.flatten_leaves("kv", kv)[1]:
        move_to_front(keep, x.transpose(1, 2) if kv_layout == "BHSD" else x)


def move_to_front(keep: torch.Tensor, x: torch.Tensor) -> None:
    """The kept rows of ``x [B, N, ...]`` move to the front."""
    x = x.view(torch.uint8) if x.element_size() == 1 else x
    for b, row in enumerate(keep):
        row = row[row >= 0]
        x[b, : len(row)] = x[b, row]
