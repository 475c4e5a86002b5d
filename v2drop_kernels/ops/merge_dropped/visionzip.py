"""VisionZip's contextual tokens: which rows they are, and the merge of the dropped rows into them."""

from __future__ import annotations

import torch

from ...core import arguments
from ..similarity.pairwise import cosines
from ..weighted_merge import weighted_merge
from ..weighted_merge.arguments import mask
from ..weighted_merge.groups import groups
from .kept import Kept


def merge_into_targets(
    x: torch.Tensor, kept: Kept, features: torch.Tensor, targets: torch.Tensor, backend: str | None = None
) -> torch.Tensor:
    """Every dropped row is assigned to the target of highest cosine; the mean of its assigned rows is added to a target."""
    keep, slot, _ = kept
    k = keep.shape[1]
    with torch.no_grad():
        at = keep.clamp(min=0)
        receives = (keep >= 0) & targets.gather(1, at)  # [B, K]
        similar = cosines(features, features.gather(1, at[:, :, None].expand(-1, -1, features.shape[2])))  # [B, N, K]
        nearest = similar.masked_fill(~receives[:, None], -torch.inf).argmax(2)
        goes = kept.dropped & receives.any(1, keepdim=True)
        target = torch.where(goes, nearest, slot)
        offsets, rows = groups(target, k)
        came = torch.zeros((x.shape[0], k + 1), device=x.device).scatter_add_(1, torch.where(goes, target, k), goes.float())
        share = torch.where(goes, 1 / came.gather(1, target).clamp(min=1), 1.0)
    return weighted_merge(x, offsets, rows, share.gather(1, rows), backend=backend)


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
    arguments.tensor("kept", kept)
    mask("kept", kept, kept)
    mask("droppable", droppable, kept)
    left = ~kept if droppable is None else ~kept & droppable
    wanted = torch.full((1, 1), count, device=kept.device) if isinstance(count, int) else count[:, None]
    stride = (left.sum(1, keepdim=True) // wanted.clamp(min=1)).clamp(min=1)
    nth = left.cumsum(1) - 1
    return left & (nth % stride == 0) & (nth // stride < wanted)
