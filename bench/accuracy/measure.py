"""How it is measured: which methods, at which budgets, and what is kept of each run."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tasks import Task

from v2drop_kernels.plot import retention
from v2drop_kernels.schedule import Schedule, solve

POLICIES: dict[str, dict[str, str]] = {
    "variation L2": {"policy": "variation", "metric": "l2"},
    "variation L1": {"policy": "variation", "metric": "l1"},
    "variation cosine": {"policy": "variation", "metric": "cosine"},
    "last-token attention": {"policy": "attention"},
    "random": {"policy": "random"},
}
SHAPES = ("progressive", "progressive, then exit", "one-time")
POSITIONS = ("persistent", "compacted")
BUDGETS = (33.0, 22.0, 11.0, 5.0)
BIAS_BUDGET = 50.0  # V2Drop's figure on positional bias drops half of the tokens at once
SEEDS = 3


@dataclass(frozen=True)
class Method:
    """One row of the table. ``budget`` is a percentage."""

    policy: str
    shape: str
    positions: str
    budget: float
    seed: int = 0

    def schedule(self, layers: Sequence[int], n: int, depth: int) -> Schedule:
        """Drops that leave the budget: the mean share of the tokens that enters a block, from the first drop on.

        The blocks before the first drop see all tokens whatever the method does; over all blocks, 5 % could not be reached
        in a model of eight. One token always stays, as in V2Drop's code.
        """
        first = layers[0]
        average = n * (first + self.budget / 100 * (depth - first)) / depth
        stages = {"one-time": layers[:1]}.get(self.shape, layers)
        last = 0.0 if self.shape.endswith("exit") else None
        return solve(
            average=average, layers=stages, n=n, depth=depth, last=last, at_least=1, name=str(self), **POLICIES[self.policy]
        )

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if self.policy == "random" else ""
        return f"{self.policy}, {self.shape}, {self.positions} ids, {self.budget:g} %{seed}"


def methods(
    policies: Iterable[str] = tuple(POLICIES),
    shapes: Iterable[str] = SHAPES,
    positions: Iterable[str] = POSITIONS,
    budgets: Iterable[float] = BUDGETS,
    seeds: int = SEEDS,
) -> Iterator[Method]:
    """All that is compared, and one run per policy for the figure on positional bias."""
    policies = list(policies)
    settings = [*itertools.product(shapes, positions, budgets), ("one-time", "persistent", BIAS_BUDGET)]
    for (shape, ids, budget), policy in itertools.product(dict.fromkeys(settings), policies):
        for seed in range(seeds if policy == "random" else 1):
            yield Method(policy, shape, ids, budget, seed)


@dataclass(frozen=True)
class Run:
    """The answers to all questions, and per question and stage the vision tokens that were kept."""

    method: Method | None
    schedule: Schedule
    answers: list[Any]
    right: list[bool]
    kept: list[list[list[int]]]


def run(task: Task, method: Method | None) -> Run:
    """Ask all questions of a task; without a method nothing is dropped."""
    from v2drop_kernels.models import TokenDropper

    schedule = Schedule(())
    if method is not None:
        schedule = method.schedule(task.layers, task.vision_tokens[0], task.depth)
    answers: list[Any] = [None] * len(task.items)
    kept: list[list[list[int]]] = [[]] * len(task.items)
    for chosen, inputs in task.batches():
        if method is None:
            ids = _generate(task, inputs)
        else:
            with TokenDropper(schedule, positions=method.positions, seed=method.seed)(task.model) as dropper:
                ids = _generate(task, inputs)
                for row, i in enumerate(chosen):
                    kept[i] = [[int(x) for x in stage] for stage in dropper.kept(row).stages]
                    # A drop that did not fire would look like a method that costs nothing.
                    if [len(stage) for stage in kept[i]] != list(schedule.counts(task.vision_tokens[i])):
                        raise RuntimeError(f"question {i}: kept {[*map(len, kept[i])]} of {task.vision_tokens[i]} with {schedule}")
        for row, i in enumerate(chosen):
            answers[i] = task.decode(ids[row])
    right = [task.right(given, item.answer) for given, item in zip(answers, task.items, strict=True)]
    return Run(method, schedule, answers, right, kept)


def _generate(task: Task, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        moved = {name: x.to(task.model.device) for name, x in inputs.items()}
        ids = task.model.generate(**moved, max_new_tokens=task.max_new_tokens, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :]


def row(task: Task, done: Run, undropped: Run) -> dict[str, Any]:
    """The figures of one run."""
    n = task.vision_tokens
    averages = [done.schedule.average_tokens(x, task.depth) / x for x in n if x]
    agree = [a == b for a, b in zip(done.answers, undropped.answers, strict=True)]
    figures: dict[str, Any] = {
        "questions": len(task.items),
        "accuracy": round(100 * statistics.mean(done.right), 3),
        "agreement": round(100 * statistics.mean(agree), 3),
        "layers": " ".join(map(str, done.schedule.layers)),
        "kept": " ".join(map(str, done.schedule.counts(n[0]))),
        "of": n[0],
        "average_share": round(100 * statistics.mean(averages), 3),
    }
    if done.method is None:
        return {"policy": "none", **figures}
    tenths = retention([stages[0] for stages in done.kept], n)
    return {
        **dataclasses.asdict(done.method),
        **figures,
        "relevant_first": _percent(relevant_share(task, done.kept, 0)),
        "relevant_last": _percent(relevant_share(task, done.kept, -1)),
        **{f"tenth_{i}": _percent(x) for i, x in enumerate(tenths, 1)},
    }


COLUMNS = (
    "policy", "shape", "positions", "budget", "seed", "questions", "accuracy", "agreement", "relevant_first", "relevant_last",
    "layers", "kept", "of", "average_share", *(f"tenth_{i}" for i in range(1, 11)),
)  # fmt: skip


def relevant_share(task: Task, kept: Sequence[Sequence[Sequence[int]]], stage: int) -> float | None:
    """Of the tokens that the answers stand on, the share that is there after a stage; None where a task does not know."""
    had = left = 0
    for item, stages in zip(task.items, kept, strict=True):
        if item.relevant is not None:
            had += len(item.relevant)
            left += len(set(item.relevant) & set(stages[stage]))
    return left / had if had else None


def _percent(share: float | None) -> float | None:
    return None if share is None or share != share else round(100 * share, 3)


def difference(a: Sequence[Run], b: Sequence[Run]) -> tuple[float, float]:
    """Accuracy of ``a`` less that of ``b`` in points, question by question, with its standard error; runs are seeds."""
    means = [[statistics.mean(map(float, rights)) for rights in zip(*(r.right for r in side), strict=True)] for side in (a, b)]
    each = [100 * (x - y) for x, y in zip(*means, strict=True)]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("inf")
    return statistics.mean(each), error
