"""key_norm and cosine_to_pivots as ``torch.ops.v2drop.*``, which traced calls go through."""

from __future__ import annotations

from typing import Any

import torch

from ..._ops import ops
from ...backends.choice import runner_of
from ...backends.protocol import Op
from ...backends.requests import CosineRequest, KeyNormRequest
from .. import registration
from . import reference
from .gradient import cosine_to_pivots_backward, key_norm_backward


def call_key_norm(backend: str, request: KeyNormRequest) -> torch.Tensor:
    """Run a request as a node of a traced graph."""
    return ops.key_norm(*request, backend)


def call_cosine(backend: str, request: CosineRequest) -> torch.Tensor:
    """Run a request as a node of a traced graph."""
    return ops.cosine_to_pivots(*request, backend)


KEY_NORM = Op(__package__, "key_norm", reference.run_key_norm, call_key_norm)
COSINE = Op(__package__, "cosine_to_pivots", reference.run_cosine, call_cosine)


def _key_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.norm = inputs[1]


def _key_norm_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return ops.key_norm_backward(grad, *ctx.saved_tensors, ctx.norm), None, None


def _cosine_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _cosine_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return ops.cosine_to_pivots_backward(grad, *ctx.saved_tensors), None, None


registration.define(
    "key_norm(Tensor k, str norm, str backend) -> Tensor",
    lambda k, norm, backend: k.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32),
    lambda k, norm, backend: runner_of(KEY_NORM, backend).run(KeyNormRequest(k, norm)),
)
registration.define(
    "key_norm_backward(Tensor grad, Tensor k, str norm) -> Tensor",
    lambda grad, k, norm: k.new_empty(k.shape),
    lambda grad, k, norm: key_norm_backward(grad, k, norm).contiguous(),
)
registration.define(
    "cosine_to_pivots(Tensor x, Tensor pivots, str backend) -> Tensor",
    lambda x, pivots, backend: x.new_empty((*pivots.shape, x.shape[1]), dtype=torch.float32),
    lambda x, pivots, backend: runner_of(COSINE, backend).run(CosineRequest(x, pivots)),
)
registration.define(
    "cosine_to_pivots_backward(Tensor grad, Tensor x, Tensor pivots) -> Tensor",
    lambda grad, x, pivots: x.new_empty(x.shape),
    lambda grad, x, pivots: cosine_to_pivots_backward(grad, x, pivots).contiguous(),
)
registration.define_gradient("key_norm", _key_norm_gradient, _key_norm_setup)
registration.define_gradient("cosine_to_pivots", _cosine_gradient, _cosine_setup)
