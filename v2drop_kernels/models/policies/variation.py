"""V2Drop's score: how much the previous block changed a token.

``s_i = ||x_i(L) - x_i(L - 1)||`` of the inputs of blocks ``L`` and ``L - 1``; ``Stage.metric`` says L2, L1 or cosine. Scoring,
selection and compaction are one call. Source: V2Drop, section 3 and Algorithm 1. This module needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.presets import PRESETS
from ..policy import Method, Policy

if TYPE_CHECKING:
    from ..context import DropContext


@dataclass(frozen=True)
class Variation(Policy):
    """No options: ``Stage(3, 0.5, metric="l2")``."""

    method = Method(
        paper="V2Drop, section 3",
        where="decoder",
        score="norm of the last block's change",
        needs_weights=False,
        deviations="differences and norms stay in float32, where the code rounds both to the model's dtype; score_dtype= of "
        "TokenDropper rounds them too, and of tokens with equal rounded scores at the cut the first ones are kept, where "
        "torch.topk of the code keeps any",
        presets=PRESETS,
    )

    def score(self, context: DropContext) -> None:
        context.previous("tokens that a block has changed")
