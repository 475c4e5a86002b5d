"""Tensors that a call overwrites: ``out=``, the tensors of an earlier result, and the caches of compact_."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .overlap import conflict, overlaps_itself
from .types import GatherSpec

if TYPE_CHECKING:
    import torch


def checked(out: Any, kind: type, traced: bool) -> Any:
    """``out``; raise unless it is an earlier result, given outside tracing."""
    if not isinstance(out, kind):
        raise TypeError(f"out must be a {kind.__name__}, got {type(out).__name__}")
    if traced:
        raise ValueError("out cannot be given under torch.compile or torch.export, which plan memory themselves")
    return out


def into(
    name: str, given: tuple[Any, list[torch.Tensor]], structure: Any, specs: list[GatherSpec], out_rows: int
) -> list[GatherSpec]:
    """The gathers of the argument ``name``, each into its tensor of ``given``, the structure and the tensors of ``out``."""
    found, targets = given
    if found != structure or len(targets) != len(specs):
        raise ValueError(f"out.{name} must have the structure of {name}")
    return [_into(f"out.{name}", spec, target, out_rows) for spec, target in zip(specs, targets, strict=True)]


def _into(name: str, spec: GatherSpec, target: torch.Tensor, out_rows: int) -> GatherSpec:
    import torch

    shape = list(spec.tensor.shape)
    shape[spec.row_dim] = out_rows
    if list(target.shape) != shape or target.dtype != spec.tensor.dtype or target.device != spec.tensor.device:
        want = f"{spec.tensor.dtype} {shape} on {spec.tensor.device}"
        raise ValueError(f"{name} must be {want}, got {target.dtype} {list(target.shape)} on {target.device}")
    if not target.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(target.stride())}")
    if target.is_neg() or target.is_conj():
        raise ValueError(f"{name} must not be a negated or conjugated view: its memory would be read with another sign")
    if torch.is_grad_enabled() and (spec.tensor.requires_grad or target.requires_grad):
        raise ValueError(f"{name} cannot be given where a gradient is recorded")
    return spec._replace(out=target)


def overwriting(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``run`` for a request with ``out=``: checks first that no written memory is read or written twice, and counts the change."""

    def run_and_count(request: Any) -> Any:
        written = [gather.out for gather in request.gathers if gather.out is not None]
        read = list(_tensors(request))
        if found := conflict(written, read):
            other = "another of its tensors" if found[1] < len(written) else "a tensor that is read"
            raise ValueError(f"out must not share memory with what a call reads, nor within itself: one tensor meets {other}")
        result = run(request)
        count_change(written)
        return result

    return run_and_count


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that a request reads."""
    if isinstance(value, GatherSpec):
        yield value.tensor
    elif isinstance(value, list | tuple):
        for x in value:
            yield from _tensors(x)
    elif hasattr(value, "data_ptr"):
        yield value


def distinct(gathers: Sequence[GatherSpec], keep: torch.Tensor, *, traced: bool) -> list[GatherSpec]:
    """The gathers of compact_, each cache once where several layers share it; raise where memory is shared in another way."""
    found: dict[Any, GatherSpec] = {}
    for gather in gathers:
        x = gather.tensor
        found.setdefault(id(x) if traced else (x.data_ptr(), x.shape, x.stride(), x.dtype), gather)
    once = list(found.values())
    if not traced:
        if any(overlaps_itself(gather.tensor) for gather in once):
            raise ValueError("kv must not share memory between elements: one of its tensors overlaps itself")
        if conflict([gather.tensor for gather in once], [keep]):
            raise ValueError("kv must not share memory between its tensors, except where one tensor is given more than once")
    return once


def count_change(written: Iterable[torch.Tensor]) -> None:
    """Tell autograd that tensors were changed in place, so that it refuses to use a value that it saved before."""
    import torch

    torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])
