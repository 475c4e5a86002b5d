"""VisionZip: dominant tokens by the tower's CLS attention, and contextual tokens that the rest of the tile is merged into.

Of every picture the ``d`` patches with the highest ``s_i = sum_h softmax(q_cls K^T / sqrt(d_h))[i]`` in the second-last block of
CLIP stay as they are. Of the others ``c`` at uniform stride are targets; each remaining patch goes to the target of highest
cosine of keys (that block's, averaged over heads), and a target becomes itself plus the mean of what came. Merging is done on the
tower's features, which the projector then embeds, as published. Source: VisionZip (CVPR 2025), section 3, and its released code
for the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...core.arguments import require_int
from ...core.schedule import Schedule, Stage
from ...ops.merge_dropped import merge_dropped
from ...ops.merge_dropped.visionzip import contextual_targets
from ..adapters import ModelAdapter
from ..adapters.tower import record_cls
from ..context import DropContext
from ..policy import FLOAT32, Method, Policy
from ..ranking import Ranking
from ..tiles import Tiles, check_entry


def _preset(n: int, contextual: int) -> Schedule:
    stage = Stage(0, n / 576, "visionzip", rounding="round", options={"contextual": contextual})
    return Schedule(
        (stage,), f"visionzip-{n}", f"VisionZip, {n - contextual} dominant and {contextual} contextual tokens per picture"
    )


@dataclass(frozen=True)
class VisionZip(Policy):
    """``contextual``: targets of every tile, within its even share of what the stage keeps; ``layer``: block of the tower."""

    method = Method(
        paper="VisionZip, CVPR 2025, section 3",
        where="before the decoder",
        score="attention of the tower's CLS token, sum over heads; the rest merged by keys",
        needs_weights=True,
        order="dominant by position, then contextual",
        positions="compacted",
        deviations="position order; CLS, one of the published dominant tokens, has no row: one more patch takes its place; "
        "newlines of LLaVA-NeXT stay and count, and patches that it unpads take no part; " + FLOAT32,
        presets=(_preset(192, 30), _preset(128, 20), _preset(64, 10)),
    )
    contextual: int = 30
    layer: int = -2

    def __post_init__(self) -> None:
        require_int("contextual", self.contextual)

    def register_hooks(self, adapter: ModelAdapter, tower_cache: dict[str, Any]) -> Iterator[Any]:
        return record_cls(adapter, tower_cache, [self.layer])

    def score(self, context: DropContext) -> Ranking:
        check_entry(context)
        tiles = Tiles(context)
        budget = tiles.even(tiles.budget())
        contextual = budget.clamp(max=self.contextual)
        rank = tiles.rank(tiles.cls(self.layer, "sum"))
        dominant = rank < (budget - contextual)[:, None]
        targets = contextual_targets(dominant, contextual, droppable=tiles.present)
        context.tower_cache["visionzip"] = targets
        return tiles.ranking(2 * dominant + targets, rank)

    def merge(self, context: DropContext, kept: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        tiles = Tiles(context)
        targets = context.tower_cache.pop("visionzip")
        keep = tiles.rows(kept)
        keys = tiles.tower.keys[self.layer][:, 1:].unflatten(-1, (tiles.tower.heads, -1)).mean(2)
        merged = merge_dropped(
            tiles.features, keep, "visionzip", features=keys, targets=targets, droppable=tiles.present, backend=context.backend
        )
        return tiles.embed(keep.masked_fill(~targets.gather(1, keep.clamp(min=0)), -1), merged, kept, hidden)
