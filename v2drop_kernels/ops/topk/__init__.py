"""segmented_topk and variation_topk: the k best tokens of every segment, exactly, without a sort.

The order is (score descending, index ascending): NaN ranks above +inf, -0.0 equals 0.0, equal scores keep the smaller
index. Three integers per segment decide (threshold key, how many ties to take, a prefix count), so results are
deterministic and equal on every backend.
"""

from __future__ import annotations

from typing import Any

import torch

from ...backends import repeated
from ...backends.choice import forced_name, is_traced, resolve_backend, transformed, why_not
from ...backends.implementations import interpreting
from ...backends.requests import Source, TopKRequest
from ...core import arguments
from ...core.arguments import check_device, is_packed
from ...core.calls import resolve
from ...core.types import TopK
from ..autograd import opaque
from ..host_ints import host_ints
from ..variation_score import variation_score
from .packed import packed_items
from .torch_op import OP


def segmented_topk(
    scores: torch.Tensor,
    k: Any,
    *,
    cu_seqlens: Any = None,
    droppable: Any = None,
    order: str = "position",
    backend: str | None = None,
) -> TopK:
    """Keep the k highest scores of every segment.

    Parameters
    ----------
    scores : Tensor
        ``[B, N]``, or packed ``[T]`` with ``cu_seqlens``; float32, float16 or bfloat16 (float64 on the CPU and the
        reference).
    k : int | list of int | CPU tensor
        Tokens to keep, one count for all segments or one per segment. 0 is allowed; a count above the size of a segment keeps the
        whole segment.
    cu_seqlens : sequence of int | Tensor, optional
        int32 ``[B + 1]`` offsets of a packed batch. A tensor on a GPU is not read: groups are then padded to ``max(k)``.
    droppable : optional
        Which tokens compete (see :class:`TokenLayout`): None for all, one ``(start, stop)`` for every item, a list with
        the spans of each item (every span is a segment), a bool mask (one synchronisation to count it; or give
        ``TokenLayout.from_mask(mask, counts)``), or a TokenLayout.
    order : {"position", "score"}
        Indices ascend, or follow the score.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    TopK
        ``values`` and ``indices`` ``[G, K]``, one row per segment, K the largest count that is kept. Indices are
        positions along ``N`` (padded) or rows of ``T`` (packed). A segment that keeps fewer is filled at its end with
        value -inf and index -1. Values carry the gradient of ``scores``.

    Raises
    ------
    ValueError, TypeError
        Wrong shapes, ``k`` below 0 or not on the host, spans that are reversed, overlapping or outside, ``cu_seqlens``
        that do not start at 0, ascend and end at ``T``.

    Notes
    -----
    Equivalent plain torch for one budget: ``torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]``,
    then sorted. Source: V2Drop, Algorithm 1 (which emits score order; its code restores position order, as we do).

    Examples
    --------
    >>> segmented_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2).indices
    tensor([[1, 2]])
    """
    earlier = repeated.look_up(OP, (), (scores,), k, droppable, backend, cu_seqlens is None, order)
    if earlier[2] is not None:
        return _again(earlier[2], (scores, None, None), order, (k, droppable, None))
    arguments.tensor("scores", scores)
    packed = is_packed(droppable, cu_seqlens)
    if scores.dim() != (1 if packed else 2):
        want = "[T] because cu_seqlens is given" if packed else "[B, N] (a packed [T] needs cu_seqlens)"
        raise ValueError(f"scores must be {want}, got shape {list(scores.shape)}")
    arguments.dtype_in("scores", scores, arguments.HIDDEN_DTYPES)
    arguments.one_of("order", order, arguments.ORDERS)
    if droppable is not None:
        check_device(droppable, scores.device, "scores")
    runner = resolve_backend(OP, scores, backend, _doubles_served(scores, backend))
    resolved = packed_items(runner, scores, k, droppable, cu_seqlens)
    if resolved is None:
        resolved = resolve("topk", scores, k, droppable, cu_seqlens, traced=runner.traced)
    if not runner.traced:
        scores = arguments.settled(scores)
    repeated.remember(earlier, runner, resolved.plan)
    follow = transformed()
    grad = follow or (torch.is_grad_enabled() and scores.requires_grad)
    source = Source(scores.detach() if grad else scores, None, None, resolved.mask)
    request = TopKRequest(source, resolved.plan, resolved.cu_seqlens, order, (k, droppable, cu_seqlens))
    values, indices = opaque(runner.run, request) if follow else runner.run(request)
    return TopK(_gathered(scores, resolved.plan, values, indices) if grad else values, indices)


def variation_topk(
    h_prev: torch.Tensor,
    h_cur: torch.Tensor,
    k: Any,
    *,
    metric: str = "l2",
    cu_seqlens: Any = None,
    droppable: Any = None,
    order: str = "position",
    score_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> TopK:
    """Keep the k tokens of every segment that one decoder layer changed most; score and select in one call.

    Parameters
    ----------
    h_prev, h_cur, metric, score_dtype
        As in :func:`variation_score`.
    k, cu_seqlens, droppable, order, backend
        As in :func:`segmented_topk`.

    Returns
    -------
    TopK
        As :func:`segmented_topk`; values are float32.

    Raises
    ------
    ValueError, TypeError
        As :func:`variation_score` and :func:`segmented_topk`.

    Notes
    -----
    Equivalent plain torch: ``segmented_topk(variation_score(h_prev, h_cur), k)``. Scores of tokens that do not compete
    are never computed. Source: V2Drop, Algorithm 1.

    Examples
    --------
    >>> h = torch.zeros(1, 3, 4)
    >>> variation_topk(h, h + torch.tensor([[[1.0], [3.0], [2.0]]]), 2)
    TopK(values=tensor([[6., 4.]]), indices=tensor([[1, 2]]))
    """
    plain = cu_seqlens is None
    earlier = repeated.look_up(OP, (), (h_prev, h_cur), k, droppable, backend, plain, metric, order, score_dtype)
    if earlier[2] is not None:
        return _again(earlier[2], (None, h_prev, h_cur, None, metric, score_dtype), order, (k, droppable, None))
    arguments.pair(h_prev, h_cur, is_packed(droppable, cu_seqlens))
    arguments.score_options(metric, score_dtype)
    arguments.one_of("order", order, arguments.ORDERS)
    if droppable is not None:
        check_device(droppable, h_cur.device, "h_cur")
    runner = resolve_backend(OP, h_cur, backend)
    if transformed() or (torch.is_grad_enabled() and (h_prev.requires_grad or h_cur.requires_grad)):
        # The values carry a gradient: score and select apart, so that autograd sees both.
        scores = variation_score(h_prev, h_cur, metric=metric, score_dtype=score_dtype, backend=runner.name)
        return segmented_topk(scores, k, cu_seqlens=cu_seqlens, droppable=droppable, order=order, backend=runner.name)
    if not runner.traced:
        h_prev, h_cur = arguments.settled(h_prev), arguments.settled(h_cur)
    resolved = packed_items(runner, h_cur, k, droppable, cu_seqlens)
    if resolved is None:
        resolved = resolve("topk", h_cur, k, droppable, cu_seqlens, traced=runner.traced)
    repeated.remember(earlier, runner, resolved.plan)
    source = Source(None, h_prev, h_cur, resolved.mask, metric, score_dtype)
    budget = (k, droppable, cu_seqlens)
    return TopK(*runner.run(TopKRequest(source, resolved.plan, resolved.cu_seqlens, order, budget)))


def _doubles_served(scores: torch.Tensor, backend: str | None) -> torch.dtype | None:
    """The dtype by which a backend is chosen, None for that of the scores: on the CPU the library also selects from float64."""
    if scores.dtype != torch.float64 or not scores.is_cpu or is_traced(scores) or forced_name(backend) not in (None, "cpu"):
        return None
    return torch.float32 if why_not("cpu", "cpu", torch.float32) is None and not interpreting() else None


def _again(known: repeated.Known, source: tuple[Any, ...], order: str, budget: Any) -> TopK:
    """A call whose checks and plan are known; ``source`` has the fields of a :class:`Source`."""
    again = known.memo.get("again")
    if again is None:
        return TopK(*known.runner.run(TopKRequest(Source(*source), known.plan, None, order, budget, known.memo)))
    return TopK(*again(source))


def _gathered(scores: torch.Tensor, plan: Any, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The values again, as a gather that autograd sees."""
    if scores.numel() == 0:
        return values + scores.sum()  # of nothing, with a graph
    rows = indices.clamp(min=0)
    if scores.dim() == 1:
        found = scores[rows]
    elif plan.uniform is not None:
        found = scores.gather(1, rows)
    else:
        # An empty segment may start behind the last row of its item, which is another item's or nobody's: it has no values.
        starts = [min(start, plan.batch * plan.rows - 1) for start in plan.column("src_start")]
        items = host_ints([start // plan.rows for start in starts], scores.device)
        found = scores[items].gather(1, rows)
    return torch.where(indices >= 0, found, values)
