"""Which rows of a stop are the instruction: what scores by text ask, and the rows of the prompt they came from."""

from __future__ import annotations

import torch

from .context import Stop


def text_rows(at: Stop) -> torch.Tensor:
    """bool ``[B, N]``: the text behind an item's first droppable row, which is the text that can see one; else its last row."""
    droppable = at.droppable
    text = at.visible & ~droppable & (droppable.cumsum(1) > 0)
    last = torch.arange(text.shape[1], device=text.device) == at.last
    return text | (last & ~text.any(1, keepdim=True))


def numbers(at: Stop, chosen: torch.Tensor) -> torch.Tensor:
    """int64 ``[B, Q]``: the row numbers of ``chosen``, a part of :func:`text_rows`, ascending; -1 where an item has fewer.

    ``Q`` is a bound that the host knows: how many are chosen, only the device does.
    """
    layout = at.layout
    starts = [spans[0][0] if spans else lo for spans, (lo, _) in zip(layout.spans, layout.bounds, strict=True)]
    most = max((hi - start - n for start, (_, hi), n in zip(starts, layout.bounds, at.counts, strict=True)), default=0)
    return at.rows_of(chosen, max(most, 1))


def prompt_rows(at: Stop, table: torch.Tensor) -> torch.Tensor:
    """``[B, N0, ...]`` of the prompt's rows as ``[B, N, ...]`` of the stop's; padding repeats the prompt's first row."""
    if at.origin is None:
        return table
    rows = at.origin.clamp(min=0)
    return table[torch.arange(rows.shape[0], device=rows.device)[:, None], rows]
