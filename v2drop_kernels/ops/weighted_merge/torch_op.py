"""weighted_merge as ``torch.ops.v2drop.weighted_merge``; traced calls of the Triton kernels go through it."""

from __future__ import annotations

from typing import Any

import torch

from ... import _library
from ..._ops import add_op_namespace_prefix, ops
from .gradient import gradients, kernels


def _launch(x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None, mean: bool) -> torch.Tensor:
    return kernels().weighted_merge(x, offsets, rows, weights, mean)


def _fake(x: Any, offsets: Any, rows: Any, weights: Any, mean: bool) -> torch.Tensor:
    return x.new_empty((x.shape[0], offsets.shape[1] - 1, x.shape[2]))


def _backward_fake(
    grad: Any, x: Any, offsets: Any, rows: Any, weights: Any, mean: bool, both: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), rows.new_empty(rows.shape if both else 0, dtype=torch.float32)


_SIGNATURE = "Tensor x, Tensor offsets, Tensor rows, Tensor? weights, bool mean"
_library._define(f"weighted_merge({_SIGNATURE}) -> Tensor", _fake)(_launch)
_library._define(f"weighted_merge_backward(Tensor grad, {_SIGNATURE}, bool both) -> (Tensor, Tensor)", _backward_fake)(gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.mean = inputs[4]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    both = ctx.needs_input_grad[3]
    d_x, d_weights = ops.weighted_merge_backward(grad, *ctx.saved_tensors, ctx.mean, both)
    return d_x, None, None, d_weights if both else None, None


torch.library.register_autograd(add_op_namespace_prefix("weighted_merge"), _backward, setup_context=_setup, lib=_library._lib)
