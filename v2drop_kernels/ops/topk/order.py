"""The selection order of the package, in plain PyTorch: what sort-based ops share."""

from __future__ import annotations

import torch

_INDEX_BITS = 32


def ranked(scores: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """Rows ``[..., N]`` by (score descending, index ascending), NaN first, -0.0 equal to 0.0; rows outside ``among`` last.

    One sort of 64-bit keys, the score's bits above the index: all differ, so it need not be stable, and nothing else is sorted.
    """
    if scores.dtype == torch.float64:  # no room for the index
        order = scores.argsort(dim=-1, descending=True, stable=True)
        if among is not None:
            order = order.gather(-1, among.gather(-1, order).to(torch.uint8).argsort(dim=-1, descending=True, stable=True))
        return order
    wide = scores.detach().float()
    wide = torch.where(wide.isnan(), torch.nan, torch.where(wide == 0, 0.0, wide))  # one NaN, one zero
    bits = wide.view(torch.int32)
    falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))  # the larger the score, the smaller this integer
    if among is not None:
        falling = torch.where(among, falling, 0x7FFFFFFF)  # beyond that of -inf
    index = torch.arange(scores.shape[-1], device=scores.device)
    keys = (falling.long() << _INDEX_BITS) | index
    return keys.sort(dim=-1).values & ((1 << _INDEX_BITS) - 1)
