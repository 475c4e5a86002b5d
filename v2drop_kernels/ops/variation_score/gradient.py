"""The gradient of variation_score in eager mode."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...backends.choice import runner_of
from ...backends.protocol import Runner
from ...backends.requests import ScoreBackwardRequest, Source
from ...core.arguments import settled_gradient
from .torch_op import BACKWARD


class VariationScore(torch.autograd.Function):
    """Scores of ``h_prev`` and ``h_cur``; the backward pass is one kernel of the same backend."""

    @staticmethod
    def forward(ctx: Any, h_prev: torch.Tensor, h_cur: torch.Tensor, runner: Runner, source: Source) -> torch.Tensor:
        ctx.save_for_backward(h_prev, h_cur)
        ctx.metric, ctx.backend = source.metric, runner.name
        return runner.run(source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        h_prev, h_cur = ctx.saved_tensors
        need_prev, need_cur = ctx.needs_input_grad[:2]
        request = ScoreBackwardRequest(settled_gradient(grad), Source(None, h_prev, h_cur, None, ctx.metric), need_prev, need_cur)
        return (*runner_of(BACKWARD, ctx.backend).run(request), None, None)
