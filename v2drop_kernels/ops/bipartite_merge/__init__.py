"""bipartite_merge: the most similar pairs of tokens become their means (ToMe)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core import arguments
from ..similarity.pairwise import cosines
from ..topk.order import ranked
from ..weighted_merge import weighted_merge
from ..weighted_merge.arguments import count, floats, rows_of
from ..weighted_merge.groups import groups


class Merged(NamedTuple):
    """What :func:`bipartite_merge` returns; the output rows stand in the order of the rows that stayed.

    Attributes
    ----------
    hidden : Tensor
        ``[B, N - r, D]``.
    size : Tensor
        float32 ``[B, N - r]``: how many tokens each row stands for (ToMe's proportional attention adds its logarithm).
    keep : Tensor
        int64 ``[B, N - r]``, ascending: the input row at whose place each output row stands.
    row : Tensor
        int64 ``[B, N]``: the output row that each input row went to, so ``hidden.gather`` by it undoes the shortening.
    """

    hidden: torch.Tensor
    size: torch.Tensor
    keep: torch.Tensor
    row: torch.Tensor


def bipartite_merge(
    x: torch.Tensor,
    metric: torch.Tensor,
    r: int,
    *,
    size: torch.Tensor | None = None,
    protected: int = 1,
    backend: str | None = None,
) -> Merged:
    """Merge the ``r`` most similar pairs of tokens (ToMe).

    Rows 0, 2, 4, ... are looked at from rows 1, 3, 5, ...: each even row proposes itself to the odd row of highest cosine, and
    the ``r`` best proposals are merged, as means weighted by ``size``.

    Parameters
    ----------
    x : Tensor
        ``[B, N, D]`` tokens; as for :func:`weighted_merge`.
    metric : Tensor
        Floating point ``[B, N, C]``: what is compared; ToMe takes the keys of the block, averaged over heads.
    r : int
        Tokens to lose; at most ``(N - protected) // 2`` are.
    size : Tensor, optional
        ``[B, N]``: how many tokens each row stands for already; default 1.
    protected : int
        Leading rows (1: the class token) that merge with none.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Merged

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit together; a negative ``r`` or ``protected``.

    Notes
    -----
    Ties: an even row proposes to the lowest of equally similar odd rows, and of equal proposals the lower row's is taken. A zero
    vector has cosine 0 with all. Differentiable in ``x`` and ``size``; the pairs carry no gradient. The output stands in position
    order, where the released code puts the unmerged even rows first: attention in a vision tower does not see the difference.
    Compares all pairs, ``[B, N / 2, N / 2]``: for the towers' hundreds of tokens, not for a video of ten thousand.

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
    rows_of("metric", metric, x)
    count("r", r)
    count("protected", protected)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if size is None:
        size = torch.ones((batch, n), dtype=wide, device=x.device)
    else:
        floats("size", size, x, n)
    r = min(r, max(n - protected, 0) // 2)
    index = torch.arange(n, device=x.device).expand(batch, n)
    if r == 0:
        return Merged(x, size.to(wide), index.clone(), index.clone())
    with torch.no_grad():
        similar = cosines(metric[:, ::2], metric[:, 1::2], wide)  # [B, A, B]
        similar[:, : (protected + 1) // 2] = -torch.inf
        similar[:, :, : protected // 2] = -torch.inf
        best = similar.max(dim=2)
        chosen = ranked(best.values)[:, :r]
        leaves, into = 2 * chosen, 2 * best.indices.gather(1, chosen) + 1
        gone = torch.zeros((batch, n), dtype=torch.bool, device=x.device).scatter_(1, leaves, True)
        place = (~gone).cumsum(1) - 1
        row = place.scatter(1, leaves, place.gather(1, into))
        keep = gone.to(torch.uint8).sort(dim=1, stable=True).indices[:, : n - r]
        offsets, rows = groups(row, n - r)
    weights = size.to(wide).gather(1, rows)
    hidden = weighted_merge(x, offsets, rows, weights, mean=True, backend=backend)
    total = weighted_merge(size.to(wide)[:, :, None], offsets, rows, backend=backend)[:, :, 0]
    return Merged(hidden, total, keep, row)
