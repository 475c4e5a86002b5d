"""weighted_merge as ``torch.ops.v2drop.weighted_merge``; traced calls of the Triton kernels go through it."""

from __future__ import annotations

from typing import Any

import torch

from ..._ops import ops
from ...backends.choice import runner_of
from ...backends.protocol import Op
from ...backends.requests import MergeRequest
from .. import registration
from . import reference
from .gradient import gradients


def call(backend: str, request: MergeRequest) -> torch.Tensor:
    """Run a request as a node of a traced graph."""
    return ops.weighted_merge(*request, backend)


OP = Op(__package__, "run", reference.run, call)


def _merge(x: Any, offsets: Any, rows: Any, weights: Any, mean: bool, backend: str) -> torch.Tensor:
    return runner_of(OP, backend).run(MergeRequest(x, offsets, rows, weights, mean))


def _merge_fake(x: Any, offsets: Any, rows: Any, weights: Any, mean: bool, backend: str) -> torch.Tensor:
    return x.new_empty((x.shape[0], offsets.shape[1] - 1, x.shape[2]))


def _backward_fake(grad: Any, x: Any, offsets: Any, rows: Any, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), rows.new_empty(rows.shape if options[2] else 0, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.mean, ctx.backend = inputs[4:]


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    both = ctx.needs_input_grad[3]
    d_x, d_weights = ops.weighted_merge_backward(grad, *ctx.saved_tensors, ctx.mean, both, ctx.backend)
    return d_x, None, None, d_weights if both else None, None, None


_SIGNATURE = "Tensor x, Tensor offsets, Tensor rows, Tensor? weights, bool mean"
registration.define(f"weighted_merge({_SIGNATURE}, str backend) -> Tensor", _merge_fake, _merge)
registration.define(
    f"weighted_merge_backward(Tensor grad, {_SIGNATURE}, bool both, str backend) -> (Tensor, Tensor)", _backward_fake, gradients
)
registration.define_gradient("weighted_merge", _gradient, _setup)
