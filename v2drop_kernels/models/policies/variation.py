"""V2Drop's score: how much the previous block changed a token; and V2Drop's presets.

``s_i = ||x_i(L) - x_i(L - 1)||`` of the inputs of blocks ``L`` and ``L - 1``; ``Stage.metric`` says L2, L1 or cosine. Scoring,
selection and compaction are one call. Source: V2Drop, section 3 and Algorithm 1. This module needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.schedule import Schedule, Stage
from ..policy import Method, Policy

if TYPE_CHECKING:
    from ..context import DropContext

_SUPPLEMENT = "V2Drop, supplement: LLaVA-1.5-7B (32 blocks), drop {} % before layers 3, 17 and 22; one token stays, as in the code"
_ONE_TIME = (
    "V2Drop's ablation of one-time dropping; the paper prints neither layer nor count, so: layer 3, and of LLaVA-1.5's 576 "
    "tokens the count whose average is nearest to the progressive preset's {}"
)


def _v2drop(name: str, dropped: Mapping[int, float], source: str) -> Schedule:
    return dataclasses.replace(Schedule.from_paper("v2drop", dropped, at_least=1), name=name, source=source)


PRESETS = (
    _v2drop("v2drop-192", {3: 50, 17: 70, 22: 100}, _SUPPLEMENT.format("50/70/100")),
    _v2drop("v2drop-128", {3: 72, 17: 75, 22: 100}, _SUPPLEMENT.format("72/75/100")),
    _v2drop("v2drop-64", {3: 95, 17: 95, 22: 100}, _SUPPLEMENT.format("95/95/100")),
    _v2drop(
        "v2drop-released",
        {3: 50, 17: 50, 22: 100},
        "V2Drop's released LLaVA code: drop 50/50/100 % before layers 3, 17 and 22, one token stays",
    ),
    _v2drop(
        "v2drop-qwen2-vl",
        {3: 75, 16: 95, 22: 100},
        "V2Drop's released Qwen2-VL-7B code (28 blocks): drop 75/95/100 % before layers 3, 16 and 22, one token stays",
    ),
    Schedule((Stage(3, 0.2674),), "one-time-192", _ONE_TIME.format(193.75)),
    Schedule((Stage(3, 0.1476),), "one-time-128", _ONE_TIME.format("131.0")),
    Schedule((Stage(3, 0.0244),), "one-time-64", _ONE_TIME.format(66.72)),
)


@dataclass(frozen=True)
class Variation(Policy):
    """No options: ``Stage(3, 0.5, metric="l2")``."""

    method = Method(
        paper="V2Drop, section 3",
        where="decoder",
        score="norm of the last block's change",
        needs_weights=False,
        presets=PRESETS,
    )

    def score(self, context: DropContext) -> None:
        context.previous("tokens that a block has changed")
