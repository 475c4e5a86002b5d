"""From a target for every row to the lists of edges of a merge."""

from __future__ import annotations

import torch


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
