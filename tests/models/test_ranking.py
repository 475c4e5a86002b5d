"""Ranking: tiers precede scores, against sorting tuples one by one."""

from __future__ import annotations

import math

import pytest
import torch

from v2drop_kernels.models import Ranking
from v2drop_kernels.ops.topk.order import ranked

NAN, INF = math.nan, math.inf


def slow_order(scores, tier, droppable):
    """Droppable rows by (tier descending, NaN first, score descending, row ascending)."""
    rows = [i for i, here in enumerate(droppable) if here]
    return sorted(rows, key=lambda i: (-tier[i], not math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i], i))


@pytest.mark.parametrize("seed", range(20))
def test_ordinals(seed):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 0.5, 1.0])[torch.randint(0, 7, (3, 40), generator=rng)]
    tier = torch.randint(-1, 4, (3, 40), generator=rng)
    droppable = torch.rand(3, 40, generator=rng) < 0.8
    found = Ranking(scores, tier).ordinals(droppable)
    assert found.dtype == torch.float32
    order = ranked(found, droppable)
    for i in range(3):
        want = slow_order(scores[i].tolist(), tier[i].tolist(), droppable[i].tolist())
        assert order[i, : len(want)].tolist() == want
        assert len(set(found[i, droppable[i]].tolist())) == len(want)


@pytest.mark.parametrize("seed", range(10))
def test_shifted_scores_have_the_same_order_and_a_gradient(seed):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 30, generator=rng).mul_(7).requires_grad_()
    tier, droppable = torch.randint(0, 4, (2, 30), generator=rng), torch.rand(2, 30, generator=rng) < 0.8
    ranking = Ranking(torch.where(droppable, scores, NAN), tier)
    shifted = ranking.shifted(droppable)
    assert torch.equal(ranked(shifted, droppable), ranked(ranking.ordinals(droppable), droppable))
    shifted[droppable].sum().backward()
    assert torch.equal(scores.grad, droppable.float())


def test_shifted_scores_of_weights():
    """The values that SparseVLM's soft training has always had: tiers 1 and 2 lie at 2 and 3, weights below 1 stay."""
    ranking = Ranking(torch.tensor([[0.25, 0.0, 0.0, 0.5]]), torch.tensor([[0, 1, 2, 0]]))
    assert ranking.shifted(torch.ones(1, 4, dtype=torch.bool)).tolist() == [[0.25, 2.0, 3.0, 0.5]]


def test_errors():
    with pytest.raises(ValueError, match="tier must hold integers of the shape"):
        Ranking(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="tier must hold integers of the shape"):
        Ranking(torch.zeros(1, 3), torch.zeros(1, 4, dtype=torch.int64))
