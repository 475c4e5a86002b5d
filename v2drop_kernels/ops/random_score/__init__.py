"""random_score: scores at random, as a control for rankings; one call of a counter-based generator."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from ...backends.choice import forced_name, is_traced, runner_on, transformed, why_not
from ...backends.protocol import Op
from ...backends.requests import RandomRequest
from ...core import arguments
from ..host_ints import host_ints
from . import reference

OP = Op(__package__, "run", reference.run)
_CPU = torch.device("cpu")
_NOTHING = torch.empty(0)  # a plain tensor, to find out whether a call without one is being traced


def random_score(
    like: torch.Tensor | Sequence[int], seed: int = 0, *, item_seeds: Sequence[int] | torch.Tensor | None = None, device: Any = None
) -> torch.Tensor:
    """Score tokens at random, as a control for rankings.

    Parameters
    ----------
    like : Tensor or (B, N)
        The scores have its first two sizes and its device.
    seed : int
        Of all items; its low 64 bits count.
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
    The score of column ``j`` is word ``j % 4`` of Philox4x32-10 with the counter ``(j // 4, item seed)`` and the key ``seed``, each
    of 64 bits with the low word first, without its 8 low bits. It is the same on every device, backend and version of torch,
    whatever the batch and its width. Not for cryptography.

    Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (the generator); the "random" rows of the
    papers' ablations.

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
    if device is None:
        device = like.device if isinstance(like, torch.Tensor) else _CPU
    device = torch.device(device)
    items = None
    if isinstance(item_seeds, torch.Tensor):
        items = item_seeds.to(device)
    elif item_seeds is not None:
        items = host_ints(_integers(item_seeds), device)
    if items is not None and (items.dtype != torch.int64 or items.shape != sizes[:1]):
        raise ValueError(f"item_seeds must be one int64 per item, [B] = [{sizes[0]}], got {items.dtype} {list(items.shape)}")
    request = RandomRequest(sizes[0], sizes[1], _signed(seed), items, device)
    if transformed() or device.type == "meta" or is_traced(like if isinstance(like, torch.Tensor) else _NOTHING):
        return reference.run(request)
    forced = forced_name(None)
    if forced is not None and why_not(forced, device.type, torch.float32) is not None:
        forced = None  # a block that forces a backend for a GPU may well draw on the host: the numbers are the same
    return runner_on(OP, device, forced).run(request)


def _integers(seeds: Any) -> list[int]:
    """The seeds as the integers that int64 wraps them to."""
    try:
        return [_signed(operator.index(seed)) for seed in seeds]
    except TypeError:
        raise TypeError(f"item_seeds must be a sequence of ints or an int64 tensor, got {arguments.kind(seeds)}") from None


def _signed(x: int) -> int:
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
