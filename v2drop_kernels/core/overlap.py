"""Whether two tensors share memory: exactly, for any strides, unless that would take long."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Steps of the search for a common byte. Nested strides, those of any view of a contiguous tensor, take a few per dimension.
MOST_STEPS = 4096

Dims = tuple[tuple[int, int], ...]  # (stride in bytes, extent) of every dimension that is stepped through, largest stride first


def conflict(written: Sequence[torch.Tensor], read: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    """Two tensors that share memory, at least one of which is written, as places in ``written`` and then ``read``; or None."""
    spans = sorted(_span(x, i) for i, x in enumerate((*written, *read)) if x.numel())
    open_spans: list[tuple[int, int, int]] = []
    tensors = (*written, *read)
    for span in spans:
        start, _, i = span
        open_spans = [other for other in open_spans if other[1] > start]
        for _, _, j in open_spans:
            if min(i, j) < len(written) and _share(tensors[j], tensors[i]):
                return min(i, j), max(i, j)
        open_spans.append(span)
    return None


def overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two elements of ``x`` lie at one address, or that cannot be told from strides that do not nest."""
    if x.is_contiguous():
        return False
    width = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < width:
                return True
            width += stride * (size - 1)
    return False


def _span(x: torch.Tensor, i: int) -> tuple[int, int, int]:
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.numel() * x.element_size(), i
    reach = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return start, start + (reach + 1) * x.element_size(), i


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_contiguous() and b.is_contiguous():
        return True  # their spans meet, and have no gaps
    return _meet(b.data_ptr() - a.data_ptr(), *_dims(a), *_dims(b))


def _dims(x: torch.Tensor) -> tuple[int, Dims]:
    """The bytes that lie together, and the dimensions that step from one such piece to the next."""
    width = x.element_size()
    dims: list[tuple[int, int]] = []
    for stride, size in sorted((s * x.element_size(), n) for s, n in zip(x.stride(), x.shape, strict=True)):
        if size == 1 or stride == 0:
            continue
        if stride == width and not dims:
            width *= size
        else:
            dims.append((stride, size))
    return width, tuple(reversed(dims))


@functools.lru_cache(maxsize=4096)
def _meet(distance: int, width_a: int, dims_a: Dims, width_b: int, dims_b: Dims) -> bool:
    """Whether a piece of ``a`` meets one of ``b``, which begins ``distance`` bytes behind it.

    That is whether some steps through both bring the distance between ``-width_b`` and ``width_a``.
    """
    steps = sorted([(s, n, -1) for s, n in dims_a] + [(s, n, 1) for s, n in dims_b], reverse=True)
    # The least and the most that the steps from each on can add.
    reach = [(0, 0)]
    for s, n, sign in reversed(steps):
        low, high = reach[-1]
        far = s * (n - 1)
        reach.append((low - far, high) if sign < 0 else (low, high + far))
    reach.reverse()
    todo, done = [(distance, 0)], 0
    while todo:
        at, i = todo.pop()
        done += 1
        if i == len(steps) or done > MOST_STEPS:
            return True
        s, n, sign = steps[i]
        low, high = reach[i + 1]
        # at + sign * s * v must come within (-width_b - high, width_a - low).
        ends = sorted(sign * end for end in (-width_b - high - at + 1, width_a - low - at - 1))
        first, last = max(-(-ends[0] // s), 0), min(ends[1] // s, n - 1)
        todo += [(at + sign * s * v, i + 1) for v in range(first, min(last, first + MOST_STEPS) + 1)]
    return False
