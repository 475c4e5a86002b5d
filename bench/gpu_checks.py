"""Checks of a result against ``v2drop_kernels.reference``: what is wrong with it in words, or None."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from registry import Expected, Inputs
from verify import legal_set, rows_at

from v2drop_kernels import reference

ROUNDED = 2.0**-7  # what a bfloat16 difference or norm may be off


EXACT = 1e-5  # another order of summation of a few thousand float32 terms


def same(expected: Any, what: str) -> Callable[[Any], str | None]:
    """Equal bytes."""

    def check(found: Any) -> str | None:
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"{what}: {found.dtype} {list(found.shape)} in place of {expected.dtype} {list(expected.shape)}"
        return None if torch.equal(found, expected) else f"{what} differ"

    return check


def kept(x: Inputs, rounding: float) -> Callable[[Any], str | None]:
    """The right tokens, but for those whose scores round into the cut, and the very rows of what was kept."""
    expected = Expected(x.scores.cpu(), x.scores.cpu(), x.keep.cpu(), x.scores.cpu())

    def check(found: Any) -> str | None:
        keep, hidden = found[0], found[1]
        if keep.shape != x.keep.shape:
            return f"keep has shape {list(keep.shape)} in place of {list(x.keep.shape)}"
        why = None if torch.equal(keep, x.keep) else legal_set(keep.cpu(), expected, rounding)
        return why or same(rows_at(x.h_cur, keep), "copied rows")(hidden)

    return check


def segments_kept(x: Inputs, offsets: Sequence[int], ks: Sequence[int]) -> Callable[[Any], str | None]:
    """``kept`` for every segment of a packed batch."""
    checks = []
    for lo, hi, k in zip(offsets[:-1], offsets[1:], ks, strict=True):
        scores = x.scores[:, lo:hi]
        keep = reference.segmented_topk(scores, k).indices
        checks.append((lo, k, kept(Inputs(x.h_prev[:, lo:hi], x.h_cur[:, lo:hi], scores, keep), EXACT)))

    def check(found: Any) -> str | None:
        at = 0
        for lo, k, segment in checks:
            wrong = segment((found[0][None, at : at + k] - lo, found[1][None, at : at + k]))
            if wrong:
                return f"segment at row {lo}: {wrong}"
            at += k
        return None if at == len(found[0]) else f"{len(found[0])} rows in place of {at}"

    return check
