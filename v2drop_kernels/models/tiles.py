"""The patches of every tile of a CLIP tower: rankings and budgets inside tiles, and the rows of the prompt they became."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..ops.host_ints import host_ints
from ..ops.topk.order import ranked
from .adapters.tower import TOWER, Tower, project_features
from .ranking import Ranking

if TYPE_CHECKING:
    from .context import DropContext


def check_entry(context: DropContext) -> None:
    """Raise ValueError unless the stage is at layer 0: projected features can replace embeddings only there."""
    if context.layer:
        raise ValueError(f"layer must be 0 for the policy {context.stage.policy!r}, which makes embeddings, got {context.layer}")


def tower_of(context: DropContext) -> Tower:
    """What was recorded of the tower in this forward."""
    found: Tower | None = context.tower_cache.get(TOWER)
    if found is None or found.order is None:
        raise ValueError(
            "pixel_values must go through the model's own vision tower in this forward: the policy ranks by what it saw"
        )
    if found.input_ids is None:
        raise ValueError("input_ids must be given: the policy finds the tower's tokens at their placeholders")
    return found


def tower_tokens_of_rows(context: DropContext) -> torch.Tensor:
    """The tower token of every row, int64 ``[B, N]``; -1 for newlines, and for rows that are not droppable."""
    tower = tower_of(context)
    assert tower.order is not None
    assert tower.input_ids is not None
    mask = tower.input_ids == context.adapter.token_ids[0]
    counts = mask.sum(1)
    # generate() repeats every item for beams after the tower ran: copies of an item share its tokens.
    copies = (counts.sum() // tower.order.shape[0]).clamp(min=1)
    before = counts.cumsum(0) - counts
    first = torch.arange(len(counts), device=mask.device) // copies * copies
    number = (before[first] // copies)[:, None] + mask.cumsum(1) - 1
    order = tower.order.to(mask.device)
    tokens = order[number.clamp(0, order.shape[0] - 1)].masked_fill(~mask, -1)
    if context.origin is not None:
        tokens = tokens.gather(1, context.origin.clamp(min=0)).masked_fill(context.origin < 0, -1)
    return tokens.masked_fill(~context.droppable.to(mask.device), -1)


class Tiles:
    """The patches of every tile: tensors ``[T, W]`` with ``W = P - 1``, all on the device.

    Attributes
    ----------
    present : Tensor
        bool ``[T, W]``: the patch is a droppable row. LLaVA-NeXT unpads the others away.
    item, count, number : Tensor
        int64 ``[T]``: the tile's item (the first of copies), how many tiles that item has, and which of them this one is.
    """

    def __init__(self, context: DropContext) -> None:
        self.tower, self.context = tower_of(context), context
        assert self.tower.order is not None
        token = tower_tokens_of_rows(context).to(self.tower.order.device)  # the decoder may be on another device
        batch, tiles, width = len(token), self.tower.tiles, self.tower.width - 1
        inside = (token >= 0) & (token % (width + 1) > 0)
        nowhere = tiles * width
        self._patch = torch.where(inside, token // (width + 1) * width + token % (width + 1) - 1, nowhere)  # [B, N]
        self._extra = (context.droppable.to(token.device) & ~inside).sum(1)  # newlines, and CLS where it has a row
        self.present = self._marked(self._patch)
        items = torch.arange(batch, device=token.device)[:, None].expand_as(token)
        owner = torch.full((nowhere + 1,), batch - 1, device=token.device)
        owner = owner.scatter_reduce(0, self._patch.flatten(), items.flatten(), "amin")
        self.item = owner[:-1].view(tiles, width).amin(1)
        present = self.present.any(1).long()
        per_item = torch.zeros(batch, dtype=torch.int64, device=token.device).scatter_add(0, self.item, present)
        self.count = per_item[self.item].clamp(min=1)
        self.number = present.cumsum(0) - 1 - (per_item.cumsum(0) - per_item)[self.item]

    def _marked(self, patch: torch.Tensor) -> torch.Tensor:
        shape = self.tower.tiles, self.tower.width - 1
        mask = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool, device=patch.device)
        return mask.scatter_(0, patch.flatten(), True)[:-1].view(shape)

    def cls(self, layer: int, form: str) -> torch.Tensor:
        """:func:`v2drop_kernels.cls_attention_score` of a recorded block: float32 ``[T, W]``."""
        return self.tower.cls(layer, form, self.context.backend)

    @property
    def features(self) -> torch.Tensor:
        """The projector's input for every patch: ``[T, W, C]``."""
        assert self.tower.features is not None
        return self.tower.features[:, -self.present.shape[1] :]

    def rank(self, score: torch.Tensor) -> torch.Tensor:
        """Ranks from 0 by (score descending, patch ascending) of the patches that are present, followed by the others."""
        order = ranked(score, self.present)
        return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))

    def budget(self, keep_extra: bool = True) -> torch.Tensor:
        """What the tile's item keeps, int64 ``[T]``; less its rows that are not patches if these are kept first."""
        keep = host_ints(self.context.keep, self.item.device)
        return (keep - self._extra if keep_extra else keep).clamp(min=0)[self.item]

    def even(self, total: torch.Tensor) -> torch.Tensor:
        """An item's ``total``, split evenly over its tiles; the first tiles get the remainder."""
        return total // self.count + (self.number < total % self.count)

    def to_rows(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """Values of patches ``[T, W]`` at their rows: ``[B, N]``; ``fill`` at rows that are not patches."""
        return torch.nn.functional.pad(values.flatten(), (0, 1), value=fill)[self._patch].to(self.context.hidden.device)

    def ranking(self, tier: torch.Tensor, rank: torch.Tensor, *, extra_first: bool = True) -> Ranking:
        """Rows in order of their patches' tier ``[T, W]`` (not negative) and then of their rank ``[T, W]``, low ranks first.

        Other droppable rows (newlines, and CLS where it has a row) precede all tiers, or come last without ``extra_first``.
        An item's top k are then exactly the patches of its upper tiers if these are k.
        """
        extra = torch.iinfo(torch.int32).max if extra_first else -1
        return Ranking(self.to_rows(-rank.float(), 0.0), self.to_rows(tier.long(), extra))

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The patches of these rows ``[B, K]`` (-1: none), by tile: int64 ``[T, K']``, ascending, -1 for padding."""
        mask = self._marked(self._patches_of(rows))
        order = ranked(mask.float())[:, : rows.shape[1]]
        return order.masked_fill(~mask.gather(1, order), -1)

    def embed(self, patches: torch.Tensor, features: torch.Tensor, rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden [B, K, D]`` of ``rows``, in which the patches ``[T, K']`` (-1: none) embed ``features`` ``[T, K', C]``."""
        embeddings = project_features(self.context.adapter, features).flatten(0, 1).to(hidden)
        start = torch.arange(len(patches), device=patches.device)[:, None] * self.present.shape[1]
        nowhere = self.present.numel()
        source = torch.full((nowhere + 1,), -1, device=patches.device)
        source.scatter_(
            0, torch.where(patches >= 0, start + patches, nowhere).flatten(), torch.arange(len(embeddings), device=patches.device)
        )
        source[-1:] = -1  # not source[-1], which copies the number from host memory
        row = source[self._patches_of(rows)].to(hidden.device)[..., None]
        return torch.where(row >= 0, embeddings[row[..., 0].clamp(min=0)], hidden)

    def _patches_of(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(self._patch.device)
        return self._patch.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, self.present.numel())
