"""PyramidDrop: attention of the last instruction token, with the projections of the stage's own block.

``s_i = 1/H sum_h softmax(q_last K^T / sqrt(d))[i]`` with block ``L``'s norm and projections on its own input; the drop is before
block ``L``. The query is the last token of the prompt; in training, where ``labels`` are given, the token before each answer, and
``s`` is the mean over these. Source: PyramidDrop (CVPR 2025), section 3, and its released code: half of what is left before
blocks 8, 16 and 24 of 32. Published with compacted ids, which here are ``TokenDropper("pdrop", positions="compacted")``:
positions are the dropper's option, persistent by default for all methods, so that rankings alone can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.schedule import Schedule, Stage
from ..context import DropContext
from ..policy import FLOAT32, Method, Policy


@dataclass(frozen=True)
class PDrop(Policy):
    """No options."""

    method = Method(
        paper="PyramidDrop, CVPR 2025, section 3",
        where="decoder",
        score="last instruction token's attention by the next block's projections, mean over heads and rounds",
        needs_weights=False,
        positions="compacted",
        deviations="in training, an item without an answer drops by its last row, where the code drops nothing of it; " + FLOAT32,
        presets=(
            Schedule(
                tuple(Stage(layer, 0.5, policy="pdrop") for layer in (8, 16, 24)),
                "pdrop",
                "PyramidDrop's released code (32 blocks): half of the tokens before layers 8, 16 and 24",
            ),
        ),
    )

    def score(self, context: DropContext) -> torch.Tensor:
        rows = context.last if context.labels is None else context.answers()
        return context.attention(context.layer, context.hidden, rows)
