"""The argument ``out=``: the tensors of an earlier result, which a call writes again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    if target.untyped_storage().data_ptr() == spec.tensor.untyped_storage().data_ptr() and target.numel():
        raise ValueError(f"{name} must not share memory with the tensor that is read")
    if torch.is_grad_enabled() and (spec.tensor.requires_grad or target.requires_grad):
        raise ValueError(f"{name} cannot be given where a gradient is recorded")
    return spec._replace(out=target)
