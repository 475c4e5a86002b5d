"""Position ids after a drop, in the three modes that HiDivDrop compares (section 4.3 and Table 10 of the paper).

*persistent*: a token keeps the id that it was given at the input (best in the paper, and V2Drop's choice).
*compacted*: the kept rows of every item are numbered 0, 1, 2, ... anew (PyramidDrop).
*group*: vision and text have disjoint ranges, given once and never updated: the droppable tokens of an item are numbered
from 0, the others follow from the number of droppable tokens on, so generation continues at the same id as without grouping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .layout import TokenLayout

if TYPE_CHECKING:
    import torch

MODES = ("persistent", "compacted", "group")


def group_position_ids(layout: TokenLayout, device: torch.device | str = "cpu") -> torch.Tensor:
    """Group ids of the *input* rows: int64 ``[B, N]`` (``[T]`` packed); 0 on padding. Pass them on as persistent ids.

    Parameters
    ----------
    layout : TokenLayout
        Where the droppable tokens are.
    device : device
        The device of the result.

    Examples
    --------
    >>> group_position_ids(TokenLayout.padded((1, 3), 5, batch=1)).tolist()
    [[2, 0, 1, 3, 4]]
    """
    import torch

    droppable = layout.droppable_rows(device)
    ids = torch.zeros(droppable.shape, dtype=torch.int64, device=device)
    for i, (lo, hi) in enumerate(layout.bounds):
        row, out = (droppable, ids) if layout.is_packed else (droppable[i], ids[i])
        vision = row[lo:hi]
        # Running counts, so that nothing is read back to the host.
        among_vision = vision.cumsum(0) - 1
        among_text = (~vision).cumsum(0) - 1 + vision.sum()
        out[lo:hi] = torch.where(vision, among_vision, among_text)
    return ids


def compacted_position_ids(keep: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Compacted ids of the *kept* rows, shaped like ``keep``; 0 on padding.

    Parameters
    ----------
    keep : Tensor
        int64 ``[B, S]``, -1 for padding, or packed ``[T']``.
    cu_seqlens : Tensor | None
        int32 ``[B + 1]`` of the packed result.
    """
    import torch

    if cu_seqlens is None:
        real = keep >= 0
        return torch.where(real, real.cumsum(-1) - 1, 0)
    rows = torch.arange(keep.shape[0], device=keep.device)
    item = torch.searchsorted(cu_seqlens[1:].long(), rows, right=True).clamp(max=cu_seqlens.shape[0] - 2)
    return torch.where(keep >= 0, rows - cu_seqlens[item], 0)


def like(ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """New ids in the dtype of the given ones, and with their leading planes (M-RoPE's three)."""
    if position_ids is None:
        return ids
    ids = ids.to(position_ids.dtype)
    return ids if position_ids.dim() == ids.dim() else ids.expand(position_ids.shape[0], *ids.shape).contiguous()
