"""bipartite_merge: the most similar pairs of tokens become their means (ToMe)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...backends.choice import is_traced, resolve_name, transformed
from ...core import arguments
from ...core.deprecated import argument
from ..similarity.pairwise import cosines
from ..topk.order import ranked
from ..weighted_merge import weighted_merge
from ..weighted_merge.arguments import count, floats, rows_of
from ..weighted_merge.groups import groups

_SERVED = (torch.float32, torch.float16, torch.bfloat16)
_MOST = 1024  # rows of an item, beyond which a product of matrices is faster than the dot products of the library


class Merged(NamedTuple):
    """What :func:`bipartite_merge` returns.

    Attributes
    ----------
    hidden : Tensor
        ``[B, N - r, D]``.
    size : Tensor
        float32 ``[B, N - r]``: how many tokens each row stands for (ToMe's proportional attention adds its logarithm).
    keep : Tensor
        int64 ``[B, N - r]``: the input row that each output row was; ascending with ``order="position"``.
    row : Tensor
        int64 ``[B, N]``: the output row that each input row went to, so ``hidden.gather`` by it undoes the shortening.
    """

    hidden: torch.Tensor
    size: torch.Tensor
    keep: torch.Tensor
    row: torch.Tensor


@argument("metric", "features")
def bipartite_merge(
    x: torch.Tensor,
    features: torch.Tensor,
    r: int,
    *,
    size: torch.Tensor | None = None,
    protected: int = 1,
    order: str = "position",
    backend: str | None = None,
) -> Merged:
    """Merge the ``r`` most similar pairs of tokens (ToMe).

    Rows 0, 2, 4, ... are compared with rows 1, 3, 5, ...: each even row is paired with the odd row of highest cosine, and the
    ``r`` most similar pairs are merged, as means weighted by ``size``.

    Parameters
    ----------
    x : Tensor
        ``[B, N, D]`` tokens; as for :func:`weighted_merge`.
    features : Tensor
        Floating point ``[B, N, C]``: what is compared; ToMe takes the keys of the block, averaged over heads.
    r : int
        Tokens to remove; at most ``(N - protected) // 2`` are removed.
    size : Tensor, optional
        ``[B, N]``: how many tokens each row stands for already; default 1.
    protected : int
        Leading rows (1: the class token) that are never merged.
    order : {"position", "released"}
        How the output rows stand. "position": as in the input. "released": as in ToMe's code, the protected rows first, then the
        even rows that stayed, then the odd rows; without protected rows the even rows stand by descending similarity of their
        pairs, otherwise ascending. With ``r = 0`` the rows stay as they are in both. The order decides which pairs a second
        merge compares, because even rows are compared with odd ones.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Merged

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit together; a negative ``r`` or ``protected``; an unknown ``order``.

    Notes
    -----
    Ties: an even row is paired with the lowest of equally similar odd rows; of equally similar pairs the one with the lower even
    row is merged first. A zero vector has cosine 0 with all. Differentiable in ``x`` and ``size``; the choice of pairs has no
    gradient. All pairs are compared, ``[B, N / 2, N / 2]``: meant for the hundreds of tokens of a vision tower, not for a video
    of ten thousand.

    Source: ToMe (ICLR 2023), section 3.

    Examples
    --------
    >>> x = torch.tensor([[[9.0], [1.0], [1.0], [2.0]]])
    >>> merged = bipartite_merge(x, torch.tensor([[[0.0, 1], [1, 0], [1, 0], [0, 1]]]), 1)
    >>> merged.hidden.flatten().tolist(), merged.size.tolist(), merged.row.tolist()
    ([9.0, 1.0, 2.0], [[1.0, 2.0, 1.0]], [[0, 1, 1, 2]])
    """
    arguments.hidden("x", x, False)
    batch, n, _ = x.shape
    rows_of("features", features, x)
    count("r", r)
    count("protected", protected)
    arguments.one_of("order", order, ("position", "released"))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if size is None:
        size = torch.ones((batch, n), dtype=wide, device=x.device)
    else:
        floats("size", size, x, n)
    r = min(r, max(n - protected, 0) // 2)
    if r == 0:
        index = torch.arange(n, device=x.device).expand(batch, n)
        return Merged(x, size.to(wide), index.clone(), index.clone())
    with torch.no_grad():
        keep, row, offsets, rows = _pairs(x, features, r, protected, order, wide, backend)
    weights = size.to(wide).gather(1, rows)
    hidden = weighted_merge(x, offsets, rows, weights, mean=True, backend=backend)
    total = weighted_merge(size.to(wide)[:, :, None], offsets, rows, backend=backend)[:, :, 0]
    return Merged(hidden, total, keep, row)


def _pairs(
    x: torch.Tensor, features: torch.Tensor, r: int, protected: int, order: str, wide: torch.dtype, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The input row of every output row, the output row of every input row, and the lists of edges of the merge."""
    if _served(x, features, backend):
        from . import native

        return native.pairs(features, r, protected, order)
    batch, n = x.shape[:2]
    index = torch.arange(n, device=x.device).expand(batch, n)
    similar = cosines(features[:, ::2], features[:, 1::2], wide)  # [B, A, B]
    similar[:, : (protected + 1) // 2] = -torch.inf
    similar[:, :, : protected // 2] = -torch.inf
    best = similar.max(dim=2)
    proposals = ranked(best.values)
    chosen = proposals[:, :r]
    leaves, into = 2 * chosen, 2 * best.indices.gather(1, chosen) + 1
    if order == "position":
        gone = torch.zeros((batch, n), dtype=torch.bool, device=x.device).scatter_(1, leaves, True)
        keep = gone.to(torch.uint8).sort(dim=1, stable=True).indices[:, : n - r]
    else:
        keep = _released_order(2 * proposals[:, r:], index[:, 1::2], protected)
    place = torch.zeros_like(index).scatter_(1, keep, index[:, : n - r])
    row = place.scatter(1, leaves, place.gather(1, into))
    return keep, row, *groups(row, n - r)


def _served(x: torch.Tensor, features: torch.Tensor, backend: str | None) -> bool:
    """Whether the library finds the pairs of this call; of float64 rows or features plain PyTorch does."""
    if not x.is_cpu or x.dtype not in _SERVED or features.dtype not in _SERVED or x.shape[1] > _MOST:
        return False
    return not (is_traced(x) or is_traced(features) or transformed()) and resolve_name(x, backend) == "cpu"


def _released_order(even: torch.Tensor, odd: torch.Tensor, protected: int) -> torch.Tensor:
    """int64 ``[B, N - r]``: the rows that stay, the ``even`` ones by descending similarity, in the order of ToMe's code."""
    if not protected:
        return torch.cat([even, odd], dim=1)
    keep = torch.cat([even.sort(dim=1).values, odd], dim=1)
    return keep.gather(1, keep.clamp(max=protected).argsort(dim=1, stable=True))
