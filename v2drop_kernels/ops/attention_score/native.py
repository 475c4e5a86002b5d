# SPDX-License-Identifier: Apache-2.0
"""attention_score in the compiled library."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import native as library
from ...backends import native
from ...backends.requests import AttentionRequest


@functools.lru_cache(maxsize=1024)
def workspace_bytes(batch: int, heads: int, queries: int, rows: int) -> int:
    """Scratch memory of one call on CUDA."""
    return int(library.lib().attention_workspace_bytes(batch, heads, queries, rows))


def attention_score(request: AttentionRequest, place: str) -> Tensor:
    """Float32 scores ``[B, S]``."""
    q, k, query_rows, key_mask, droppable, causal, scale, mode, heads, queries = request
    q, k = native.unit_stride(q), native.unit_stride(k)
    scores = torch.empty((k.shape[0], k.shape[2]), dtype=torch.float32, device=k.device)
    # A number of heads is its own code.
    reductions = library.HEADS[heads] if isinstance(heads, str) else heads, library.QUERIES[queries]
    native.call(
        "attention_score", place, k.device, native.view(q), native.view(k), native.view(query_rows), native.maybe_view(key_mask),
        native.maybe_view(droppable), causal, scale, library.MODES[mode], *reductions, native.view(scores),
        workspace=workspace_bytes(*q.shape[:3], k.shape[2]) if place == "cuda" else 0,
    )  # fmt: skip
    return scores
