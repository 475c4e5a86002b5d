"""FasterVLM: attention of the vision tower's CLS token to the patches, mean over heads, before the decoder.

``s_i = 1/H sum_h softmax(q_cls K^T / sqrt(d))[i]`` in the second-last block of CLIP (whose output LLaVA takes); every picture
keeps as many, tiles of LLaVA-NeXT too. Source: FasterVLM (arXiv 2412.01818), section 3; it is now VisPruner. Published: 192, 128
or 64 tokens per picture, positions counted anew (``positions="compacted"`` here).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...core.schedule import Schedule, Stage
from ..adapters import ModelAdapter
from ..adapters.tower import record_cls
from ..context import DropContext
from ..policy import FLOAT32, Method, Policy
from ..ranking import Ranking
from ..tiles import Tiles


@dataclass(frozen=True)
class FasterVLM(Policy):
    """``layer``: block of the tower, from its end when negative."""

    method = Method(
        paper="FasterVLM, arXiv 2412.01818, section 3",
        where="before the decoder",
        score="attention of the tower's CLS token, mean over heads",
        needs_weights=True,
        positions="compacted",
        deviations="newlines of LLaVA-NeXT stay, as published, but count; patches that it unpads never compete; " + FLOAT32,
        presets=tuple(
            Schedule(
                (Stage(0, n / 576, "fastervlm", rounding="round"),), f"fastervlm-{n}", f"FasterVLM, {n} of 576 tokens per picture"
            )
            for n in (192, 128, 64)
        ),
    )
    layer: int = -2

    def register_hooks(self, adapter: ModelAdapter, tower_cache: dict[str, Any]) -> Iterator[Any]:
        return record_cls(adapter, tower_cache, [self.layer])

    def score(self, context: DropContext) -> Ranking:
        tiles = Tiles(context)
        rank = tiles.rank(tiles.cls(self.layer, "mean"))
        return tiles.ranking(rank < tiles.even(tiles.budget())[:, None], rank)
