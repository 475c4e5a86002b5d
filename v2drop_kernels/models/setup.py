"""What is fixed while a model drops tokens: options, stages, policies and the modules of the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.schedule import Schedule, Stage
from ..distributed.collectives import group_of
from . import policies
from .adapters import ModelAdapter, adapter_of
from .parallel import tensor_parallel_group
from .policy import Policy
from .soft import SoftBudgets, rounded_counts

if TYPE_CHECKING:
    from .dropper import TokenDropper


@dataclass(frozen=True)
class Setup:
    """The fixed part of a session.

    Attributes
    ----------
    options : TokenDropper
    schedule : Schedule
    adapter : ModelAdapter
    stages, policies : dict
        By layer. Stages with the same policy and options share one policy object, which then registers its hooks once.
    tower_caches : dict
        By ``id`` of the policy: what its hooks in the vision tower record.
    soft : SoftBudgets
        Empty without soft training.
    """

    options: TokenDropper
    schedule: Schedule
    adapter: ModelAdapter
    stages: dict[int, Stage]
    policies: dict[int, Policy]
    tower_caches: dict[int, Any]
    soft: SoftBudgets

    @classmethod
    def of(cls, options: TokenDropper, model: Any) -> Setup:
        """Check that the options fit the model; raises ValueError otherwise."""
        schedule, adapter = options.schedule, adapter_of(model)
        group = tensor_parallel_group(adapter.decoder.layers[0]) if options.group is None else group_of(options.group)
        adapter = dataclasses.replace(adapter, group=group)
        assert isinstance(schedule, Schedule)
        schedule.validate(adapter.depth)
        if not adapter.token_ids and options.spans is None:
            raise ValueError(f"spans must be given for {adapter.kind!r}, which has no placeholder of images")
        made = {(x.policy, repr(x.options)): policies.make(x.policy, x.options) for x in schedule.stages}
        soft = SoftBudgets()
        if options.soft:
            tokens = int(options.soft) if options.soft is not True else adapter.vision_tokens
            soft = SoftBudgets.of(schedule, tokens, adapter.norm.weight.device)
        return cls(
            options=options,
            schedule=schedule,
            adapter=adapter,
            stages={stage.layer: stage for stage in schedule.stages},
            policies={stage.layer: made[stage.policy, repr(stage.options)] for stage in schedule.stages},
            tower_caches={id(policy): {} for policy in made.values()},
            soft=soft,
        )

    def tower_cache(self, layer: int) -> dict[str, Any]:
        """Of the policy of a stage, in this thread."""
        found: dict[str, Any] = self.tower_caches[id(self.policies[layer])]
        return found

    def counts(self, left: tuple[int, ...], layer: int, ratio: float | None) -> tuple[int, ...]:
        """What the stage keeps of every item's ``left`` tokens; ``ratio`` is the learned share that it drops, if any."""
        stage, policy, cache = self.stages[layer], self.policies[layer], self.tower_cache(layer)
        if ratio is None:
            return policy.counts(left, tuple(map(stage.count, left)), cache)
        kept = rounded_counts(left, ratio)
        if policy.counts(left, kept, cache) != kept:
            raise ValueError(f"soft must not be used with the policy {stage.policy!r}, which cannot keep any number of tokens")
        return kept
