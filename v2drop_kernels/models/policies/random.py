"""Seeded random scores: the control for every ranking.

Draws depend on the run's seed, the layer and the item's tokens alone, not on its neighbours in the batch or on padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ops.random_score import random_score
from ..context import DropContext
from ..policy import Method, Policy


@dataclass(frozen=True)
class Random(Policy):
    """No options; ``TokenDropper(seed=)``."""

    method = Method(paper="control", where="decoder", score="seeded random numbers", needs_weights=False)
    seeded: ClassVar[bool] = True

    def score(self, context: DropContext) -> torch.Tensor:
        number = context.droppable.cumsum(1).sub(1).clamp(min=0)  # counted from the item's first droppable row
        return random_score(context.hidden, item_seeds=context.seeds).gather(1, number)
