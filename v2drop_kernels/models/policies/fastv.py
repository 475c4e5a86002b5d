"""FastV: attention of the last prompt token in the block before the stage, mean over heads.

``s_i = 1/H sum_h softmax(q_last K^T / sqrt(d))[i]`` in block ``L - 1``, over all keys that the last token sees; the drop is before
block ``L`` (the paper's K, 0-based). Source: FastV (ECCV 2024), section 4. As in the released code the last
token's row is used, where the text says the mean over all tokens. The code runs one layer with eager attention to read its weights;
here one query is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.schedule import Schedule, Stage
from ..context import DropContext
from ..policy import FLOAT32, Method, Policy


@dataclass(frozen=True)
class FastV(Policy):
    """No options."""

    method = Method(
        paper="FastV, ECCV 2024, section 4",
        where="decoder",
        score="last token's attention in the block before, mean over heads",
        needs_weights=True,
        deviations=FLOAT32,
        presets=(
            Schedule(
                (Stage(3, 0.5, policy="fastv"),),
                "fastv",
                "FastV, K = 3 and R = 50 %: half of the tokens before layer 3, scored by the last token's attention",
            ),
        ),
    )

    def score(self, context: DropContext) -> torch.Tensor:
        return context.attention(context.layer - 1, context.previous("the attention of a block before it"))
