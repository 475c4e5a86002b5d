"""variation_score: how much one decoder layer changed each token (V2Drop, Algorithm 1; metrics: Tables 7, 9)."""

from __future__ import annotations

from typing import Any

import torch

from ...backends import repeated
from ...backends.choice import resolve_backend
from ...backends.requests import Source
from ...core import arguments
from ..autograd import differentiable
from .gradient import backward_by
from .torch_op import OP


def variation_score(
    h_prev: torch.Tensor,
    h_cur: torch.Tensor,
    *,
    metric: str = "l2",
    cu_seqlens: Any = None,
    score_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score every token by the change that one decoder layer made to it.

    Parameters
    ----------
    h_prev, h_cur : Tensor
        Hidden states before and after the layer, ``[B, N, D]`` or packed ``[T, D]``; float32, float16 or bfloat16
        (float64 on the reference backend). Any batch and token stride; a last dimension whose stride is not 1 costs one
        contiguous copy.
    metric : {"l2", "l1", "cosine"}
        ``||h_cur - h_prev||`` in the 2-norm (V2Drop's choice) or the 1-norm, or ``1 - cos(h_prev, h_cur)``, so that
        higher always means more change. Cosine is 1 where a vector is zero.
    cu_seqlens : optional
        Accepted for symmetry with the other ops: scores are row by row, so offsets change nothing.
    score_dtype : dtype, optional
        Round the difference and the score to this dtype, as eager PyTorch does in that dtype, to reproduce the selections of
        published code. Default: float32 throughout.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Tensor
        float32 ``[B, N]`` or ``[T]``.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that differ; an unknown metric.

    Notes
    -----
    Accumulates in float32, cosine in float64, in an order that depends on the backend, never on the thread count or the batch.
    Cosine is within 8 units in the last place for norms of any ratio and size, and so is its gradient. Differentiable
    in both hidden states; the subgradient at score 0 is 0. Equivalent plain torch:
    ``torch.linalg.vector_norm(h_cur.float() - h_prev.float(), dim=-1)``.

    Source: V2Drop, Algorithm 1 (L2); L1 and cosine are the alternatives that it studies (supplement, section 7).

    The score measures change, not attention; :func:`attention_score` ranks by attention.

    Examples
    --------
    >>> variation_score(torch.zeros(1, 2, 4), torch.ones(1, 2, 4))
    tensor([[2., 2.]])
    """
    earlier = repeated.look_up(OP, (), (h_prev, h_cur), 0, None, backend, cu_seqlens is None, metric, score_dtype)
    if earlier[2] is not None:
        return earlier[2].runner.run(Source(None, h_prev, h_cur, None, metric, score_dtype))
    arguments.pair(h_prev, h_cur, None if cu_seqlens is None else True)
    arguments.score_options(metric, score_dtype)
    runner = resolve_backend(OP, h_cur, backend)
    if not runner.traced:
        h_prev, h_cur = arguments.settled(h_prev), arguments.settled(h_cur)
    repeated.remember(earlier, runner, None)
    request = Source(None, h_prev, h_cur, None, metric, score_dtype)
    return differentiable(OP, runner, request, backward_by(runner.name))
