# SPDX-License-Identifier: Apache-2.0
"""soft_topk in the compiled library, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native as library
from ...backends import native
from ...core.arguments import settled_gradient


def soft_topk(
    scores: Tensor, ratio: Tensor, valid: Tensor | None, temperature: float | None, ties: str, hard: bool,
    slope: Tensor | None = None, order: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The mask; ``slope`` and ``order`` are filled where they are given."""
    mask = torch.empty(scores.shape, dtype=torch.float32)
    native.call(
        "soft_topk", "cpu", mask.device, native.view(scores.detach()), native.view(ratio.detach().reshape(-1)),
        native.maybe_view(valid), temperature or 0.0, library.TIES[ties], hard, native.view(mask), native.maybe_view(slope),
        native.maybe_view(order),
    )  # fmt: skip
    return mask


def with_slope(
    scores: Tensor, ratio: Tensor, valid: Tensor | None, temperature: float | None, ties: str, hard: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The mask, the slope of the soft mask in the rank, and the rows in selection order."""
    slope, order = torch.empty(scores.shape, dtype=torch.float32), torch.empty(scores.shape, dtype=torch.int64)
    return soft_topk(scores, ratio, valid, temperature, ties, hard, slope, order), slope, order


def backward(grad: Tensor, slope: Tensor, scores: Tensor, order: Tensor, valid: Tensor | None) -> Tensor:
    """The gradient in the scores, float32."""
    found = torch.empty(scores.shape, dtype=torch.float32)
    grad = settled_gradient(grad).contiguous()
    native.call(
        "soft_topk_backward", "cpu", found.device, native.view(grad), native.view(slope), native.view(scores.detach()),
        native.view(order), native.maybe_view(valid), native.view(found),
    )  # fmt: skip
    return found
