"""weighted_merge: weighted sums of rows, by lists of edges.

A merge is a list of edges by output row (offsets, rows, weights) and one gather through it: no atomics, so the result does not
depend on scheduling, and the backward pass is the same gather through the transposed list.
"""

from __future__ import annotations

import functools

import torch

from ...backends.choice import resolve_backend
from ...backends.requests import MergeRequest
from ...core.arguments import hidden, settled
from ..autograd import differentiable
from .arguments import edges_exist, floats, integers
from .gradient import backward
from .reference import by_products
from .torch_op import OP


def weighted_merge(
    x: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    mean: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum rows of ``x`` with weights, by lists of edges.

    ``out[b, k]`` is the sum over ``e`` in ``[offsets[b, k], offsets[b, k + 1])`` of ``weights[b, e] * x[b, rows[b, e]]``.

    Parameters
    ----------
    x : Tensor
        ``[B, N, D]``; float32, float16 or bfloat16 (float64 in plain torch). Any batch and row stride.
    offsets : Tensor
        int64 ``[B, K + 1]``, ascending, within ``[0, E]``. Edges before the first and after the last offset are unused.
    rows : Tensor
        int64 ``[B, E]``: rows of ``x``. Those of used edges must lie in ``[0, N)``.
    weights : Tensor, optional
        Floating point ``[B, E]``; default 1.
    mean : bool
        Divide by the sum of the weights; where that is 0 the result is 0.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Tensor
        ``[B, K, D]`` of the dtype of ``x``, accumulated in float32; 0 for a row without edges.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit together. On the CPU also invalid offsets and rows. On a GPU this check would
        synchronise with the host; invalid edges add nothing there.

    Notes
    -----
    Deterministic: one fixed order of additions per backend, no atomics. Differentiable in ``x`` and ``weights``. Triton, ``cuda``
    and ``cpu`` have kernels for it; the last two add the edges in their order, each product rounded.
    Equivalent plain torch, for one item: ``torch.stack([(w[a:b, None] * x[r[a:b]]).sum(0) for a, b in pairwise(offsets)])``.

    Not for copying rows: :func:`v2drop_kernels.compact` moves every tensor of a model at once.

    Examples
    --------
    >>> x = torch.tensor([[[1.0], [2.0], [4.0]]])
    >>> weighted_merge(x, torch.tensor([[0, 2, 3]]), torch.tensor([[0, 2, 1]]))
    tensor([[[5.],
             [2.]]])
    """
    hidden("x", x, False)
    integers("offsets", offsets, x, "K + 1")
    integers("rows", rows, x, "E")
    if offsets.shape[1] == 0:
        raise ValueError("offsets must be [B, K + 1] with at least one column, got none")
    if weights is not None:
        floats("weights", weights, x, rows.shape[1])
        weights = weights.double() if x.dtype == torch.float64 else weights.float()
    runner = resolve_backend(OP, x, backend)
    if not runner.traced:
        x, offsets, rows = settled(x), settled(offsets), settled(rows)
        if x.device.type == "cpu" and runner.name != "cpu":  # whose library checks them
            edges_exist(offsets, rows, x.shape[1])
        weights = None if weights is None else settled(weights)
    request = MergeRequest(x, offsets.contiguous(), rows.contiguous(), None if weights is None else weights.contiguous(), mean)
    return differentiable(OP, runner, request, functools.partial(backward, runner.name), by_products)
