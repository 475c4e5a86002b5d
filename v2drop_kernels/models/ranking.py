"""Rankings of tokens by an integer tier first and a score second."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.topk.order import ranked


@dataclass(frozen=True)
class Ranking:
    """Scores in tiers: a policy returns one where some tokens precede others whatever their scores are.

    Tokens are selected by (tier descending, score descending, row ascending); NaN scores come first in their tier.

    Attributes
    ----------
    scores : Tensor
        Float ``[B, N]``, higher means keep, compared inside a tier only. Rows that are not droppable may hold anything.
    tier : Tensor
        Integer or bool ``[B, N]``; tokens of a higher tier are kept first.

    Examples
    --------
    >>> ranking = Ranking(torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([[0, 1, 0]]))
    >>> ranking.ordinals(torch.ones(1, 3, dtype=torch.bool))
    tensor([[-1., -0., -2.]])
    """

    scores: torch.Tensor
    tier: torch.Tensor

    def __post_init__(self) -> None:
        if self.tier.is_floating_point() or self.tier.shape != self.scores.shape:
            raise ValueError(
                f"tier must hold integers of the shape {list(self.scores.shape)} of scores, "
                f"got {self.tier.dtype} {list(self.tier.shape)}"
            )

    def ordinals(self, droppable: torch.Tensor) -> torch.Tensor:
        """float32 ``[B, N]``: scores that have this order and no equal values, exact for fewer than 2**24 rows.

        ``droppable`` is bool ``[B, N]``.
        """
        order = ranked(self.scores, droppable)
        tier = self.tier.long().gather(1, order)
        order = order.gather(1, tier.argsort(dim=1, descending=True, stable=True))
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return -torch.empty_like(order).scatter_(1, order, place).float()

    def shifted(self, droppable: torch.Tensor) -> torch.Tensor:
        """Float ``[B, N]``: the scores, with a gradient, plus a constant for each tier so that tiers do not overlap.

        For soft training, whose estimator reads distances between scores. A tier is as wide as the range of the item's finite
        scores, and at least 1; tier 0 keeps its scores.
        """
        known = droppable & self.scores.isfinite()
        values = self.scores.detach()
        high = values.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
        low = values.masked_fill(~known, torch.inf).amin(1, keepdim=True)
        width = torch.where(high > low, high - low, 0.0).clamp(min=1)
        return self.scores + torch.where(self.tier > 0, self.tier + 1, self.tier) * width
