"""segmented_topk and variation_topk as ``torch.ops.v2drop.topk``, which traced calls go through."""

from __future__ import annotations

from typing import Any

import torch

from ..._ops import ops
from ...backends.choice import runner_of
from ...backends.protocol import Op
from ...backends.requests import Source, TopKRequest
from .. import registration
from . import reference


def call(backend: str, request: TopKRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a request as a node of a traced graph."""
    scores, h_prev, h_cur, mask, metric, score_dtype = request.source
    plan = registration.pack_plan(request.plan)
    return ops.topk(scores, h_prev, h_cur, mask, request.cu_seqlens, *plan, request.order, metric, score_dtype, backend)


OP = Op(__package__, "topk", reference.run, call)


def _topk(
    scores: Any, h_prev: Any, h_cur: Any, mask: Any, cu_seqlens: Any, plan: Any, batch: int, rows: int, out_rows: int, order: str,
    metric: str, score_dtype: torch.dtype | None, backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    source = Source(scores, h_prev, h_cur, mask, metric, score_dtype)
    unpacked = registration.unpack_plan(plan, batch, rows, out_rows, cu_seqlens, pack=False)
    return runner_of(OP, backend).run(TopKRequest(source, unpacked, cu_seqlens, order))


def _topk_fake(
    scores: Any, h_prev: Any, h_cur: Any, mask: Any, cu_seqlens: Any, plan: Any, batch: Any, rows: Any, out_rows: Any, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    like = h_cur if scores is None else scores
    shape = (registration.group_count(plan, batch, cu_seqlens), out_rows)
    values = like.new_empty(shape, dtype=torch.float32 if scores is None else scores.dtype)
    return values, like.new_empty(shape, dtype=torch.int64)


registration.define(
    f"topk(Tensor? scores, Tensor? h_prev, Tensor? h_cur, Tensor? mask, Tensor? cu_seqlens, {registration.PLAN}, "
    "str order, str metric, ScalarType? score_dtype, str backend) -> (Tensor, Tensor)",
    _topk_fake, _topk,
)  # fmt: skip
