"""TopV: keep the vision tokens that supply most in a transport of the vision tokens onto themselves.

For the ``n`` droppable tokens of an item, with hidden states ``x`` (the input of block ``L``) and places ``p`` in the image,
centred and scaled so that a corner lies at distance 1, the cost of serving token j from token i is ::

    C_ij = 1 - cos(x_i, x_j) + spatial |p_i - p_j| / 2 + central |p_i|
    P = argmin_P  <P, C> - epsilon H(P) + relax KL(P 1 | 1)   with  P^T 1 = 1,  all P_ij >= 0
    s_i = sum_j P_ij

so feature similarity, relative spatial distance and absolute central distance enter as the paper names them: a token that can
supply many others at low cost supplies much. ``iterations`` Sinkhorn steps in float32 from ``v = 1``: ``u = (1 / K v)^(relax
/ (relax + epsilon))``, ``v = 1 / K^T u`` with ``K = exp(-C / epsilon)``. The demand side is met exactly; were the supply side too,
every token would supply the same and rank nothing, so it is held by ``relax`` only.

Source: TopV (CVPR 2025), by its abstract: Sinkhorn transport once, before block 2, with those three terms, no attention weights.
No code is published and its formulas were not at hand: the weights, the relaxed supply and the score are **this package's
reading**, and its numbers are not the paper's. ``p`` is the token's cell in ``context.grids`` (a video's frames are a third
axis) when all tokens of one image are there, else its number in a row. The ``n x n`` cost and kernel are in memory, over droppable
tokens only: inherent to the method, and why it is no method for long videos.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...core.schedule import Schedule, Stage
from ..context import DropContext
from ..policy import Method, Policy


@dataclass(frozen=True)
class TopV(Policy):
    """Weights of the cost, of the entropy and of the supply, and the number of Sinkhorn steps."""

    spatial: float = 0.5
    central: float = 0.5
    epsilon: float = 0.1
    relax: float = 0.1
    iterations: int = 20

    method = Method(
        paper="TopV, CVPR 2025, abstract",
        where="decoder",
        score="mass of each token in an entropic optimal transport between the vision tokens",
        needs_weights=False,
        deviations="all but the three terms of the cost, Sinkhorn's algorithm and the layer: the other formulas were not available",
        presets=(
            Schedule(
                (Stage(2, 0.46, policy="topv"),),
                "topv",
                "TopV, once before block 2 of LLaVA-1.5-7B; the share that leaves 49 % of the FLOPs, as compared with VTW",
            ),
        ),
    )

    def __post_init__(self) -> None:
        for name in ("spatial", "central", "relax", "iterations"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        # exp(-80) is the least that the diagonal of K may be, or a corner token's demand would overflow float32.
        if self.epsilon <= 0 or self.epsilon < self.central / 80:
            raise ValueError(f"epsilon must be positive and at least central / 80, got {self.epsilon}")

    def score(self, context: DropContext) -> torch.Tensor:
        droppable, most = context.droppable, max(context.counts, default=0)
        rows = context.row_indices(droppable, most)
        there, items = rows >= 0, torch.arange(len(rows), device=rows.device)[:, None]
        x = torch.nn.functional.normalize(context.hidden[items, rows.clamp(min=0)].float(), dim=-1)
        p = torch.stack([_places(context, item, n, most, x.device) for item, n in enumerate(context.counts)])
        cost = 1 - x @ x.transpose(1, 2) + self.spatial / 2 * torch.cdist(p, p, compute_mode="donot_use_mm_for_euclid_dist")
        cost = cost + self.central * p.norm(dim=-1)[..., None]
        both = there[:, :, None] & there[:, None]
        kernel = (-cost / self.epsilon).exp().masked_fill(~both, 0)
        u = v = there.float()
        for _ in range(self.iterations):
            u = _inverse(kernel @ v[..., None]).pow(self.relax / (self.relax + self.epsilon))[..., 0]
            v = _inverse(u[:, None] @ kernel)[:, 0]
        supply = u * (kernel @ v[..., None])[..., 0]
        n = droppable.shape[1]
        return torch.zeros(len(rows), n + 1, device=x.device).scatter_(1, torch.where(there, rows, n), supply)[:, :n]


def _inverse(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1 / x, 0)


def _places(context: DropContext, item: int, n: int, most: int, device: torch.device) -> torch.Tensor:
    """float32 ``[most, 3]``: the cell of each of ``n`` tokens, from the middle, in half diagonals; padding at 0."""
    grid = context.grids[item]
    sizes = grid if grid is not None and context.origin is None and math.prod(grid) == n else (n,)
    cells = torch.cartesian_prod(*(torch.arange(size, device=device) - (size - 1) / 2 for size in sizes)).reshape(n, len(sizes))
    found = torch.zeros(most, 3, device=device)
    if n > 1:
        found[:n, : cells.shape[1]] = cells / cells[0].norm()
    return found
