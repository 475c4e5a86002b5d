"""attention_score as ``torch.ops.v2drop.attention_score``, which traced calls go through."""

from __future__ import annotations

from typing import Any

import torch

from ..._ops import ops
from ...backends.choice import runner_of
from ...backends.protocol import Op
from ...backends.requests import AttentionRequest
from .. import registration
from . import reference
from .gradient import attention_score_backward


def call(backend: str, request: AttentionRequest) -> torch.Tensor:
    """Run a request as a node of a traced graph."""
    return ops.attention_score(*request._replace(heads=str(request.heads)), backend)


OP = Op(__package__, "attention_score", reference.run, call)
_OPTIONS = "Tensor query_rows, Tensor? key_mask, Tensor? droppable, bool causal, float scale, str mode, str heads, str queries"


def _request(*fields: Any) -> AttentionRequest:
    request = AttentionRequest(*fields)
    return request._replace(heads=int(fields[8])) if fields[8].isdecimal() else request


def _score(*fields: Any) -> torch.Tensor:
    *request, backend = fields
    return runner_of(OP, backend).run(_request(*request))


def _score_fake(q: Any, k: Any, *_: Any) -> torch.Tensor:
    return k.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32)


def _backward(grad: Any, *fields: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_score_backward(grad, *_request(*fields))


def _backward_fake(grad: Any, q: Any, k: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:-1]


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return (*ops.attention_score_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 9)


registration.define(f"attention_score(Tensor q, Tensor k, {_OPTIONS}, str backend) -> Tensor", _score_fake, _score)
registration.define(
    f"attention_score_backward(Tensor grad, Tensor q, Tensor k, {_OPTIONS}) -> (Tensor, Tensor)", _backward_fake, _backward
)
registration.define_gradient("attention_score", _gradient, _setup)
