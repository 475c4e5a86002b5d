"""Cross-modal weighted pruning: text-to-vision attention, which at the first layer the vision tower's [CLS] attention corrects.

In a stage before block 1 (``calibrated``: the last such block) ``s_v = lambda I(V, T) alpha_tv + alpha_CLSv``, in later ones
``s_v = alpha_tv``. ``alpha_tv`` is the softmax attention in block ``L - 1`` of the text behind the image to token v, mean over
heads and text tokens, the drop being before block ``L``: the first stage comes before block 1, with the weights of block 0.
``alpha_CLSv`` is the attention of [CLS] in block ``tower`` of the CLIP tower, mean over heads (FasterVLM's); newline tokens have
none. Source: cross-modal weighted pruning, supplement D, equation 1.

The paper leaves open: ``I(V, T)``, here ``alignment``, a number, or "cosine": of the mean vision with the mean text embedding,
negative ones being 0; the reduction over heads and text tokens; later stages; the layers, for which see
:mod:`.cross_modal_flash`, whose presets are the same. Needs a CLIP tower (LLaVA, LLaVA-NeXT) unless ``calibrated`` is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...ops.attention_score import cross_modal_score
from ..adapters import ModelAdapter
from ..adapters.tower import record_cls
from ..context import DropContext
from ..policy import Method, Policy
from ..text import numbers, prompt_rows, text_rows
from ..tiles import Tiles
from .cross_modal_flash import BUDGETS, FLOPS, solved


@dataclass(frozen=True)
class CrossModal(Policy):
    """``alignment`` is I(V, T), ``scale`` is lambda; ``calibrated``: the last layer with [CLS]; ``tower``: its block there."""

    alignment: float | str = "cosine"
    scale: float = 1.0
    calibrated: int = 1
    tower: int = -2

    method = Method(
        paper="cross-modal weighted pruning, supplement D",
        where="decoder",
        score="text's attention, at the first layer weighed against the tower's [CLS] attention",
        needs_weights=True,
        deviations=f"I(V, T), reductions, later stages and layers, which the paper does not give; {FLOPS}",
        presets=tuple(solved("cross_modal", "cross-modal", *budget) for budget in BUDGETS),
    )

    def __post_init__(self) -> None:
        if self.alignment != "cosine" and (isinstance(self.alignment, bool) or not isinstance(self.alignment, int | float)):
            raise ValueError(f"alignment must be a number or 'cosine', got {self.alignment!r}")

    def register_hooks(self, adapter: ModelAdapter, tower_cache: dict[str, Any]) -> Iterator[Any]:
        return record_cls(adapter, tower_cache, (self.tower,)) if self.calibrated else iter(())

    def score(self, context: DropContext) -> torch.Tensor:
        prev_hidden = context.previous("the attention of a block before it")
        text = text_rows(context)
        attention = context.attention(context.layer - 1, prev_hidden, numbers(context, text))
        if context.layer > self.calibrated:
            return attention
        tiles = Tiles(context)
        cls = tiles.to_rows(tiles.cls(self.tower, "mean"), 0.0)
        return cross_modal_score(attention, cls, self._alignment(context, text), self.scale)

    def _alignment(self, context: DropContext, text: torch.Tensor) -> float | torch.Tensor:
        if not isinstance(self.alignment, str):
            return self.alignment
        embeds = prompt_rows(context, context.embeds).float()
        # Sums instead of means: a cosine does not depend on length.
        vision, instruction = ((embeds * rows[..., None]).sum(1) for rows in (context.droppable, text))
        return torch.nn.functional.cosine_similarity(vision, instruction, dim=-1).clamp(min=0)
