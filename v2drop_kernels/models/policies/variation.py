"""V2Drop's score: how much the previous block changed a token.

``s_i = ||x_i(L) - x_i(L - 1)||`` of the inputs of blocks ``L`` and ``L - 1``; ``Stage.metric`` says L2, L1 or cosine. It is scored,
selected and compacted in one call. Source: V2Drop, section 3 and Algorithm 1. Presets: ``v2drop_kernels.schedule.presets()``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import schedule
from ..policy import Method, Policy, Stop


@dataclass(frozen=True)
class Variation(Policy):
    """No options: ``Stage(3, 0.5, metric="l2")``."""

    method = Method(
        paper="V2Drop, section 3",
        where="decoder",
        score="norm of the last block's change",
        needs_weights=False,
        presets=tuple(map(schedule.preset, schedule.presets())),
    )

    def score(self, at: Stop) -> torch.Tensor | None:
        if at.before is None:
            raise ValueError("the policy 'variation' needs tokens that a block has changed: not where they enter the model")
        return None
