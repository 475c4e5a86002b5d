"""Calls with a ragged plan of their own for every seed, for tests of what happens between them."""

from __future__ import annotations

import itertools
import random

import v2drop_kernels as vk
from v2drop_kernels.core import calls

B, N, D = 2, 24, 8


def _shuffled(items):
    return random.Random(0).sample(items, len(items))


_FOURS = _shuffled(list(itertools.combinations(range(N + 1), 4)))
_PAIRS = _shuffled(list(itertools.combinations(range(N + 1), 2)))
_CUTS = _shuffled(list(itertools.combinations(range(1, B * N), 2)))


def padded(seed, **options):
    """Two spans in the first item and one in the second, somewhere; different for each of 12650 seeds."""
    (a, b, c, d), second = _FOURS[seed % len(_FOURS)], _PAIRS[seed % len(_PAIRS)]
    return vk.TokenLayout.padded([[(a, b), (c, d)], [second]], N, **options)


def packed(seed):
    """Three items of the rows of the batch, wholly droppable but for their first row; with budget(), different for 11891 seeds."""
    cu = [0, *_CUTS[seed % len(_CUTS)], B * N]
    return vk.TokenLayout.packed([(1, b - a) if b - a > 1 else () for a, b in zip(cu[:-1], cu[1:], strict=True)], cu)


def budget(seed):
    """What a span of a packed layout keeps."""
    return 1 + seed // len(_CUTS) % 11


def layout_of(call, seed):
    """The layout that a call makes of a seed; it may be given in the place of the seed, as torch.compile needs it."""
    if call is drop_packed:
        return packed(seed)
    return padded(seed, padding_side="left" if call is drop_padded and seed % 2 else "right")


def _layout(call, seed):
    return layout_of(call, seed) if isinstance(seed, int) else seed


def drop_padded(seed, prev, cur, backend):
    """A padded drop with a cache and a mask."""
    extra = {"kv": [cur[:, None]], "attention_mask": cur[..., 0]}
    got = vk.drop_tokens(prev, cur, [2, 1, 3], droppable=_layout(drop_padded, seed), backend=backend, **extra)
    return got.keep, got.hidden, got.kv[0], got.attention_mask


def drop_packed(seed, prev, cur, backend):
    """A packed drop, with the offsets of its result."""
    layout, k = _layout(drop_packed, seed), budget(seed) if isinstance(seed, int) else 3
    got = vk.drop_tokens(prev.flatten(0, 1), cur.flatten(0, 1), [k] * layout.groups, droppable=layout, backend=backend)
    return got.keep, got.hidden, got.cu_seqlens


def topk(seed, prev, cur, backend):
    """The best of every span, by score."""
    return tuple(vk.variation_topk(prev, cur, [2, 1, 3], droppable=_layout(topk, seed), order="score", backend=backend))


CALLS = (drop_padded, drop_packed, topk)


def all_three(prev, cur, backend):
    """One call of each with its first plan, as one list of results: what a graph captures."""
    return [x for call in CALLS for x in call(0, prev, cur, backend)]


def other_plans(first, last, prev, cur, backend):
    """Calls of each kind in turn, every one with a plan that no other seed has."""
    for seed in range(first + 1, last + 1):
        CALLS[seed % len(CALLS)](seed, prev, cur, backend)


def forget_plans():
    """Forget the plans of calls that were made without their launches: nothing wrote the tables that are kept with them."""
    calls._cached_drop_plan.cache_clear()
    calls._cached_topk_plan.cache_clear()
