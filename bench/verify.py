"""The check that comes before any timing: a result is compared with ``v2drop_kernels.reference``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from registry import Case, Expected, Inputs, inputs_of

if TYPE_CHECKING:
    from providers import Provider


class WrongResult(Exception):
    """A provider does not compute what the reference computes: it gets no number."""


def verified(op: str, provider: Provider, case: Case) -> Callable[[Inputs], Any]:
    """The provider's callable, after its result on the case was compared with the reference.

    Raises
    ------
    WrongResult
        With what differs.
    """
    inputs, expected = inputs_of(case)
    try:
        call = provider.build(case)
        if provider.rounding is None:
            return call
        results = [call(inputs), call(inputs)]  # the second call finds buffers that have been used
        found = (_difference(op, result, inputs, expected, provider.rounding) for result in results)
        why = next(filter(None, found), None)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        raise WrongResult(f"{provider.name} {op} {case}: {' '.join(why.split())[:300]}")
    return call


def _difference(op: str, found: Any, inputs: Inputs, expected: Expected, rounding: float) -> str | None:
    if op == "score":
        return same_scores(found, expected.scores, rounding)
    if op == "select":
        values, indices = (x.cpu() for x in found)
        if not torch.equal(indices, expected.keep):
            return f"{int((indices != expected.keep).sum())} indices differ"
        return None if torch.equal(values, expected.values) else "values differ"
    if op == "compact":
        return same_bytes(found.cpu(), expected.hidden)
    keep, hidden = (x.cpu() for x in found)
    if keep.shape != expected.keep.shape:
        return f"keep has shape {list(keep.shape)} in place of {list(expected.keep.shape)}"
    if torch.equal(keep, expected.keep):
        return same_bytes(hidden, expected.hidden)
    return legal_set(keep, expected, rounding) or same_bytes(hidden, rows_at(inputs.h_cur, keep))


def same_scores(found: torch.Tensor, expected: torch.Tensor, rounding: float) -> str | None:
    if found.shape != expected.shape:
        return f"scores have shape {list(found.shape)} in place of {list(expected.shape)}"
    off = ((found.cpu().float() - expected).abs() / expected.abs().clamp(min=1e-30)).max().item()
    return None if off <= rounding else f"scores are off by {off:.1e}, more than {rounding:.1e}"


def same_bytes(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"rows are {found.dtype} {list(found.shape)} in place of {expected.dtype} {list(expected.shape)}"
    return None if torch.equal(found, expected) else "copied rows differ"


def legal_set(keep: torch.Tensor, expected: Expected, rounding: float) -> str | None:
    """Another kept set is legal where it ascends and only tokens whose scores round into the cut changed sides."""
    n = expected.scores.shape[1]
    if not bool(((keep >= 0) & (keep < n)).all()) or not bool((keep.diff(dim=1) > 0).all()):
        return "kept rows do not ascend inside the item"
    chosen = torch.zeros(expected.scores.shape, dtype=torch.bool).scatter_(1, keep, True)
    wanted = torch.zeros_like(chosen).scatter_(1, expected.keep, True)
    cut = expected.scores.gather(1, expected.keep).amin(dim=1, keepdim=True)
    clear = (expected.scores - cut).abs() > 2 * rounding * cut
    wrong = int(((chosen != wanted) & clear).sum())
    return f"{wrong} kept tokens differ by more than rounding" if wrong else None


def rows_at(h: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.index_select(0, rows) for x, rows in zip(h, keep, strict=True)])
