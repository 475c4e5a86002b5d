"""What never_slower.py measures: the rows of scores, selection and compaction. Those of the merges are in never_slower_merges.py.

A row has two calls with the same result: that of this package, and the shortest plain PyTorch. Every op takes the sizes
:data:`SIZES` at the batches :data:`BATCHES` in float32. ``D`` is 1024 and smaller where one tensor would exceed :data:`BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import v2drop_kernels as vk

SIZES, BATCHES, BYTES = (16, 64, 576, 6272, 65536), (1, 32), 64 << 20
Call = Callable[[], Any]


class Sides(NamedTuple):
    """Ours, plain PyTorch, its text for the table, and how far the results may be apart (None: not at all)."""

    ours: Call
    torch: Call
    text: str
    within: float | None = 1e-4
    compare: Callable[[Any, Any], bool] | None = None


class Row(NamedTuple):
    """One line: the op, its case, the size that the limit depends on, and the two calls, built when it is measured."""

    op: str
    case: str
    n: int
    build: Callable[[], Sides]

    @property
    def limit(self) -> float:
        return 1.0 if self.n >= 576 else 1.3


def width(b: int, n: int, most: int = 1024) -> int:
    """Channels of float32 rows: ``most``, or a smaller power of two."""
    return max(8, min(most, 1 << int(math.log2(max(1, BYTES // (4 * b * n))))))


def distinct(b: int, n: int) -> torch.Tensor:
    """Float32 scores ``[B, N]``, no two of an item equal."""
    return torch.stack([torch.randperm(n) for _ in range(b)]).float() / n


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.topk(k, sorted=False).indices.sort().values


def rows_at(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))


def score(b: int, n: int, d: int) -> Sides:
    p, c = torch.randn(b, n, d), torch.randn(b, n, d)
    return Sides(lambda: vk.variation_score(p, c), lambda: torch.linalg.vector_norm(c - p, dim=-1), "vector_norm(c - p)")


def score_topk(b: int, n: int, d: int) -> Sides:
    p, c, k = torch.randn(b, n, d), torch.randn(b, n, d), max(1, n // 4)
    plain = lambda: best(torch.linalg.vector_norm(c - p, dim=-1), k)
    return Sides(lambda: vk.variation_topk(p, c, k).indices, plain, "vector_norm(c - p).topk, sort")


def select(b: int, n: int, k: int | None = None, order: str = "position", dtype: torch.dtype = torch.float32) -> Sides:
    s, k = distinct(b, n).to(dtype), max(1, n // 4) if k is None else k

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        keep = best(s, k)
        return s.gather(1, keep), keep

    ours = lambda: tuple(vk.segmented_topk(s, k, order=order))
    if order == "score":
        return Sides(ours, lambda: tuple(s.topk(k)), "topk", None)
    return Sides(ours, plain, "topk, sort, gather", None)


def packed(groups: int, n: int, fresh: bool, order: str = "position") -> Sides:
    """``groups`` segments of ``n`` rows, of which 4 are kept. torch sees that they are equally long."""
    s = distinct(groups, n)
    flat, base, k = s.flatten(), torch.arange(0, groups * n, n)[:, None], min(4, n)
    cu = torch.arange(0, groups * n + 1, n, dtype=torch.int32)
    again = cu.tolist()

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(vk.segmented_topk(flat, k, cu_seqlens=cu.clone() if fresh else again))

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        keep = best(flat.view(groups, n), k)
        return s.gather(1, keep), keep + base

    return Sides(ours, plain, "view, topk, sort, gather", None)


def drop(b: int, n: int, d: int) -> Sides:
    p, c, k, ids = torch.randn(b, n, d), torch.randn(b, n, d), max(1, n // 4), torch.arange(n).repeat(b, 1)

    def ours() -> tuple[Any, ...]:
        out = vk.drop_tokens(p, c, k, position_ids=ids)
        return out.keep, out.hidden, out.position_ids

    def plain() -> tuple[Any, ...]:
        keep = best(torch.linalg.vector_norm(c - p, dim=-1), k)
        return keep, rows_at(c, keep), ids.gather(1, keep)

    return Sides(ours, plain, "vector_norm, topk, sort, gather", None)


def compact(b: int, n: int, d: int) -> Sides:
    x, keep = torch.randn(b, n, d), best(torch.rand(b, n), max(1, n // 4))
    return Sides(lambda: vk.compact(keep, x).hidden, lambda: rows_at(x, keep), "gather", None)


def compact_inplace(b: int, n: int, d: int) -> Sides:
    """Each side has a cache of its own, and moves the same rows of it to the front again and again."""
    cache, keep = torch.randn(b, 1, n, d), best(torch.rand(b, n), max(1, n // 4))
    other, k = cache.clone(), keep.shape[1]

    def ours() -> torch.Tensor:
        vk.compact_(keep, cache)
        return cache

    def plain() -> torch.Tensor:
        other[:, 0, :k] = rows_at(other[:, 0], keep)
        return other

    return Sides(ours, plain, "x[:, :k] = gather", None)


def attention(b: int, n: int, d: int, heads: int = 8) -> Sides:
    dh = max(8, d // heads)
    heads = max(1, d // dh)
    q, k, rows = torch.randn(b, heads, 1, dh), torch.randn(b, heads, n, dh), torch.full((b, 1), n - 1)
    plain = lambda: ((q @ k.transpose(2, 3)) * dh**-0.5).softmax(-1).mean((1, 2))
    return Sides(lambda: vk.attention_score(q, k, query_rows=rows), plain, "softmax(q k^T).mean((1, 2))", 1e-3)


def cls(b: int, n: int, d: int) -> Sides:
    heads = max(1, d // 64)
    dh = d // heads
    q, k = torch.randn(b, heads, 1, dh), torch.randn(b, heads, 1 + n, dh)
    plain = lambda: ((q @ k.transpose(2, 3)) * dh**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    return Sides(lambda: vk.cls_attention_score(q, k), plain, "softmax(q k^T).mean(1)", 1e-3)


def raters(b: int, n: int, d: int) -> Sides:
    embeds, text, vision = torch.randn(b, n, d), torch.arange(n - 8, n).repeat(b, 1), torch.arange(n - 8).repeat(b, 1)

    def plain() -> torch.Tensor:
        seen = (embeds[:, : n - 8] @ embeds[:, n - 8 :].transpose(1, 2)).softmax(2).mean(1)
        return torch.where(seen > seen.mean(1, keepdim=True), text, -1)

    return Sides(lambda: vk.text_raters(vision, text, embeds), plain, "softmax(v t^T).mean > mean", 0.0)


def cross_modal(b: int, n: int) -> Sides:
    text, cls, a = torch.rand(b, n), torch.rand(b, n), torch.rand(b)
    at = a[:, None]
    return Sides(lambda: vk.cross_modal_score(text, cls, a), lambda: at * text + cls, "a * text + cls")


def key_norm(b: int, n: int, d: int) -> Sides:
    k = torch.randn(b, max(1, d // 64), n, min(d, 64))
    return Sides(lambda: vk.key_norm_score(k), lambda: k.norm(p=1, dim=(1, 3)), "norm(p=1, dim=(1, 3))", 1e-3)


def pivots(b: int, n: int, d: int) -> Sides:
    x, p = torch.randn(b, n, d), torch.randint(0, n, (b, 4))
    unit = torch.nn.functional.normalize

    def plain() -> torch.Tensor:
        return unit(rows_at(x, p), dim=-1) @ unit(x, dim=-1).transpose(1, 2)

    return Sides(lambda: vk.cosine_to_pivots(x, p), plain, "normalize(x[p]) @ normalize(x)^T", 1e-3)


def frames(b: int, n: int, d: int) -> Sides:
    x = torch.randn(b, 4, n // 4, d)

    def plain() -> torch.Tensor:
        change = 1 - torch.nn.functional.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
        return torch.cat([change.new_full((b, 1, n // 4), torch.inf), change], 1)

    return Sides(lambda: vk.frame_similarity(x), plain, "1 - cosine_similarity(x[1:], x[:-1]), cat", 1e-3)


def random(b: int, n: int) -> Sides:
    """The two draw other numbers, so that what is compared is shape, dtype and range."""

    def alike(x: torch.Tensor, y: torch.Tensor) -> bool:
        return x.shape == y.shape and x.dtype == y.dtype and bool(((x >= 0) & (x < 1)).all())

    return Sides(lambda: vk.random_score((b, n)), lambda: torch.rand(b, n), "rand (other numbers)", compare=alike)


WIDE: dict[str, Callable[[int, int, int], Sides]] = {
    "variation_score": score, "variation_topk": score_topk, "drop_tokens": drop, "compact": compact, "compact_": compact_inplace,
    "attention_score": attention, "cls_attention_score": cls, "text_raters": raters, "key_norm_score": key_norm,
    "cosine_to_pivots": pivots, "frame_similarity": frames,
}  # fmt: skip
NARROW: dict[str, Callable[[int, int], Sides]] = {
    "segmented_topk": select,
    "segmented_topk, by score": lambda b, n: select(b, n, order="score"),
    "segmented_topk, float64": lambda b, n: select(b, n, dtype=torch.float64),
    "cross_modal_score": cross_modal,
    "random_score": random,
}


def by_size() -> Iterator[Row]:
    """Every op at every size and batch."""
    for name, wide in WIDE.items():
        for n in SIZES:
            for b in BATCHES:
                d = width(b, n)
                yield Row(name, f"[{b}, {n}, {d}]", n, lambda wide=wide, b=b, n=n, d=d: wide(b, n, d))
    for name, narrow in NARROW.items():
        for n in SIZES:
            for b in BATCHES:
                yield Row(name, f"[{b}, {n}]", n, lambda narrow=narrow, b=b, n=n: narrow(b, n))


def found() -> Iterator[Row]:
    """Shapes that were once several times slower than PyTorch; their limit is that of large sizes, except for tiny calls."""
    yield Row("variation_score, one channel", "[1, 65536, 1]", 65536, lambda: score(1, 65536, 1))
    yield Row("variation_score, three channels", "[1, 4096, 3]", 4096, lambda: score(1, 4096, 3))
    for groups in (100, 1000, 10000, 100000):
        for fresh in (True, False):
            what = "offsets new" if fresh else "offsets seen before"
            yield Row(
                f"segmented_topk, packed, {what}", f"{groups} segments of 16", groups * 16,
                lambda groups=groups, fresh=fresh: packed(groups, 16, fresh),
            )  # fmt: skip
    yield Row("segmented_topk, float64", "[1, 65536], k = 1000", 65536, lambda: select(1, 65536, 1000, dtype=torch.float64))
    yield Row("segmented_topk, by score", "[1000, 8], k = 1", 8000, lambda: select(1000, 8, 1, "score"))
    yield Row("segmented_topk, by score", "[1, 576], k = 1", 576, lambda: select(1, 576, 1, "score"))
    yield Row("attention_score, one head of 8 channels", "[1, 65536, 8]", 65536, lambda: attention(1, 65536, 8, 1))
