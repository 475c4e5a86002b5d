"""Training with learnable budgets: one ratio per stage, and the mask through which its gradient flows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..core.schedule import Schedule, Stage
from ..ops.soft_topk import soft_topk
from .context import DropContext


class SoftBudgets:
    """The share that each stage drops, as parameters.

    Attributes
    ----------
    ratios : ParameterList
        float32 scalars in the order of the stages that keep something; empty without soft training.
    """

    def __init__(self) -> None:
        self.ratios = torch.nn.ParameterList()
        self._by_layer: dict[int, torch.nn.Parameter] = {}

    @classmethod
    def of(cls, schedule: Schedule, vision_tokens: int | None, device: torch.device) -> SoftBudgets:
        """Ratios that start at the schedule's shares.

        Raises
        ------
        ValueError
            The schedule counts tokens and ``vision_tokens``, those of an item, is None.
        """
        budgets, n = cls(), None if vision_tokens is None else float(vision_tokens)
        for stage in schedule.stages:
            if isinstance(stage.keep, float) or not stage.keep:
                share = float(stage.keep)
            elif n is None:
                raise ValueError("soft must be the number of vision tokens of an item, which this model's config does not give")
            else:
                share = min(stage.keep, n) / n
            n = None if n is None else n * share
            if share:
                ratio = torch.nn.Parameter(torch.tensor(1 - share, dtype=torch.float32, device=device))
                budgets._by_layer[stage.layer] = ratio
        budgets.ratios.extend(budgets._by_layer.values())
        return budgets

    def __bool__(self) -> bool:
        return bool(self._by_layer)

    def parameter(self, layer: int) -> torch.nn.Parameter | None:
        """The ratio of a stage while gradients are recorded; else None."""
        return self._by_layer.get(layer) if torch.is_grad_enabled() else None

    def values(self) -> dict[int, float]:
        """The ratio of every layer, by one read on the host."""
        if not self:
            return {}
        return dict(zip(self._by_layer, torch.stack(list(self._by_layer.values())).tolist(), strict=True))

    def learned_schedule(self, schedule: Schedule) -> Schedule:
        """``schedule`` with the shares that training has reached. Reads the ratios on the host."""
        keep = {layer: max(0.0, min(1.0, 1 - ratio.item())) for layer, ratio in self._by_layer.items()}

        def learned(stage: Stage) -> Stage:
            if stage.layer not in keep:
                return stage
            return dataclasses.replace(stage, keep=keep[stage.layer], rounding="round", at_least=0)

        return dataclasses.replace(schedule, stages=tuple(map(learned, schedule.stages)))


def rounded_counts(left: Sequence[int], ratio: float) -> tuple[int, ...]:
    """What remains of ``left`` tokens when the share ``ratio`` is dropped, rounded as :func:`soft_topk` rounds it."""
    share = 1 - torch.tensor(ratio, dtype=torch.float32)
    kept = tuple(int(k) for k in (share * torch.tensor(left)).round().clamp(min=0).tolist())
    return tuple(map(min, kept, left))


def apply_mask(
    hidden: torch.Tensor, context: DropContext, scores: torch.Tensor, ratio: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Kept rows ``hidden [B, S, D]`` times the mask of :func:`soft_topk` for the droppable ones among ``keep`` int64 ``[B, S]``."""
    at, droppable = keep.clamp(min=0), context.droppable
    mask = soft_topk(scores, ratio, valid=droppable, backend=context.backend).gather(1, at)
    return hidden * torch.where(droppable.gather(1, at), mask, 1.0)[..., None].to(hidden.dtype)
