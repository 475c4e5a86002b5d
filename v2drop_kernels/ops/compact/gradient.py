"""The gradient, in eager mode, of every launch that ends in a gather."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...backends.choice import runner_of
from ...backends.protocol import Runner
from ...backends.requests import CompactBackwardRequest, CompactRequest
from ...core.arguments import settled_gradient
from ...core.types import GatherSpec
from ..autograd import by_formula, each
from .reference import gather
from .torch_op import BACKWARD

Launched = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]  # keep, tensors, offsets of a packed result
Dims = list[tuple[int, int]]


class _Gather(torch.autograd.Function):
    """Any launch that ends in a gather; its backward pass is one gather with the inverse map."""

    @staticmethod
    def forward(
        ctx: Any, launch: Callable[[], Launched], backend: str, dims: Dims, rows: int, *tensors: torch.Tensor
    ) -> tuple[Any, ...]:
        keep, outs, cu = launch()
        ctx.save_for_backward(keep)
        ctx.backend, ctx.dims, ctx.rows = backend, dims, rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(keep, *(o for i, o in enumerate(outs) if not ctx.needs_input_grad[4 + i]))
        return (keep, cu, *outs)

    @staticmethod
    def backward(ctx: Any, _keep: Any, _cu: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        found = _pulled(ctx.saved_tensors[0], grads, ctx.needs_input_grad[4:], ctx.backend, ctx.dims, ctx.rows)
        return (None, None, None, None, *found)


class _Moved(torch.autograd.Function):
    """A gather by rows that are known, under a transform: linear, so its tangents are gathered alike."""

    @staticmethod
    def forward(runner: Runner, specs: list[GatherSpec], keep: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gathers = [spec._replace(tensor=x) for spec, x in zip(specs, tensors, strict=True)]
        return tuple(runner.run(CompactRequest(keep, gathers)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.runner, ctx.specs, keep, *tensors = inputs
        ctx.save_for_backward(keep)
        ctx.save_for_forward(keep, *(x for x in tensors if not x.is_floating_point()))
        ctx.shapes = [(x.shape, x.dtype, x.device) for x in tensors]
        ctx.floating = [x.is_floating_point() for x in tensors]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in output if not x.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        dims = [(spec.batch_dim, spec.row_dim) for spec in ctx.specs]
        rows = ctx.shapes[0][0][dims[0][1]]
        found = _pulled(ctx.saved_tensors[0], grads, ctx.needs_input_grad[3:], ctx.runner.name, dims, rows)
        return (None, None, None, *found)

    @staticmethod
    def jvp(ctx: Any, _runner: Any, _specs: Any, _keep: Any, *tangents: torch.Tensor | None) -> tuple[Any, ...]:
        keep, which = ctx.saved_tensors[0], [i for i, floating in enumerate(ctx.floating) if floating]
        zeros = lambda i: torch.zeros(ctx.shapes[i][0], dtype=ctx.shapes[i][1], device=ctx.shapes[i][2])
        given = [zeros(i) if tangents[i] is None else tangents[i] for i in which]
        moved = dict(zip(which, _Moved.apply(ctx.runner, [ctx.specs[i] for i in which], keep, *given), strict=True))
        return tuple(moved.get(i) for i in range(len(tangents)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, runner: Any, specs: Any, keep: Any, *tensors: Any) -> tuple[Any, Any]:
        # The dimensions of a list belong to its elements, of which none has one here.
        return each(_Moved, info, (None, None, *in_dims[2:]), (runner, specs, keep, *tensors))


def _pulled(
    keep: torch.Tensor, grads: Sequence[torch.Tensor | None], needed: Sequence[bool], backend: str, dims: Dims, rows: int
) -> list[torch.Tensor | None]:
    """The gradients of the gathered tensors from those of the results, by one kernel or, to be differentiated, by a formula."""
    found: list[torch.Tensor | None] = [None] * len(grads)
    wanted = [(i, GatherSpec(g, *dims[i])) for i, g in enumerate(grads) if g is not None and needed[i]]
    if not wanted:
        return found
    made: Sequence[torch.Tensor]
    if by_formula(*grads):
        made = [_transposed(keep, spec, rows) for _, spec in wanted]
    else:
        gathers = [spec._replace(tensor=settled_gradient(spec.tensor)) for _, spec in wanted]
        made = runner_of(BACKWARD, backend).run(CompactBackwardRequest(keep, gathers, rows))
    for (i, _), gradient in zip(wanted, made, strict=True):
        found[i] = gradient
    return found


def _transposed(keep: torch.Tensor, spec: GatherSpec, rows: int) -> torch.Tensor:
    shape = list(spec.tensor.shape)
    shape[spec.row_dim] = rows
    zeros = torch.zeros(shape, dtype=spec.tensor.dtype, device=spec.tensor.device)
    return torch.func.vjp(lambda x: gather(keep, [spec._replace(tensor=x)])[0], zeros)[1](spec.tensor)[0]


def recorded(launch: Callable[[], Launched], runner: Runner, gathers: Sequence[GatherSpec], rows: int) -> Launched:
    """The results of ``launch``, recorded for the gradient in the gathered tensors, which have ``rows`` rows."""
    dims = [(g.batch_dim, g.row_dim) for g in gathers]
    keep, cu, *outs = _Gather.apply(launch, runner.name, dims, rows, *(g.tensor for g in gathers))
    return keep, outs, cu


def moved(runner: Runner, keep: torch.Tensor, gathers: Sequence[GatherSpec]) -> list[torch.Tensor]:
    """The gathered tensors, under a transform of torch.func or forward-mode AD."""
    if any(gather.out is not None for gather in gathers):
        raise ValueError("out cannot be given under a transform of torch.func or forward-mode AD: it is changed in place")
    specs = [gather._replace(tensor=None) for gather in gathers]
    return list(_Moved.apply(runner, specs, keep, *(gather.tensor for gather in gathers)))
