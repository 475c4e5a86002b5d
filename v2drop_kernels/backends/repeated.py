"""Calls that are like an earlier one: their arguments are not checked again, and nothing is planned again.

What the checks of a call find, and its plan, follow from the structure of its arguments, from the dtypes, devices, shapes, strides
and alignments of its tensors, and from its options. These are the key of a bounded table. A call whose arguments passed all checks
leaves there what a call like it needs; a call with another key, or one that has no key, goes the whole way. Keys and entries hold
no tensor of the caller.
"""

from __future__ import annotations

import array
import functools
import math
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import native as library
from ..core.layout import TokenLayout
from ..core.plan import CuPlan, Plan
from ..core.types import GatherSpec
from .choice import forced_name, is_traced, small_limit, transformed
from .protocol import Op, Runner
from .requests import KnownGathers

ENTRIES = 512  # of the table; the oldest goes first

# Results of one call, of the same shape, share one allocation up to this size: the allocations of 64 tensors take longer than
# their copies. Beyond, every tensor has its own, so that the memory of each can be freed by itself.
SHARED_BYTES = 32 << 20


class Block(NamedTuple):
    """One allocation: results of ``nbytes`` each, end to end; ``rows`` has of each its extent in the first dimension."""

    rows: list[int]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    nbytes: int
    dtype: torch.dtype
    device: torch.device


class Known(NamedTuple):
    """What a call like an earlier one needs.

    Attributes
    ----------
    runner : Runner
        What runs it.
    plan : Plan | CuPlan | None
        What it executes, if that follows from more than its tensors.
    gathers : tuple
        ``(batch_dim, row_dim, fill)`` of every tensor to gather.
    blocks : tuple of Block
        How their results are allocated, in order.
    after : TokenLayout | None
        The layout of the result.
    memo : dict
        What the backend keeps for calls like this one, by a name of its own.
    """

    runner: Runner
    plan: Any
    gathers: tuple[tuple[int, int, int], ...] = ()
    blocks: tuple[Block, ...] = ()
    after: TokenLayout | None = None
    memo: dict[str, Any] = {}  # noqa: RUF012 (every entry is made with its own)


_table: dict[Hashable, Known] = {}
_lock = threading.Lock()


# What the checks of arguments depend on, their tensors in order, and the addresses of these, eight bytes each.
Described = tuple[Hashable, list[torch.Tensor], bytes]


def signature(given: tuple[Any, ...]) -> Described | None:
    """The description of these arguments; None where there is more to look at.

    That is: a value that is neither None, nor a plain strided tensor, nor a list or tuple of those; or one that needs a gradient.
    """
    differentiable = torch.is_grad_enabled()
    functions = _functions()
    if functions is not None:
        found: Described | None = functions[0](given, differentiable)
        return found
    tensors: list[torch.Tensor] = []
    try:
        return _described(given, tensors, differentiable), tensors, addresses(tensors)
    except (_Unlike, RuntimeError):  # RecursionError is one
        return None


def addresses(tensors: Sequence[torch.Tensor]) -> bytes:
    """Where the data of tensors begins, eight bytes each."""
    return array.array("Q", [x.data_ptr() for x in tensors]).tobytes()


@functools.cache
def _functions() -> Any:
    """These functions of the library; None where it is not there or cannot read tensors of torch."""
    if not library.reads(torch.Tensor):
        return None
    return library.lib().signature, library.lib().rebuild, library.lib().result_addresses


class _Unlike(Exception):
    """An argument of a kind that is not remembered."""


def _described(value: Any, tensors: list[torch.Tensor], differentiable: bool) -> Hashable:
    if value is None:
        return None
    kind = type(value)
    if kind is torch.Tensor:
        x: torch.Tensor = value
        if x.layout is not torch.strided or x.is_complex() or x.is_neg() or (differentiable and x.requires_grad):
            raise _Unlike
        tensors.append(x)
        return x.dtype, x.device, tuple(x.shape), x.stride(), (x.data_ptr() | 16) & -(x.data_ptr() | 16)
    if kind is not tuple and kind is not list:
        raise _Unlike
    return (kind is list, *(_described(item, tensors, differentiable) for item in value))


# The key of a call (None: it is not to be remembered), the tensors that it moves, what is known of such calls, and the addresses of
# all its tensors, of which those that it moves are the last. A plain tuple: this is on the way of every call.
Found = tuple[Hashable, list[torch.Tensor], Known | None, bytes]
UNKNOWN: Found = (None, [], None, b"")


def look_up(
    op: Op, ranked: tuple[Any, ...], moved: tuple[Any, ...], k: Any, droppable: Any, backend: str | None, plain: bool, *options: Any
) -> Found:
    """Whether there was a call like this one; ``plain`` says that it has no argument but those that are given here.

    ``ranked`` are the arguments that rows are ranked by (tensors or None), ``moved`` those of which the kept rows are gathered.
    """
    if not plain or type(k) is not int or not (droppable is None or _is_plain(droppable)):
        return UNKNOWN
    if is_traced(moved[0]) or transformed():
        return UNKNOWN
    described = signature(ranked + moved)
    if described is None:
        return UNKNOWN
    tensors = described[1]
    for x in ranked:
        if x is not None:
            del tensors[0]
    key = (op, described[0], k, droppable, forced_name(backend), small_limit(), options)
    try:
        return key, tensors, _table.get(key), described[2]
    except TypeError:  # an option that is no word: the checks say so
        return UNKNOWN


def _is_plain(droppable: Any) -> bool:
    if type(droppable) is tuple:
        return len(droppable) == 2 and type(droppable[0]) is int and type(droppable[1]) is int
    return type(droppable) is TokenLayout and droppable.mask is None and not droppable.is_packed


def remember(
    found: Found, runner: Runner, plan: Plan | CuPlan | None, gathers: Sequence[GatherSpec] = (), out_rows: int = 0,
    after: TokenLayout | None = None,
) -> None:  # fmt: skip
    """Note what a call that was looked up, and passed all checks, has found; its results have ``out_rows`` rows."""
    key, tensors = found[:2]
    if key is None or runner.differentiable or runner.traced or (plan is not None and plan.ragged):
        return
    if any(spec.tensor is not x for spec, x in zip(gathers, tensors, strict=bool(gathers))):
        return  # an argument was expanded or copied on the way
    dimensions = tuple((spec.batch_dim, spec.row_dim, spec.fill) for spec in gathers)
    known = Known(runner, plan, dimensions, _blocks(gathers, out_rows), after, {})
    with _lock:
        while len(_table) >= ENTRIES:
            del _table[next(iter(_table))]
        _table[key] = known


def _blocks(gathers: Sequence[GatherSpec], out_rows: int) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for spec in gathers:
        x = spec.tensor
        shape = tuple(out_rows if dim == spec.row_dim else size for dim, size in enumerate(x.shape))
        strides = [1]
        for size in shape[:0:-1]:
            strides.insert(0, strides[0] * max(size, 1))
        nbytes = math.prod(shape) * x.element_size()
        new = Block([shape[0]], shape, tuple(strides), nbytes, x.dtype, x.device)
        if blocks and nbytes and nbytes % 64 == 0:
            last = blocks[-1]
            rows = [*last.rows, shape[0]]
            alike = last[3:] == new[3:] and last.rows[0] == shape[0] and last.shape[1:] == shape[1:]
            if alike and len(rows) * nbytes <= SHARED_BYTES:
                blocks[-1] = last._replace(rows=rows, shape=(sum(rows), *shape[1:]))
                continue
        blocks.append(new)
    return tuple(blocks)


def rebuild(tree: tuple[Any, ...], leaves: list[torch.Tensor]) -> Any:
    """The tree with these leaves instead of its own, in their order; None stays None."""
    functions = _functions()
    return _rebuilt(tree, iter(leaves)) if functions is None else functions[1](tree, leaves)


def _rebuilt(tree: Any, leaves: Iterator[torch.Tensor]) -> Any:
    if tree is None:
        return None
    return type(tree)(_rebuilt(x, leaves) for x in tree) if isinstance(tree, list | tuple) else next(leaves)


def gathers_of(found: Found) -> KnownGathers:
    """What a known call moves, with uninitialised results."""
    _, tensors, known, given = found
    assert known is not None
    results: list[torch.Tensor] = []
    blocks = []
    for rows, shape, strides, nbytes, dtype, device in known.blocks:
        block = torch.empty_strided(shape, strides, dtype=dtype, device=device)  # a third faster than torch.empty
        start, count = block.data_ptr(), len(rows)
        blocks.append((start, count, nbytes))
        if count * nbytes >= library.HUGE_BYTES and device.type == "cpu" and library.available()[0]:
            library.lib().prefer_huge_pages(start, count * nbytes)
        if count == 1:
            results.append(block)
        else:  # tensors of their own, which autograd does not take for views of one another
            results += torch.unsafe_split_with_sizes(block, rows)
    functions = _functions()
    places = given + addresses(results) if functions is None else functions[2](given, tuple(blocks))
    return KnownGathers(tensors, results, known.gathers, places, known.memo)


def clear() -> None:
    """Forget every call, for tests."""
    with _lock:
        _table.clear()
