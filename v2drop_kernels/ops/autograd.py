"""How autograd sees the ops: gradients by a kernel, and everything else by the plain PyTorch of the reference.

A gradient is one call of a kernel, or of a formula in plain PyTorch. Second derivatives, forward-mode AD and the transforms of
torch.func differentiate the reference instead, which gives the same values within rounding; a vmap is a loop over its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ..backends.choice import transformed
from ..backends.protocol import Op, Runner
from ..core.arguments import settled_gradient


def by_formula(*grads: torch.Tensor | None) -> bool:
    """Whether a backward pass must be differentiable itself, or serves many gradients at once, and so is not a call of a kernel."""
    return torch.is_grad_enabled() or transformed() or any(g is not None and _is_wrapped(g) for g in grads)


def _is_wrapped(x: torch.Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def refuse_inplace(op: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raise where a transform follows a tensor that would be changed in place."""
    if transformed() and any(_is_wrapped(x) or forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"{op} changes memory in place, which torch.func and forward-mode AD cannot follow: use compact")


def each(function: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """The rule of vmap for ``function``: every entry of the batch by itself."""
    found = [
        function.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(found[0], torch.Tensor):
        return torch.stack(found), 0
    columns = list(zip(*found, strict=True))
    return tuple(None if c[0] is None else torch.stack(c) for c in columns), tuple(None if c[0] is None else 0 for c in columns)


class Call:
    """A request without its tensors, and the ways to run it; an argument of a Function that no transform looks into."""

    def __init__(self, run: Callable[[Any], Any], request: Any, reference: Any = None, backward: Any = None) -> None:
        self.run, self.reference, self.backward = run, reference, backward
        self.kind = type(request)
        self.places = [i for i, x in enumerate(request) if isinstance(x, torch.Tensor)]
        self.fields = [None if isinstance(x, torch.Tensor) else x for x in request]

    def request(self, tensors: Sequence[Any]) -> Any:
        """The request with these tensors."""
        fields = list(self.fields)
        for place, tensor in zip(self.places, tensors, strict=True):
            fields[place] = tensor
        return self.kind(*fields)


def tensors_of(request: Any) -> list[torch.Tensor]:
    """The tensors of a request, in the order of its fields."""
    return [x for x in request if isinstance(x, torch.Tensor)]


def differentiable(op: Op, runner: Runner, request: Any, backward: Callable[..., Any], formula: Any = None) -> Any:
    """Run a request of ``op``, with a gradient in those of its tensors that require one.

    ``backward(needed, grad, *request)`` gives the gradients of its fields, None where there is none or it is not needed.
    ``formula`` stands for the reference where that cannot be differentiated twice.
    """
    follow = transformed()
    if not follow and (
        runner.differentiable or not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors_of(request))
    ):
        return runner.run(request)
    return _Recomputed.apply(Call(runner.run, request, formula or op.reference, backward), *tensors_of(request))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(call: Call, *tensors: torch.Tensor) -> torch.Tensor:
        result = call.run(call.request(tensors))
        return result.clone() if result._is_view() else result  # a tangent must have the layout of the whole that is viewed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        call, tensors = ctx.call, ctx.saved_tensors
        if by_formula(grad):
            places, function, primals = _function(call, tensors)
            found = torch.func.vjp(function, *primals)[1](grad)
            by_place = dict(zip(places, found, strict=True))
            return (None, *(by_place.get(i) for i in range(len(tensors))))
        needed = dict(zip(call.places, ctx.needs_input_grad[1:], strict=True))
        found = call.backward(needed, settled_gradient(grad), *call.request(tensors))
        return (None, *(found[place] if place < len(found) else None for place in call.places))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        """The derivative of the gradient in the incoming one, which it is linear in: reverse mode twice."""
        places, function, primals = _function(ctx.call, ctx.saved_tensors)
        given = tuple(torch.zeros_like(x) if tangents[i] is None else tangents[i] for i, x in zip(places, primals, strict=True))
        pulled: Any = torch.func.vjp(function, *primals)
        return torch.func.vjp(pulled[1], torch.zeros_like(pulled[0]))[1](given)[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return each(_Recomputed, info, in_dims, args)


def _function(call: Call, tensors: Sequence[torch.Tensor]) -> tuple[list[int], Callable[..., torch.Tensor], list[torch.Tensor]]:
    """The reference as a function of the floating-point tensors: their places, the function, and they."""
    places = [i for i, x in enumerate(tensors) if x.is_floating_point()]

    def function(*primals: torch.Tensor) -> torch.Tensor:
        every = list(tensors)
        for i, x in zip(places, primals, strict=True):
            every[i] = x
        return call.reference(call.request(every))

    return places, function, [tensors[i] for i in places]


def opaque(run: Callable[[Any], Any], request: Any) -> tuple[Any, ...]:
    """Run a request whose results carry no gradient under any transform; a tuple of tensors, or None in places."""
    leaves, structure = pytree.tree_flatten(request)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    return _Opaque.apply(_Flat(run, [None if isinstance(x, torch.Tensor) else x for x in leaves], leaves, structure), *tensors)


class _Flat:
    """A nested request without its tensors."""

    def __init__(self, run: Callable[[Any], Any], rest: list[Any], leaves: list[Any], structure: Any) -> None:
        self.run, self.rest, self.structure = run, rest, structure
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

    def __call__(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        leaves = list(self.rest)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tuple(self.run(pytree.tree_unflatten(leaves, self.structure)))


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(call: _Flat, *tensors: torch.Tensor) -> tuple[Any, ...]:
        return call(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.results, ctx.arguments = len(output), len(inputs)
        ctx.mark_non_differentiable(*(x for x in output if x is not None))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return (None,) * ctx.arguments

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * ctx.results

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return each(_Opaque, info, in_dims, args)
