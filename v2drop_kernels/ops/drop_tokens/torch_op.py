"""drop_tokens as ``torch.ops.v2drop.drop``, which traced calls go through."""

from __future__ import annotations

from typing import Any

import torch

from ..._ops import ops
from ...backends.choice import runner_of
from ...backends.protocol import Op
from ...backends.requests import DropRequest, Source
from ...core.plan import COLUMNS, Plan
from .. import registration
from ..compact.torch_op import gradients, save_gathers
from . import reference


def call(backend: str, request: DropRequest) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    """Run a request as a node of a traced graph."""
    (scores, h_prev, h_cur, mask, metric, score_dtype), cu_seqlens = request.source, request.cu_seqlens
    gathers, plan = registration.pack_gathers(request.gathers), registration.pack_plan(request.plan)
    outs, keep, cu = ops.drop(scores, h_prev, h_cur, mask, cu_seqlens, *gathers, *plan, metric, score_dtype, backend)
    return keep, outs, None if cu_seqlens is None else cu


OP = Op(__package__, "drop_tokens", reference.run, call)


def _drop(
    scores: Any, h_prev: Any, h_cur: Any, mask: Any, cu_seqlens: Any, tensors: Any, dims: Any, fills: Any, plan: Any, batch: int,
    rows: int, out_rows: int, metric: str, score_dtype: torch.dtype | None, backend: str,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:  # fmt: skip
    source = Source(scores, h_prev, h_cur, mask, metric, score_dtype)
    unpacked = registration.unpack_plan(plan, batch, rows, out_rows, cu_seqlens, pack=True)
    gathers = registration.unpack_gathers(tensors, dims, fills)
    keep, outs, cu = runner_of(OP, backend).run(DropRequest(source, unpacked, cu_seqlens, gathers))
    if cu is None:
        cu = torch.empty(0, dtype=torch.int32, device=keep.device)
        if cu_seqlens is not None and isinstance(unpacked, Plan):  # resolved on the host: its table says what is kept
            kept = unpacked.host_table()[:, COLUMNS.k].cumsum(0)
            cu = torch.nn.functional.pad(kept, (1, 0)).to(torch.int32)
    return outs, keep, cu


def _drop_fake(*given: Any) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The shapes of ``_drop``, from the same arguments."""
    (scores, _, h_cur, _, cu_seqlens, tensors, dims), (batch, _, out_rows) = given[:7], given[9:12]
    like = h_cur if scores is None else scores
    cu = like.new_empty(0 if cu_seqlens is None else cu_seqlens.shape[0], dtype=torch.int32)
    return registration.resized(tensors, dims, out_rows), like.new_empty((batch, out_rows), dtype=torch.int64), cu


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, dims, fills = inputs[5:8]
    save_gathers(ctx, output[1], tensors, dims, fills, inputs[-1])
    ctx.unanswered = registration.unanswered(inputs)


def _gradient(ctx: Any, grads: Any, _keep: Any, _cu: Any) -> tuple[Any, ...]:
    return (*ctx.unanswered[:5], gradients(ctx, grads), *ctx.unanswered[6:])


registration.define(
    f"drop(Tensor? scores, Tensor? h_prev, Tensor? h_cur, Tensor? mask, Tensor? cu_seqlens, Tensor[] tensors, "
    f"int[] dims, int[] fills, {registration.PLAN}, str metric, ScalarType? score_dtype, str backend) "
    "-> (Tensor[], Tensor, Tensor)",
    _drop_fake, _drop,
)  # fmt: skip
registration.define_gradient("drop", _gradient, _setup)
