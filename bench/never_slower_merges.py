"""The rows of never_slower.py that merge rows or choose them softly; see never_slower_rows.py.

Where memory is quadratic in the size, a row is left out where one such table would exceed :data:`TABLE` bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from never_slower_rows import BATCHES, SIZES, Row, Sides, rows_at, width
from torch.nn.functional import normalize

import v2drop_kernels as vk
from v2drop_kernels.ops.merge_dropped.sparsevlm import recycled_clusters
from v2drop_kernels.ops.merge_dropped.visionzip import contextual_targets
from v2drop_kernels.ops.weighted_merge.groups import groups

TABLE = 128 << 20


def sums(b: int, n: int, d: int, backward: bool = False) -> Sides:
    """Every row into one of ``N / 4``, with a weight."""
    k = max(1, n // 4)
    x, target, w = torch.randn(b, n, d), torch.randint(0, k, (b, n)), torch.rand(b, n)
    offsets, rows = groups(target, k)
    weights, into = w.gather(1, rows), (target + torch.arange(0, b * k, k)[:, None]).flatten()

    def plain() -> torch.Tensor:
        return x.new_zeros(b * k, d).index_add_(0, into, (w[:, :, None] * x).flatten(0, 1)).view(b, k, d)

    ours = lambda: vk.weighted_merge(x, offsets, rows, weights)
    if not backward:
        return Sides(ours, plain, "index_add of w * x", 1e-3)
    x.requires_grad_()
    w.requires_grad_()
    weights.requires_grad_()
    grad = torch.randn(b, k, d)

    def with_gradients() -> tuple[torch.Tensor, ...]:
        d_x, d_weights = torch.autograd.grad(ours(), (x, weights), grad)
        return d_x, d_weights

    def plain_gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(plain(), (x, w), grad)

    def alike(mine: Any, theirs: Any) -> bool:
        close = lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=1e-3)
        return close(mine[0], theirs[0]) and close(mine[1], theirs[1].gather(1, rows))

    return Sides(with_gradients, plain_gradients, "index_add, autograd", compare=alike)


def tome(b: int, n: int, d: int) -> Sides:
    """ToMe's own steps, with an eighth of the tokens merged and no protected row."""
    x, features, r = torch.randn(b, n, d), torch.randn(b, n, 64), max(1, n // 8)

    def plain() -> torch.Tensor:
        f = normalize(features, dim=-1)
        best, into = (f[:, ::2] @ f[:, 1::2].transpose(1, 2)).max(2)
        order = best.argsort(1, descending=True)
        away, stay = order[:, :r], order[:, r:]
        even, odd = x[:, ::2], x[:, 1::2]
        target = into.gather(1, away)[:, :, None]
        sizes = torch.ones(b, odd.shape[1], 1).scatter_add_(1, target, torch.ones(b, r, 1))
        added = odd.scatter_add(1, target.expand(-1, -1, d), rows_at(even, away))
        return torch.cat([rows_at(even, stay), added / sizes], 1)

    def alike(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
        """Cosines are rounded otherwise, so that a few rows in thousands, of nearly equal cosines, change places."""
        return torch.isclose(mine, theirs, rtol=1e-3, atol=1e-4).all(-1).float().mean().item() > 0.995

    ours = lambda: vk.bipartite_merge(x, features, r, protected=0, order="released").hidden
    return Sides(ours, plain, "normalize, max, argsort, gather, scatter_add, cat", compare=alike)


def _kept(b: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    keep = torch.rand(b, n).topk(max(2, n // 8)).indices.sort().values
    return keep, torch.zeros(b, n, dtype=torch.bool).scatter(1, keep, True)


def visionzip(b: int, n: int, d: int) -> Sides:
    """An eighth of the rows is kept, and half of these are targets."""
    x, features = torch.randn(b, n, d), torch.randn(b, n, 64)
    keep, kept = _kept(b, n)
    k = keep.shape[1]
    targets, into = torch.zeros_like(kept).scatter(1, keep[:, : k // 2], True), keep[:, : k // 2]

    def plain() -> torch.Tensor:
        f = normalize(features, dim=-1)
        slot = (f @ rows_at(f, into).transpose(1, 2)).argmax(2).masked_fill(kept, k)
        count = torch.zeros(b, k + 1).scatter_add_(1, slot, torch.ones(b, n))
        total = torch.zeros(b, k + 1, d).scatter_add_(1, slot[:, :, None].expand(-1, -1, d), x)
        return rows_at(x, keep) + total[:, :k] / count[:, :k, None].clamp(min=1)

    ours = lambda: vk.merge_dropped(x, keep, "visionzip", features=features, targets=targets)
    return Sides(ours, plain, "normalize, argmax, scatter_add", 1e-3)


def prumerge(b: int, n: int, d: int) -> Sides:
    """Every kept row gets its 8 nearest, weighted."""
    x, features, scores, m = torch.randn(b, n, d), torch.randn(b, n, 64), torch.rand(b, n), 8
    keep, _ = _kept(b, n)

    def plain() -> torch.Tensor:
        f = normalize(features, dim=-1)
        similar = rows_at(f, keep) @ f.transpose(1, 2)
        near = similar.scatter(2, keep[:, :, None], -torch.inf).topk(m).indices.flatten(1)
        weighted = (scores.gather(1, near)[:, :, None] * rows_at(x, near)).view(b, -1, m, d)
        return rows_at(x, keep) + weighted.sum(2)

    ours = lambda: vk.merge_dropped(x, keep, "prumerge", features=features, scores=scores, neighbours=m)
    return Sides(ours, plain, "normalize, topk, gather, sum", 1e-3)


def clusters(b: int, n: int, d: int) -> Sides:
    """The steps of SparseVLM's released code; every row was dropped, and 30 % are recycled."""
    x, scores = torch.randn(b, n, d), torch.stack([torch.randperm(n) for _ in range(b)]).float() / n
    dropped, r = torch.ones(b, n, dtype=torch.bool), min(int(0.3 * n) + 1, n)
    c = r // 10 + 1

    def plain() -> torch.Tensor:
        at = scores.topk(r).indices.sort().values
        chosen = rows_at(x, at)
        apart = torch.cdist(chosen, chosen) / d**0.5
        density = (-(apart.topk(c, largest=False).values ** 2).mean(2)).exp() - 1e-6 * torch.arange(r)  # no ties
        denser = density[:, None] > density[:, :, None]
        gap = apart.masked_fill(~denser, torch.inf).amin(2).minimum(apart.flatten(1).amax(1, keepdim=True))
        centre = (gap * density).topk(c).indices.sort().values
        joined = centre.gather(1, apart.gather(1, centre[:, :, None].expand(-1, -1, r)).argmin(1))
        return torch.full((b, n), -1).scatter_(1, at, at.gather(1, joined.scatter(1, centre, centre)))

    def alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:  # torch rounds distances in float32, ours are of float64 products
        return ((ours < 0) == (theirs < 0)).all().item() and (ours == theirs).float().mean().item() > 0.9

    return Sides(lambda: recycled_clusters(x, scores, dropped), plain, "cdist, topk, exp, topk, argmin", compare=alike)


def recycle(b: int, n: int, d: int) -> Sides:
    """The means of given clusters; the other kept rows are copied."""
    x = torch.randn(b, n, d)
    keep, _ = _kept(b, n)
    k = keep.shape[1]
    slot = torch.randint(0, k, (b, n)).scatter(1, keep, torch.arange(k).repeat(b, 1))
    given = keep.gather(1, slot)

    def plain() -> torch.Tensor:
        count = torch.zeros(b, k).scatter_add_(1, slot, torch.ones(b, n))
        return torch.zeros(b, k, d).scatter_add_(1, slot[:, :, None].expand(-1, -1, d), x) / count[:, :, None]

    ours = lambda: vk.merge_dropped(x, keep, "sparsevlm", clusters=given)
    return Sides(ours, plain, "scatter_add, divide (slots known)", 1e-3)


def targets(b: int, n: int) -> Sides:
    _, kept = _kept(b, n)
    left, count = n - kept[0].sum().item(), max(1, n // 16)
    stride = max(1, left // count)

    def plain() -> torch.Tensor:
        rows = (~kept).nonzero()[:, 1].view(b, left)[:, ::stride][:, :count]
        return torch.zeros(b, n, dtype=torch.bool).scatter_(1, rows, True)

    return Sides(lambda: contextual_targets(kept, count), plain, "nonzero, slice, scatter", None)


def soft(b: int, n: int, backward: bool = False) -> Sides:
    """The kept mask; with its gradient in the ratio, which plain PyTorch finds through the soft mask."""
    s, ratio = torch.stack([torch.randperm(n) for _ in range(b)]).float() / n, torch.tensor(0.75)
    place = torch.arange(1, n + 1).repeat(b, 1).float() / n

    def rank() -> torch.Tensor:
        return torch.empty(b, n).scatter_(1, s.argsort(1), place)

    if not backward:
        return Sides(lambda: vk.soft_topk(s, 0.75), lambda: (rank() > 0.75).float(), "argsort, scatter, >", None)
    ratio.requires_grad_()
    grad = torch.randn(b, n)

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        above = rank() - ratio
        mask = torch.sigmoid(above * n)
        mask = mask + ((above > 0).float() - mask).detach()
        return mask, torch.autograd.grad(mask, ratio, grad)[0]

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        mask = vk.soft_topk(s, ratio)
        return mask, torch.autograd.grad(mask, ratio, grad)[0]

    def alike(mine: Any, theirs: Any) -> bool:
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-2) for a, b in zip(mine, theirs, strict=True))

    return Sides(ours, plain, "argsort, scatter, sigmoid, autograd", compare=alike)


def by_size() -> Iterator[Row]:
    """Every merge at every size and batch at which its tables can be held."""
    wide: dict[str, tuple[Callable[[int, int, int], Sides], float]] = {  # and N^2 times this are the elements of its table
        "weighted_merge": (sums, 0.0),
        "weighted_merge, with backward": (lambda b, n, d: sums(b, n, d, True), 0.0),
        "bipartite_merge": (tome, 0.25),
        "merge_dropped, visionzip": (visionzip, 1 / 16),
        "merge_dropped, prumerge": (prumerge, 1 / 8),
        "merge_dropped, sparsevlm": (recycle, 0.0),
        "recycled_clusters": (clusters, 0.09),
    }
    for name, (build, share) in wide.items():
        for n in SIZES:
            for b in BATCHES:
                d = width(b, n)
                if 4 * b * n * n * share <= TABLE:
                    yield Row(name, f"[{b}, {n}, {d}]", n, lambda build=build, b=b, n=n, d=d: build(b, n, d))
    for n in SIZES:
        for b in BATCHES:
            shape = f"[{b}, {n}]"
            yield Row("contextual_targets", shape, n, lambda b=b, n=n: targets(b, n))
            yield Row("soft_topk", shape, n, lambda b=b, n=n: soft(b, n))
            yield Row("soft_topk, with backward", shape, n, lambda b=b, n=n: soft(b, n, True))


def found() -> Iterator[Row]:
    """The merges of 16 rows that were once slower than PyTorch."""
    yield Row("weighted_merge", "[1, 16, 64]", 16, lambda: sums(1, 16, 64))
    yield Row("bipartite_merge", "[1, 16, 64]", 16, lambda: tome(1, 16, 64))
