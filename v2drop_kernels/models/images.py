"""Budgets per image: every run of placeholders competes within itself (``Schedule(per="image")``)."""

from __future__ import annotations

import torch

from ..core.schedule import Stage
from ..ops.host_ints import host_ints
from ..ops.topk.order import ranked
from .adapters.spans import Spans
from .context import DropContext
from .ranking import Ranking
from .text import prompt_rows

Counts = tuple[tuple[int, ...], ...]  # of every item, of every run


def run_counts(stage: Stage, left: Counts, last_stays: tuple[bool, ...]) -> Counts:
    """What the stage keeps of every run; the run that ends the prompt keeps its last row."""
    kept = [[stage.count(n) for n in item] for item in left]
    for item, stays in zip(kept, last_stays, strict=True):
        if stays:
            item[-1] = max(item[-1], 1)
    return tuple(map(tuple, kept))


def by_image(context: DropContext, scores: torch.Tensor | Ranking, spans: Spans, keep: Counts, rows: int) -> Ranking:
    """The ranking in which the best ``keep`` rows of every run of an item precede its others.

    ``spans`` are the runs among the ``rows`` of the prompt. An item's top rows are then the best of every run.
    """
    droppable = context.droppable
    values = scores.ordinals(droppable) if isinstance(scores, Ranking) else scores
    run = torch.zeros(len(spans), rows, dtype=torch.int64, device=values.device)
    for item, pairs in enumerate(spans):
        for number, (start, stop) in enumerate(pairs):
            run[item, start:stop] = number  # filled on the device, not copied to it
    most = max(map(len, keep))
    count = host_ints([n for item in keep for n in (*item, *[0] * (most - len(item)))], values.device).view(len(keep), most)
    order = ranked(values, droppable)
    mine, present = prompt_rows(context, run).gather(1, order), droppable.gather(1, order)
    each = (mine[..., None] == torch.arange(most, device=values.device)) & present[..., None]
    place = each.cumsum(1).gather(2, mine[..., None])[..., 0]  # from 1, within the run
    chosen = present & (place <= count.gather(1, mine))
    return Ranking(values, torch.zeros_like(order).scatter_(1, order, chosen.long()))
