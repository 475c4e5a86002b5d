"""soft_topk in plain PyTorch: its values, and the two gradients, as functions of the sorted scores."""

from __future__ import annotations

import torch

from ..topk.order import ranked

# No score counts as lying in a denser place than this many times that of an even spread of the middle half of the scores.
DENSITY_CAP = 16.0


def soft_topk(
    scores: torch.Tensor,
    ratio: torch.Tensor,
    valid: torch.Tensor | None = None,
    temperature: float | None = None,
    ties: str = "index",
    hard: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mask ``[B, N]``, the slope of the soft mask in the normalised rank, and the rows in selection order.

    ``ratio [B, 1]`` is in the dtype of the result.
    """
    wide = ratio.dtype
    order = ranked(scores, valid)
    n, slots = _counts(scores, valid)
    upto = n - slots  # scores at or below that of the slot, all different
    if ties == "released":
        sorted_scores = scores.gather(1, order)
        first = torch.cat([torch.ones_like(order[:, :1]), (sorted_scores[:, 1:] != sorted_scores[:, :-1]).long()], 1)
        upto = n - torch.where(first.bool(), slots, 0).cummax(1).values
    rank = upto.to(wide) / n.clamp(min=1).to(wide)  # c'
    sharpness = n.to(wide) if temperature is None else temperature
    soft = torch.sigmoid((rank - ratio) * sharpness)
    slope = sharpness * soft * (1 - soft)
    if not hard:
        chosen = soft
    elif ties == "released":
        chosen = (rank.float() > ratio.float()).to(wide)
    else:
        chosen = (slots < torch.round((1 - ratio) * n)).to(wide)
    chosen = torch.where(ratio.isnan(), ratio, chosen)
    inside = slots < n
    unsort = lambda x: torch.zeros_like(x).scatter(1, order, torch.where(inside, x, 0.0))
    return unsort(chosen), unsort(slope), order


def soft_topk_backward(
    grad: torch.Tensor, slope: torch.Tensor, scores: torch.Tensor, order: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """Gradient in the scores: the ranks' by nearest neighbours (see :func:`v2drop_kernels.soft_topk`), times ``grad * slope``."""
    wide = slope.dtype
    n, slots = _counts(scores, valid)
    last = n - 1
    window = torch.ceil(n.double().sqrt() / 2).long()
    low, high = (slots - window).clamp(min=0), torch.minimum(slots + window, last).clamp(min=0)
    low = torch.minimum(low, high)
    value = scores.gather(1, order).to(wide)  # falls along the slots
    neighbours = (high - low).to(wide)
    gap = value.gather(1, low) - value.gather(1, high)
    middle = _spread(value, last // 4, last - last // 4)
    spread = 2 * torch.where(middle > 0, middle, _spread(value, 0 * last, last) / 2)
    density = torch.minimum(neighbours / n.clamp(min=1).to(wide) / gap, DENSITY_CAP / spread)
    density = torch.where((spread > 0) & density.isfinite() & (slots < n), density, 0.0)
    own = density * (grad * slope).gather(1, order)
    # Each neighbour's rank falls as this score rises: what the window gains, it loses. Prefix sums in float64 cancel to nothing.
    share = own / neighbours.clamp(min=1)
    sums = torch.nn.functional.pad(share.cumsum(1, dtype=torch.float64), (1, 0))
    lost = (sums.gather(1, high + 1) - sums.gather(1, low)).to(wide) - share
    return torch.zeros_like(own).scatter(1, order, torch.where(slots < n, own - lost, 0.0))


def _counts(scores: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """How many scores count, ``[B, 1]``, and the slots of the sorted ones, ``[B, N]``."""
    slots = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    return torch.full_like(slots[:, :1], scores.shape[1]) if valid is None else valid.sum(1, keepdim=True), slots


def _spread(value: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return value.gather(1, low.clamp(min=0)) - value.gather(1, high.clamp(min=0))
