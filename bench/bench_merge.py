"""The merges beside the same sums in eager PyTorch (rows gathered, weighted, index_add): one thread, in turns, minima.

``python bench/bench_merge.py`` prints a Markdown table; ``--out FOLDER`` also writes merge.csv; ``--dry`` runs everything on
tiny shapes (no measurement). What decides where a token goes (cosines, clusters) is reported apart from the sums.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent))

import bench_soft_topk
import harness
import torch

from v2drop_kernels.ops.bipartite_merge import bipartite_merge
from v2drop_kernels.ops.merge_dropped import merge_dropped
from v2drop_kernels.ops.merge_dropped.sparsevlm import recycled_clusters
from v2drop_kernels.ops.merge_dropped.visionzip import contextual_targets
from v2drop_kernels.ops.weighted_merge import weighted_merge
from v2drop_kernels.ops.weighted_merge.groups import groups


def eager(x: torch.Tensor, target: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, k: int) -> torch.Tensor:
    """One item; every edge by itself."""
    return x.new_zeros(k, x.shape[2]).index_add_(0, target, weights[:, None] * x[0, rows])[None]


def measure(gate: harness.NoiseGate, dry: bool) -> list[dict[str, Any]]:
    rows = []
    compared = lambda *args: rows.append(bench_soft_topk.compared(gate, *args, None, dry))
    gen = torch.Generator().manual_seed(0)
    n, d, c, k = (60, 16, 8, 12) if dry else (576, 4096, 1024, 64)
    x, metric, scores = torch.randn(1, n, d, generator=gen), torch.randn(1, n, c, generator=gen), torch.rand(1, n, generator=gen)

    shapes = {"every token to one of k": (n, 1), "33 tokens to each of k": (33 * k, 33)}
    for name, (count, _) in shapes.items():
        target = torch.randint(0, k, (1, count), generator=gen)
        offsets, edge = groups(target, k)
        source = torch.arange(n)[None] if count == n else torch.randint(0, n, (1, count), generator=gen)
        source, weights = source.gather(1, edge), torch.rand(1, count, generator=gen)
        sides = target.gather(1, edge)[0], source[0], weights[0]
        ours = lambda offsets=offsets, source=source, weights=weights: weighted_merge(x, offsets, source, weights)
        theirs = lambda sides=sides: eager(x, *sides, k)
        torch.testing.assert_close(ours(), theirs())
        compared(f"{name}: N={n} D={d} k={k}", ("weighted_merge", ours), ("index_add", theirs))

    sums = "its sums alone"
    keep = scores.topk(k).indices.sort().values
    kept = torch.zeros(1, n, dtype=torch.bool).scatter(1, keep, True)
    copy = "rows copied", lambda: x.gather(1, keep[:, :, None].expand(-1, -1, d))
    compared(
        f"PruMerge N={n} D={d} k={k}",
        ("merge_dropped", lambda: merge_dropped(x, keep, "prumerge", metric=metric, scores=scores)),
        copy,
    )
    targets = contextual_targets(kept, 10)
    both = torch.cat([keep, targets.nonzero()[None, :, 1]], 1)
    compared(
        f"VisionZip N={n} D={d} k={k}+10",
        ("merge_dropped", lambda: merge_dropped(x, both, "visionzip", metric=metric, targets=targets)),
        copy,
    )
    clusters = recycled_clusters(x, scores, ~kept)
    centres = torch.cat([keep, clusters[clusters >= 0].unique()[None]], 1)
    compared(f"SparseVLM N={n} D={d}", ("recycled_clusters", lambda: recycled_clusters(x, scores, ~kept)),
             (sums, lambda: merge_dropped(x, centres, "sparsevlm", clusters=clusters)))  # fmt: skip
    tower = torch.randn(1, n + 1, c, generator=gen)
    merged = bipartite_merge(tower, metric_of(tower), n // 36)
    offsets, edge = groups(merged.row, merged.hidden.shape[1])
    compared(f"ToMe N={n + 1} D={c} r={n // 36}", ("bipartite_merge", lambda: bipartite_merge(tower, metric_of(tower), n // 36)),
             (sums, lambda: weighted_merge(tower, offsets, edge, mean=True)))  # fmt: skip
    return rows


def metric_of(tower: torch.Tensor) -> torch.Tensor:
    """As wide as one head's keys."""
    return tower[:, :, :64]


if __name__ == "__main__":
    sys.exit(bench_soft_topk.main(name="merge", measure=measure))
