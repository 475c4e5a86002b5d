"""variation_score as ``torch.ops.v2drop.variation_score``, which traced calls go through."""

from __future__ import annotations

from typing import Any

import torch

from ..._ops import ops
from ...backends.choice import runner_of
from ...backends.protocol import Op
from ...backends.requests import ScoreBackwardRequest, Source
from .. import registration
from . import reference


def call(backend: str, source: Source) -> torch.Tensor:
    """Run a request as a node of a traced graph."""
    return ops.variation_score(source.h_prev, source.h_cur, source.metric, source.score_dtype, backend)


OP = Op(__package__, "variation_score", reference.ranked_by, call)
BACKWARD = Op(__package__, "variation_score_backward")


def _score(h_prev: Any, h_cur: Any, metric: str, score_dtype: torch.dtype | None, backend: str) -> torch.Tensor:
    return runner_of(OP, backend).run(Source(None, h_prev, h_cur, None, metric, score_dtype))


def _score_fake(h_prev: Any, h_cur: Any, *options: Any) -> torch.Tensor:
    return h_cur.new_empty(h_cur.shape[:-1], dtype=torch.float32)


def _backward(grad: Any, h_prev: Any, h_cur: Any, metric: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    request = ScoreBackwardRequest(grad, Source(None, h_prev, h_cur, None, metric), True, True)
    return runner_of(BACKWARD, backend).run(request)


def _backward_fake(grad: Any, h_prev: Any, h_cur: Any, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return h_prev.new_empty(h_prev.shape), h_cur.new_empty(h_cur.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    h_prev, h_cur, ctx.metric, _, ctx.backend = inputs
    ctx.save_for_backward(h_prev, h_cur)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    d_prev, d_cur = ops.variation_score_backward(grad, *ctx.saved_tensors, ctx.metric, ctx.backend)
    return d_prev, d_cur, None, None, None


registration.define(
    "variation_score(Tensor h_prev, Tensor h_cur, str metric, ScalarType? score_dtype, str backend) -> Tensor", _score_fake, _score
)
registration.define(
    "variation_score_backward(Tensor grad, Tensor h_prev, Tensor h_cur, str metric, str backend) -> (Tensor, Tensor)",
    _backward_fake, _backward,
)  # fmt: skip
registration.define_gradient("variation_score", _gradient, _setup)
