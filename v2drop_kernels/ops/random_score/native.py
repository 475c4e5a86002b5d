# SPDX-License-Identifier: Apache-2.0
"""random_score in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...backends.requests import RandomRequest


def run(request: RandomRequest, place: str) -> Tensor:
    """Float32 ``[B, N]``."""
    batch, n, seed, items, device = request
    scores = torch.empty((batch, n), dtype=torch.float32, device=device)
    if scores.numel():
        native.call("random_score", place, device, seed, native.maybe_view(items), native.view(scores))
    return scores
