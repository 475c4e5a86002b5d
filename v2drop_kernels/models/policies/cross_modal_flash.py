"""Cross-modal weighted pruning in its FlashAttention form: dot products of the last instruction token with the image tokens.

``s_v = 1/H sum_h q_last . k_v / sqrt(d)`` with block ``L``'s norm and projections on its own input, rotated, no softmax; the drop
is before block ``L``. Source: cross-modal weighted pruning, supplement C ("similar to PDrop"). It names neither layers nor head
reduction: the mean over heads is ours, and so are the layers of the presets, the paper's first one and then PyramidDrop's three
quarters. Every stage keeps one share, solved for so that averages are those of tables 3 (LLaVA-1.5-7B, 32 blocks) and 4 (13B, 40).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.budgets import solve
from ...core.schedule import Schedule
from ..context import DropContext
from ..policy import Method, Policy


def solved(policy: str, name: str, average: int, depth: int) -> Schedule:
    """One preset of either form: drops before block 1 and before each later quarter of the blocks."""
    layers = (1, depth // 4, depth // 2, 3 * depth // 4)
    model = {32: "7B", 40: "13B"}[depth]
    found = solve(average=average, layers=layers, n=576, depth=depth, name=f"{name}-{average}", policy=policy)
    source = (
        f"cross-modal weighted pruning at an average of {average} on LLaVA-1.5-{model}; layers are ours, the share is solved for"
    )
    return Schedule(found.stages, found.name, source)


BUDGETS = ((192, 32), (128, 32), (64, 32), (288, 40), (144, 40), (58, 40))


FLOPS = (
    "the FLOPs in the table are those of the vision tokens alone, where the paper's 42.9, 33.7 and 23.2 % at 192, 128 and 64 "
    "tokens count the text too (with 96 text tokens the presets leave 42.3, 32.8 and 23.4 %)"
)


@dataclass(frozen=True)
class CrossModalFlash(Policy):
    """No options."""

    method = Method(
        paper="cross-modal weighted pruning, supplement C",
        where="decoder",
        score="dot product of the last token's query with the keys, mean over heads",
        needs_weights=False,
        deviations=f"layers of the stages and reduction over heads, which the paper does not give; {FLOPS}",
        presets=tuple(solved("cross_modal_flash", "cross-modal-flash", *budget) for budget in BUDGETS),
    )

    def score(self, context: DropContext) -> torch.Tensor:
        return context.attention(context.layer, context.hidden, mode="dot")
