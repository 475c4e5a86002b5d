"""LLaVA-PruMerge and PruMerge+: CLS attention of one wide head picks tokens, and the others flow into them by their keys.

``s = softmax(q_cls K^T C^-0.5)`` over the whole width ``C`` in the last block of CLIP. Kept are the patches of highest ``s`` and,
in PruMerge+, some at uniform stride among the others; each gets the ``s``-weighted sum of its 32 nearest patches by cosine of
keys added, and one extra token is the ``s``-weighted sum of all that were dropped. Merging is done on the tower's features, which
the projector then embeds, as published. ``adaptive=True`` takes, in place of the stage's budget, as many patches as have outlying
``s``: above the third quartile by 1.5 interquartile ranges. Source: LLaVA-PruMerge (ICCV 2025), section 3, and its released code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...layout import require_int
from ...merge import contextual_targets, merge_dropped
from ...schedule import Schedule, Stage
from .._tower import SEEN, Tiles, check_entry, watch_cls
from ..policy import Method, Policy, Stop


def _preset(name: str, n: int, what: str, uniform: float) -> Schedule:
    stage = Stage(0, n / 576, "prumerge", rounding="round", options={"uniform": uniform})
    return Schedule((stage,), f"{name}-{n}", f"{what}, {n} of 576 tokens per picture, the extra one included")


@dataclass(frozen=True)
class PruMerge(Policy):
    """``uniform``: share of the kept patches that PruMerge+ samples; ``neighbours``; ``extra`` token; ``layer`` of the tower;
    ``adaptive``: budgets by outliers, which the host reads once per forward (LLaVA-1.5's one tile per picture only)."""

    method = Method(
        paper="LLaVA-PruMerge, ICCV 2025, section 3",
        where="before the decoder",
        score="single-head CLS attention in the tower's last block; the rest merged by keys",
        needs_weights=False,
        order="score, the extra token last",
        positions="compacted",
        deviations="position order, the extra token at the best dropped patch; by default a fixed budget, split evenly over "
        "pictures; PruMerge+ samples among the patches that are left; newlines of LLaVA-NeXT stay and count",
        presets=(
            *(_preset("prumerge", n, "LLaVA-PruMerge", 0.0) for n in (192, 128, 64, 32)),
            _preset("prumerge-plus", 144, "LLaVA-PruMerge+, three uniform samples per token of high attention", 0.75),
        ),
    )
    uniform: float = 0.0
    neighbours: int = 32
    extra: bool = True
    layer: int = -1
    adaptive: bool = False

    def __post_init__(self) -> None:
        require_int("neighbours", self.neighbours)
        if not 0 <= self.uniform <= 1:
            raise ValueError(f"uniform must lie in [0, 1], got {self.uniform!r}")

    def watch(self, family: Any, seen: dict[str, Any]) -> Iterator[Any]:
        if self.adaptive and (family.kind != "llava" or family.config.vision_feature_select_strategy != "default"):
            raise ValueError(f"adaptive must be False for {family.kind!r} where features are not just all the patches of a tile")
        return watch_cls(family, seen, [self.layer])

    def counts(self, left: Sequence[int], kept: Sequence[int], seen: dict[str, Any]) -> tuple[int, ...]:
        if not self.adaptive or not any(left):
            return super().counts(left, kept, seen)
        tower = seen[SEEN]
        attention = tower.cls(self.layer, "single-head")
        quartiles = attention.quantile(torch.tensor([0.25, 0.75], device=attention.device), dim=1, keepdim=True)
        outlying = (attention > quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])).sum(1)
        seen["outlying"] = outlying
        width, found = attention.shape[1], outlying.tolist()
        copies, counts, first = sum(left) // (width * len(found)), [], 0  # generate() repeats every item for beams
        for item, n in enumerate(left):
            tiles = n // width
            counts.append(sum(min(m + self.extra, width) for m in found[first : first + tiles]))
            first += tiles if (item + 1) % copies == 0 else 0
        return tuple(counts)

    def score(self, at: Stop) -> torch.Tensor:
        check_entry(at)
        tiles = Tiles(at)
        attention = tiles.cls(self.layer, "single-head")
        budget = at.seen["outlying"] if self.adaptive else (tiles.even(tiles.budget()) - int(self.extra)).clamp(min=0)
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
