"""LLaVA-PruMerge and PruMerge+: CLS attention of one wide head picks tokens, and the others flow into them by their keys.

``s = softmax(q_cls K^T C^-0.5)`` over the whole width ``C`` in the last block of CLIP. Kept are the patches of highest ``s`` and,
in PruMerge+, some at uniform stride among the others; each gets the ``s``-weighted sum of its 32 nearest patches by cosine of
keys added, and one extra token is the ``s``-weighted sum of all that were dropped. Merging is done on the tower's features, which
the projector then embeds, as published. Source: LLaVA-PruMerge (ICCV 2025), section 3, and its
released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...layout import require_int
from ...merge import contextual_targets, merge_dropped
from ...schedule import Schedule, Stage
from .._tower import Tiles, check_entry, watch_cls
from ..policy import Method, Policy, Stop


def _preset(name: str, n: int, what: str, uniform: float) -> Schedule:
    stage = Stage(0, n / 576, "prumerge", rounding="round", options={"uniform": uniform})
    return Schedule((stage,), f"{name}-{n}", f"{what}, {n} of 576 tokens per picture, the extra one included")


@dataclass(frozen=True)
class PruMerge(Policy):
    """``uniform``: share of the kept patches that PruMerge+ samples; ``neighbours``; ``extra`` token; ``layer`` of the tower."""

    method = Method(
        paper="LLaVA-PruMerge, ICCV 2025, section 3",
        where="before the decoder",
        score="single-head CLS attention in the tower's last block; the rest merged by keys",
        needs_weights=False,
        order="score, the extra token last",
        positions="compacted",
        deviations="position order, the extra token at the best dropped patch; a fixed budget, split evenly over pictures, in "
        "place of the share of outliers; PruMerge+ samples among the patches that are left; newlines of LLaVA-NeXT stay and count",
        presets=(
            *(_preset("prumerge", n, "LLaVA-PruMerge", 0.0) for n in (192, 128, 64, 32)),
            _preset("prumerge-plus", 144, "LLaVA-PruMerge+, three uniform samples per token of high attention", 0.75),
        ),
    )
    uniform: float = 0.0
    neighbours: int = 32
    extra: bool = True
    layer: int = -1

    def __post_init__(self) -> None:
        require_int("neighbours", self.neighbours)
        if not 0 <= self.uniform <= 1:
            raise ValueError(f"uniform must lie in [0, 1], got {self.uniform!r}")

    def watch(self, family: Any, seen: dict[str, Any]) -> Iterator[Any]:
        return watch_cls(family, seen, [self.layer])

    def score(self, at: Stop) -> torch.Tensor:
        check_entry(at)
        tiles = Tiles(at)
        attention = tiles.cls(self.layer, "single-head")
        budget = (tiles.even(tiles.budget()) - int(self.extra)).clamp(min=0)
        rank = tiles.rank(attention)
        sampled = (budget.double() * self.uniform).floor().long()
        top = rank < (budget - sampled)[:, None]
        chosen = top | contextual_targets(top, sampled, droppable=tiles.present)
        # The rank of the best patch that is left, whose row the extra token takes.
        best = rank.masked_fill(chosen | ~tiles.present, rank.shape[1]).amin(1, keepdim=True)
        target = (rank == best) & tiles.present & self.extra
        at.seen["prumerge"] = attention, target
        return tiles.score(2 * chosen + target, rank)

    def merge(self, at: Stop, kept: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        tiles = Tiles(at)
        attention, target = at.seen.pop("prumerge")
        keep, keys = tiles.rows(kept), tiles.tower.keys[self.layer][:, 1:]
        merged = merge_dropped(
            tiles.features, keep, "prumerge", metric=keys, scores=attention, targets=target if self.extra else None,
            droppable=tiles.present, neighbours=self.neighbours, backend=at.backend,
        )  # fmt: skip
        return tiles.embed(keep, merged, kept, hidden)
