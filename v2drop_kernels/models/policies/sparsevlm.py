"""SparseVLM: text tokens that relate to the image rate its tokens; version 1 recycles part of the dropped tokens.

*Raters*, once per prompt, on the input embeddings: the text tokens behind the image whose mean over the vision tokens of
``softmax(v . t)`` exceeds the average (:func:`v2drop_kernels.text_raters`); where none does, all. Of several images, when all the
raters lie before what is left, they are chosen anew. *Score*, before block ``L`` with the attention of block ``L - 1``: softmax
weights of the raters, mean over heads and raters. The papers' layers 2, 6 and 15 are
blocks whose **output** is dropped: stages before blocks 3, 7 and 16 here.

Version 1 recycles the best ``n = int(0.3 m) + 1`` of the ``m`` dropped tokens: it clusters them around ``n // 10 + 1`` density
peaks, and a centre's row then holds its cluster's mean (:func:`v2drop_kernels.merge_dropped`). A stage's count **includes** the
centres: 309 rows are 300 tokens and 9 means. Version 2 (SparseVLM+) merges nothing, divides every weight by ``g = R_r 1 . R_v 1 /
sqrt(d)``, the product of two vectors of ones rotated to the rater's and the token's positions (RoPE's pull to near rows,
"gravity"), and takes the mean over the ``heads`` heads with the largest total over all raters.

Presets (LLaVA-1.5-7B) by the released tables. Averages here count what enters a block; the names count what leaves one: "192" is
206.5 against 192.0. Source: SparseVLM (ICML 2025); SparseVLM+, its second version.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from ...core.schedule import Schedule, Stage
from ...ops.attention_score import text_raters
from ...ops.attention_score.queries import chunks
from ...ops.host_ints import host_ints
from ...ops.merge_dropped import merge_dropped
from ...ops.merge_dropped.sparsevlm import recycled_clusters
from ...ops.topk.order import ranked
from ..context import DropContext
from ..parallel import all_heads
from ..policy import FLOAT32, Method, Policy
from ..ranking import Ranking
from ..text import numbers, prompt_rows, text_rows

RECYCLED = 0.3


def _preset(name: str, target: tuple[int, int, int], keep: tuple[int, int, int], **options: int) -> Schedule:
    stages = tuple(Stage(layer, k, policy="sparsevlm", options=options) for layer, k in zip((3, 7, 16), keep, strict=True))
    entering = Schedule(stages).average_tokens(576, 32)
    means = "" if keep == target else f" and the means of their clusters, {keep} rows"
    source = (
        f"SparseVLM, LLaVA-1.5-7B: {target} tokens behind blocks 2, 6 and 15{means}; average {entering:g} counted on what enters "
        f"a block, {entering - (576 - keep[-1]) / 32:g} on what leaves it"
    )
    return Schedule(stages, name, source)


@dataclass(frozen=True)
class SparseVLM(Policy):
    """``version`` 1 (recycling) or 2 (gravity and the ``heads`` best heads)."""

    version: int = 1
    heads: int = 14

    method = Method(
        paper="SparseVLM, ICML 2025",
        where="decoder",
        score="attention of text raters in the block before, mean over heads",
        needs_weights=True,
        order="position, then means",
        positions="compacted (version 2: persistent)",
        deviations="the code appends the means behind the image with compacted ids, here they stand at their centres' rows; its "
        "densities carry random noise, here the lower row breaks ties; it drops at least one token, here a budget of all the "
        "tokens keeps them; " + FLOAT32,
        presets=(
            _preset("sparsevlm-192", (300, 200, 110), (309, 204, 113)),
            _preset("sparsevlm-128", (303, 110, 36), (312, 117, 39)),
            _preset("sparsevlm-64", (66, 30, 17), (82, 32, 18)),
            _preset("sparsevlm2-192", (300, 200, 118), (300, 200, 118), version=2),
            _preset("sparsevlm2-128", (238, 108, 60), (238, 108, 60), version=2),
            _preset("sparsevlm2-64", (66, 34, 20), (66, 34, 20), version=2),
        ),
    )

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {self.version!r}")
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, got {self.heads!r}")

    def score(self, context: DropContext) -> torch.Tensor | Ranking:
        prev_hidden = context.previous("the attention of a block before it")
        raters = _raters(context)
        if self.version == 2:
            return self._gravity_free(context, prev_hidden, raters)
        scores, droppable = context.attention(context.layer - 1, prev_hidden, raters), context.droppable
        most = [_tokens(n, k) for n, k in zip(context.counts, context.keep, strict=True)]
        first = torch.arange(scores.shape[1], device=scores.device) < host_ints(most, scores.device)[:, None]
        kept = torch.zeros_like(droppable).scatter_(1, ranked(scores, droppable), first) & droppable
        clusters = context.tower_cache["clusters"] = recycled_clusters(context.hidden, scores, droppable & ~kept, share=RECYCLED)
        centre = clusters == torch.arange(scores.shape[1], device=scores.device)
        return Ranking(scores.masked_fill(kept | centre, 0.0), torch.where(kept, 2, centre.long()))

    def merge(self, context: DropContext, kept: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if self.version == 2:
            return hidden
        clusters = context.tower_cache.pop("clusters")
        return merge_dropped(
            context.hidden, kept, "sparsevlm", clusters=clusters, droppable=context.droppable, backend=context.backend
        )

    def _gravity_free(self, context: DropContext, hidden: torch.Tensor, raters: torch.Tensor) -> torch.Tensor:
        """Plain PyTorch, some raters at a time: heads are chosen by their totals over all raters, after the division."""
        query, keys = context.project(context.layer - 1, hidden, raters)
        attn = context.blocks[context.layer - 1].self_attn
        batch, n_heads, _, d = query.shape
        n, per_key = keys.shape[2], n_heads // keys.shape[1]
        rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
        ones = torch.ones(batch, 1, n, d, device=keys.device)
        pulled = rotate(ones, ones, *(x.expand(batch, -1, -1).float() for x in context.rope))[0][:, 0]
        pull = pulled[torch.arange(batch, device=keys.device)[:, None], raters.clamp(min=0)] @ pulled.transpose(1, 2) * attn.scaling
        seen = context.visible[:, None] & (torch.arange(n, device=keys.device) <= raters[..., None])  # [B, Q, N]
        rated, total = seen & context.droppable[:, None], torch.zeros(batch, n_heads, n, device=keys.device)
        for part in chunks(query, keys):
            q = query[:, :, part].float()
            logits = q.reshape(batch, keys.shape[1], -1, d) @ keys.float().transpose(2, 3) * attn.scaling
            logits = logits.reshape(batch, keys.shape[1] * per_key, -1, n)
            weights = logits.masked_fill(~seen[:, None, part], -torch.inf).softmax(-1) / pull[:, None, part]
            total += weights.masked_fill(~rated[:, None, part], 0).sum(2)
        total = all_heads(total, context.adapter.group)
        best = total.sum(2).argsort(dim=1, descending=True, stable=True)[:, : self.heads, None]
        return total.gather(1, best.expand(-1, -1, n)).mean(1) / (raters >= 0).sum(1, keepdim=True).clamp(min=1)


def _raters(context: DropContext) -> torch.Tensor:
    """int64 ``[B, Q]``: rows of the raters, -1 in places without one; they are selected at the first stage and stored."""
    if "rates" not in context.tower_cache:
        text = numbers(context, text_rows(context))
        chosen = _chosen(context, text)
        # By rows of the prompt, because positions among text_rows shift when the first of several images is dropped.
        origin = chosen if context.origin is None else context.origin.gather(1, chosen.clamp(min=0))
        rates = torch.zeros(chosen.shape[0], context.embeds.shape[1] + 1, dtype=torch.bool, device=chosen.device)
        rates.scatter_(1, torch.where(chosen < 0, context.embeds.shape[1], origin), True)
        apart = context.layout.counts is not None or any(len(spans) > 1 for spans in context.layout.spans)
        context.tower_cache["rates"] = rates[:, :-1], text.shape[1], apart
        return chosen
    rates, most, apart = context.tower_cache["rates"]
    # Not more rows than at the first stage, whose bound is used: that of `numbers` excludes text before the first kept token.
    rows = context.row_indices(prompt_rows(context, rates) & context.visible, most)
    rows[:, :1] = torch.where(rows[:, :1] < 0, context.last, rows[:, :1])  # no rater is left
    if not apart:
        return rows
    # Raters between images cannot attend to a later image; if only that is left, raters are chosen again, for it alone.
    sees = context.droppable.cumsum(1).gather(1, rows.amax(1, keepdim=True)) > 0
    return torch.where(sees, rows, _chosen(context, context.row_indices(text_rows(context), most)))


def _chosen(context: DropContext, text: torch.Tensor) -> torch.Tensor:
    """Those of ``text [B, Q]`` that rate, the others -1; all where none exceeds the average."""
    found = text_raters(context.droppable, text, prompt_rows(context, context.embeds)) >= 0
    return torch.where(found | ~found.any(1, keepdim=True), text, -1)


def _tokens(n: int, rows: int) -> int:
    """How many of ``n`` tokens stay as they are, so that with the means of those recycled ``rows`` rows are left."""
    means = lambda m: min(int(RECYCLED * m) + 1, m) // 10 + 1 if m else 0
    return max((k for k in range(rows + 1) if k + means(n - k) <= rows), default=0)
