"""That all ranks of a group call the same op with the same arguments, checked before they exchange data.

Ranks that disagree would exchange buffers of different sizes, or each wait for a collective that the other never calls. Every op
therefore begins with one all-gather of a few integers: hashes of what the host knows, and whether the rank found its arguments
wrong. Reading it on a GPU would synchronise, so there it is made only where ``V2DROP_CHECK_RANKS=1``; ``V2DROP_CHECK_RANKS=0``
leaves it out on the CPU as well.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .collectives import all_gather

FACTS = ("op", "batch", "rows", "k", "droppable", "sharding", "dtype", "options")
Facts = dict[str, Any]
Found = TypeVar("Found")


def checks_ranks(device: torch.device) -> bool:
    """Whether ranks compare their arguments before a call on tensors of this device."""
    asked = os.environ.get("V2DROP_CHECK_RANKS", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"V2DROP_CHECK_RANKS must be 0 or 1, got {asked!r}")
    if torch.compiler.is_compiling():
        return False
    return asked == "1" or (asked == "" and device.type == "cpu")


def agreed(op: str, device: Any, group: Any, prepare: Callable[[], tuple[Found, Facts]]) -> Found:
    """What ``prepare`` returns beside its facts; raises on every rank if it raised on one, or if a fact differs.

    ``device`` is that of the tensors (the CPU if an argument is not a tensor).
    """
    if not checks_ranks(device):
        return prepare()[0]
    found, facts, error = None, None, None
    try:
        found, facts = prepare()
    except Exception as caught:
        error = caught
    mine = [0 if error is None else 1, *(_hash((facts or {}).get(name, op if name == "op" else None)) for name in FACTS)]
    table = all_gather(torch.tensor(mine, dtype=torch.int64, device=device), group).tolist()
    if error is not None:
        raise error
    failed = [r for r, row in enumerate(table) if row[0]]
    if failed:
        raise RuntimeError(f"group: {op} raised an error on rank {failed[0]}, which says why, so that no other rank goes on")
    for i, name in enumerate(FACTS, start=1):
        other = next((r for r, row in enumerate(table) if row[i] != table[0][i]), None)
        if other is not None:
            what = "the op that is called" if name == "op" else "dtype of the tensors" if name == "dtype" else name
            raise ValueError(f"{what} must be equal on all ranks of group, but ranks 0 and {other} differ")
    assert found is not None
    return found


def check_equal(what: str, x: torch.Tensor, group: Any) -> None:
    """Raise RuntimeError on every rank unless ``x``, integers or bools, is equal on all of them; one small all-gather."""
    mine = torch.tensor([zlib.crc32(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())], device=x.device)
    table = all_gather(mine, group).flatten().tolist()
    other = next((r for r, value in enumerate(table) if value != table[0]), None)
    if other is not None:
        raise RuntimeError(
            f"{what} must be equal on all ranks of group, but ranks 0 and {other} differ (rank {dist.get_rank(group)})"
        )


def _hash(fact: Any) -> int:
    return zlib.crc32(repr(fact).encode())
