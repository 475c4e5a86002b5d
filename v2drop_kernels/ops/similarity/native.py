# SPDX-License-Identifier: Apache-2.0
"""key_norm and cosine_to_pivots in the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native as library
from ...backends import native
from ...backends.requests import CosineRequest, KeyNormRequest


def key_norm(request: KeyNormRequest, place: str) -> Tensor:
    """Float32 norms ``[B, S]``."""
    k = native.unit_stride(request.k)
    scores = torch.empty((k.shape[0], k.shape[2]), dtype=torch.float32, device=k.device)
    native.call("key_norm", place, k.device, native.view(k), library.METRICS[request.norm], native.view(scores))
    return scores


def cosine_to_pivots(request: CosineRequest, place: str) -> Tensor:
    """Float32 cosines ``[B, P, N]``."""
    x, pivots = native.unit_stride(request.x), request.pivots
    cosines = torch.empty((x.shape[0], pivots.shape[1], x.shape[1]), dtype=torch.float32, device=x.device)
    native.call("cosine_to_pivots", place, x.device, native.view(x), native.view(pivots), native.view(cosines))
    return cosines
