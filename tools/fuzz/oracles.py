"""What the docstrings of the package say, in NumPy: one row after the other, in float64, without any of its code.

Tensors come as NumPy arrays (bfloat16 widened to float32, which is exact). A *segment* is a list of rows that share a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def best(scores: np.ndarray, rows: Sequence[int], k: int) -> list[int]:
    """The ``k`` first of ``rows`` by: NaN, then the larger score (-0.0 equals 0.0), then the smaller row."""
    return sorted(rows, key=lambda r: (0, 0.0, r) if math.isnan(scores[r]) else (1, -float(scores[r]) + 0.0, r))[:k]


def topk(scores: Sequence[np.ndarray], segments: Sequence[Sequence[int]], ks: Sequence[int], order: str) -> list[list[int]]:
    """The kept rows of every segment; ``scores`` are those that each segment's rows index."""
    found = [best(s, rows, k) for s, rows, k in zip(scores, segments, ks, strict=True)]
    return [sorted(rows) for rows in found] if order == "position" else found


def table(rows: Sequence[Sequence[Any]], fill: Any, dtype: Any, side: str = "right") -> np.ndarray:
    """Ragged lists as one array, filled up to the longest."""
    width = max((len(row) for row in rows), default=0)
    pad = [[fill] * (width - len(row)) for row in rows]
    full = [p + list(row) if side == "left" else list(row) + p for row, p in zip(rows, pad, strict=True)]
    return np.array(full, dtype=dtype).reshape(len(rows), width)


def take(x: np.ndarray, rows: Sequence[int], axis: int, fill: int = 0) -> np.ndarray:
    """Rows of ``x`` along ``axis``; ``fill`` where a row is negative."""
    shape = list(x.shape)
    shape[axis] = len(rows)
    out = np.full(shape, fill, dtype=x.dtype) if fill else np.zeros(shape, dtype=x.dtype)
    source, target = np.moveaxis(x, axis, 0), np.moveaxis(out, axis, 0)
    for j, r in enumerate(rows):
        if r >= 0:
            target[j] = source[r]
    return out


def group_ids(rows: Sequence[int], droppable: set[int]) -> dict[int, int]:
    """ "group" position ids of an item's real rows: the droppable ones from 0, the others after them."""
    vision, text = [r for r in rows if r in droppable], [r for r in rows if r not in droppable]
    return {r: i for i, r in enumerate([*vision, *text])}


def variation(prev: np.ndarray, cur: np.ndarray, metric: str) -> np.ndarray:
    """The definition of the score over the last axis."""
    a, b = prev.astype(np.float64), cur.astype(np.float64)
    if metric == "l2":
        return np.sqrt(np.square(b - a).sum(-1))
    if metric == "l1":
        return np.abs(b - a).sum(-1)
    return 1 - cosine(a, b)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine over the last axis in extended precision; 0 where a vector is zero."""
    a, b = a.astype(np.longdouble), b.astype(np.longdouble)
    scale_a, scale_b = (np.maximum(np.abs(x).max(-1, initial=0, keepdims=True), np.finfo(np.longdouble).tiny) for x in (a, b))
    a, b = a / scale_a, b / scale_b
    product = np.sqrt(np.square(a).sum(-1) * np.square(b).sum(-1))
    return np.where(product == 0, 0.0, (a * b).sum(-1) / np.where(product == 0, 1, product)).astype(np.float64)


def softmax(x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Over the last axis among ``seen``; 0 elsewhere, and everywhere where nothing is seen."""
    if not seen.any():
        return np.zeros_like(x)
    e = np.where(seen, np.exp(np.where(seen, x, 0) - x[seen].max()), 0.0)
    return e / e.sum()


def attention(
    q: np.ndarray,
    k: np.ndarray,
    rows: np.ndarray,
    key_mask: np.ndarray,
    droppable: np.ndarray,
    causal: bool,
    scale: float,
    mode: str,
    heads: str | int,
    queries: str,
) -> tuple[np.ndarray, bool]:
    """``attention_score`` of one item, ``q [H, Q, D]`` and ``k [Hkv, S, D]``; and whether the choice of heads is clear.

    It is not where the totals of a chosen and an unchosen head differ by less than float32 rounding.
    """  # fmt: skip
    per_key, s = q.shape[0] // k.shape[0], k.shape[1]
    each, clear = [], True
    for j, row in enumerate(rows):
        if row < 0:
            continue
        seen = key_mask & (np.arange(s) <= row if causal else np.ones(s, dtype=bool))
        weights = np.zeros((q.shape[0], s))
        for h in range(q.shape[0]):
            logits = k[h // per_key].astype(np.float64) @ q[h, j].astype(np.float64) * scale
            weights[h] = softmax(logits, seen) if mode == "softmax" else np.where(seen, logits, 0.0)
        weights = np.where(droppable, weights, 0.0)
        if heads == "mean":
            each.append(weights.mean(0))
        elif heads == "sum":
            each.append(weights.sum(0))
        elif heads == "max":
            each.append(np.where(seen & droppable, weights.max(0), 0.0))
        else:
            totals = weights.sum(1)
            order = sorted(range(len(totals)), key=lambda h: (-totals[h], h))
            if heads < len(totals):
                gap = totals[order[heads - 1]] - totals[order[heads]]
                clear &= bool(gap > 1e-4 * max(1.0, np.abs(weights).sum()))
            each.append(weights[order[:heads]].mean(0))
    if not each:
        return np.zeros(s), clear
    stacked = np.stack(each)
    return (stacked.mean(0) if queries == "mean" else np.sqrt(np.square(stacked).sum(0))), clear


def soft_mask(scores: np.ndarray, ratio: float, valid: np.ndarray, temperature: float | None) -> np.ndarray:
    """HiDivDrop's soft mask of one item: ``sigmoid(t (c' - a))`` with the normalised rank by value and index."""
    rows = [int(i) for i in np.nonzero(valid)[0]]
    n, out = len(rows), np.zeros(len(scores))
    order = best(scores, rows, n)
    for place, r in enumerate(order):
        x = (n if temperature is None else temperature) * ((n - place) / n - ratio)
        out[r] = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    return out


def weighted_sum(x: np.ndarray, offsets: np.ndarray, rows: np.ndarray, weights: np.ndarray, mean: bool) -> tuple[Any, Any]:
    """``weighted_merge`` of one item, and the sum of the absolute terms of every entry, which bounds the rounding."""
    out, size = np.zeros((len(offsets) - 1, x.shape[1])), np.zeros((len(offsets) - 1, x.shape[1]))
    for j in range(len(offsets) - 1):
        edges = range(int(offsets[j]), int(offsets[j + 1]))
        terms = [weights[e] * x[rows[e]].astype(np.float64) for e in edges]
        total = sum(float(weights[e]) for e in edges)
        if terms:
            out[j], size[j] = sum(terms), sum(np.abs(t) for t in terms)
        if mean:
            out[j], size[j] = (out[j] / total, size[j] / abs(total)) if total else (0.0, 0.0)
    return out, size
