"""Scores of the caller: ``TokenDropper(schedule, scores=callable)``, for your own ranking model, or for experiments.

The callable takes the :class:`~v2drop_kernels.models.DropContext` and returns float ``[B, N]``, higher means keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..context import DropContext
from ..policy import Method, Policy


@dataclass(frozen=True)
class Given(Policy):
    """No options."""

    method = Method(paper="-", where="decoder", score="given by the caller", needs_weights=False)

    def score(self, context: DropContext) -> torch.Tensor:
        return context.given_scores()
