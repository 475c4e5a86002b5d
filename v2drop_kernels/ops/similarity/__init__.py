"""Scores by the keys and hidden states alone: norms, cosines with pivots and between frames, and the random control."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from ...backends.choice import resolve_backend
from ...backends.requests import CosineRequest, KeyNormRequest
from ...core import arguments
from ..autograd import differentiable
from ..host_ints import host_ints
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
    All pivots are compared in one read of ``x``. Accumulates in float32, in an order that depends on the backend, never on the
    batch or the thread count. Differentiable in ``x``; the backward is plain PyTorch. Equivalent plain torch for one item:
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


def random_score(
    like: torch.Tensor | Sequence[int], seed: int = 0, *, item_seeds: Sequence[int] | torch.Tensor | None = None, device: Any = None
) -> torch.Tensor:
    """Score tokens at random, as a control for rankings.

    Parameters
    ----------
    like : Tensor or (B, N)
        The scores have its first two sizes and its device.
    seed : int
        Of all items.
    item_seeds : sequence of int or int64 Tensor ``[B]``, optional
        An additional seed per item. Default: the index of the item in the batch. Give seeds where the scores of an item must not
        depend on its place in the batch.
    device : optional
        Default the device of ``like``, or the CPU.

    Returns
    -------
    Tensor
        float32 ``[B, N]``, multiples of ``2**-24`` from 0 to below 1.

    Raises
    ------
    ValueError, TypeError
        Sizes that are not two; seeds that are not one integer per item.

    Notes
    -----
    The score of column ``j`` is a hash of (seed, item seed, j) in 64-bit integers (two rounds of the finaliser of SplitMix64), so
    it is the same on every device and torch version, whatever the batch and its width. Not for cryptography.

    Source: the "random" rows of the papers' ablations.

    Examples
    --------
    >>> random_score((1, 4)).shape
    torch.Size([1, 4])
    >>> bool((random_score((2, 4), item_seeds=[7, 8])[1] == random_score((1, 9), item_seeds=[8])[0, :4]).all())
    True
    """
    sizes = tuple(like.shape[:2]) if isinstance(like, torch.Tensor) else tuple(like) if isinstance(like, list | tuple) else ()
    if len(sizes) != 2:
        raise ValueError(f"like must be a tensor [B, N, ...] or sizes (B, N), got {arguments.kind(like)}")
    for size in sizes:
        arguments.require_int("like", size)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {arguments.kind(seed)}")
    if isinstance(like, torch.Tensor) and device is None:
        device = like.device
    if item_seeds is None:
        items = torch.arange(sizes[0], device=device)
    elif isinstance(item_seeds, torch.Tensor):
        items = item_seeds.to(device)
    else:
        items = host_ints(_integers(item_seeds), torch.device(device or "cpu"))
    if items.dtype != torch.int64 or items.shape != sizes[:1]:
        raise ValueError(f"item_seeds must be one int64 per item, [B] = [{sizes[0]}], got {items.dtype} {list(items.shape)}")
    mixed = _mix(_mix(torch.full_like(items, _signed(seed))) + items)
    bits = _mix(mixed[:, None] + torch.arange(sizes[1], device=device))
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


def _integers(seeds: Any) -> list[int]:
    """The seeds as the integers that int64 wraps them to."""
    try:
        return [_signed(operator.index(seed)) for seed in seeds]
    except TypeError:
        raise TypeError(f"item_seeds must be a sequence of ints or an int64 tensor, got {arguments.kind(seeds)}") from None


def _mix(x: torch.Tensor) -> torch.Tensor:
    """One step of SplitMix64 from the state ``x``; int64 wraps as the uint64 of its definition does."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(x: int) -> int:
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
