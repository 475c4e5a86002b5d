"""The offsets of packed batches, and their longest item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .arguments import host_cu_seqlens, is_tensor


def longest_item(offsets: Sequence[int]) -> int:
    """Rows of the longest item of a packed batch."""
    return max([stop - start for start, stop in zip(offsets[:-1], offsets[1:], strict=True)], default=0)


def kept_max_seqlen(rows: int, cu_seqlens: Any, *, traced: bool) -> int:
    """The most rows that an item can have of ``rows`` kept ones: all, or as many as it had where the host has the lengths.

    It is the same on every device: the exact number is in the offsets of the result, and reading those from a GPU would
    synchronise.
    """
    if is_tensor(cu_seqlens) and (traced or cu_seqlens.device.type != "cpu"):
        return rows
    return min(longest_item(host_cu_seqlens(cu_seqlens)), rows)
