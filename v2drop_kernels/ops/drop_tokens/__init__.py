"""drop_tokens: one drop step of V2Drop (score, select, compact), the main op of this package."""

from __future__ import annotations

from typing import Any, cast

import torch

from ...backends import repeated
from ...backends.choice import is_traced, resolve_backend, transformed
from ...backends.protocol import Runner
from ...backends.requests import DropRequest, Source
from ...core import arguments, calls, overwrite
from ...core.arguments import check_device, is_packed
from ...core.droppable import layout_of
from ...core.types import Dropped
from ..autograd import opaque
from ..compact.gradient import Launched, moved, recorded
from ..compact.torch_op import OP as COMPACT
from ..host_ints import host_ints
from .torch_op import OP


def drop_tokens(
    h_prev: torch.Tensor | None,
    h_cur: torch.Tensor,
    k: Any,
    *,
    droppable: Any = None,
    scores: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    kv: Any = None,
    kv_layout: str = "BHSD",
    attention_mask: torch.Tensor | None = None,
    rope: Any = None,
    labels: torch.Tensor | None = None,
    positions: str = "persistent",
    cu_seqlens: Any = None,
    metric: str = "l2",
    score_dtype: torch.dtype | None = None,
    out: Dropped | None = None,
    backend: str | None = None,
) -> Dropped:
    """Drop all but the k droppable tokens of every segment that the last layer changed most, and compact the rest.

    Parameters
    ----------
    h_prev, h_cur : Tensor
        Hidden states before and after the layer, ``[B, N, D]`` or packed ``[T, D]``; ``h_cur`` is the one whose rows are kept.
    k : int | list of int | CPU tensor
        Droppable tokens to keep, one count for all segments or one per segment; 0 drops them all, a count above the size of a
        segment keeps all of it. :func:`n_keep` turns ratios into counts.
    droppable : optional
        Which tokens compete; all others (text, system prompt) are kept. None for all, one ``(start, stop)`` for every item, a list
        with the spans of each item, a bool mask, or a :class:`TokenLayout` (which also describes padding).
    scores : Tensor, optional
        float ``[B, N]`` (packed ``[T]``): rank by these instead (attention, random, ...); ``h_prev`` may then be None.
    position_ids, kv, kv_layout, attention_mask, rope, labels, positions, cu_seqlens
        As in :func:`compact`.
    metric, score_dtype
        As in :func:`variation_score`.
    out : Dropped, optional
        The result of an earlier call of the same shapes, whose gathered tensors are overwritten and returned: saves the page
        faults of fresh memory on a CPU. It must not share memory with what is read. Not under autograd or tracing.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Dropped
        ``hidden`` ``[B, S, D]``, ``keep`` ``[B, S]`` (input rows, ascending, -1 for padding), everything else that was
        given, and ``layout``, the ``droppable=`` of the next stage (None when traced: use ``TokenLayout.after(k)``).

    Raises
    ------
    ValueError, TypeError
        Tensors that do not agree, invalid spans or counts; the message names the argument.

    Notes
    -----
    Order and ties are those of :func:`segmented_topk`; kept tokens stay in position order. No host synchronisation, and safe in
    CUDA graphs (after one call outside the capture, which puts the plan's tables on the device), except where ``droppable`` is a
    bare mask or ``positions`` is "group" (hand on ``positions.group_position_ids`` instead). With ``cu_seqlens`` on a GPU the
    result has capacity ``min(T, sum(k))`` and its own ``cu_seqlens`` gives the rows that are used. A packed result goes into
    varlen attention as it is: ``cu_seqlens``, ``max_seqlen``, and K and V ``[T, H, Dh]`` where ``kv_layout`` is "BSHD"
    (``examples/varlen_attention.py``). Gradients flow to ``h_cur`` (through the kept rows), ``kv`` and ``rope``; never through the
    choice of tokens. In Triton on a GPU: two launches up to 2048 competing tokens, three or five beyond, and
    where the lengths are on the device only.

    Equivalent plain torch for one item and one span ``[a, b)``: ``s = (h_cur - h_prev)[0, a:b].float().norm(dim=-1)``,
    ``i = a + s.topk(k).indices.sort().values``, ``keep = cat([arange(a), i, arange(b, N)])``, ``h_cur[:, keep]`` and the
    same for every other tensor. Source: V2Drop, Algorithm 1; HiDivDrop section 3.3 for persistent position ids.

    Examples
    --------
    >>> h = torch.zeros(1, 5, 4)
    >>> grown = h + torch.tensor([0.0, 1.0, 3.0, 2.0, 0.0])[None, :, None]
    >>> drop_tokens(h, grown, 2, droppable=(1, 4)).keep
    tensor([[0, 2, 3, 4]])
    """
    ranked, carried = (h_prev, scores), (h_cur, position_ids, kv, attention_mask, rope, labels)
    plain = out is None and cu_seqlens is None and type(positions) is str and positions == "persistent"
    earlier = repeated.look_up(OP, ranked, carried, k, droppable, backend, plain, metric, score_dtype, kv_layout)
    if earlier[2] is not None:
        return _again(earlier, ranked, carried, (k, droppable, None), metric, score_dtype)
    packed = is_packed(droppable, cu_seqlens)
    arguments.ranked(h_prev, h_cur, scores, packed)
    arguments.score_options(metric, score_dtype)
    check_device(droppable, h_cur.device, "h_cur")
    runner = resolve_backend(OP, h_cur if scores is None else scores, backend)
    at = calls.batch_shape("h_cur", h_cur, packed)
    traced = is_traced(h_cur)
    resolved = calls.resolve("drop", h_cur, k, droppable, cu_seqlens, traced=traced)
    layout = layout_of(droppable, at.batch, at.rows, cu_seqlens) if isinstance(positions, str) and positions == "group" else None
    gathers, unflatten = calls.flatten(
        at, hidden=h_cur, position_ids=calls.input_positions(positions, position_ids, layout, at.device), kv=kv,
        kv_layout=kv_layout, attention_mask=attention_mask, rope=rope, labels=labels, extra=resolved.mask,
        out=out if out is None else overwrite.checked(out, Dropped, traced), out_rows=resolved.plan.out_rows,
    )  # fmt: skip
    gathers = gathers if traced else calls.settled_gathers(gathers)
    source = Source(*_ranks(scores, h_prev, gathers[0].tensor, traced), resolved.mask, metric, score_dtype)
    repeated.remember(earlier, runner, resolved.plan, gathers, resolved.plan.out_rows, resolved.after)
    request = DropRequest(source, resolved.plan, resolved.cu_seqlens, gathers, (k, droppable, cu_seqlens))
    keep, outs, cu = _run(runner, request, at.rows, rewrites=out is not None)
    if packed:
        keep, cu = keep.squeeze(0), _offsets(cu, resolved, keep.device)
    return calls.build_result(
        Dropped, keep, unflatten(outs), mode=positions, position_ids=position_ids, cu_seqlens=cu, after=resolved.after,
        ragged=resolved.ragged, max_seqlen=resolved.max_seqlen,
    )  # fmt: skip


def _ranks(scores: torch.Tensor | None, h_prev: Any, h_cur: torch.Tensor, traced: bool) -> tuple[Any, Any, Any]:
    """The scores, or both hidden states, as the first fields of a source."""
    if scores is None:
        return None, h_prev if traced else arguments.settled(h_prev), h_cur
    return scores if traced else arguments.settled(scores), None, None


def _offsets(cu: torch.Tensor | None, resolved: calls.Resolved, device: torch.device) -> torch.Tensor:
    """The offsets of a packed result: those that the device computed, or those of the plan on the host."""
    return host_ints(cast(tuple[int, ...], resolved.out_cu), device, torch.int32) if cu is None else cu


def _run(runner: Runner, request: DropRequest, rows: int, *, rewrites: bool) -> Launched:
    """The kept rows, the gathered tensors and new offsets, with a gradient where one is wanted."""
    gathers = request.gathers
    if transformed():
        keep, cu = opaque(lambda chosen: runner.run(chosen)[::2], request._replace(gathers=[]))
        return keep, moved(resolve_backend(COMPACT, gathers[0].tensor, runner.name, torch.float32), keep, gathers), cu
    if not runner.differentiable and torch.is_grad_enabled() and any(gather.tensor.requires_grad for gather in gathers):
        return recorded(lambda: runner.run(request), runner, gathers, rows)
    return (overwrite.overwriting(runner.run) if rewrites else runner.run)(request)


def _again(earlier: repeated.Found, ranked: Any, carried: Any, budget: Any, metric: str, score_dtype: Any) -> Dropped:
    """A call whose checks and plan are known."""
    known, (h_prev, scores) = earlier[2], ranked
    assert known is not None
    before, after = (h_prev, carried[0]) if scores is None else (None, None)
    source = Source(scores, before, after, None, metric, score_dtype)
    keep, outs, _ = known.runner.run(DropRequest(source, known.plan, None, repeated.gathers_of(earlier), budget, known.memo))
    hidden, position_ids, kv, attention_mask, rope, labels = repeated.rebuild(carried, outs)
    return Dropped(hidden, keep, position_ids, kv, attention_mask, rope, labels, None, known.after)
