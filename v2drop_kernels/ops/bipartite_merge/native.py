# SPDX-License-Identifier: Apache-2.0
"""The pairs of bipartite_merge in the compiled library, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native as library
from ...backends import native
from ...core.arguments import settled


def pairs(features: Tensor, r: int, protected: int, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``keep``, ``row``, and the lists of edges ``offsets`` and ``rows``."""
    features = native.unit_stride(settled(features.detach()))
    batch, n = features.shape[:2]
    keep, row, offsets, edges = (torch.empty(batch, size, dtype=torch.int64) for size in (n - r, n, n - r + 1, n))
    if row.numel():
        native.call(
            "bipartite_pairs", "cpu", row.device, native.view(features), r, protected, library.MERGED_ORDERS[order],
            native.view(keep), native.view(row), native.view(offsets), native.view(edges),
        )  # fmt: skip
    return keep, row, offsets, edges
