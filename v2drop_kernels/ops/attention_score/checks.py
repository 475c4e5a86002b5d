"""Argument rules of attention_score."""

from __future__ import annotations

from typing import Any

import torch

from ...core import arguments


def query_and_keys(q: Any, k: Any, layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``q`` as ``[B, H, Q, Dh]`` and ``k`` as ``[B, Hkv, S, Dh]``; raise unless they fit together."""
    q, k = arguments.keys("q", q, layout), arguments.keys("k", k, layout)
    if q.dtype != k.dtype:
        raise TypeError(f"q must have the dtype of k {k.dtype}, got {q.dtype}")
    arguments.same_device("q", q, k.device, "k")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q must have the batch and head size of k, {k.shape[0]} and {k.shape[3]}, got {q.shape[0]} and {q.shape[3]}"
        )
    if k.shape[1] < 1 or q.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of the heads of k ({k.shape[1]}), got {q.shape[1]}")
    if not k.shape[3]:
        raise ValueError("k must have heads of at least one channel, got 0")
    return q, k


def head_reduction(heads: Any, h: int) -> None:
    """Raise unless ``heads`` is a way to reduce ``h`` heads to one."""
    if isinstance(heads, bool) or not isinstance(heads, int):
        arguments.one_of("heads", heads, ("mean", "sum", "max"))
    elif not 1 <= heads <= h:
        raise ValueError(f"heads must be from 1 to the {h} heads of q, got {heads}")
