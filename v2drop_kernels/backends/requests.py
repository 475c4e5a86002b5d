"""What an op hands to a backend: one frozen record per call.

``v2drop.h`` has the same records for C. A record holds tensors, host integers and options; its arguments were checked by the public
function. Every tensor of a source may have any stride: an implementation that needs a last dimension of stride 1 copies for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..core.plan import CuPlan, Plan
from ..core.types import GatherSpec


class Source(NamedTuple):
    """What rows are ranked by: ``scores``, or else the change from ``h_prev`` to ``h_cur``; the request of variation_score.

    Attributes
    ----------
    scores : Tensor | None
        ``[B, N]`` or packed ``[T]``.
    h_prev, h_cur : Tensor | None
        ``[B, N, D]`` or packed ``[T, D]``.
    mask : Tensor | None
        bool, the shape of the scores: the rows that compete, where spans do not say it.
    metric : str
        ``"l2"``, ``"l1"`` or ``"cosine"``.
    score_dtype : dtype | None
        What the difference and the score are rounded to.
    """

    scores: torch.Tensor | None
    h_prev: torch.Tensor | None
    h_cur: torch.Tensor | None
    mask: torch.Tensor | None = None
    metric: str = "l2"
    score_dtype: torch.dtype | None = None


class KnownGathers(Sequence[GatherSpec]):
    """The gathers of a call like an earlier one: plain tensors, their results, and ``(batch_dim, row_dim, fill)`` of each.

    The same as a list of :class:`GatherSpec`, which is made only where it is looked at. ``addresses`` has those of the tensors that
    rows are ranked by, of the tensors, and of the results, eight bytes each; ``memo`` is what a backend keeps for calls like this.
    """

    __slots__ = ("addresses", "dimensions", "memo", "results", "tensors")

    def __init__(
        self, tensors: list[torch.Tensor], results: list[torch.Tensor], dimensions: tuple[tuple[int, int, int], ...],
        addresses: bytes, memo: dict[str, Any],
    ) -> None:  # fmt: skip
        self.tensors, self.results, self.dimensions, self.addresses, self.memo = tensors, results, dimensions, addresses, memo

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, i: Any) -> Any:
        return list(self)[i]

    def __iter__(self) -> Iterator[GatherSpec]:
        for tensor, result, dimensions in zip(self.tensors, self.results, self.dimensions, strict=True):
            yield GatherSpec(tensor, *dimensions, result)


# k, droppable and cu_seqlens as the caller gave them: the reference reads these, so that it is independent of the plan.
Budget = tuple[Any, Any, Any]


class ScoreBackwardRequest(NamedTuple):
    """The gradients in ``h_prev`` and ``h_cur`` (None where not needed) from that of the scores."""

    grad: torch.Tensor
    source: Source
    need_prev: bool
    need_cur: bool


class TopKRequest(NamedTuple):
    """segmented_topk and variation_topk: values and indices ``[groups, out_rows]``."""

    source: Source
    plan: Plan | CuPlan
    cu_seqlens: torch.Tensor | None  # on the device, for a CuPlan
    order: str
    budget: Budget | None = None
    memo: dict[str, Any] | None = None  # what the backend keeps for calls like this one (repeated.Known)


class DropRequest(NamedTuple):
    """drop_tokens: the kept rows ``[B, out_rows]``, the gathered tensors, and new offsets for a CuPlan (else None)."""

    source: Source
    plan: Plan | CuPlan
    cu_seqlens: torch.Tensor | None  # on the device, for a CuPlan
    gathers: Sequence[GatherSpec]
    budget: Budget | None = None
    memo: dict[str, Any] | None = None


class CompactRequest(NamedTuple):
    """compact and compact_: rows ``keep [B, S]`` of every tensor; -1 is an empty row."""

    keep: torch.Tensor
    gathers: Sequence[GatherSpec]
    memo: dict[str, Any] | None = None


class CompactBackwardRequest(NamedTuple):
    """The gradients of the gathered tensors, which have ``rows`` rows, from those of the results."""

    keep: torch.Tensor
    gathers: Sequence[GatherSpec]
    rows: int


class AttentionRequest(NamedTuple):
    """attention_score: float32 ``[B, S]`` of keys ``[B, Hkv, S, Dh]`` by queries ``[B, H, Q, Dh]``."""

    q: torch.Tensor
    k: torch.Tensor
    query_rows: torch.Tensor
    key_mask: torch.Tensor | None
    droppable: torch.Tensor | None
    causal: bool
    scale: float
    mode: str
    heads: str | int
    queries: str


class KeyNormRequest(NamedTuple):
    """key_norm_score: float32 ``[B, S]`` of keys ``[B, Hkv, S, Dh]``."""

    k: torch.Tensor
    norm: str


class CosineRequest(NamedTuple):
    """cosine_to_pivots: float32 ``[B, P, N]`` of rows ``[B, N, D]`` and pivots ``[B, P]``."""

    x: torch.Tensor
    pivots: torch.Tensor


class RandomRequest(NamedTuple):
    """random_score: float32 ``[batch, n]`` by a seed and the int64 ``[batch]`` seeds of the items (None: their numbers)."""

    batch: int
    n: int
    seed: int
    items: torch.Tensor | None
    device: torch.device


class MergeRequest(NamedTuple):
    """weighted_merge: ``[B, K, D]`` of rows ``[B, N, D]`` by lists of edges."""

    x: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor | None
    mean: bool
