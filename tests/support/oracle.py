"""The selection and the gather in plain Python, row by row: what even the reference is compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from support.cases import Batch, same, to


def best(values: list[float], rows: list[int], k: int) -> list[int]:
    """The k best of ``rows``, best first: NaN, then descending, then by row."""
    return sorted(rows, key=lambda r: (0, 0.0, r) if math.isnan(values[r]) else (1, -values[r], r))[:k]


def topk(scores: torch.Tensor, segments: list[list[list[int]]], ks: list[int], order: str) -> tuple[torch.Tensor, torch.Tensor]:
    """values and indices ``[G, K]`` of ``[B, N]`` or packed ``[T]`` scores."""
    items = [(i, s) for i, item in enumerate(segments) for s in item]
    chosen = []
    for (i, rows), k in zip(items, ks, strict=True):
        found = best((scores if scores.dim() == 1 else scores[i]).tolist(), rows, k)
        chosen.append(sorted(found) if order == "position" else found)
    width = max(map(len, chosen), default=0)
    indices = torch.tensor([c + [-1] * (width - len(c)) for c in chosen], dtype=torch.int64).view(len(items), width)
    values = torch.full(indices.shape, -math.inf, dtype=scores.dtype)
    for g, ((i, _), c) in enumerate(zip(items, chosen, strict=True)):
        values[g, : len(c)] = (scores if scores.dim() == 1 else scores[i])[c]
    return values, indices


def keep(scores: torch.Tensor, b: Batch, ks: list[int]) -> torch.Tensor:
    """Rows that survive a drop: ``[B, S]`` padded with -1, or ``[T']``."""
    left = iter(ks)
    rows = []
    for i, (real, segments) in enumerate(zip(b.real, b.segments, strict=True)):
        values = (scores if b.packed else scores[i]).tolist()
        competing = {r for s in segments for r in s}
        survivors = {r for s in segments for r in best(values, s, next(left))}
        rows.append([r for r in real if r not in competing or r in survivors])
    if b.packed:
        return torch.tensor([r for item in rows for r in item], dtype=torch.int64)
    width = max(map(len, rows), default=0)
    pad = [[-1] * (width - len(r)) for r in rows]
    padded = [p + r if b.side == "left" else r + p for r, p in zip(rows, pad, strict=True)]
    return torch.tensor(padded, dtype=torch.int64).view(b.batch, width)


def gather(x: Any, keep: torch.Tensor, batch_dim: int, row_dim: int, fill: int = 0) -> Any:
    """Rows ``keep`` of x (or of nested tensors), written one by one."""
    if isinstance(x, list | tuple):
        return type(x)(gather(y, keep, batch_dim, row_dim, fill) for y in x)
    if keep.dim() == 1:
        return gather(x.unsqueeze(0), keep[None], 0, row_dim + 1, fill).squeeze(0)
    shape = list(x.shape)
    shape[row_dim] = keep.shape[1]
    out = torch.zeros(shape, dtype=x.dtype) if fill == 0 else torch.full(shape, fill, dtype=x.dtype)
    source, target = (t.movedim((batch_dim, row_dim), (0, 1)) for t in (x, out))
    for b, rows in enumerate(keep.tolist()):
        for s, r in enumerate(rows):
            if r >= 0:
                target[b, s] = source[b, r]
    return out


def check_compacted(got, keep, hidden, given):
    """Every field against the row-by-row gather."""
    packed = keep.dim() == 1
    row = 0 if packed else 1
    same(got.keep.cpu(), keep)
    same(to(got.hidden, "cpu"), gather(hidden, keep, 0, row))
    for name, value in given.items():
        plane = row
        if name == "kv":
            plane = 1 if packed else 2
        elif name in ("position_ids", "rope"):
            first = value[0] if name == "rope" else value
            plane = first.dim() - 1 - (name == "rope")
        fill = -100 if name == "labels" else 0
        want = gather(value, keep, plane - row, plane, fill) if name != "kv" else gather(value, keep, 0, plane)
        found = to(getattr(got, name), "cpu")
        same(found, want)
        assert _all_contiguous(found)


def _all_contiguous(x):
    return all(map(_all_contiguous, x)) if isinstance(x, list | tuple) else x.is_contiguous()


def position_ids(b, keep, mode):
    """The two renumbering modes in plain Python."""
    new = torch.zeros_like(keep)
    for i, real in enumerate(b.real):
        vision = sorted(r for s in b.segments[i] for r in s)
        text = [r for r in real if r not in set(vision)]
        group = {r: j for j, r in enumerate([*vision, *text])}
        flat, out = (keep, new) if b.packed else (keep[i], new[i])
        mine = [j for j, r in enumerate(flat.tolist()) if r in real and r >= 0]
        for n, j in enumerate(mine):
            out[j] = n if mode == "compacted" else group[int(flat[j])]
    return new


def exact(prev, cur, metric):
    """The definition, in float64."""
    a, b = prev.double(), cur.double()
    if metric == "l2":
        return (b - a).square().sum(-1).sqrt()
    if metric == "l1":
        return (b - a).abs().sum(-1)
    product = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(product == 0, 1.0, 1 - (a * b).sum(-1) / torch.where(product == 0, 1.0, product))


def eager(prev, cur, metric):
    """The same by PyTorch's own float32 ops."""
    a, b = prev.float(), cur.float()
    if metric == "cosine":
        return 1 - F.cosine_similarity(a, b, dim=-1)
    return torch.linalg.vector_norm(b - a, ord={"l2": 2, "l1": 1}[metric], dim=-1)
