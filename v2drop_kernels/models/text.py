"""Which rows are the instruction, for scores by text, and the rows of the prompt that they were."""

from __future__ import annotations

import torch

from .context import DropContext


def text_rows(context: DropContext) -> torch.Tensor:
    """bool ``[B, N]``: the text behind an item's first droppable row, which can attend to it; if there is none, the last row."""
    droppable = context.droppable
    text = context.visible & ~droppable & (droppable.cumsum(1) > 0)
    last = torch.arange(text.shape[1], device=text.device) == context.last
    return text | (last & ~text.any(1, keepdim=True))


def numbers(context: DropContext, chosen: torch.Tensor) -> torch.Tensor:
    """int64 ``[B, Q]``: the row numbers of ``chosen``, a subset of :func:`text_rows`, ascending; -1 where an item has fewer.

    ``Q`` is an upper bound from host integers, because the number of chosen rows is on the device only.
    """
    layout = context.layout
    starts = [spans[0][0] if spans else lo for spans, (lo, _) in zip(layout.spans, layout.bounds, strict=True)]
    most = max((hi - start - n for start, (_, hi), n in zip(starts, layout.bounds, context.counts, strict=True)), default=0)
    return context.row_indices(chosen, max(most, 1))


def prompt_rows(context: DropContext, table: torch.Tensor) -> torch.Tensor:
    """``[B, N0, ...]`` of the prompt's rows as ``[B, N, ...]`` of the present rows; padding repeats the prompt's first row."""
    if context.origin is None:
        return table
    rows = context.origin.clamp(min=0)
    return table[torch.arange(rows.shape[0], device=rows.device)[:, None], rows]
