"""The plan of a packed batch whose items are one segment each, made by the compiled library without Python for every segment."""

from __future__ import annotations

from typing import Any

import torch

from ... import native as library
from ...backends.choice import transformed
from ...backends.protocol import Runner
from ...core.calls import Resolved
from ...core.plan import WIDTH, Plan, TensorTable


def packed_items(runner: Runner, ranked: torch.Tensor, k: Any, droppable: Any, cu_seqlens: Any) -> Resolved | None:
    """What ``resolve("topk", ...)`` finds; None where the call is of another kind, or its offsets are wrong."""
    if cu_seqlens is None or droppable is not None or runner.name != "cpu" or runner.traced or type(k) is not int or k < 0:
        return None
    if type(cu_seqlens) is torch.Tensor:
        if not cu_seqlens.is_cpu or cu_seqlens.dim() != 1 or cu_seqlens.is_neg() or transformed():
            return None
    elif type(cu_seqlens) not in (list, tuple):
        return None
    if not len(cu_seqlens) or not library.reads(torch.Tensor):
        return None
    groups = len(cu_seqlens) - 1
    table = torch.empty((groups, WIDTH), dtype=torch.int64)
    width = library.lib().packed_segments(cu_seqlens, ranked.shape[0], min(k, ranked.shape[0]), table.data_ptr(), groups)
    if width < 0:
        return None
    plan = Plan(1, ranked.shape[0], width, groups, None, TensorTable(table))
    return Resolved(plan, None, None, None, None)
