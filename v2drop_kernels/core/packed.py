"""The offsets of packed batches, and their longest item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .arguments import check_offsets, host_cu_seqlens, is_tensor
from .plan import offsets_on

if TYPE_CHECKING:
    import torch


def longest_item(offsets: Sequence[int]) -> int:
    """Rows of the longest item of a packed batch."""
    return max([stop - start for start, stop in zip(offsets[:-1], offsets[1:], strict=True)], default=0)


def kept_offsets(keep: torch.Tensor, cu_seqlens: Any, rows: int, *, traced: bool) -> torch.Tensor:
    """New offsets of a packed batch from its kept rows, on the device: an item's rows are those inside its old offsets."""
    if is_tensor(cu_seqlens) and (traced or cu_seqlens.device.type != "cpu"):
        check_offsets(cu_seqlens)
        old = cu_seqlens
    else:
        old = offsets_on(host_cu_seqlens(cu_seqlens, rows), keep.device, traced=traced)
    old = old.to(keep.device)[:, None]
    return ((keep >= 0) & (keep < old)).sum(1).int()


def kept_max_seqlen(rows: int, cu_seqlens: Any, *, traced: bool) -> int:
    """The most rows that an item can have of ``rows`` kept ones: all, or as many as it had where the host knows that.

    It is the same on every device: the exact number is in the offsets of the result, and reading those from a GPU would
    synchronise.
    """
    if is_tensor(cu_seqlens) and (traced or cu_seqlens.device.type != "cpu"):
        return rows
    return min(longest_item(host_cu_seqlens(cu_seqlens)), rows)


def kept_items(keep: torch.Tensor, cu_seqlens: Any, rows: int, longest: int | None, *, traced: bool) -> tuple[torch.Tensor, int]:
    """:func:`kept_offsets`, and the rows of the longest item: ``longest`` where they are known, else :func:`kept_max_seqlen`."""
    new = kept_offsets(keep, cu_seqlens, rows, traced=traced)
    return new, kept_max_seqlen(keep.shape[0], cu_seqlens, traced=traced) if longest is None else longest
