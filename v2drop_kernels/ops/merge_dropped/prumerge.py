"""LLaVA-PruMerge's token supplement: the nearest neighbours of every kept row are added to it."""

from __future__ import annotations

import torch

from ...backends.choice import resolve_name
from ..similarity.pairwise import cosines
from ..topk import segmented_topk
from ..topk.order import ranked
from ..weighted_merge import weighted_merge
from ..weighted_merge.groups import groups
from .kept import Kept


def merge_neighbours(
    x: torch.Tensor, kept: Kept, features: torch.Tensor, scores: torch.Tensor, targets: torch.Tensor | None, neighbours: int,
    backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Add to every kept row the weighted sum of its nearest rows; a target becomes the weighted sum of all dropped rows."""
    keep, slot, may = kept
    (batch, n, _), k = x.shape, keep.shape[1]
    m = min(neighbours, max(n - 1, 0))
    with torch.no_grad():
        at = keep.clamp(min=0)
        index = torch.arange(n, device=x.device)
        similar = cosines(features.gather(1, at[:, :, None].expand(-1, -1, features.shape[2])), features)  # [B, K, N]
        other = may[:, None] & (index != at[:, :, None])  # a row is no neighbour of its own
        near = _nearest(similar, other, m, backend)
        gives = other.gather(2, near) & may.gather(1, at)[:, :, None]
        # What is no neighbour becomes the row itself, with weight 0: no foreign NaN comes in.
        rows = torch.cat([at[:, :, None], torch.where(gives, near, at[:, :, None])], 2)  # [B, K, 1 + m]
        offsets = torch.arange(0, (1 + m) * (k + 1), 1 + m, device=x.device).expand(batch, k + 1)
    weights = torch.where(gives, scores.gather(1, near.flatten(1)).view(near.shape), 0.0)
    weights = torch.cat([torch.ones_like(weights[:, :, :1]) if m else weights.new_ones(batch, k, 1), weights], 2)
    out = weighted_merge(x, offsets, rows.flatten(1), weights.flatten(1), backend=backend)
    if targets is not None:
        lost = may & ((slot == k) | targets)
        ends, members = groups((~lost).long(), 1)
        rest = weighted_merge(x, ends, members, scores.gather(1, members), backend=backend)
        out = torch.where(targets.gather(1, at)[:, :, None], rest, out)
    return torch.where((keep >= 0)[:, :, None], out, 0.0)


def _nearest(similar: torch.Tensor, other: torch.Tensor, m: int, backend: str | None) -> torch.Tensor:
    """The ``m`` best columns ``[B, K, m]`` of every row among ``other``, the best first; others come after them."""
    if similar.numel() == 0 or resolve_name(similar, backend, torch.float32) == "reference":
        return ranked(similar, other)[:, :, :m]
    rows = similar.masked_fill(~other, -torch.inf).flatten(0, 1)
    return segmented_topk(rows, m, order="score", backend=backend).indices.view(*similar.shape[:2], -1)
