"""HiRED: a budget for every tile by where the CLS token looks early, and the choice in each by where it looks late.

Of an image's ``k`` tokens the tile of the whole image gets ``floor(alpha k)``. The others are split over the tiles in proportion
to how many of the whole image's top ``(1 - alpha) P`` patches, by CLS attention in the first block, lie where the tile lies. Each
tile then keeps its best by CLS attention in the second-last block (sums over heads). Newlines of LLaVA-NeXT go first. Source:
HiRED (arXiv 2408.10945), section 4, and its code: 20 % of the tokens, alpha 0.5, positions counted anew
(``positions="compacted"``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...core.schedule import Schedule, Stage
from ...ops.host_ints import host_ints
from ...ops.topk.order import ranked
from ..adapters import ModelAdapter
from ..adapters.tower import record_cls
from ..context import DropContext
from ..policy import FLOAT32, Method, Policy
from ..ranking import Ranking
from ..tiles import Tiles


def _preset(keep: float, name: str, what: str) -> Schedule:
    return Schedule((Stage(0, keep, "hired", rounding="round"),), name, f"HiRED, {what}, alpha 0.5")


@dataclass(frozen=True)
class HiRED(Policy):
    """``alpha``: share of the whole image; ``early``, ``late``: blocks of the tower, from its end when negative."""

    method = Method(
        paper="HiRED, arXiv 2408.10945, section 4",
        where="before the decoder",
        score="CLS attention in the second-last block, budgets per tile by the first",
        needs_weights=False,
        positions="compacted",
        deviations="k is a share of the prompt's tokens, not of all tiles'; what rounding leaves over, or a tile lacks, goes to "
        "the best ranks that are left; several images share the item's k by their tiles; a tile's budget counts the patches of the "
        "whole image that lie where the tile lies, where the code counts strips of consecutive rows, which is the same for one "
        "column of tiles only; " + FLOAT32,
        presets=(
            _preset(0.2, "hired-20", "20 % of the tokens, the released default"),
            *(_preset(n / 576, f"hired-{n}", f"{n} of LLaVA-1.5's 576 tokens") for n in (192, 128, 64)),
        ),
    )
    alpha: float = 0.5
    early: int = 0
    late: int = -2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha!r}")

    def register_hooks(self, adapter: ModelAdapter, tower_cache: dict[str, Any]) -> Iterator[Any]:
        return record_cls(adapter, tower_cache, [self.early, self.late])

    def score(self, context: DropContext) -> Ranking:
        tiles = Tiles(context)
        looked, top = self._looked(tiles)
        is_whole = [i for rows, columns in tiles.tower.grids for i in (True, *(False,) * (rows * columns))]
        sizes = [n + 1 for n in (rows * columns for rows, columns in tiles.tower.grids) for _ in range(n + 1)]  # tiles of its image
        whole, size = host_ints(is_whole, looked.device) != 0, host_ints(sizes, looked.device)
        share = tiles.budget(keep_extra=False) * size // tiles.count
        first = torch.where(size > 1, (share.double() * self.alpha).floor().long(), share)
        budget = torch.where(whole, first, (share - first) * looked // max(top, 1))
        rank = tiles.rank(tiles.cls(self.late, "sum"))
        return tiles.ranking(rank < budget[:, None], rank, extra_first=False)

    def _looked(self, tiles: Tiles) -> tuple[torch.Tensor, int]:
        """How many of the top patches of its whole image lie where a tile lies, int64 ``[T]``; and how many these are."""
        early = tiles.cls(self.early, "sum")
        top, side = int((1 - self.alpha) * early.shape[1]), round(early.shape[1] ** 0.5)
        chosen, at = ranked(early)[:, :top], torch.arange(side, device=early.device)
        counts, tile = torch.zeros(len(early), dtype=torch.int64, device=early.device), 0
        for rows, columns in tiles.tower.grids:
            cell = ((at * rows // side)[:, None] * columns + at * columns // side).flatten()
            if rows:
                counts[tile + 1 : tile + 1 + rows * columns].scatter_add_(0, cell[chosen[tile]], torch.ones_like(chosen[tile]))
            tile += 1 + rows * columns
        return counts, top
