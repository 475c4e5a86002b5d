"""How an op becomes ``torch.ops.v2drop.*``: its schema, its fake and its gradient, and how a plan travels through a schema.

torch.compile and torch.export see one node per op. Eager calls do not come through here: they call the implementation of their
backend directly, which saves the dispatcher's microseconds. A plan travels as a flat list of (possibly symbolic) integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._ops import add_op_namespace_prefix
from ..backends.tables import made_anew
from ..core.arguments import host_cu_seqlens
from ..core.cache import BoundedCache
from ..core.plan import WIDTH, CuPlan, Plan
from ..core.types import GatherSpec

_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")

PLAN = "SymInt[] plan, SymInt batch, SymInt rows, SymInt out_rows"
PlanArguments = tuple[list[int], int, int, int]


def define(schema: str, fake: Callable[..., Any], implementation: Callable[..., Any]) -> None:
    """Register an op: its schema, its fake, and one implementation for every device."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _keeping_nothing(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)
    if name.endswith("_backward"):
        define_gradient(name, functools.partial(_once, name), lambda ctx, inputs, output: None)


def _once(name: str, *_: Any) -> Any:
    """The gradient of a gradient in a traced graph, where a term of a loss would be lost without it."""
    op = name.removesuffix("_backward")
    raise RuntimeError(
        f"{op} is differentiable once where torch.compile or export traced it: call it eagerly, or with backend='reference'"
    )


def _keeping_nothing(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation, without tables that outlive a call: its memory may belong to a CUDA graph of torch.compile."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        with made_anew():
            return implementation(*args)

    return run


def define_gradient(name: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    """Register the gradient of an op."""
    torch.library.register_autograd(add_op_namespace_prefix(name), backward, setup_context=setup, lib=_library)


def pack_plan(plan: Plan | CuPlan) -> PlanArguments:
    """A plan as the four arguments of ``PLAN``."""
    if isinstance(plan, CuPlan):
        return list(plan.ks), 1, plan.rows, plan.out_rows
    return list(plan.uniform or plan.table), plan.batch, plan.rows, plan.out_rows


def _made_plan(ints: tuple[int, ...], batch: int, rows: int, out_rows: int) -> Plan:
    if len(ints) == 4:
        return Plan(batch, rows, out_rows, batch, (ints[0], ints[1], ints[2], ints[3]))
    return Plan(batch, rows, out_rows, len(ints) // WIDTH, None, ints)


_plan = BoundedCache(_made_plan, lambda ints, *_: 32 + len(ints) // WIDTH)


def unpack_plan(
    ints: Sequence[int], batch: int, rows: int, out_rows: int, cu_seqlens: torch.Tensor | None, pack: bool
) -> Plan | CuPlan:
    """The plan again; with offsets on the host it is resolved."""
    if cu_seqlens is None:
        return _plan(tuple(ints), batch, rows, out_rows)
    plan = CuPlan(rows, tuple(ints), out_rows, pack)
    return plan.resolve(host_cu_seqlens(cu_seqlens, rows)) if cu_seqlens.device.type == "cpu" else plan


def group_count(ints: Sequence[int], batch: int, cu_seqlens: torch.Tensor | None) -> int:
    """How many segments a packed plan has."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    return batch if len(ints) == 4 else len(ints) // WIDTH


def pack_gathers(gathers: Sequence[GatherSpec]) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Tensors, their (batch, row) dimensions end to end, and their fills."""
    return [g.tensor for g in gathers], [d for g in gathers for d in (g.batch_dim, g.row_dim)], [g.fill for g in gathers]


def unpack_gathers(tensors: Sequence[torch.Tensor], dims: Sequence[int], fills: Sequence[int] | None = None) -> list[GatherSpec]:
    """The gathers again."""
    return [GatherSpec(t, dims[2 * i], dims[2 * i + 1], fills[i] if fills else 0) for i, t in enumerate(tensors)]


def resized(tensors: Sequence[torch.Tensor], dims: Sequence[int], rows: int) -> list[torch.Tensor]:
    """Empty tensors of the same shapes with ``rows`` rows."""
    shapes = [[rows if d == dims[2 * i + 1] else n for d, n in enumerate(t.shape)] for i, t in enumerate(tensors)]
    return [t.new_empty(shape) for t, shape in zip(tensors, shapes, strict=True)]


def unanswered(inputs: Sequence[Any]) -> list[Any]:
    """What a backward pass returns for arguments without a gradient.

    Autograd takes an empty list of integers for one of tensors, and expects a list for it.
    """
    return [[] if isinstance(x, list | tuple) and not x else None for x in inputs]
