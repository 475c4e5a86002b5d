"""The kept rows of a merge, as its three methods need them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Kept(NamedTuple):
    """Which rows are kept, and which take part.

    Attributes
    ----------
    keep : Tensor
        int64 ``[B, K]``, -1 for padding.
    slot : Tensor
        int64 ``[B, N]``: the column of ``keep`` that names each row; ``K`` for a dropped row.
    droppable : Tensor
        bool ``[B, N]``: the rows that take part.
    """

    keep: torch.Tensor
    slot: torch.Tensor
    droppable: torch.Tensor

    @property
    def dropped(self) -> torch.Tensor:
        """bool ``[B, N]``: the rows that take part and are not kept."""
        return self.droppable & (self.slot == self.keep.shape[1])
