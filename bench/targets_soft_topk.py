"""soft_topk beside a torch.sort of the same scores: ``python bench/run.py --suite soft_topk``.

Asserted: the forward pass of 6272 scores takes at most three times as long as the sort. The rest is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from targets import Call, Problem, Target
from verify import WrongResult

from v2drop_kernels.ops.soft_topk import soft_topk


def calls(scores: torch.Tensor) -> dict[str, Call]:
    """What is timed: the passes of soft_topk, and the comparison of all pairs that defines it."""
    leaf, ratio, grad = scores.clone().requires_grad_(), torch.tensor(0.9, requires_grad=True), torch.randn_like(scores)
    pairs = lambda: (scores[:, :, None] >= scores[:, None]).float().mean(2)
    return {
        "forward": lambda: soft_topk(scores, 0.9),
        "forward, ties as released": lambda: soft_topk(scores, 0.9, ties="released"),
        "forward and backward": lambda: torch.autograd.grad(soft_topk(leaf, ratio), (leaf, ratio), grad),
        "all comparisons, n x n": lambda: torch.sigmoid((pairs() - 0.9) * scores.shape[1]),
    }


def checked(n: int) -> None:
    """The kept tokens are those of a comparison of all pairs."""
    scores = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    rank = (scores[:, :, None] >= scores[:, None]).float().mean(2)
    if not torch.equal(soft_topk(scores, 0.75), (rank > 0.75).float()):
        raise WrongResult("soft_topk keeps other tokens than the definition")


def beside_sort(name: str) -> Callable[[Target[Problem]], tuple[str, Call, str, Call]]:
    def sides(target: Target[Problem]) -> tuple[str, Call, str, Call]:
        n = target.case.numbers[0]
        checked(n)
        scores = torch.randn(1, n, generator=torch.Generator().manual_seed(0))
        return name, calls(scores)[name], "torch.sort", lambda: torch.sort(scores)

    return sides


def targets(dry: bool = False) -> Iterator[Target[Problem]]:
    """Every pass for an image and for a video."""
    for n in (32, 64) if dry else (576, 6272):
        for name in calls(torch.zeros(1, 1)):
            limit = 3.0 if (name, n) == ("forward", 6272) else None
            case = Problem(f"n={n}", 4 * n, (n,))
            yield Target(f"{name} against torch.sort", "soft_topk", case, limit, "at most", beside_sort(name))
