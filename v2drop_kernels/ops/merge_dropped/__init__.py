"""merge_dropped: dropped rows are merged into kept ones, as in PruMerge, VisionZip and SparseVLM.

Keys or features decide, without a gradient, which rows are merged; gradients pass through the sums, to the rows and the weights.
"""

from __future__ import annotations

from typing import cast

import torch

from ...core import arguments
from ...core.deprecated import argument
from ..weighted_merge import weighted_merge
from ..weighted_merge.arguments import count, floats, integers, mask, rows_of
from .kept import Kept
from .prumerge import merge_neighbours
from .sparsevlm import merge_clusters
from .visionzip import merge_into_targets

HOWS = ("prumerge", "visionzip", "sparsevlm")


@argument("metric", "features")
def merge_dropped(
    x: torch.Tensor,
    keep: torch.Tensor,
    how: str,
    *,
    features: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    clusters: torch.Tensor | None = None,
    droppable: torch.Tensor | None = None,
    neighbours: int = 32,
    backend: str | None = None,
) -> torch.Tensor:
    """The kept rows after dropped ones were merged into them.

    * ``"prumerge"`` (needs ``features``, ``scores``): a kept row gets the sum of its ``neighbours`` nearest other rows by cosine of
      ``features``, kept or dropped, weighted by ``scores`` (attention of the class token), added. The row in ``targets``, where
      there is one, becomes the sum of all dropped rows and itself, weighted by ``scores``: PruMerge's extra token.
    * ``"visionzip"`` (needs ``features``, ``targets``): every dropped row is assigned to the target row of highest cosine; the mean
      of the rows assigned to a target is added to it. :func:`contextual_targets` chooses the targets, which ``keep`` must contain.
    * ``"sparsevlm"`` (needs ``clusters``): the row of a cluster's centre becomes the mean of the cluster; the dropped rows outside
      the clusters are lost. :func:`recycled_clusters` makes the clusters, whose centres ``keep`` must contain.

    Parameters
    ----------
    x : Tensor
        ``[B, N, D]``; as for :func:`weighted_merge`.
    keep : Tensor
        int64 ``[B, K]``: distinct rows of ``x`` in any order, -1 for padding.
    how : {"prumerge", "visionzip", "sparsevlm"}
    features : Tensor
        Floating point ``[B, N, C]``: what is compared. Both papers take keys, PruMerge those of all heads side by side, VisionZip
        their average over heads.
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
    >>> merge_dropped(x, torch.tensor([[0, 1]]), "visionzip", features=x, targets=targets)
    tensor([[[1.0000, 0.0000],
             [1.5000, 3.5000]]])
    """
    arguments.one_of("how", how, HOWS)
    arguments.hidden("x", x, False)
    integers("keep", keep, x, "K")
    batch, n, _ = x.shape
    needs = {"prumerge": {"features": features, "scores": scores}, "visionzip": {"features": features, "targets": targets},
             "sparsevlm": {"clusters": clusters}}[how]  # fmt: skip
    for name, given in needs.items():
        if given is None:
            raise ValueError(f"{name} must be given for how={how!r}")
    if features is not None:
        rows_of("features", features, x)
    if scores is not None:
        floats("scores", scores, x, n)
    mask("targets", targets, x)
    mask("droppable", droppable, x)
    if clusters is not None:
        integers("clusters", clusters, x, "N")
        if clusters.shape[1] != n:
            raise ValueError(f"clusters must be [B, N] = [{batch}, {n}], got {list(clusters.shape)}")
    count("neighbours", neighbours)

    k, real = keep.shape[1], keep >= 0
    if k == 0 or n == 0:
        return weighted_merge(x, keep.new_zeros(batch, k + 1), keep[:, :0], backend=backend)
    slot = torch.full((batch, n + 1), k, device=x.device).scatter_(
        1, torch.where(real, keep, n), torch.arange(k, device=x.device).expand(batch, k)
    )[:, :n]  # [B, N] where in keep each row stands, k: dropped
    everywhere = torch.ones((batch, n), dtype=torch.bool, device=x.device) if droppable is None else droppable
    kept = Kept(keep, slot, everywhere)
    if how == "prumerge":
        return merge_neighbours(x, kept, cast(torch.Tensor, features), cast(torch.Tensor, scores), targets, neighbours, backend)
    if how == "sparsevlm":
        return merge_clusters(x, kept, cast(torch.Tensor, clusters), backend)
    return merge_into_targets(x, kept, cast(torch.Tensor, features), cast(torch.Tensor, targets), backend)
