"""The gradient of variation_score in eager mode: one kernel of the same backend."""

from __future__ import annotations

from typing import Any

import torch

from ...backends.choice import runner_of
from ...backends.requests import ScoreBackwardRequest, Source
from .torch_op import BACKWARD


def backward_by(name: str) -> Any:
    """The gradient of a source of hidden states, by the kernel of a backend."""

    def backward(needed: dict[int, bool], grad: torch.Tensor, *source: Any) -> tuple[Any, ...]:
        _, h_prev, h_cur, _, metric, _ = source
        request = ScoreBackwardRequest(grad, Source(None, h_prev, h_cur, None, metric), needed[1], needed[2])
        return (None, *runner_of(BACKWARD, name).run(request))

    return backward
