"""Scores by the keys and hidden states alone: norms, and cosines with pivots and between frames."""

from __future__ import annotations

import torch

from ...backends.choice import resolve_backend
from ...backends.requests import CosineRequest, KeyNormRequest
from ...core import arguments
from ..autograd import differentiable
from ..variation_score import variation_score
from . import reference
from .gradient import cosine_to_pivots_backward, key_norm_backward
from .torch_op import COSINE, KEY_NORM


def key_norm_score(k: torch.Tensor, *, norm: str = "l1", layout: str = "BHSD", backend: str | None = None) -> torch.Tensor:
    """Score rows by the norm of their keys, all heads together.

    Parameters
    ----------
    k : Tensor
        ``[B, Hkv, S, Dh]`` keys; float32, float16 or bfloat16 (float64 on the reference backend). Any strides; a last dimension
        whose stride is not 1 costs one contiguous copy.
    norm : {"l1", "l2"}
        The norm of all heads and channels of a row as one vector.
    layout : {"BHSD", "BSHD"}
        Of ``k``; ``"BSHD"`` is ``[B, S, Hkv, Dh]``.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Tensor
        float32 ``[B, S]``.

    Raises
    ------
    ValueError, TypeError
        A wrong shape or dtype; an unknown word.

    Notes
    -----
    Accumulates in float32, in an order that depends on the backend, never on the batch or the thread count. Differentiable; the
    backward is plain PyTorch. Equivalent plain torch: ``k.float().norm(p=1, dim=(1, 3))``.

    Source: DART, section 3.2 (its pivots are the tokens with the largest L1 norm). Methods that evict keys of *large* norm take
    the negative.

    Examples
    --------
    >>> key_norm_score(torch.ones(1, 2, 3, 4))
    tensor([[8., 8., 8.]])
    """
    k = arguments.keys("k", k, layout)
    arguments.one_of("norm", norm, ("l1", "l2"))
    runner = resolve_backend(KEY_NORM, k, backend)
    if not runner.traced:
        k = arguments.settled(k)
    if 0 in k.shape:  # the kernels expect at least one of each
        return reference.key_norm(k, norm)
    return differentiable(KEY_NORM, runner, KeyNormRequest(k, norm), lambda _, grad, *fields: (key_norm_backward(grad, *fields),))


def cosine_to_pivots(x: torch.Tensor, pivots: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Compare every row with a few rows of the same item.

    Parameters
    ----------
    x : Tensor
        ``[B, N, D]``; float32, float16 or bfloat16 (float64 on the reference backend). Any strides; a last dimension whose stride
        is not 1 costs one contiguous copy.
    pivots : Tensor
        int64 ``[B, P]`` rows of ``x``. A number outside ``[0, N)``, by convention -1, marks an absent pivot.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Tensor
        float32 ``[B, P, N]`` cosines; 0 where either row is zero, and for absent pivots.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or devices that do not fit.

    Notes
    -----
    All pivots are compared in one read of ``x``. Accumulates in float64, so that a cosine is within 8 units in the last place for
    norms of any ratio and size, in an order that depends on the backend, never on the batch or the thread count. Differentiable in
    ``x``; the backward is plain PyTorch. Equivalent plain torch for one item:
    ``F.cosine_similarity(x[pivots][:, None], x[None], dim=-1)``.

    Source: DART, section 3.2: the tokens that are least similar to every pivot stay.

    Examples
    --------
    >>> cosine_to_pivots(torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0]]))
    tensor([[[1., 1., 0.]]])
    """
    arguments.hidden("x", x, False)
    arguments.tensor("pivots", pivots)
    if pivots.dim() != 2:
        raise ValueError(f"pivots must be [B, P], got shape {list(pivots.shape)}")
    arguments.table("pivots", pivots, (x.shape[0], pivots.shape[1]), torch.int64, x)
    runner = resolve_backend(COSINE, x, backend)
    if not runner.traced:
        x, pivots = arguments.settled(x), arguments.settled(pivots)
    if 0 in x.shape or 0 in pivots.shape:  # the kernels expect at least one of each
        return reference.cosine_to_pivots(x, pivots)
    return differentiable(COSINE, runner, CosineRequest(x, pivots), lambda _, grad, *f: (cosine_to_pivots_backward(grad, *f),))


def frame_similarity(x: torch.Tensor, *, pairs: str = "previous", backend: str | None = None) -> torch.Tensor:
    """Score the patches of a video by how much they differ from the same patch of an earlier frame.

    Parameters
    ----------
    x : Tensor
        ``[B, F, P, D]`` or ``[F, P, D]``: frames of patches; dtypes as :func:`variation_score`.
    pairs : {"previous", "dycoke"}
        The frame that frame ``f`` is compared with. "previous": ``f - 1``. "dycoke": ``f - 1`` for odd ``f``, ``f - 2`` where
        ``f % 4 == 2``, and none where ``f % 4 == 0``.
    backend : str, optional
        Force a backend for this call.

    Returns
    -------
    Tensor
        float32 ``[B, F, P]`` or ``[F, P]``: ``1 - cos`` with the partner's patch, so that higher means keep; ``+inf`` in frames
        that have no partner.

    Raises
    ------
    ValueError, TypeError
        A wrong shape or dtype; an unknown word.

    Notes
    -----
    :func:`variation_score` with ``metric="cosine"`` between frames, with its accuracy, determinism and gradient; the frames are
    copied once where their spacing in memory is not uniform. Equivalent plain torch for ``"previous"``:
    ``1 - F.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)``, frame 0 at ``inf``.

    Source: Efficient Video Sampling in vLLM (``"previous"``); DyCoke, section 3.2, stage 1 (``"dycoke"``).

    Examples
    --------
    >>> frame_similarity(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    tensor([[inf],
            [1.]])
    """
    arguments.one_of("pairs", pairs, ("previous", "dycoke"))
    arguments.tensor("x", x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, F, P, D] or [F, P, D], got shape {list(x.shape)}")
    arguments.dtype_in("x", x, arguments.HIDDEN_DTYPES)
    video = x if x.dim() == 4 else x[None]

    def change(earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
        earlier, later = earlier[:, : later.shape[1]], later
        score = variation_score(earlier.flatten(0, -2), later.flatten(0, -2), metric="cosine", backend=backend)
        return score.unflatten(0, later.shape[:-1])

    frames = torch.arange(video.shape[1], device=x.device)
    if pairs == "previous":
        found = [change(video, video[:, 1:])]
        alone, places = video[:, :1], [frames[:1], frames[1:]]
    else:
        found = [change(video[:, 0::2], video[:, 1::2]), change(video[:, 0::4], video[:, 2::4])]
        alone, places = video[:, 0::4], [frames[0::4], frames[1::2], frames[2::4]]
    infinite = torch.full_like(alone[..., 0], torch.inf, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    scores = torch.cat([infinite, *found], 1)[:, torch.cat(places).argsort()]
    return scores if x.dim() == 4 else scores[0]
