"""The ops as ``torch.ops.v2drop.*``: schemas, fakes and autograd, so that torch.compile and torch.export see one node each.

Eager calls do not come through here: they call the backend's launcher directly, which saves the dispatcher's microseconds.
A plan travels as a flat list of (possibly symbolic) integers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import reference
from ._ops import add_op_namespace_prefix, ops
from .backends import choice
from .core.arguments import host_cu_seqlens
from .core.plan import COLUMNS, CuPlan, Plan
from .core.types import GatherSpec

_lib = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")
_PLAN = "SymInt[] plan, SymInt batch, SymInt rows, SymInt out_rows"


def _define(schema: str, fake: Any, tags: tuple[torch.Tag, ...] = (torch.Tag.pt2_compliant_tag,)) -> Any:
    """Register one op: its schema, its fake, and the decorated function as the implementation for every device."""
    name = schema.split("(", 1)[0]

    def register(fn: Any) -> Any:
        _lib.define(schema, tags=tags)
        _lib.impl(name, fn, "CompositeExplicitAutograd")
        torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_lib)
        return fn

    return register


def dispatched(x: torch.Tensor) -> bool:
    """Whether a call on ``x`` must be seen by the dispatcher: it is being traced, or ``x`` is a tensor subclass."""
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


@functools.lru_cache(maxsize=256)
def _plan(ints: tuple[int, ...], batch: int, rows: int, out_rows: int) -> Plan:
    if len(ints) == 4:
        return Plan(batch, rows, out_rows, batch, (ints[0], ints[1], ints[2], ints[3]))
    return Plan(batch, rows, out_rows, len(ints) // 8, None, ints)


def _unpack_plan(
    ints: Sequence[int], batch: int, rows: int, out_rows: int, cu_seqlens: torch.Tensor | None, pack: bool
) -> Plan | CuPlan:
    if cu_seqlens is None:
        return _plan(tuple(ints), batch, rows, out_rows)
    plan = CuPlan(rows, tuple(ints), out_rows, pack)
    return plan.resolve(host_cu_seqlens(cu_seqlens, rows)) if cu_seqlens.device.type == "cpu" else plan


def _pack_plan(plan: Plan | CuPlan) -> tuple[list[int], int, int, int]:
    if isinstance(plan, CuPlan):
        return list(plan.ks), 1, plan.rows, plan.out_rows
    return list(plan.uniform or plan.table), plan.batch, plan.rows, plan.out_rows


def _groups(ints: Sequence[int], batch: int, cu_seqlens: torch.Tensor | None) -> int:
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    return batch if len(ints) == 4 else len(ints) // 8


def _parts(tensors: Sequence[torch.Tensor], dims: Sequence[int], fills: Sequence[int]) -> list[GatherSpec]:
    return [GatherSpec(t, dims[2 * i], dims[2 * i + 1], fills[i]) for i, t in enumerate(tensors)]


def _resized(tensors: Sequence[torch.Tensor], dims: Sequence[int], rows: int) -> list[torch.Tensor]:
    shapes = [[rows if d == dims[2 * i + 1] else n for d, n in enumerate(t.shape)] for i, t in enumerate(tensors)]
    return [t.new_empty(shape) for t, shape in zip(tensors, shapes, strict=True)]


# --- variation_score


def _variation_score_fake(h_prev: Any, h_cur: Any, metric: str, score_dtype: Any, backend: str) -> torch.Tensor:
    return h_cur.new_empty(h_cur.shape[:-1], dtype=torch.float32)


@_define(
    "variation_score(Tensor h_prev, Tensor h_cur, str metric, ScalarType? score_dtype, str backend) -> Tensor",
    _variation_score_fake,
)
def _variation_score(
    h_prev: torch.Tensor, h_cur: torch.Tensor, metric: str, score_dtype: torch.dtype | None, backend: str
) -> torch.Tensor:
    return choice.load(backend).variation_score(h_prev, h_cur, metric, score_dtype)


def _variation_score_backward_fake(
    grad: Any, h_prev: Any, h_cur: Any, metric: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return h_prev.new_empty(h_prev.shape), h_cur.new_empty(h_cur.shape)


@_define(
    "variation_score_backward(Tensor grad, Tensor h_prev, Tensor h_cur, str metric, str backend) -> (Tensor, Tensor)",
    _variation_score_backward_fake,
)
def _variation_score_backward(
    grad: torch.Tensor, h_prev: torch.Tensor, h_cur: torch.Tensor, metric: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return choice.load(backend).variation_score_backward(grad, h_prev, h_cur, metric, True, True)


def _score_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    h_prev, h_cur, ctx.metric, _, ctx.backend = inputs
    ctx.save_for_backward(h_prev, h_cur)


def _score_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    h_prev, h_cur = ctx.saved_tensors
    d_prev, d_cur = ops.variation_score_backward(grad, h_prev, h_cur, ctx.metric, ctx.backend)
    return d_prev, d_cur, None, None, None


torch.library.register_autograd(add_op_namespace_prefix("variation_score"), _score_backward, setup_context=_score_setup, lib=_lib)


# --- topk


def _topk_fake(
    scores: Any, h_prev: Any, h_cur: Any, mask: Any, cu_seqlens: Any, plan: Any, batch: int, rows: int,
    out_rows: int, order: str, metric: str, score_dtype: Any, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    like = h_cur if scores is None else scores
    shape = (_groups(plan, batch, cu_seqlens), out_rows)
    return (
        like.new_empty(shape, dtype=torch.float32 if scores is None else scores.dtype),
        like.new_empty(shape, dtype=torch.int64),
    )


@_define(
    f"topk(Tensor? scores, Tensor? h_prev, Tensor? h_cur, Tensor? mask, Tensor? cu_seqlens, {_PLAN}, "
    "str order, str metric, ScalarType? score_dtype, str backend) -> (Tensor, Tensor)",
    _topk_fake,
)
def _topk(
    scores: torch.Tensor | None, h_prev: torch.Tensor | None, h_cur: torch.Tensor | None, mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, plan: Sequence[int], batch: int, rows: int, out_rows: int, order: str,
    metric: str, score_dtype: torch.dtype | None, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    found = _unpack_plan(plan, batch, rows, out_rows, cu_seqlens, pack=False)
    return choice.load(backend).topk(scores, h_prev, h_cur, found, mask, order, metric, score_dtype, cu_seqlens=cu_seqlens)


# --- drop


def _drop_fake(
    scores: Any, h_prev: Any, h_cur: Any, mask: Any, cu_seqlens: Any, parts: Any, dims: Any, fills: Any, plan: Any,
    batch: int, rows: int, out_rows: int, metric: str, score_dtype: Any, backend: str,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:  # fmt: skip
    like = h_cur if scores is None else scores
    cu = like.new_empty(0 if cu_seqlens is None else cu_seqlens.shape[0], dtype=torch.int32)
    return _resized(parts, dims, out_rows), like.new_empty((batch, out_rows), dtype=torch.int64), cu


@_define(
    f"drop(Tensor? scores, Tensor? h_prev, Tensor? h_cur, Tensor? mask, Tensor? cu_seqlens, Tensor[] parts, "
    f"int[] dims, int[] fills, {_PLAN}, str metric, ScalarType? score_dtype, str backend) "
    "-> (Tensor[], Tensor, Tensor)",
    _drop_fake,
)
def _drop(
    scores: torch.Tensor | None, h_prev: torch.Tensor | None, h_cur: torch.Tensor | None, mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, parts: Sequence[torch.Tensor], dims: Sequence[int], fills: Sequence[int],
    plan: Sequence[int], batch: int, rows: int, out_rows: int, metric: str, score_dtype: torch.dtype | None,
    backend: str,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:  # fmt: skip
    found = _unpack_plan(plan, batch, rows, out_rows, cu_seqlens, pack=True)
    keep, outs, cu = choice.load(backend).drop(
        scores, h_prev, h_cur, found, mask, _parts(parts, dims, fills), metric, score_dtype, cu_seqlens=cu_seqlens
    )
    if cu is None:
        cu = torch.empty(0, dtype=torch.int32, device=keep.device)
        if cu_seqlens is not None and isinstance(found, Plan):  # resolved on the host: its table tells what is kept
            kept = found.host_table()[:, COLUMNS.k].cumsum(0)
            cu = torch.nn.functional.pad(kept, (1, 0)).to(torch.int32)
    return outs, keep, cu


def _drop_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    parts, dims, fills = inputs[5:8]
    _save(ctx, output[1], parts, dims, fills, inputs[-1])
    # Autograd takes an empty list of integers for one of tensors, and wants it answered with a list.
    ctx.answer = [[] if isinstance(x, list | tuple) and not x else None for x in inputs]


def _drop_backward(ctx: Any, grads: Any, _keep: Any, _cu: Any) -> tuple[Any, ...]:
    return (*ctx.answer[:5], _gradients(ctx, grads), *ctx.answer[6:])


# --- compact, its backward, and compact_


def _compact_fake(keep: Any, parts: Any, dims: Any, fills: Any, backend: str) -> list[torch.Tensor]:
    return _resized(parts, dims, keep.shape[1])


@_define("compact(Tensor keep, Tensor[] parts, int[] dims, int[] fills, str backend) -> Tensor[]", _compact_fake)
def _compact(
    keep: torch.Tensor, parts: Sequence[torch.Tensor], dims: Sequence[int], fills: Sequence[int], backend: str
) -> list[torch.Tensor]:
    return choice.load(backend).compact(keep, _parts(parts, dims, fills))


def _compact_backward_fake(keep: Any, grads: Any, dims: Any, rows: int, backend: str) -> list[torch.Tensor]:
    return _resized(grads, dims, rows)


@_define(
    "compact_backward(Tensor keep, Tensor[] grads, int[] dims, SymInt rows, str backend) -> Tensor[]",
    _compact_backward_fake,
)
def _compact_backward(
    keep: torch.Tensor, grads: Sequence[torch.Tensor], dims: Sequence[int], rows: int, backend: str
) -> list[torch.Tensor]:
    return choice.load(backend).compact_backward(keep, _parts(grads, dims, [0] * len(grads)), rows)


def _compact_inplace_fake(keep: Any, parts: Any, dims: Any, backend: str) -> None:
    return None


@_define("compact_(Tensor keep, Tensor(a!)[] parts, int[] dims, str backend) -> ()", _compact_inplace_fake)
def _compact_inplace(keep: torch.Tensor, parts: Sequence[torch.Tensor], dims: Sequence[int], backend: str) -> None:
    choice.load(backend).compact_(keep, _parts(parts, dims, [0] * len(parts)))


def _save(ctx: Any, keep: torch.Tensor, parts: Any, dims: Any, fills: Any, backend: str) -> None:
    ctx.save_for_backward(keep)
    ctx.dims, ctx.backend = dims, backend
    ctx.rows = [t.shape[dims[2 * i + 1]] for i, t in enumerate(parts)]
    ctx.differentiable = [t.is_floating_point() for t in parts]


def _gradients(ctx: Any, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """One backward launch for all parts that got a gradient."""
    (keep,) = ctx.saved_tensors
    wanted = [i for i, g in enumerate(grads) if g is not None and ctx.differentiable[i]]
    found: list[torch.Tensor | None] = [None] * len(grads)
    if wanted:
        dims = [d for i in wanted for d in ctx.dims[2 * i : 2 * i + 2]]
        rows = ctx.rows[wanted[0]]
        made = ops.compact_backward(keep, [grads[i] for i in wanted], dims, rows, ctx.backend)
        for i, g in zip(wanted, made, strict=True):
            found[i] = g
    return found


def _compact_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, *inputs)
    ctx.answer = [[] if isinstance(x, list | tuple) and not x else None for x in inputs]


def _compact_grad(ctx: Any, grads: Any) -> tuple[Any, ...]:
    return (None, _gradients(ctx, grads), *ctx.answer[2:])


torch.library.register_autograd(add_op_namespace_prefix("drop"), _drop_backward, setup_context=_drop_setup, lib=_lib)
torch.library.register_autograd(add_op_namespace_prefix("compact"), _compact_grad, setup_context=_compact_setup, lib=_lib)


# --- attention_score, key_norm, cosine_to_pivots: their backward is plain PyTorch, whatever the backend

_ATTENTION = "Tensor query_rows, Tensor? key_mask, Tensor? droppable, bool causal, float scale, str mode, str heads, str queries"


def _heads(heads: str) -> str | int:
    return int(heads) if heads.isdecimal() else heads


def _attention_score_fake(q: Any, k: Any, *_: Any) -> torch.Tensor:
    return k.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32)


@_define(f"attention_score(Tensor q, Tensor k, {_ATTENTION}, str backend) -> Tensor", _attention_score_fake)
def _attention_score(
    q: torch.Tensor, k: torch.Tensor, query_rows: torch.Tensor, key_mask: torch.Tensor | None, droppable: torch.Tensor | None,
    causal: bool, scale: float, mode: str, heads: str, queries: str, backend: str,
) -> torch.Tensor:  # fmt: skip
    run = choice.load(backend).attention_score
    return run(q, k, query_rows, key_mask, droppable, causal, scale, mode, _heads(heads), queries)


def _attention_score_backward_fake(grad: Any, q: Any, k: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_define(
    f"attention_score_backward(Tensor grad, Tensor q, Tensor k, {_ATTENTION}) -> (Tensor, Tensor)",
    _attention_score_backward_fake,
)
def _attention_score_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, query_rows: torch.Tensor, key_mask: torch.Tensor | None,
    droppable: torch.Tensor | None, causal: bool, scale: float, mode: str, heads: str, queries: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    options = (query_rows, key_mask, droppable, causal, scale, mode, _heads(heads), queries)
    return reference.attention_score_backward(grad, q, k, *options)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:-1]


def _attention_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return (*ops.attention_score_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 9)


@_define(
    "key_norm(Tensor k, str norm, str backend) -> Tensor",
    lambda k, norm, backend: k.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32),
)
def _key_norm(k: torch.Tensor, norm: str, backend: str) -> torch.Tensor:
    return choice.load(backend).key_norm(k, norm)


@_define("key_norm_backward(Tensor grad, Tensor k, str norm) -> Tensor", lambda grad, k, norm: k.new_empty(k.shape))
def _key_norm_backward(grad: torch.Tensor, k: torch.Tensor, norm: str) -> torch.Tensor:
    return reference.key_norm_backward(grad, k, norm).contiguous()


def _key_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.norm = inputs[1]


def _key_norm_grad(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return ops.key_norm_backward(grad, *ctx.saved_tensors, ctx.norm), None, None


@_define(
    "cosine_to_pivots(Tensor x, Tensor pivots, str backend) -> Tensor",
    lambda x, pivots, backend: x.new_empty((*pivots.shape, x.shape[1]), dtype=torch.float32),
)
def _cosine_to_pivots(x: torch.Tensor, pivots: torch.Tensor, backend: str) -> torch.Tensor:
    return choice.load(backend).cosine_to_pivots(x, pivots)


@_define("cosine_to_pivots_backward(Tensor grad, Tensor x, Tensor pivots) -> Tensor", lambda grad, x, pivots: x.new_empty(x.shape))
def _cosine_to_pivots_backward(grad: torch.Tensor, x: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    return reference.cosine_to_pivots_backward(grad, x, pivots).contiguous()


def _cosine_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _cosine_grad(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return ops.cosine_to_pivots_backward(grad, *ctx.saved_tensors), None, None


for _name, _backward, _setup in (
    ("attention_score", _attention_backward, _attention_setup),
    ("key_norm", _key_norm_grad, _key_norm_setup),
    ("cosine_to_pivots", _cosine_grad, _cosine_setup),
):
    torch.library.register_autograd(add_op_namespace_prefix(_name), _backward, setup_context=_setup, lib=_lib)


class Dispatched:
    """The functions of a backend module, called through ``torch.ops.v2drop``."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def variation_score(self, prev: torch.Tensor, cur: torch.Tensor, metric: str, score_dtype: torch.dtype | None) -> torch.Tensor:
        return ops.variation_score(prev, cur, metric, score_dtype, self._backend)

    def topk(
        self, scores: Any, prev: Any, cur: Any, plan: Any, mask: Any, order: str, metric: str, score_dtype: Any,
        cu_seqlens: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        packed = _pack_plan(plan)
        return ops.topk(scores, prev, cur, mask, cu_seqlens, *packed, order, metric, score_dtype, self._backend)

    def drop(
        self, scores: Any, prev: Any, cur: Any, plan: Any, mask: Any, parts: list[GatherSpec], metric: str,
        score_dtype: Any, cu_seqlens: Any = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:  # fmt: skip
        tensors, dims, fills = _split(parts)
        outs, keep, cu = ops.drop(
            scores, prev, cur, mask, cu_seqlens, tensors, dims, fills, *_pack_plan(plan), metric, score_dtype,
            self._backend,
        )  # fmt: skip
        return keep, outs, cu if cu_seqlens is not None else None

    def compact(self, keep: torch.Tensor, parts: list[GatherSpec]) -> list[torch.Tensor]:
        return ops.compact(keep, *_split(parts), self._backend)

    def compact_(self, keep: torch.Tensor, parts: list[GatherSpec]) -> None:
        tensors, dims, _ = _split(parts)
        ops.compact_(keep, tensors, dims, self._backend)

    def attention_score(
        self, q: torch.Tensor, k: torch.Tensor, query_rows: Any, key_mask: Any, droppable: Any, causal: bool, scale: float,
        mode: str, heads: str | int, queries: str,
    ) -> torch.Tensor:  # fmt: skip
        rest = (causal, scale, mode, str(heads), queries, self._backend)
        return ops.attention_score(q, k, query_rows, key_mask, droppable, *rest)

    def key_norm(self, k: torch.Tensor, norm: str) -> torch.Tensor:
        return ops.key_norm(k, norm, self._backend)

    def cosine_to_pivots(self, x: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
        return ops.cosine_to_pivots(x, pivots, self._backend)


def runner(tensor: torch.Tensor, argument: str | None, dtype: torch.dtype | None = None) -> tuple[Any, str]:
    """What runs a call on this tensor, and its name: a backend module, or the dispatcher's ops when traced.

    The reference has no such module: the public op calls it with its own arguments. ``dtype`` stands for the tensor's
    where an op only moves bytes.
    """
    kind, dtype = tensor.device.type, dtype or tensor.dtype
    if dispatched(tensor):
        name = choice.traced_choice(kind, dtype, argument)
        return (None if name == "reference" else Dispatched(name)), name
    name = choice.choose_name(kind, dtype, choice.forced_name(argument))
    return (None if name == "reference" else choice.load(name)), name


def differentiable(op: Any, backward: Any, tensors: int, *args: Any) -> Any:
    """``op(*args)``, with ``backward(grad, *args)`` for the gradient of its first arguments.

    ``tensors`` arguments, the leading ones, are tensors or None. The op that a traced call becomes has its gradient registered.
    """
    wanted = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args[:tensors])
    if wanted and not dispatched(args[0]):
        return _Differentiable.apply(op, backward, tensors, *args)
    return op(*args)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, backward: Any, tensors: int, *args: Any) -> Any:
        ctx.save_for_backward(*args[:tensors])
        ctx.gradient, ctx.rest = backward, args[tensors:]
        return op(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        found = ctx.gradient(grad, *ctx.saved_tensors, *ctx.rest)
        found = found if isinstance(found, tuple) else (found,)
        return (None, None, None, *found, *[None] * (len(ctx.saved_tensors) + len(ctx.rest) - len(found)))


def _split(parts: list[GatherSpec]) -> tuple[list[torch.Tensor], list[int], list[int]]:
    return [p.tensor for p in parts], [d for p in parts for d in (p.batch_dim, p.row_dim)], [p.fill for p in parts]
