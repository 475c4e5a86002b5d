"""HiDivDrop: attention of the last text token, or of one token per round, computed again for those queries only.

``s_i = 1/H sum_h softmax(q K^T / sqrt(d))[i]`` with the norm and projections of block ``L`` on its own input, then the mean
over the queries, or their L2 norm; the drop is before block ``L``. Source: HiDivDrop, section 3.3 and appendix F.3. The paper's
filter layers 10, 14, 16 and 18 are these 0-based blocks; its injection at 9 and exit at 25 are before blocks 8 and 24 in the
released code. The presets are the counts of the released scripts, with averages of 64.0, 48.0 and 80.03 of 576 tokens; the one
for 80 has other filter layers. Train it with ``TokenDropper("hidivdrop-64", soft=True)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.schedule import Schedule, Stage
from ..context import DropContext
from ..policy import FLOAT32, Method, Policy


def _preset(average: int, *counts: int, layers: tuple[int, ...] = (10, 14, 16, 18)) -> Schedule:
    stages = [Stage(layer, k, policy="hidivdrop") for layer, k in zip((*layers, 24), (*counts, 0), strict=True)]
    source = f"HiDivDrop's released scripts for LLaVA-1.5-7B (32 blocks): {list(counts)} tokens before layers {list(layers)}"
    return Schedule(tuple(stages), f"hidivdrop-{average}", source, inject=8)


@dataclass(frozen=True)
class HiDivDrop(Policy):
    """Options.

    Attributes
    ----------
    tokens : {"rounds", "last", "all"}
        Which tokens are queries. "rounds": the token before each answer if labels are given (training; their number is read on the
        host), otherwise the last token; "last": the last token; "all": all text tokens.
    queries : {"mean", "l2"}
        How the queries of an item become one.
    """

    tokens: str = "rounds"
    queries: str = "mean"

    method = Method(
        paper="HiDivDrop, section 3",
        where="decoder",
        score="last token's attention by the next block's projections, mean over heads and rounds",
        needs_weights=False,
        deviations="the published top-k passes no gradient on, soft=True does; in training, an item without an answer drops by its "
        "last row, where the code drops nothing of it; " + FLOAT32,
        presets=(
            _preset(64, 215, 10, 5, 1),
            _preset(48, 87, 10, 5, 1),
            _preset(80, 453, 10, 5, 1, layers=(10, 13, 16, 19)),
        ),
    )

    def __post_init__(self) -> None:
        if self.tokens not in ("rounds", "last", "all"):
            raise ValueError(f"tokens must be 'rounds', 'last' or 'all', got {self.tokens!r}")
        if self.queries not in ("mean", "l2"):
            raise ValueError(f"queries must be 'mean' or 'l2', got {self.queries!r}")

    def score(self, context: DropContext) -> torch.Tensor:
        rows = context.last
        if self.tokens == "all":
            most = max(hi - lo - n for (lo, hi), n in zip(context.layout.bounds, context.counts, strict=True))
            rows = context.row_indices(context.visible & ~context.droppable, max(1, most))
            rows[:, :1] = torch.where(rows[:, :1] < 0, context.last, rows[:, :1])  # nothing but vision tokens
        elif self.tokens == "rounds" and context.labels is not None:
            rows = context.answers()
        return context.attention(context.layer, context.hidden, rows, queries=self.queries)
