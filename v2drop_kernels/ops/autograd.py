"""The gradient of ops whose backward pass is plain PyTorch, whatever the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..backends.protocol import Runner


def differentiable(runner: Runner, request: Any, backward: Callable[..., Any]) -> Any:
    """Run a request, with ``backward(grad, *request)`` for the gradient of its first fields, where one is wanted."""
    if runner.differentiable or not torch.is_grad_enabled():
        return runner.run(request)
    if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in request):
        return runner.run(request)
    return _Differentiable.apply(runner.run, backward, type(request), *request)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Any], Any], backward: Callable[..., Any], kind: Callable[..., Any], *fields: Any) -> Any:
        ctx.tensors = [i for i, x in enumerate(fields) if isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*(fields[i] for i in ctx.tensors))
        ctx.fields = [None if isinstance(x, torch.Tensor) else x for x in fields]
        ctx.gradient = backward
        return run(kind(*fields))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        fields = list(ctx.fields)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            fields[i] = tensor
        found = ctx.gradient(grad, *fields)
        found = found if isinstance(found, tuple) else (found,)
        return (None, None, None, *found, *[None] * (len(fields) - len(found)))
