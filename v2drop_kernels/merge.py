"""Dropped tokens flow into kept ones: weighted sums of rows, and the ways that published methods choose which rows, and how.

A merge is a list of edges by output row (offsets, rows, weights) and one gather through it: no atomics, so the result does not
depend on scheduling, and the backward pass is the same gather through the transposed list. What flows where is decided
from keys or features without a gradient; gradients pass through the sums, to the rows and to the weights.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import _checks, _library
from ._ops import add_op_namespace_prefix, ops
from .reference.merge import weighted_merge as _plain
from .reference.order import ranked

HOWS = ("prumerge", "visionzip", "sparsevlm")


class Merged(NamedTuple):
    """What :func:`bipartite_merge` returns; the output rows stand in the order of the rows that stayed.

    Attributes
    ----------
    hidden : Tensor
        ``[B, N - r, D]``.
    size : Tensor
        float32 ``[B, N - r]``: how many tokens each row stands for (ToMe's proportional attention adds its logarithm).
    keep : Tensor
        int64 ``[B, N - r]``, ascending: the input row at whose place each output row stands.
    row : Tensor
        int64 ``[B, N]``: the output row that each input row went to, so ``hidden.gather`` by it undoes the shortening.
    """

    hidden: torch.Tensor
    size: torch.Tensor
    keep: torch.Tensor
    row: torch.Tensor


def weighted_merge(
    x: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    mean: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum rows of ``x`` with weights, by lists of edges.

    ``out[b, k]`` is the sum over ``e`` in ``[offsets[b, k], offsets[b, k + 1])`` of ``weights[b, e] * x[b, rows[b, e]]``.

    Parameters
    ----------
    x : Tensor
        ``[B, N, D]``; float32, float16 or bfloat16 (float64 in plain torch). Any batch and row stride.
    offsets : Tensor
        int64 ``[B, K + 1]``, ascending, within ``[0, E]``. Edges before the first and after the last offset are unused.
    rows : Tensor
        int64 ``[B, E]``: rows of ``x``. Those of used edges must lie in ``[0, N)``, which is not checked: that would wait
        for the device.
    weights : Tensor, optional
        Floating point ``[B, E]``; default 1.
    mean : bool
        Divide by the sum of the weights; where that is 0 the result is 0.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Tensor
        ``[B, K, D]`` of the dtype of ``x``, accumulated in float32; 0 for a row without edges.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit together.

    Notes
    -----
    Deterministic: one fixed order of additions per backend, no atomics. Differentiable in ``x`` and ``weights``. Triton has
    kernels for it; ``cpu`` and ``cuda`` have none and run plain torch (``embedding_bag``), which moves the same bytes.
    Equivalent plain torch, for one item: ``torch.stack([(w[a:b, None] * x[r[a:b]]).sum(0) for a, b in pairwise(offsets)])``.

    Not for copying rows: :func:`v2drop_kernels.compact` moves every tensor of a model at once.

    Examples
    --------
    >>> x = torch.tensor([[[1.0], [2.0], [4.0]]])
    >>> weighted_merge(x, torch.tensor([[0, 2, 3]]), torch.tensor([[0, 2, 1]]))
    tensor([[[5.],
             [2.]]])
    """
    _checks.hidden("x", x, False)
    _integers("offsets", offsets, x, "K + 1")
    _integers("rows", rows, x, "E")
    if offsets.shape[1] == 0:
        raise ValueError("offsets must be [B, K + 1] with at least one column, got none")
    if weights is not None:
        _floats("weights", weights, x, rows.shape[1])
        weights = weights.double() if x.dtype == torch.float64 else weights.float()
    _, name = _library.runner(x, backend)
    if name != "triton":
        return _plain(x, offsets, rows, weights, mean=mean)
    x = _checks.unit_stride(x)
    offsets, rows, weights = offsets.contiguous(), rows.contiguous(), None if weights is None else weights.contiguous()
    if _library.dispatched(x):
        return ops.weighted_merge(x, offsets, rows, weights, mean)
    if torch.is_grad_enabled() and (x.requires_grad or (weights is not None and weights.requires_grad)):
        return _WeightedMerge.apply(x, offsets, rows, weights, mean)
    return _launch(x, offsets, rows, weights, mean)


def groups(target: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges that send every row to one output row: the first two lists of :func:`weighted_merge`.

    Parameters
    ----------
    target : Tensor
        int64 ``[B, N]``: the output row of each row, ``k`` for a row that goes nowhere.
    k : int
        Output rows.

    Returns
    -------
    offsets, rows : Tensor
        int64 ``[B, k + 1]`` and ``[B, N]``; the rows of an output row ascend, those that go nowhere come last.

    Notes
    -----
    One stable sort. Equivalent plain torch: ``target.argsort(stable=True)`` and the bounds of the equal values in it.

    Examples
    --------
    >>> groups(torch.tensor([[1, 0, 1, 2]]), 2)
    (tensor([[0, 1, 3]]), tensor([[1, 0, 2, 3]]))
    """
    found = target.sort(dim=1, stable=True)
    bounds = torch.arange(k + 1, device=target.device).expand(target.shape[0], -1).contiguous()
    return torch.searchsorted(found.values, bounds), found.indices


def bipartite_merge(
    x: torch.Tensor,
    metric: torch.Tensor,
    r: int,
    *,
    size: torch.Tensor | None = None,
    protected: int = 1,
    backend: str | None = None,
) -> Merged:
    """Merge the ``r`` most similar pairs of tokens (ToMe).

    Rows 0, 2, 4, ... are looked at from rows 1, 3, 5, ...: each even row proposes itself to the odd row of highest cosine, and
    the ``r`` best proposals are merged, as means weighted by ``size``.

    Parameters
    ----------
    x : Tensor
        ``[B, N, D]`` tokens; as for :func:`weighted_merge`.
    metric : Tensor
        Floating point ``[B, N, C]``: what is compared; ToMe takes the keys of the block, averaged over heads.
    r : int
        Tokens to lose; at most ``(N - protected) // 2`` are.
    size : Tensor, optional
        ``[B, N]``: how many tokens each row stands for already; default 1.
    protected : int
        Leading rows (1: the class token) that merge with none.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Merged

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit together; a negative ``r`` or ``protected``.

    Notes
    -----
    Ties: an even row proposes to the lowest of equally similar odd rows, and of equal proposals the lower row's is taken. A zero
    vector has cosine 0 with all. Differentiable in ``x`` and ``size``; the pairs carry no gradient. The output stands in position
    order, where the released code puts the unmerged even rows first: attention in a vision tower does not see the difference.
    Compares all pairs, ``[B, N / 2, N / 2]``: for the towers' hundreds of tokens, not for a video of ten thousand.

    Source: ToMe (ICLR 2023), section 3.

    Examples
    --------
    >>> x = torch.tensor([[[9.0], [1.0], [1.0], [2.0]]])
    >>> merged = bipartite_merge(x, torch.tensor([[[0.0, 1], [1, 0], [1, 0], [0, 1]]]), 1)
    >>> merged.hidden.flatten().tolist(), merged.size.tolist(), merged.row.tolist()
    ([9.0, 1.0, 2.0], [[1.0, 2.0, 1.0]], [[0, 1, 1, 2]])
    """
    _checks.hidden("x", x, False)
    batch, n, _ = x.shape
    _rows_of("metric", metric, x)
    _count("r", r)
    _count("protected", protected)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if size is None:
        size = torch.ones((batch, n), dtype=wide, device=x.device)
    else:
        _floats("size", size, x, n)
    r = min(r, max(n - protected, 0) // 2)
    index = torch.arange(n, device=x.device).expand(batch, n)
    if r == 0:
        return Merged(x, size.to(wide), index.clone(), index.clone())
    with torch.no_grad():
        similar = _cosines(metric[:, ::2], metric[:, 1::2], wide)  # [B, A, B]
        similar[:, : (protected + 1) // 2] = -torch.inf
        similar[:, :, : protected // 2] = -torch.inf
        best = similar.max(dim=2)
        chosen = ranked(best.values)[:, :r]
        leaves, into = 2 * chosen, 2 * best.indices.gather(1, chosen) + 1
        gone = torch.zeros((batch, n), dtype=torch.bool, device=x.device).scatter_(1, leaves, True)
        place = (~gone).cumsum(1) - 1
        row = place.scatter(1, leaves, place.gather(1, into))
        keep = gone.to(torch.uint8).sort(dim=1, stable=True).indices[:, : n - r]
        offsets, rows = groups(row, n - r)
    weights = size.to(wide).gather(1, rows)
    hidden = weighted_merge(x, offsets, rows, weights, mean=True, backend=backend)
    total = weighted_merge(size.to(wide)[:, :, None], offsets, rows, backend=backend)[:, :, 0]
    return Merged(hidden, total, keep, row)


def merge_dropped(
    x: torch.Tensor,
    keep: torch.Tensor,
    how: str,
    *,
    metric: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    clusters: torch.Tensor | None = None,
    droppable: torch.Tensor | None = None,
    neighbours: int = 32,
    backend: str | None = None,
) -> torch.Tensor:
    """The kept rows after dropped ones flowed into them.

    * ``"prumerge"`` (needs ``metric``, ``scores``): a kept row gets the sum of its ``neighbours`` nearest other rows by cosine of
      ``metric``, kept or dropped, weighted by ``scores`` (attention of the class token), added. The row in ``targets``, where
      there is one, becomes the sum of all dropped rows and itself, weighted by ``scores``: PruMerge's extra token.
    * ``"visionzip"`` (needs ``metric``, ``targets``): every dropped row goes to the target row of highest cosine; a target gets
      the mean of what came, added. :func:`contextual_targets` chooses the targets, which ``keep`` must contain.
    * ``"sparsevlm"`` (needs ``clusters``): the row of a cluster's centre becomes the mean of the cluster; the dropped rows outside
      the clusters are lost. :func:`recycled_clusters` makes the clusters, whose centres ``keep`` must contain.

    Parameters
    ----------
    x : Tensor
        ``[B, N, D]``; as for :func:`weighted_merge`.
    keep : Tensor
        int64 ``[B, K]``: distinct rows of ``x`` in any order, -1 for padding.
    how : {"prumerge", "visionzip", "sparsevlm"}
    metric : Tensor
        Floating point ``[B, N, C]``, keys: PruMerge's of all heads side by side, VisionZip's averaged over heads.
    scores : Tensor
        Floating point ``[B, N]``.
    targets : Tensor
        bool ``[B, N]``.
    clusters : Tensor
        int64 ``[B, N]``: the row of the centre of each row's cluster, -1 for none.
    droppable : Tensor, optional
        bool ``[B, N]``: rows that take part; the others neither give nor receive. Default: all.
    neighbours : int
        For PruMerge.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Tensor
        ``[B, K, D]``, rows as in ``keep``, 0 for padding. A row that receives nothing is copied exactly.

    Raises
    ------
    ValueError, TypeError
        What ``how`` needs is missing; shapes, dtypes or devices that do not fit together.

    Notes
    -----
    Of equal cosines the lower row (for VisionZip: the first in ``keep``) counts as nearer. Differentiable in ``x`` and
    ``scores``. One weighted gather, two with PruMerge's extra token; the cosines are ``[B, K, N]``.

    Sources: LLaVA-PruMerge (ICCV 2025), token supplement; VisionZip (CVPR 2025), contextual tokens, as its code has them: the
    target plus the mean; SparseVLM (ICML 2025), token recycling (v1).

    Examples
    --------
    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]]])
    >>> targets = torch.tensor([[False, True, False, False]])
    >>> merge_dropped(x, torch.tensor([[0, 1]]), "visionzip", metric=x, targets=targets)
    tensor([[[1.0000, 0.0000],
             [1.5000, 3.5000]]])
    """
    _checks.one_of("how", how, HOWS)
    _checks.hidden("x", x, False)
    _integers("keep", keep, x, "K")
    batch, n, _ = x.shape
    needs = {"prumerge": {"metric": metric, "scores": scores}, "visionzip": {"metric": metric, "targets": targets},
             "sparsevlm": {"clusters": clusters}}[how]  # fmt: skip
    for name, given in needs.items():
        if given is None:
            raise ValueError(f"{name} must be given for how={how!r}")
    if metric is not None:
        _rows_of("metric", metric, x)
    if scores is not None:
        _floats("scores", scores, x, n)
    _mask("targets", targets, x)
    _mask("droppable", droppable, x)
    if clusters is not None:
        _integers("clusters", clusters, x, "N")
        if clusters.shape[1] != n:
            raise ValueError(f"clusters must be [B, N] = [{batch}, {n}], got {list(clusters.shape)}")
    _count("neighbours", neighbours)

    k, real = keep.shape[1], keep >= 0
    if k == 0 or n == 0:
        return weighted_merge(x, keep.new_zeros(batch, k + 1), keep[:, :0], backend=backend)
    slot = torch.full((batch, n + 1), k, device=x.device).scatter_(
        1, torch.where(real, keep, n), torch.arange(k, device=x.device).expand(batch, k)
    )[:, :n]  # [B, N] where in keep each row stands, k: dropped
    may = torch.ones((batch, n), dtype=torch.bool, device=x.device) if droppable is None else droppable
    if how == "prumerge":
        assert metric is not None and scores is not None  # noqa: PT018
        return _prumerge(x, keep, slot, metric, scores, targets, may, neighbours, backend)
    dropped = may & (slot == k)
    if how == "sparsevlm":
        assert clusters is not None
        centre = slot.gather(1, clusters.clamp(min=0))
        offsets, rows = groups(torch.where(dropped, torch.where(clusters >= 0, centre, k), slot), k)
        return weighted_merge(x, offsets, rows, mean=True, backend=backend)
    assert metric is not None and targets is not None  # noqa: PT018
    with torch.no_grad():
        at = keep.clamp(min=0)
        receives = real & targets.gather(1, at)  # [B, K]
        similar = _cosines(metric, metric.gather(1, at[:, :, None].expand(-1, -1, metric.shape[2])))  # [B, N, K]
        nearest = similar.masked_fill(~receives[:, None], -torch.inf).argmax(2)
        goes = dropped & receives.any(1, keepdim=True)
        target = torch.where(goes, nearest, slot)
        offsets, rows = groups(target, k)
        came = torch.zeros((batch, k + 1), device=x.device).scatter_add_(1, torch.where(goes, target, k), goes.float())
        share = torch.where(goes, 1 / came.gather(1, target).clamp(min=1), 1.0)
    return weighted_merge(x, offsets, rows, share.gather(1, rows), backend=backend)


def _prumerge(
    x: torch.Tensor, keep: torch.Tensor, slot: torch.Tensor, metric: torch.Tensor, scores: torch.Tensor,
    targets: torch.Tensor | None, may: torch.Tensor, neighbours: int, backend: str | None,
) -> torch.Tensor:  # fmt: skip
    (batch, n, _), k = x.shape, keep.shape[1]
    m = min(neighbours, max(n - 1, 0))
    with torch.no_grad():
        at = keep.clamp(min=0)
        index = torch.arange(n, device=x.device)
        similar = _cosines(metric.gather(1, at[:, :, None].expand(-1, -1, metric.shape[2])), metric)  # [B, K, N]
        other = may[:, None] & (index != at[:, :, None])  # a row is no neighbour of its own
        near = ranked(similar, other)[:, :, :m]
        gives = other.gather(2, near) & may.gather(1, at)[:, :, None]
        # What is no neighbour becomes the row itself, with weight 0: no foreign NaN comes in.
        rows = torch.cat([at[:, :, None], torch.where(gives, near, at[:, :, None])], 2)  # [B, K, 1 + m]
        offsets = torch.arange(0, (1 + m) * (k + 1), 1 + m, device=x.device).expand(batch, k + 1)
    weights = torch.where(gives, scores.gather(1, near.flatten(1)).view(near.shape), 0.0)
    weights = torch.cat([torch.ones_like(weights[:, :, :1]) if m else weights.new_ones(batch, k, 1), weights], 2)
    out = weighted_merge(x, offsets, rows.flatten(1), weights.flatten(1), backend=backend)
    if targets is not None:
        lost = may & ((slot == k) | targets)
        ends, members = groups((~lost).long(), 1)
        rest = weighted_merge(x, ends, members, scores.gather(1, members), backend=backend)
        out = torch.where(targets.gather(1, at)[:, :, None], rest, out)
    return torch.where((keep >= 0)[:, :, None], out, 0.0)


def contextual_targets(kept: torch.Tensor, count: int | torch.Tensor, *, droppable: torch.Tensor | None = None) -> torch.Tensor:
    """VisionZip's contextual tokens: ``count`` rows at uniform stride among those that are not kept.

    Parameters
    ----------
    kept : Tensor
        bool ``[B, N]``: the dominant rows.
    count : int or Tensor
        Targets per item, or int64 ``[B]`` on the device of ``kept``; fewer where fewer rows are left.
    droppable : Tensor, optional
        bool ``[B, N]``: rows that may be chosen; default all.

    Returns
    -------
    Tensor
        bool ``[B, N]``: of the ``m`` rows left, the 1st, the (1 + s)th, ... with ``s = max(1, m // count)``.

    Raises
    ------
    ValueError, TypeError
        A mask that is not bool ``[B, N]``.

    Notes
    -----
    Source: VisionZip (CVPR 2025), contextual tokens. Equivalent plain torch, for one item: ``left = (~kept).nonzero()[:, 0]``, then
    ``left[::s][:count]``, without waiting for the device.

    Examples
    --------
    >>> contextual_targets(torch.tensor([[True, False, False, False, False, True]]), 2).nonzero()[:, 1]
    tensor([1, 3])
    """
    _checks.tensor("kept", kept)
    _mask("kept", kept, kept)
    _mask("droppable", droppable, kept)
    left = ~kept if droppable is None else ~kept & droppable
    wanted = torch.as_tensor(count, device=kept.device).reshape(-1, 1) if isinstance(count, int) else count[:, None]
    stride = (left.sum(1, keepdim=True) // wanted.clamp(min=1)).clamp(min=1)
    nth = left.cumsum(1) - 1
    return left & (nth % stride == 0) & (nth // stride < wanted)


def recycled_clusters(
    x: torch.Tensor, scores: torch.Tensor, dropped: torch.Tensor, *, share: float = 0.3, neighbours: int | None = None
) -> torch.Tensor:
    """SparseVLM's token recycling: cluster the best of the dropped tokens around density peaks (DPC-KNN).

    Of the ``m`` dropped rows of an item the ``n = int(share * m)`` of highest score are clustered around ``n // 10 + 1`` centres.
    Density is ``exp(-mean d^2)`` over the nearest rows, itself included, with ``d`` the Euclidean distance over ``sqrt(D)``; the
    centres have the highest products of density and distance to the nearest denser row; every row joins its nearest centre.

    Parameters
    ----------
    x : Tensor
        Floating point ``[B, N, D]``: what is clustered, the hidden states.
    scores : Tensor
        Floating point ``[B, N]``.
    dropped : Tensor
        bool ``[B, N]``.
    share : float
        Which part of the dropped rows is recycled.
    neighbours : int, optional
        Rows that density looks at; default the number of centres, as released.

    Returns
    -------
    Tensor
        int64 ``[B, N]``: the row of the centre of each recycled row, -1 elsewhere; ``clusters == arange(N)`` are the centres, which
        must be kept for :func:`merge_dropped` to place the means.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit together; ``share`` outside [0, 1].

    Notes
    -----
    Deterministic: of equal densities the lower row counts as denser, where the released code adds random noise of 1e-6; of
    equal products and distances the lower row wins. Carries no gradient, and does not wait for the device: ``n`` may differ
    between items. Distances below 1e-6 of the rows' norms count as 0. Memory is quadratic in ``share * N``.

    Source: SparseVLM (ICML 2025), token recycling; density peaks: Rodriguez and Laio, Science 2014.

    Examples
    --------
    >>> x = torch.tensor([[[0.0], [0.1], [5.0], [0.0], [0.2]]])
    >>> recycled_clusters(x, torch.arange(5.0)[None], torch.tensor([[True, True, False, True, True]]), share=0.8)
    tensor([[-1,  1, -1,  1,  1]])
    """
    _checks.hidden("x", x, False)
    batch, n, d = x.shape
    _floats("scores", scores, x, n)
    _checks.tensor("dropped", dropped)
    _mask("dropped", dropped, x)
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    most = int(share * n)  # rows that any item may recycle
    with torch.no_grad():
        clusters = torch.full((batch, n), -1, device=x.device)
        if most == 0 or batch == 0:
            return clusters
        count = (dropped.sum(1, keepdim=True).double() * share).long()  # [B, 1]
        centres = torch.where(count > 0, count // 10 + 1, 0)
        slots = torch.arange(most, device=x.device)
        real = slots < count  # [B, R]
        # The recycled rows in position order, so that the first of equals is the lower row.
        row = torch.where(real, ranked(scores, dropped)[:, :most], n).sort(dim=1).values
        at = row.clamp(max=n - 1)
        features = x.gather(1, at[:, :, None].expand(-1, -1, d))
        distance = _distances(features) / max(d, 1) ** 0.5
        pair = real[:, :, None] & real[:, None, :]
        around = (centres if neighbours is None else torch.full_like(count, neighbours)).clamp(max=count.clamp(min=1))[:, :, None]
        nearest = distance.masked_fill(~pair, torch.inf).sort(dim=2).values
        density = torch.exp(-torch.where(slots < around, nearest.square(), 0.0).sum(2) / around[:, :, 0])
        density = torch.where(real, density, 0.0)
        # Masked entries of nearest are inf, but only rows that are masked themselves read them.
        denser = (density[:, None, :] > density[:, :, None]) | (
            (density[:, None, :] == density[:, :, None]) & (slots < slots[:, None])
        )
        farthest = distance.masked_fill(~pair, 0.0).amax((1, 2), keepdim=True)
        apart = torch.where(denser & pair, distance, farthest).amin(2)
        order = ranked(density * apart, real)
        centre = torch.zeros_like(real).scatter_(1, order, slots < centres) & real
        joined = distance.masked_fill(~centre[:, None, :], torch.inf).argmin(2)
        joined = torch.where(centre, slots, joined)
        padded = torch.full((batch, n + 1), -1, device=x.device)
        return padded.scatter_(1, row, torch.where(real, at.gather(1, joined), -1))[:, :n]


def _cosines(a: torch.Tensor, b: torch.Tensor, wide: torch.dtype = torch.float32) -> torch.Tensor:
    """Cosines ``[B, I, J]`` of all rows of ``a [B, I, C]`` with all rows of ``b [B, J, C]``; 0 where a row is zero."""
    wide = torch.promote_types(wide, torch.float64) if a.dtype == torch.float64 else wide
    unit = lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    a, b = unit(a.detach().to(wide)), unit(b.detach().to(wide))
    with _full_precision(a.device.type):
        return a @ b.transpose(1, 2)


def _full_precision(kind: str) -> Any:
    """Without autocast, which would let a decision hang on half precision."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def _distances(x: torch.Tensor) -> torch.Tensor:
    """Euclidean distances ``[B, I, I]`` of the rows of ``x``; 0 below 1e-6 of the rows' norms.

    From products in float64, 13 times as fast as by differences on a CPU. They cancel to about 1e-8 of the norms, not to 0,
    where rows are equal; rounded to float32, equal distances come out equal as well.
    """
    products = x.double() @ x.double().transpose(1, 2)
    norms = products.diagonal(dim1=1, dim2=2)
    norms = norms[:, :, None] + norms[:, None]
    squares = norms - 2 * products
    return torch.where(squares > 1e-12 * norms, squares, 0.0).sqrt().to(torch.promote_types(x.dtype, torch.float32))


def _integers(name: str, t: Any, x: torch.Tensor, width: str) -> None:
    _checks.tensor(name, t)
    if t.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {t.dtype}")
    if t.dim() != 2 or t.shape[0] != x.shape[0]:
        raise ValueError(f"{name} must be [B, {width}] with B = {x.shape[0]}, got {list(t.shape)}")
    _checks.same_device(name, t, x.device, "x")


def _floats(name: str, t: Any, x: torch.Tensor, n: int) -> None:
    _checks.tensor(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")
    if t.shape != (x.shape[0], n):
        raise ValueError(f"{name} must be {[x.shape[0], n]}, got {list(t.shape)}")
    _checks.same_device(name, t, x.device, "x")


def _rows_of(name: str, t: Any, x: torch.Tensor) -> None:
    _checks.tensor(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")
    if t.dim() != 3 or t.shape[:2] != x.shape[:2]:
        raise ValueError(f"{name} must be [B, N, C] with [B, N] = {list(x.shape[:2])}, got {list(t.shape)}")
    _checks.same_device(name, t, x.device, "x")


def _mask(name: str, t: Any, x: torch.Tensor) -> None:
    if t is None:
        return
    _checks.tensor(name, t)
    if t.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {t.dtype}")
    if t.dim() != 2 or t.shape != x.shape[:2]:
        raise ValueError(f"{name} must be [B, N] = {list(x.shape[:2])}, got {list(t.shape)}")
    _checks.same_device(name, t, x.device, "x")


def _count(name: str, n: Any) -> None:
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {n!r}")


def _kernels() -> Any:
    from ._triton import merge

    return merge


def _launch(x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None, mean: bool) -> torch.Tensor:
    return _kernels().weighted_merge(x, offsets, rows, weights, mean)


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None, mean: bool,
    both: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients in ``x``, through the edges sorted by source row, and, if ``both``, in ``weights`` (else an empty tensor)."""
    run, (_, n, _), k, edges = _kernels(), x.shape, offsets.shape[1] - 1, rows.shape[1]
    weights = torch.ones(rows.shape, device=x.device) if weights is None else weights
    own = torch.arange(edges, device=x.device).expand(rows.shape).contiguous()
    sums = lambda values: run.weighted_merge(values[:, :, None], offsets, own, None, False)[:, :, 0]
    target = torch.searchsorted(offsets[:, 1:].contiguous(), own, right=True)  # [B, E] output row of each edge
    used = (own >= offsets[:, :1]) & (target < k)
    target = torch.where(used, target, k)
    if mean:
        whole = sums(weights)
        inverse = torch.where(whole == 0, 0.0, 1 / torch.where(whole == 0, 1.0, whole))
        grad = inverse[:, :, None] * grad.float()
    grad = _checks.unit_stride(grad)
    back, order = groups(torch.where(used, rows, n), n)
    d_x = run.weighted_merge(grad, back, target.gather(1, order), weights.gather(1, order), False, x.dtype)
    if not both:
        return d_x, x.new_empty(0, dtype=torch.float32)
    dots = run.row_dots(x, grad, rows, target)
    if mean:  # a weight also lessens the share of its neighbours
        dots = dots - torch.nn.functional.pad(inverse * sums(weights * dots), (0, 1)).gather(1, target)
    return d_x, dots


class _WeightedMerge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None, mean: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x, offsets, rows, weights)
        ctx.mean = mean
        return _launch(x, offsets, rows, weights, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, offsets, rows, weights = ctx.saved_tensors
        both = ctx.needs_input_grad[3]
        d_x, d_weights = _gradients(grad, x, offsets, rows, weights, ctx.mean, both)
        return d_x, None, None, d_weights if both else None, None


def _fake(x: Any, offsets: Any, rows: Any, weights: Any, mean: bool) -> torch.Tensor:
    return x.new_empty((x.shape[0], offsets.shape[1] - 1, x.shape[2]))


def _backward_fake(
    grad: Any, x: Any, offsets: Any, rows: Any, weights: Any, mean: bool, both: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), rows.new_empty(rows.shape if both else 0, dtype=torch.float32)


_SIGNATURE = "Tensor x, Tensor offsets, Tensor rows, Tensor? weights, bool mean"
_library._define(f"weighted_merge({_SIGNATURE}) -> Tensor", _fake)(_launch)
_library._define(f"weighted_merge_backward(Tensor grad, {_SIGNATURE}, bool both) -> (Tensor, Tensor)", _backward_fake)(_gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.mean = inputs[4]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    both = ctx.needs_input_grad[3]
    d_x, d_weights = ops.weighted_merge_backward(grad, *ctx.saved_tensors, ctx.mean, both)
    return d_x, None, None, d_weights if both else None, None


torch.library.register_autograd(add_op_namespace_prefix("weighted_merge"), _backward, setup_context=_setup, lib=_library._lib)
