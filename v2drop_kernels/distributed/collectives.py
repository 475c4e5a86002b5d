"""The collectives of this package: torch's functional ones, which torch.compile traces; recorded, so that tests count them.

Bytes are those that one rank receives from others: ``(P - 1) n`` for an all-gather of ``n`` bytes per rank, ``2 (P - 1) / P n`` for
an all-reduce of ``n`` bytes by a ring, and what other ranks send in an all-to-all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Collective(NamedTuple):
    """One call of :func:`record`: ``kind`` is "all_gather", "all_reduce" or "all_to_all"."""

    kind: str
    received: int


_records: list[list[Collective]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Collective]]:
    """The collectives of this package that the process issues inside the block, eager calls only.

    Examples
    --------
    >>> with record() as calls:
    ...     pass
    >>> calls
    []
    """
    calls: list[Collective] = []
    _records.append(calls)
    try:
        yield calls
    finally:
        _records.remove(calls)


def group_of(group: Any) -> Any:
    """The process group: ``group`` itself, that of a one-dimensional DeviceMesh, or the default group for None."""
    if group is not None and hasattr(group, "get_group"):
        return group.get_group()
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group must be given, or torch.distributed be initialised, where a sequence is sharded")
        return dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise ValueError("group must be a process group of which this process is a member")
    return group


def all_gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    """``[P, ...]``: ``x`` of every rank, all of one shape."""
    ranks = dist.get_world_size(group)
    _note("all_gather", (ranks - 1) * x.numel() * x.element_size())
    return _waited(lambda: torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous()[None], ranks, group.group_name))


def all_reduce(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of ``x`` over the ranks."""
    ranks = dist.get_world_size(group)
    _note("all_reduce", 2 * (ranks - 1) * x.numel() * x.element_size() // ranks)
    return _waited(lambda: torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group.group_name))


def all_to_all(x: torch.Tensor, received: Sequence[int], sent: Sequence[int], group: Any) -> torch.Tensor:
    """Rows of ``x``, ``sent[r]`` of them to rank ``r``; ``received[r]`` rows come from it."""
    row = x.element_size() * x[:1].numel() if x.shape[0] else x.element_size() * x.shape[1:].numel()
    _note("all_to_all", (sum(received) - received[dist.get_rank(group)]) * row)
    return _waited(
        lambda: torch.ops._c10d_functional.all_to_all_single(x.contiguous(), list(received), list(sent), group.group_name)
    )


def _note(kind: str, received: int) -> None:
    if not torch.compiler.is_compiling():
        for calls in _records:
            calls.append(Collective(kind, received))


def _waited(collective: Any) -> torch.Tensor:
    """The finished result of a collective; a RuntimeError in one sentence where another rank failed."""
    if torch.compiler.is_compiling():
        traced: torch.Tensor = torch.ops._c10d_functional.wait_tensor(collective())
        return traced
    try:
        found: torch.Tensor = torch.ops._c10d_functional.wait_tensor(collective())
    except RuntimeError as error:
        raise RuntimeError(
            "group: another rank raised, left, or called another op, so that a collective of v2drop_kernels.distributed failed: "
            + str(error).splitlines()[0]
        ) from error
    return found


def average_gradients(parameters: Iterable[torch.nn.Parameter], group: Any = None) -> None:
    """Replace every gradient by its mean over the ranks of ``group``, in one all-reduce; a missing gradient counts as zero.

    For parameters outside the model that DistributedDataParallel or FSDP wraps, such as ``session.ratios`` of soft training: call
    it between ``backward()`` and ``optimizer.step()``, on every rank.

    Parameters
    ----------
    parameters : iterable of Parameter
        Floating point, the same ones on every rank, on one device.
    group : ProcessGroup | DeviceMesh, optional
        The data-parallel ranks; default: all.
    """
    found, group = list(parameters), group_of(group)
    if not found:
        return
    flat = torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).float().flatten() for x in found])
    mean = all_reduce(flat, group) / dist.get_world_size(group)
    for x, part in zip(found, mean.split([x.numel() for x in found]), strict=True):
        x.grad = part.view_as(x).to(x.dtype)
