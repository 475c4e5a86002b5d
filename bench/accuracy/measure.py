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
from v2drop_kernels.schedule import Schedule, Stage, solve

# What V2Drop's tables compare: rankings that take turns over all shapes and modes of position ids.
POLICIES: dict[str, dict[str, Any]] = {
    "variation L2": {"policy": "variation", "metric": "l2"},
    "variation L1": {"policy": "variation", "metric": "l1"},
    "variation cosine": {"policy": "variation", "metric": "cosine"},
    "last-token attention": {"policy": "fastv"},
    "random": {"policy": "random"},
}
SHAPES = ("progressive", "progressive, then exit", "one-time")
ENTRY, LATE, EXIT = "before the decoder", "late injection, then exit", "exit alone"
# Methods of the papers in the shape and with the ids that they were published with, at the same budgets: (shape, ids, stage).
PAPERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "FastV": ("one-time", "persistent", {"policy": "fastv"}),
    "PDrop": ("progressive", "compacted", {"policy": "pdrop"}),
    "HiDivDrop": (LATE, "persistent", {"policy": "hidivdrop"}),
    "HiDivDrop, not injected late": ("progressive, then exit", "persistent", {"policy": "hidivdrop"}),
    "cross-modal": ("progressive", "persistent", {"policy": "cross_modal", "options": {"calibrated": 2}}),
    "cross-modal, flash": ("progressive", "persistent", {"policy": "cross_modal_flash"}),
    "SparseVLM v1": ("progressive", "compacted", {"policy": "sparsevlm", "options": {"version": 1}}),
    "SparseVLM v2": ("progressive", "persistent", {"policy": "sparsevlm", "options": {"version": 2}}),
    "DART": ("one-time", "persistent", {"policy": "dart"}),
    "TopV": ("one-time", "persistent", {"policy": "topv"}),
    "VTW": (EXIT, "persistent", {"policy": "vtw"}),
    "VisionZip": (ENTRY, "compacted", {"policy": "visionzip"}),
    "FasterVLM": (ENTRY, "compacted", {"policy": "fastervlm"}),
    "PruMerge": (ENTRY, "compacted", {"policy": "prumerge"}),
    "HiRED": (ENTRY, "compacted", {"policy": "hired"}),
    "ToMe": (ENTRY, "compacted", {"policy": "tome"}),
    "random, at entry": (ENTRY, "compacted", {"policy": "random"}),
}
LEAST = {"ToMe": 22.0}  # the tiny model's tower has two blocks, each of which can merge half of its tokens at most
NEEDS_MORE = {
    "TwigVLM": "its scores come from a trained twig",
    "DyCoke": "it compares the frames of a video",
    "VoCo-LLaMA": "its mask needs a model that was trained with it",
}
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

    @property
    def random(self) -> bool:
        return self.policy.startswith("random")

    def schedule(self, layers: Sequence[int], n: int, depth: int) -> Schedule:
        """Drops that leave the budget: the mean share of the tokens that enters a block, from the first drop on.

        The blocks before the first drop see all tokens whatever the method does; over all blocks, 5 % could not be reached
        in a model of eight. One token always stays, as in V2Drop's code.
        """
        stages = {"one-time": layers[:1], ENTRY: (0,)}.get(self.shape, tuple(layers))
        # Before the decoder too: the same mean over all blocks, so that a column compares equal costs.
        first, stage = layers[0], POLICIES.get(self.policy) or PAPERS[self.policy][2]
        average = n * (first + self.budget / 100 * (depth - first)) / depth
        if self.shape == EXIT:  # all tokens up to the block that makes the mean right, rounded to a whole one
            return Schedule((Stage(max(1, round(depth * average / n)), 0, **stage),), str(self))
        last = 0.0 if self.shape.endswith("exit") else None
        found = solve(average=average, layers=stages, n=n, depth=depth, last=last, at_least=1, name=str(self), **stage)
        if stage["policy"] == "tome":  # merges in the tower, before any stage
            merging = [dataclasses.replace(x, options={"tokens": x.count(n)}) for x in found.stages]
            found = dataclasses.replace(found, stages=tuple(merging))
        return dataclasses.replace(found, inject=1) if self.shape == LATE else found

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if self.random else ""
        return f"{self.policy}, {self.shape}, {self.positions} ids, {self.budget:g} %{seed}"


def methods(
    policies: Iterable[str] = tuple(POLICIES),
    shapes: Iterable[str] = SHAPES,
    positions: Iterable[str] = POSITIONS,
    budgets: Iterable[float] = BUDGETS,
    seeds: int = SEEDS,
    papers: Iterable[str] = tuple(PAPERS),
) -> Iterator[Method]:
    """All that is compared, and one run per policy for the figure on positional bias."""
    policies, budgets = list(policies), list(budgets)
    settings = [*itertools.product(shapes, positions, budgets), ("one-time", "persistent", BIAS_BUDGET)]
    found = [Method(policy, *setting) for setting, policy in itertools.product(dict.fromkeys(settings), policies)]
    found += [
        Method(name, *PAPERS[name][:2], budget)
        for name, budget in itertools.product(papers, budgets)
        if budget >= LEAST.get(name, 0)
    ]
    for method in found:
        yield from (dataclasses.replace(method, seed=seed) for seed in range(seeds if method.random else 1))


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
                    if [len(stage) for stage in kept[i]] != counts(schedule, task.vision_tokens[i]):
                        raise RuntimeError(f"question {i}: kept {[*map(len, kept[i])]} of {task.vision_tokens[i]} with {schedule}")
        for row, i in enumerate(chosen):
            answers[i] = task.decode(ids[row])
    right = [task.right(given, item.answer) for given, item in zip(answers, task.items, strict=True)]
    return Run(method, schedule, answers, right, kept)


def counts(schedule: Schedule, n: int) -> list[int]:
    """What every stage leaves of ``n`` tokens; some methods cannot keep any number (DART)."""
    from v2drop_kernels.models import policies

    left = []
    for stage in schedule.stages:
        k = stage.count(n)
        n = policies.make(stage.policy, stage.options).count(n, k) if k else 0
        left.append(n)
    return left


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
        "kept": " ".join(map(str, counts(done.schedule, n[0]))),
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
