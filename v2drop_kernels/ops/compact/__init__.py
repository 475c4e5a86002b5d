"""compact and compact_: only the kept rows of hidden states, KV, position ids, rope tables, masks and labels, in one pass."""

from __future__ import annotations

from typing import Any

import torch

from ...backends import repeated
from ...backends.choice import is_traced, resolve_backend, transformed
from ...backends.protocol import Runner
from ...backends.requests import CompactRequest
from ...core import arguments, calls, overwrite
from ...core.arguments import check_device, is_packed
from ...core.types import Compacted, TopK
from ..autograd import refuse_inplace
from ..host_ints import kept_items
from .gradient import moved, recorded
from .keep import check_keep, surviving_rows
from .torch_op import INPLACE, OP


def compact(
    keep: torch.Tensor | TopK,
    hidden: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    kv: Any = None,
    kv_layout: str = "BHSD",
    attention_mask: torch.Tensor | None = None,
    rope: Any = None,
    labels: torch.Tensor | None = None,
    positions: str = "persistent",
    droppable: Any = None,
    cu_seqlens: Any = None,
    k: Any = None,
    out: Compacted | None = None,
    backend: str | None = None,
) -> Compacted:
    """Gather the kept rows of everything that belongs to a batch, in one pass.

    Parameters
    ----------
    keep : Tensor | TopK
        int64 rows that survive: ``[B, S]`` positions along ``N``, or ``[T']`` rows of ``T`` for a packed batch; -1 is an
        empty row (padding). Any order; each row at most once. With ``droppable`` (and always for a packed TopK) it lists,
        per segment ``[G, K]``, the survivors *among the droppable tokens*, and all other real rows are kept as well.
    hidden : Tensor
        ``[B, N, D]`` or packed ``[T, D]``; any dtype.
    position_ids : Tensor, optional
        ``[B, N]``, ``[1, N]`` or M-RoPE's ``[3, B, N]`` (packed ``[T]`` or ``[3, T]``).
    kv : Tensor or nested tuples/lists, optional
        K and V of any number of layers, ``[B, H, N, Dh]`` or ``[B, N, H, Dh]`` (packed without ``B``); any dtype and head
        count. Comes back in the same structure.
    kv_layout : {"BHSD", "BSHD"}
    attention_mask : Tensor, optional
        2-D ``[B, N]``, any dtype. Padding of the result is 0.
    rope : tuple of Tensor, optional
        (cos, sin) tables ``[B, N, R]``, ``[1, N, R]``, ``[N, R]`` or ``[3, B, N, R]``.
    labels : Tensor, optional
        ``[B, N]`` integers. Padding of the result is -100.
    positions : {"persistent", "compacted", "group"}
        See :mod:`v2drop_kernels.positions`. "group" needs ``droppable``.
    droppable, cu_seqlens
        As in :func:`segmented_topk`.
    k : optional
        With ``droppable``: how many rows of each segment ``keep`` lists. Without it they are counted (one host
        synchronisation when ``keep`` is on a GPU).
    out : Compacted, optional
        As in :func:`drop_tokens`: the result of an earlier call, to be overwritten.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Compacted

    Raises
    ------
    ValueError, TypeError
        A tensor whose rows, batch or device differ from those of ``hidden`` (the message names it). On the CPU, an invalid row of
        ``keep``: outside the input; with ``droppable``, one that is not among the droppable tokens of its segment, one listed
        twice, or a number of rows other than ``k``. On a GPU this check would synchronise with the host: an invalid row is treated
        as an empty row there, and at most ``k`` rows of a segment are used.

    Notes
    -----
    Differentiable in ``hidden``, ``kv`` and ``rope``; the backward is one gather as well. Equivalent plain torch, per
    tensor: ``x.gather(1, keep[..., None].expand(-1, -1, D))``. Bytes are copied, never interpreted: fp8 and int8 caches
    come through exactly.

    Examples
    --------
    >>> h = torch.arange(6.0).view(1, 3, 2)
    >>> compact(torch.tensor([[0, 2]]), h).hidden
    tensor([[[0., 1.],
             [4., 5.]]])
    """
    keep = keep.indices if isinstance(keep, TopK) else keep
    carried = (hidden, position_ids, kv, attention_mask, rope, labels)
    plain = droppable is cu_seqlens is k is out is None and type(positions) is str and positions == "persistent"
    earlier = repeated.look_up(OP, (keep,), carried, 0, None, backend, plain, kv_layout)
    if earlier[2] is not None:
        return _again(earlier, keep, carried)
    packed = is_packed(droppable, cu_seqlens)
    at = calls.batch_shape("hidden", hidden, packed)
    check_device(droppable, at.device, at.of)
    traced = is_traced(hidden)
    keep, layout, cu_seqlens, longest = surviving_rows(keep, at, k, droppable, cu_seqlens, traced=traced)
    ids = calls.input_positions(positions, position_ids, layout, at.device)
    gathers, unflatten = calls.flatten(
        at, hidden=hidden, position_ids=ids, kv=kv, kv_layout=kv_layout, attention_mask=attention_mask, rope=rope,
        labels=labels, out=out if out is None else overwrite.checked(out, Compacted, traced), out_rows=keep.shape[-1],
    )  # fmt: skip
    runner = resolve_backend(OP, hidden, backend, torch.float32)
    gathers = gathers if traced else calls.settled_gathers(gathers)
    rows = (keep.unsqueeze(0) if packed else keep).contiguous()
    if rows is keep:
        repeated.remember(earlier, runner, None, gathers, keep.shape[-1])
    request = CompactRequest(rows, gathers)
    outs = _run(runner, request, at.rows, rewrites=out is not None)
    cu, longest = kept_items(keep, cu_seqlens, at.rows, longest, traced=traced) if packed else (None, None)
    return calls.build_result(
        Compacted, keep, unflatten(outs), mode=positions, position_ids=position_ids, cu_seqlens=cu, ragged=layout is not None,
        max_seqlen=longest,
    )  # fmt: skip


def _run(runner: Runner, request: CompactRequest, rows: int, *, rewrites: bool) -> list[torch.Tensor]:
    """The gathered tensors, with a gradient where one is wanted."""
    gathers = request.gathers
    if transformed():
        return moved(runner, request.keep, gathers)
    if not runner.differentiable and torch.is_grad_enabled() and any(spec.tensor.requires_grad for spec in gathers):
        return recorded(lambda: (request.keep, runner.run(request), None), runner, gathers, rows)[1]
    return (overwrite.overwriting(runner.run) if rewrites else runner.run)(request)


def _again(earlier: repeated.Found, keep: torch.Tensor, carried: Any) -> Compacted:
    """A call whose checks are known."""
    known = earlier[2]
    assert known is not None
    gathers = repeated.gathers_of(earlier)
    hidden, *others = repeated.rebuild(carried, known.runner.run(CompactRequest(keep, gathers, known.memo)))
    return Compacted(hidden, keep, *others)


def compact_(
    keep: torch.Tensor | TopK,
    kv: Any,
    *,
    kv_layout: str = "BHSD",
    rows: int | None = None,
    backend: str | None = None,
) -> None:
    """Move the kept rows to the front, in place: for preallocated (static) KV caches; no second buffer.

    Parameters
    ----------
    keep : Tensor | TopK
        int64 ``[B, S]`` positions that survive, ascending within each item; -1 entries are skipped.
    kv : Tensor or nested tuples/lists
        Tensors ``[B, H, N, Dh]`` or ``[B, N, H, Dh]``, changed in place; any dtype and strides. Item ``b`` ends with its kept rows
        at the front of the row dimension; the contents of the rows after them do not change. A tensor that several layers share
        may be given once for each: it is moved once.
    kv_layout : {"BHSD", "BSHD"}
    rows : int, optional
        ``N``; default: the first tensor's. All tensors must agree.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    None

    Raises
    ------
    ValueError, TypeError
        Tensors that disagree, or share memory in part; rows of ``keep`` outside the cache or not ascending (checked on the CPU,
        before anything is moved; on a GPU such rows are skipped or give unspecified rows, never an access out of bounds).

    Notes
    -----
    Equivalent plain torch, per item: ``x[:, :len(rows)] = x[:, rows]`` with ``rows = keep[b][keep[b] >= 0]``.

    Examples
    --------
    >>> cache = torch.arange(4.0).view(1, 1, 4, 1)
    >>> compact_(torch.tensor([[1, 3]]), cache)
    >>> cache.flatten().tolist()
    [1.0, 3.0, 2.0, 3.0]
    """
    if isinstance(keep, TopK):
        keep = keep.indices
    arguments.one_of("kv_layout", kv_layout, calls.KV_LAYOUTS)
    _, leaves = calls.flatten_leaves("kv", kv)
    if not leaves:
        raise ValueError("kv must hold at least one tensor")
    first = leaves[0]
    refuse_inplace("compact_", leaves)
    if first.dim() != 4:
        raise ValueError(f"kv must hold tensors of 4 dimensions ({kv_layout}), got shape {list(first.shape)}")
    n = first.shape[2 if kv_layout == "BHSD" else 1]
    if rows is not None:
        arguments.require_int("rows", rows)
    if rows is not None and rows != n:
        raise ValueError(f"kv must have rows = {rows}, got {n}")
    at = calls.BatchShape(first.shape[0], n, first.device, "kv")
    check_keep(keep, at, groups=False)
    for leaf in leaves:
        if torch.is_grad_enabled() and leaf.requires_grad:
            raise ValueError("kv must not require grad: compact_ changes it in place (use compact)")
    gathers, _ = calls.flatten(
        at, hidden=None, position_ids=None, kv=kv, kv_layout=kv_layout, attention_mask=None, rope=None, labels=None
    )
    runner = resolve_backend(INPLACE, first, backend, torch.float32)
    if not runner.traced:
        keep = arguments.settled(keep)
    gathers = overwrite.distinct(gathers, keep, traced=runner.traced)
    runner.run(CompactRequest(keep.contiguous(), gathers))
    if not runner.traced:
        overwrite.count_change(gather.tensor for gather in gathers)
