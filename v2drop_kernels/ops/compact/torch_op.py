"""compact, its backward pass and compact_ as ``torch.ops.v2drop.*``, which traced calls go through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..._ops import ops
from ...backends.choice import runner_of
from ...backends.protocol import Op
from ...backends.requests import CompactBackwardRequest, CompactRequest
from ...core import overwrite
from .. import registration
from . import reference


def call(backend: str, request: CompactRequest) -> list[torch.Tensor]:
    """Run a request as a node of a traced graph."""
    return ops.compact(request.keep, *registration.pack_gathers(request.gathers), backend)


def call_inplace(backend: str, request: CompactRequest) -> None:
    """Run a request of compact_ as a node of a traced graph."""
    tensors, dims, _ = registration.pack_gathers(request.gathers)
    ops.compact_(request.keep, tensors, dims, backend)


OP = Op(__package__, "compact", reference.run, call)
INPLACE = Op(__package__, "compact_", reference.run_inplace, call_inplace)
BACKWARD = Op(__package__, "compact_backward")


def _compact(keep: Any, tensors: Any, dims: Any, fills: Any, backend: str) -> list[torch.Tensor]:
    return runner_of(OP, backend).run(CompactRequest(keep, registration.unpack_gathers(tensors, dims, fills)))


def _compact_fake(keep: Any, tensors: Any, dims: Any, fills: Any, backend: str) -> list[torch.Tensor]:
    return registration.resized(tensors, dims, keep.shape[1])


def _inplace(keep: Any, tensors: Any, dims: Any, backend: str) -> None:
    runner_of(INPLACE, backend).run(CompactRequest(keep, registration.unpack_gathers(tensors, dims)))
    overwrite.count_change(tensors)


def _backward(keep: Any, grads: Any, dims: Any, rows: int, backend: str) -> list[torch.Tensor]:
    return runner_of(BACKWARD, backend).run(CompactBackwardRequest(keep, registration.unpack_gathers(grads, dims), rows))


def _backward_fake(keep: Any, grads: Any, dims: Any, rows: Any, backend: str) -> list[torch.Tensor]:
    return registration.resized(grads, dims, rows)


def save_gathers(ctx: Any, keep: torch.Tensor, tensors: Any, dims: Any, fills: Any, backend: str) -> None:
    """Keep what :func:`gradients` needs."""
    ctx.save_for_backward(keep)
    ctx.dims, ctx.backend = dims, backend
    ctx.rows = [t.shape[dims[2 * i + 1]] for i, t in enumerate(tensors)]
    ctx.differentiable = [t.is_floating_point() for t in tensors]


def gradients(ctx: Any, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """One backward launch for all tensors that got a gradient."""
    (keep,) = ctx.saved_tensors
    wanted = [i for i, g in enumerate(grads) if g is not None and ctx.differentiable[i]]
    found: list[torch.Tensor | None] = [None] * len(grads)
    if wanted:
        dims = [d for i in wanted for d in ctx.dims[2 * i : 2 * i + 2]]
        made = ops.compact_backward(keep, [grads[i] for i in wanted], dims, ctx.rows[wanted[0]], ctx.backend)
        for i, g in zip(wanted, made, strict=True):
            found[i] = g
    return found


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    save_gathers(ctx, *inputs)
    ctx.unanswered = registration.unanswered(inputs)


def _gradient(ctx: Any, grads: Any) -> tuple[Any, ...]:
    return (None, gradients(ctx, grads), *ctx.unanswered[2:])


registration.define(
    "compact(Tensor keep, Tensor[] tensors, int[] dims, int[] fills, str backend) -> Tensor[]", _compact_fake, _compact
)
registration.define(
    "compact_backward(Tensor keep, Tensor[] grads, int[] dims, SymInt rows, str backend) -> Tensor[]", _backward_fake, _backward
)
registration.define(
    "compact_(Tensor keep, Tensor(a!)[] tensors, int[] dims, str backend) -> ()",
    lambda keep, tensors, dims, backend: None,
    _inplace,
)
registration.define_gradient("compact", _gradient, _setup)
