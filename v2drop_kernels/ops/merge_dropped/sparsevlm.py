"""SparseVLM's token recycling: clusters of dropped rows, and their merge into one row each."""

from __future__ import annotations

import torch

from ...core import arguments
from ..similarity.pairwise import distances
from ..topk.order import ranked
from ..weighted_merge import weighted_merge
from ..weighted_merge.arguments import floats, mask
from ..weighted_merge.groups import groups
from .kept import Kept


def merge_clusters(x: torch.Tensor, kept: Kept, clusters: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """The row of a cluster's centre becomes the mean of the cluster; the dropped rows outside the clusters are lost."""
    keep, slot, _ = kept
    k = keep.shape[1]
    centre = slot.gather(1, clusters.clamp(min=0))
    offsets, rows = groups(torch.where(kept.dropped, torch.where(clusters >= 0, centre, k), slot), k)
    return weighted_merge(x, offsets, rows, mean=True, backend=backend)


def recycled_clusters(
    x: torch.Tensor, scores: torch.Tensor, dropped: torch.Tensor, *, share: float = 0.3, neighbours: int | None = None
) -> torch.Tensor:
    """SparseVLM's token recycling: cluster the best of the dropped tokens around density peaks (DPC-KNN).

    Of the ``m`` dropped rows of an item the ``n = min(int(share * m) + 1, m)`` of highest score are clustered around
    ``n // 10 + 1`` centres, as in the released code; with ``share=0`` none are.
    Density is ``exp(-mean d^2)`` over the nearest rows, itself included, with ``d`` the Euclidean distance over ``sqrt(D)``; the
    centres have the highest products of density and distance to the nearest denser row; every row joins its nearest centre.

    Parameters
    ----------
    x : Tensor
        Floating point ``[B, N, D]``: what is clustered, the hidden states.
    scores : Tensor
        Floating point ``[B, N]``.
    dropped : Tensor
        bool ``[B, N]``.
    share : float
        The share of the dropped rows that is recycled.
    neighbours : int, optional
        Nearest rows that the density is computed from; default the number of centres, as in the released code.

    Returns
    -------
    Tensor
        int64 ``[B, N]``: the row of the centre of each recycled row, -1 elsewhere; ``clusters == arange(N)`` are the centres, which
        must be kept for :func:`merge_dropped` to place the means.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit together; ``share`` outside [0, 1].

    Notes
    -----
    Deterministic: of equal densities the lower row counts as denser, where the released code adds random noise of 1e-6; of equal
    products and distances the lower row wins. It has no gradient and does not synchronise with the host; ``n`` may differ between
    items. Distances below 1e-6 of the rows' norms count as 0. Memory is quadratic in ``share * N``.

    Source: SparseVLM (ICML 2025), token recycling; density peaks: Rodriguez and Laio, Science 2014.

    Examples
    --------
    >>> x = torch.tensor([[[0.0], [0.1], [5.0], [0.0], [0.2]]])
    >>> recycled_clusters(x, torch.arange(5.0)[None], torch.tensor([[True, True, False, True, True]]), share=0.5)
    tensor([[-1,  1, -1,  1,  1]])
    """
    arguments.hidden("x", x, False)
    batch, n, d = x.shape
    floats("scores", scores, x, n)
    arguments.tensor("dropped", dropped)
    mask("dropped", dropped, x)
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    most = min(int(share * n) + 1, n) if share else 0  # rows that any item may recycle
    with torch.no_grad():
        clusters = torch.full((batch, n), -1, device=x.device)
        if most == 0 or batch == 0:
            return clusters
        m = dropped.sum(1, keepdim=True)
        count = torch.minimum((m.double() * share).long() + 1, m)  # [B, 1]
        centres = torch.where(count > 0, count // 10 + 1, 0)
        slots = torch.arange(most, device=x.device)
        real = slots < count  # [B, R]
        # The recycled rows in position order, so that the first of equals is the lower row.
        row = torch.where(real, ranked(scores, dropped)[:, :most], n).sort(dim=1).values
        at = row.clamp(max=n - 1)
        features = x.gather(1, at[:, :, None].expand(-1, -1, d))
        distance = distances(features) / max(d, 1) ** 0.5
        pair = real[:, :, None] & real[:, None, :]
        around = (centres if neighbours is None else torch.full_like(count, neighbours)).clamp(max=count.clamp(min=1))[:, :, None]
        nearest = distance.masked_fill(~pair, torch.inf).sort(dim=2).values
        density = torch.exp(-torch.where(slots < around, nearest.square(), 0.0).sum(2) / around[:, :, 0])
        density = torch.where(real, density, 0.0)
        # Masked entries of nearest are inf, but only rows that are masked themselves read them.
        denser = (density[:, None, :] > density[:, :, None]) | (
            (density[:, None, :] == density[:, :, None]) & (slots < slots[:, None])
        )
        farthest = distance.masked_fill(~pair, 0.0).amax((1, 2), keepdim=True)
        apart = torch.where(denser & pair, distance, farthest).amin(2)
        order = ranked(density * apart, real)
        centre = torch.zeros_like(real).scatter_(1, order, slots < centres) & real
        joined = distance.masked_fill(~centre[:, None, :], torch.inf).argmin(2)
        joined = torch.where(centre, slots, joined)
        padded = torch.full((batch, n + 1), -1, device=x.device)
        return padded.scatter_(1, row, torch.where(real, at.gather(1, joined), -1))[:, :n]
