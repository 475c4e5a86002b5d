"""LLaVA-PruMerge and PruMerge+: CLS attention of one wide head picks tokens, and the others flow into them by their keys.

``s = softmax(q_cls K^T C^-0.5)`` over the whole width ``C`` in the last block of CLIP. Kept are the patches of highest ``s`` and,
in PruMerge+, some at uniform stride among the others; each gets the ``s``-weighted sum of its 32 nearest patches by cosine of
keys added, and one extra token is the ``s``-weighted sum of all that were dropped. Merging is done on the tower's features, which
the projector then embeds, as published. ``adaptive=True`` takes, in place of the stage's budget, as many patches as have outlying
``s``, above the third quartile by 1.5 interquartile ranges, and adds samples to these: with ``uniform=0.75`` three per outlier.
Source: LLaVA-PruMerge (ICCV 2025), section 3, and its released code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.arguments import require_int
from ...core.schedule import Schedule, Stage
from ...ops.merge_dropped import merge_dropped
from ...ops.merge_dropped.visionzip import contextual_targets
from ..adapters import ModelAdapter
from ..adapters.tower import TOWER, record_cls
from ..context import DropContext
from ..policy import FLOAT32, Method, Policy
from ..ranking import Ranking
from ..tiles import Tiles, check_entry


def _preset(name: str, n: int, what: str, uniform: float) -> Schedule:
    stage = Stage(0, n / 576, "prumerge", rounding="round", options={"uniform": uniform})
    return Schedule((stage,), f"{name}-{n}", f"{what}, {n} of 576 tokens per picture, the extra one included")


@dataclass(frozen=True)
class PruMerge(Policy):
    """``uniform``: share of the kept patches that PruMerge+ samples; ``neighbours``; ``extra`` token; ``layer`` of the tower;
    ``adaptive``: budgets by outliers, samples added, which the host reads once per forward (LLaVA-1.5's one tile per picture, all
    of it droppable, only)."""

    method = Method(
        paper="LLaVA-PruMerge, ICCV 2025, section 3",
        where="before the decoder",
        score="single-head CLS attention in the tower's last block; the rest merged by keys",
        needs_weights=False,
        order="score, the extra token last",
        positions="compacted",
        deviations="position order, the extra token at the best dropped patch; by default a fixed budget, split evenly over "
        "pictures; PruMerge+ samples among the patches that are left, with adaptive=True three per outlier, where the code takes "
        "every int(int(1 / share of outliers) / 3)-th patch (24 outliers: 97 tokens here, 94 there); newlines of LLaVA-NeXT stay "
        "and count; " + FLOAT32,
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
        if self.adaptive and self.uniform == 1:
            raise ValueError("uniform must be below 1 with adaptive, which adds samples to outliers until they are that share")

    def register_hooks(self, adapter: ModelAdapter, tower_cache: dict[str, Any]) -> Iterator[Any]:
        if self.adaptive and (adapter.kind != "llava" or adapter.config.vision_feature_select_strategy != "default"):
            raise ValueError(f"adaptive must be False for {adapter.kind!r} where features are not just all the patches of a tile")
        return record_cls(adapter, tower_cache, [self.layer])

    def counts(self, left: Sequence[int], kept: Sequence[int], tower_cache: dict[str, Any]) -> tuple[int, ...]:
        if not self.adaptive or not any(left):
            return super().counts(left, kept, tower_cache)
        tower = tower_cache.get(TOWER)
        if tower is None or not tower.queries:
            raise ValueError(
                "pixel_values must go through the model's own vision tower in this forward: the policy ranks by what it saw"
            )
        attention = tower.cls(self.layer, "single-head")
        tiles, width = attention.shape
        copies = max(sum(left) // (tiles * width), 1)  # generate() repeats every item for beams
        items = left[::copies]
        if sum(items) != tiles * width or any(n % width for n in items) or list(left) != [n for n in items for _ in range(copies)]:
            raise ValueError(
                f"spans must cover every picture whole where budgets are adaptive: {tiles} pictures of {width} tokens went through "
                f"the vision tower, and the items have {tuple(left)} left"
            )
        quartiles = attention.quantile(torch.linspace(0.25, 0.75, 2, device=attention.device), dim=1, keepdim=True)
        outlying = (attention > quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])).sum(1)
        # Samples come on top: as many as make them the share `uniform` of both.
        sampled = (outlying.double() * (self.uniform / (1 - self.uniform))).round().long()
        tower_cache["adaptive"] = outlying, sampled
        found = iter((outlying + sampled + int(self.extra)).clamp(max=width).tolist())
        per_item = [sum(next(found) for _ in range(n // width)) for n in items]
        return tuple(n for n in per_item for _ in range(copies))

    def score(self, context: DropContext) -> Ranking:
        check_entry(context)
        tiles = Tiles(context)
        attention = tiles.cls(self.layer, "single-head")
        rank = tiles.rank(attention)
        if self.adaptive:
            best_ones, sampled = context.tower_cache["adaptive"]
        else:
            budget = (tiles.even(tiles.budget()) - int(self.extra)).clamp(min=0)
            sampled = (budget.double() * self.uniform).floor().long()
            best_ones = budget - sampled
        top = rank < best_ones[:, None]
        chosen = top | contextual_targets(top, sampled, droppable=tiles.present)
        # The rank of the best patch that is left, whose row the extra token takes.
        best = rank.masked_fill(chosen | ~tiles.present, rank.shape[1]).amin(1, keepdim=True)
        target = (rank == best) & tiles.present & self.extra
        context.tower_cache["prumerge"] = attention, target
        return tiles.ranking(2 * chosen + target, rank)

    def merge(self, context: DropContext, kept: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        tiles = Tiles(context)
        attention, target = context.tower_cache.pop("prumerge")
        keep, keys = tiles.rows(kept), tiles.tower.keys[self.layer][:, 1:]
        merged = merge_dropped(
            tiles.features, keep, "prumerge", features=keys, scores=attention, targets=target if self.extra else None,
            droppable=tiles.present, neighbours=self.neighbours, backend=context.backend,
        )  # fmt: skip
        return tiles.embed(keep, merged, kept, hidden)
