"""Calls with a ragged plan of their own for every seed, for tests of what happens between them."""

from __future__ import annotations

import random

import v2drop_kernels as vk

B, N, D = 2, 24, 8


def padded(seed, **options):
    """Two spans in the first item and one in the second, somewhere."""
    at = random.Random(seed)
    first, second = sorted(at.sample(range(N + 1), 4)), sorted(at.sample(range(N + 1), 2))
    return vk.TokenLayout.padded([[(first[0], first[1]), (first[2], first[3])], [tuple(second)]], N, **options)


def packed(seed):
    """Three items of the rows of the batch, wholly droppable but for their first row."""
    cuts = sorted(random.Random(seed).sample(range(1, B * N), 2))
    cu = [0, *cuts, B * N]
    return vk.TokenLayout.packed([(1, b - a) if b - a > 1 else () for a, b in zip(cu[:-1], cu[1:], strict=True)], cu)


def drop_padded(seed, prev, cur, backend):
    layout = padded(seed, padding_side="left" if seed % 2 else "right")
    extra = {"kv": [cur[:, None]], "attention_mask": cur[..., 0]}
    got = vk.drop_tokens(prev, cur, [2, 1, 3], droppable=layout, backend=backend, **extra)
    return got.keep, got.hidden, got.kv[0], got.attention_mask


def drop_packed(seed, prev, cur, backend):
    layout = packed(seed)
    k = [2 + seed % 3] * layout.groups
    got = vk.drop_tokens(prev.flatten(0, 1), cur.flatten(0, 1), k, droppable=layout, backend=backend)
    return got.keep, got.hidden, got.cu_seqlens


def topk(seed, prev, cur, backend):
    return tuple(vk.variation_topk(prev, cur, [2, 1, 3], droppable=padded(seed), order="score", backend=backend))
