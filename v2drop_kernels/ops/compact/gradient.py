"""The gradient, in eager mode, of every launch that ends in a gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...backends.choice import runner_of
from ...backends.protocol import Runner
from ...backends.requests import CompactBackwardRequest
from ...core.arguments import settled_gradient
from ...core.types import GatherSpec
from .torch_op import BACKWARD

Launched = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]  # keep, tensors, offsets of a packed result


class _Gather(torch.autograd.Function):
    """Any launch that ends in a gather; its backward pass is one gather with the inverse map."""

    @staticmethod
    def forward(
        ctx: Any, launch: Callable[[], Launched], backend: str, dims: list[tuple[int, int]], rows: int, *tensors: torch.Tensor
    ) -> tuple[Any, ...]:
        keep, outs, cu = launch()
        ctx.save_for_backward(keep)
        ctx.backend, ctx.dims, ctx.rows = backend, dims, rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(keep, *(o for i, o in enumerate(outs) if not ctx.needs_input_grad[4 + i]))
        return (keep, cu, *outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _keep: Any, _cu: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        (keep,) = ctx.saved_tensors
        found: list[torch.Tensor | None] = [None] * len(grads)
        wanted = [(i, g) for i, g in enumerate(grads) if g is not None and ctx.needs_input_grad[4 + i]]
        if wanted:
            request = CompactBackwardRequest(keep, [GatherSpec(settled_gradient(g), *ctx.dims[i]) for i, g in wanted], ctx.rows)
            for (i, _), d in zip(wanted, runner_of(BACKWARD, ctx.backend).run(request), strict=True):
                found[i] = d
        return (None, None, None, None, *found)


def recorded(launch: Callable[[], Launched], runner: Runner, gathers: list[GatherSpec], rows: int) -> Launched:
    """The results of ``launch``, recorded for the gradient in the gathered tensors, which have ``rows`` rows."""
    dims = [(g.batch_dim, g.row_dim) for g in gathers]
    keep, cu, *outs = _Gather.apply(launch, runner.name, dims, rows, *(g.tensor for g in gathers))
    return keep, outs, cu
