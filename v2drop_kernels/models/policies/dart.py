"""DART: keep a few pivots and the tokens that are least similar to them; it ranks by duplication, not by importance.

Before block ``L``, with the post-RoPE keys of block ``L - 1`` (L1 norm over all heads together) and the final-normed input
``x`` of block ``L``: the ``pivots`` vision tokens and the ``text_pivots`` tokens of the text behind them with the largest key
norms are pivots. In ascending row order each pivot takes from the vision tokens that are left the ``m`` with the lowest cosine
to it: ``m = floor((k - pivots) / (pivots + text_pivots))``. Kept: the vision pivots and what was taken, which is ``pivots + m
(pivots + text_pivots)`` and may be a few less than the budget (124 for 128); of a budget below ``pivots``, the first pivots. Equal
norms and cosines: the lower row first. Source: DART, EMNLP 2025 (as ports of its code compute it): L = 2 for LLaVA-1.5-7B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.schedule import Schedule, Stage
from ...ops.host_ints import host_ints
from ...ops.similarity import cosine_to_pivots, key_norm_score
from ...ops.topk.order import ranked
from ..context import DropContext
from ..parallel import sum_over_ranks
from ..policy import FLOAT32, Method, Policy
from ..ranking import Ranking
from ..text import text_rows


def _preset(k: int, kept: int) -> Schedule:
    source = f"DART, LLaVA-1.5-7B: {k} of 576 as the budget, {kept} kept before block 2, average {(2 * 576 + 30 * kept) / 32:g}"
    return Schedule((Stage(2, kept, policy="dart"),), f"dart-{k}", source)


@dataclass(frozen=True)
class DART(Policy):
    """``pivots`` vision and ``text_pivots`` text pivots, 4 and 4 as published."""

    pivots: int = 4
    text_pivots: int = 4

    method = Method(
        paper="DART, EMNLP 2025",
        where="decoder",
        score="least cosine to pivots of large key norm",
        needs_weights=False,
        order="pivot by pivot",
        deviations="pivots in ascending order, where the code iterates over a Python set, whose order is arbitrary; an item with "
        "fewer text tokens than text_pivots splits its budget among the pivots that it has; " + FLOAT32,
        presets=(_preset(192, 188), _preset(128, 124), _preset(64, 60)),
    )

    def __post_init__(self) -> None:
        if self.pivots < 0 or self.text_pivots < 0 or not self.pivots + self.text_pivots:
            raise ValueError(f"pivots must be at least one in all, got {self.pivots} and text_pivots {self.text_pivots}")

    def count(self, n: int, k: int) -> int:
        total = self.pivots + self.text_pivots
        return k if k >= n or k <= self.pivots else self.pivots + total * ((k - self.pivots) // total)

    def score(self, context: DropContext) -> Ranking:
        prev_hidden = context.previous("the keys of a block before it")
        _, keys = context.project(context.layer - 1, prev_hidden, context.last)
        norms = sum_over_ranks(key_norm_score(keys, norm="l1", backend=context.backend), context.adapter.group)
        vision = context.droppable
        vision_pivots = _top(norms, vision, self.pivots)
        text_pivots = _top(norms, text_rows(context), self.text_pivots)
        pivots = torch.cat([context.row_indices(vision_pivots, self.pivots), context.row_indices(text_pivots, self.text_pivots)], 1)
        # Only forward: the final norm's hooks belong to the session.
        cosines = cosine_to_pivots(context.adapter.norm.forward(context.hidden), pivots, backend=context.backend)
        left = host_ints(context.keep, norms.device)[:, None] - vision_pivots.sum(1, keepdim=True)
        share = -(-left // (pivots >= 0).sum(1, keepdim=True).clamp(min=1))  # without remainder if all pivots exist, by `count`
        pool, place = vision & ~vision_pivots, torch.arange(vision.shape[1], device=vision.device)
        # Vision pivots are kept first, then what the first pivot takes, then the second's, and so on.
        tier = vision_pivots * (pivots.shape[1] + 1)
        scores = torch.zeros_like(cosines[:, 0])
        for i, cosine in enumerate(cosines.unbind(1)):
            order = cosine.masked_fill(~pool, torch.inf).argsort(dim=1, stable=True)
            taken = torch.zeros_like(pool).scatter_(1, order, place < share) & pool
            tier = torch.where(taken, pivots.shape[1] - i, tier)
            scores = torch.where(taken, -cosine, scores)
            pool &= ~taken
        return Ranking(scores, tier)


def _top(norms: torch.Tensor, among: torch.Tensor, n: int) -> torch.Tensor:
    """bool ``[B, N]``: the ``n`` rows of ``among`` with the largest norms."""
    first = torch.arange(norms.shape[1], device=norms.device) < n
    return torch.zeros_like(among).scatter_(1, ranked(norms, among), first.expand(among.shape)) & among
