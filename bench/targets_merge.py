"""The merges beside the same sums in eager PyTorch (rows gathered, weighted, index_add): ``python bench/run.py --suite merge``.

What decides where a token goes (cosines, clusters) is reported apart from the sums. Nothing is asserted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from targets import Call, Problem, Target
from verify import WrongResult

from v2drop_kernels.ops.bipartite_merge import bipartite_merge
from v2drop_kernels.ops.merge_dropped import merge_dropped
from v2drop_kernels.ops.merge_dropped.sparsevlm import recycled_clusters
from v2drop_kernels.ops.merge_dropped.visionzip import contextual_targets
from v2drop_kernels.ops.weighted_merge import weighted_merge
from v2drop_kernels.ops.weighted_merge.groups import groups

Sides = tuple[str, Call, str, Call]


class Inputs:
    """576 tokens of width 4096 with keys of width 1024 and scores, of which the 64 best are kept; fewer in a dry run."""

    def __init__(self, dry: bool) -> None:
        self.n, self.d, self.c, self.k = (60, 16, 8, 12) if dry else (576, 4096, 1024, 64)
        self.generator = g = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, self.n, self.d, generator=g)
        self.features, self.scores = torch.randn(1, self.n, self.c, generator=g), torch.rand(1, self.n, generator=g)
        self.keep = self.scores.topk(self.k).indices.sort().values
        self.kept = torch.zeros(1, self.n, dtype=torch.bool).scatter(1, self.keep, True)


def sums(given: Inputs, count: int) -> Sides:
    """``count`` weighted rows into ``k``: each token once, or drawn at random where there are more."""
    target = torch.randint(0, given.k, (1, count), generator=given.generator)
    offsets, edge = groups(target, given.k)
    rows = torch.arange(given.n)[None] if count == given.n else torch.randint(0, given.n, (1, count), generator=given.generator)
    source, weights = rows.gather(1, edge), torch.rand(1, count, generator=given.generator)
    into, x = target.gather(1, edge)[0], given.x

    def eager() -> torch.Tensor:
        """One item; every edge by itself."""
        return x.new_zeros(given.k, x.shape[2]).index_add_(0, into, weights[0, :, None] * x[0, source[0]])[None]

    ours = lambda: weighted_merge(x, offsets, source, weights)
    if not torch.allclose(ours(), eager(), rtol=1.3e-6, atol=1e-5):
        raise WrongResult("weighted_merge: sums differ from those of index_add")
    return "weighted_merge", ours, "index_add", eager


def copied(given: Inputs) -> tuple[str, Call]:
    return "rows copied", lambda: given.x.gather(1, given.keep[:, :, None].expand(-1, -1, given.d))


def prumerge(given: Inputs) -> Sides:
    run = lambda: merge_dropped(given.x, given.keep, "prumerge", features=given.features, scores=given.scores)
    return "merge_dropped", run, *copied(given)


def visionzip(given: Inputs) -> Sides:
    targets = contextual_targets(given.kept, 10)
    both = torch.cat([given.keep, targets.nonzero()[None, :, 1]], 1)
    run = lambda: merge_dropped(given.x, both, "visionzip", features=given.features, targets=targets)
    return "merge_dropped", run, *copied(given)


def sparsevlm(given: Inputs) -> Sides:
    find = lambda: recycled_clusters(given.x, given.scores, ~given.kept)
    clusters = find()
    centres = torch.cat([given.keep, clusters[clusters >= 0].unique()[None]], 1)
    return "recycled_clusters", find, "its sums alone", lambda: merge_dropped(given.x, centres, "sparsevlm", clusters=clusters)


def tome(given: Inputs) -> Sides:
    tower = torch.randn(1, given.n + 1, given.c, generator=given.generator)
    features = tower[:, :, :64]  # as wide as one head's keys
    merge = lambda: bipartite_merge(tower, features, given.n // 36)
    merged = merge()
    offsets, edge = groups(merged.row, merged.hidden.shape[1])
    return "bipartite_merge", merge, "its sums alone", lambda: weighted_merge(tower, offsets, edge, mean=True)


def targets(dry: bool = False) -> Iterator[Target[Problem]]:
    """The sums by themselves, then every method."""
    given = Inputs(dry)
    n, d, c, k = given.n, given.d, given.c, given.k
    sized = f"N={n} D={d} k={k}"
    cases = [
        (f"every token to one of k: {sized}", "weighted_merge against index_add", lambda: sums(given, n)),
        (f"33 tokens to each of k: {sized}", "weighted_merge against index_add", lambda: sums(given, 33 * k)),
        (f"PruMerge {sized}", "merge_dropped against rows copied", lambda: prumerge(given)),
        (f"VisionZip {sized}+10", "merge_dropped against rows copied", lambda: visionzip(given)),
        (f"SparseVLM N={n} D={d}", "recycled_clusters against its sums alone", lambda: sparsevlm(given)),
        (f"ToMe N={n + 1} D={c} r={n // 36}", "bipartite_merge against its sums alone", lambda: tome(given)),
    ]
    for text, name, build in cases:
        yield Target(name, "merge", Problem(text, 4 * n * d), None, "at most", lambda target, build=build: build())
