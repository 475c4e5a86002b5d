"""What is fixed while a model drops tokens: options, stages, policies and the modules of the model."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.presets import fitted
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
        adapter = adapter_of(model)
        schedule = _fitted(options.schedule, adapter.depth)
        group = tensor_parallel_group(adapter.decoder.layers[0]) if options.group is None else group_of(options.group)
        adapter = dataclasses.replace(adapter, group=group)
        schedule.validate(adapter.depth)
        if not adapter.token_ids and options.spans is None:
            raise ValueError(f"spans must be given for {adapter.kind!r}, which has no placeholder of images")
        _check_capabilities(options, schedule, adapter)
        if adapter.windowed and any(
            getattr(x, "_compiled_call_impl", None) or hasattr(x, "_orig_mod") for x in (model, *adapter.body.modules())
        ):
            raise ValueError("model must not be compiled where its blocks have windows: steps read the padding of the whole text")
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


def _fitted(schedule: Any, depth: int) -> Schedule:
    """A preset for a model of this depth; a line says where its layers are. Other schedules as they are."""
    assert isinstance(schedule, Schedule)
    if not schedule.name or policies.presets().get(schedule.name) != schedule:
        return schedule
    made = fitted(schedule, depth)
    if made != schedule:
        at = ", ".join(map(str, made.layers))
        print(f"v2drop_kernels: {schedule.name} on {depth} blocks drops before layers {at}", file=sys.stderr)
    return made


def _check_capabilities(options: TokenDropper, schedule: Schedule, adapter: ModelAdapter) -> None:
    """Raise ValueError for options that are not exact in this model."""
    if schedule.per == "image":
        own = next((x.policy for x in schedule.stages if _counts_itself(policies.find(x.policy))), None)
        if own is not None or options.soft:
            what = f"the policy {own!r}, which counts by itself" if own else "soft"
            raise ValueError(f"schedule must not have per='image' with {what}")
    if adapter.deepstack and schedule.inject:
        raise ValueError("schedule must not inject late in a model that adds vision features behind its first blocks")
    if adapter.stateful and (schedule.inject or options.compact_earlier_kv):
        what = "inject late" if schedule.inject else "be used with compact_earlier_kv"
        raise ValueError(f"schedule must not {what} in a model with linear attention, whose state cannot forget rows")
    if not adapter.windowed:
        return
    if options.compact_earlier_kv:
        raise ValueError("compact_earlier_kv must be False for a model with windows: its caches forget rows by themselves")
    if options.positions != "persistent":
        raise ValueError(f"positions must be 'persistent' for a model with windows of positions, got {options.positions!r}")
    if schedule.inject or any(stage.layer == 0 for stage in schedule.stages):
        raise ValueError("schedule must begin behind block 0 in a model with windows: its masks follow the first block's cache")


def _counts_itself(policy: type[Policy]) -> bool:
    """Whether a policy does not keep just the number that the schedule requests."""
    return policy.count is not Policy.count or policy.counts is not Policy.counts
