"""VTW (visual tokens withdrawal): from one block on, all vision tokens are dropped, so no score is needed.

The drop is before block ``L`` (the paper's K, 0-based: blocks 0 to L - 1 see all tokens). Position ids of the text are kept by
default, as in the released code. Source: VTW (AAAI 2025); K = 15 for LLaVA-1.5-7B. How K is found there (the KL
divergence of the last token's logits, one pass per candidate) is not part of a policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.schedule import Schedule, Stage
from ..context import DropContext
from ..policy import Method, Policy


@dataclass(frozen=True)
class VTW(Policy):
    """No options: ``Stage(15, 0, policy="vtw")``."""

    method = Method(
        paper="VTW, AAAI 2025",
        where="decoder",
        score="none: all vision tokens are dropped",
        needs_weights=False,
        presets=(Schedule((Stage(15, 0, policy="vtw"),), "vtw", "VTW, K = 15 of 32 blocks (LLaVA-1.5-7B): average 270 of 576"),),
    )

    def count(self, n: int, k: int) -> int:
        if k:
            raise ValueError(f"keep must be 0 for the policy 'vtw', which withdraws all vision tokens, got {k} of {n}")
        return 0

    def score(self, context: DropContext) -> torch.Tensor:
        return context.hidden.new_zeros(context.hidden.shape[:2], dtype=torch.float32)
