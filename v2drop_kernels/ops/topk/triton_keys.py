"""Keys, thresholds and places: what the select kernels and the gather share.

Scores become signed integers of the same order. T = k-th largest key is found by bisection between the smallest and the
largest key, ending as soon as a threshold keeps exactly k; R = k - #{key > T} of the keys equal to T still fit. With
g_i = #{j <= i: key_j > T} and e_i = #{j <= i: key_j = T}, row i is kept if key_i > T, or key_i = T and e_i <= R, and
g_i + min(e_i, R) rows are kept up to it: one scan places every survivor. No histogram, no candidate buffer: nothing overflows.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORCED = tl.constexpr(0x7FFFFFFF)  # kept before any score
NAN = tl.constexpr(0x7FFFFFFE)  # above +inf
EXCLUDED = tl.constexpr(-0x80000000)  # below -inf; also lanes outside the segment

# Steps of a bisection after which both ends move on to the next real key. Few distinct values (scores of bfloat16, many ties)
# then end it at once, where halving the gap between two of them takes up to 30 steps. Random scores need 9.6 steps in the mean
# at N = 576 and 13.8 at 6272, so they pay for one such move or none.
ROUNDS_BETWEEN_REAL_KEYS = tl.constexpr(12)


@triton.jit
def score_keys(score):
    """Signed int32 of the same order as the scores; -0.0 equals 0.0, every NaN is the largest."""
    score = score.to(tl.float32)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN)


@triton.jit
def key_scores(keys):
    """The float32 scores that have these keys; a NaN or zero comes back as the one that its key stands for."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(scores, scores_r, mask, mask_r, at, inside, FORCE: tl.constexpr):
    """Keys of the rows ``at``, from scores or, as int32, as the score kernel stored them.

    Rows that the mask takes out of the competition are forced in or excluded; the score kernel has done that to its keys.
    """
    if scores.dtype.element_ty == tl.int32:
        return tl.load(scores + at.to(tl.int64) * scores_r, mask=inside, other=EXCLUDED)
    keys = score_keys(tl.load(scores + at.to(tl.int64) * scores_r, mask=inside, other=0.0))
    if mask is not None:
        competes = tl.load(mask + at.to(tl.int64) * mask_r, mask=inside, other=0) != 0
        keys = tl.where(competes, keys, FORCED if FORCE else EXCLUDED)
    return tl.where(inside, keys, EXCLUDED)


@triton.jit
def _middle(low, high):
    """Mean of two int32, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _narrow(low, high, at, count, k):
    """One step of the bisection: ``count`` keys are at least ``at``."""
    new_low = tl.where(count >= k, at, low)
    new_high = tl.where(count > k, high, tl.where(count == k, at, at - 1))
    return new_low, new_high


@triton.jit
def threshold(keys, k):
    """``(T, R, k)`` of keys in registers; k comes back smaller if fewer keys take part."""
    present = tl.sum((keys > EXCLUDED).to(tl.int32))
    k = tl.minimum(k.to(tl.int32), present)
    low = tl.min(tl.where(keys > EXCLUDED, keys, FORCED))
    high = tl.where(present == k, low, tl.max(keys))
    rounds = k * 0
    while low < high:
        at = _middle(low, high)
        low, high = _narrow(low, high, at, tl.sum((keys >= at).to(tl.int32)), k)
        rounds += 1
        if rounds % ROUNDS_BETWEEN_REAL_KEYS == 0:
            low = tl.min(tl.where(keys >= low, keys, FORCED))
            high = tl.max(tl.where(keys <= high, keys, EXCLUDED))
    return low, k - tl.sum((keys > low).to(tl.int32)), k


@triton.jit
def _extremes(
    scores, scores_r, mask, mask_r, n, low, high, FORCE: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Over all n keys: the smallest that is at least ``low``, the largest that is at most ``high``, and how many take part."""
    lanes = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]  # [DEPTH, LANES]
    smallest = tl.full([LANES], FORCED, tl.int32)
    largest = tl.full([LANES], EXCLUDED, tl.int32)
    count = tl.zeros([LANES], tl.int32)
    first = n * 0
    while first < n:
        keys = load_keys(scores, scores_r, mask, mask_r, first + lanes, first + lanes < n, FORCE)
        smallest = tl.minimum(smallest, tl.min(tl.where(keys >= low, keys, FORCED), axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(keys <= high, keys, EXCLUDED), axis=0))
        count += tl.sum((keys > EXCLUDED).to(tl.int32), axis=0)
        first += DEPTH * LANES
    return tl.min(smallest), tl.max(largest), tl.sum(count)


@triton.jit
def threshold_chunked(
    scores, scores_r, mask, mask_r, n, k, FORCE: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The same for any n: each pass over the keys (in L2 by now) counts three thresholds, so it makes two steps.

    Lane l reads the keys l, l + LANES, ...; DEPTH of them at a time, which share one counter per threshold.
    """
    lanes = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]  # [DEPTH, LANES]
    low, high, present = _extremes(scores, scores_r, mask, mask_r, n, EXCLUDED + 1, FORCED, FORCE, DEPTH, LANES)
    k = tl.minimum(k.to(tl.int32), present)
    high = tl.where(present == k, low, high)
    rounds = k * 0
    while low < high:
        at = _middle(low, high)
        at_below = _middle(low, at - 1)
        at_above = _middle(at, high)
        count = tl.zeros([LANES], tl.int32)
        count_below = tl.zeros([LANES], tl.int32)
        count_above = tl.zeros([LANES], tl.int32)
        first = n * 0
        while first < n:
            keys = load_keys(scores, scores_r, mask, mask_r, first + lanes, first + lanes < n, FORCE)
            count += tl.sum((keys >= at).to(tl.int32), axis=0)
            count_below += tl.sum((keys >= at_below).to(tl.int32), axis=0)
            count_above += tl.sum((keys >= at_above).to(tl.int32), axis=0)
            first += DEPTH * LANES
        enough = tl.sum(count)
        low, high = _narrow(low, high, at, enough, k)
        if low < high:
            at = tl.where(enough >= k, at_above, at_below)
            low, high = _narrow(low, high, at, tl.sum(tl.where(enough >= k, count_above, count_below)), k)
        rounds += 2
        if (rounds % ROUNDS_BETWEEN_REAL_KEYS == 0) & (low < high):
            low, high, _ = _extremes(scores, scores_r, mask, mask_r, n, low, high, FORCE, DEPTH, LANES)
    count = tl.zeros([LANES], tl.int32)
    first = n * 0
    while first < n:
        keys = load_keys(scores, scores_r, mask, mask_r, first + lanes, first + lanes < n, FORCE)
        count += tl.sum((keys > low).to(tl.int32), axis=0)
        first += DEPTH * LANES
    return low, k - tl.sum(count), k


@triton.jit
def kept_up_to(keys, t, quota, above, equal):
    """Of each row: whether it is kept, and how many are up to it; then the counts ``above`` and ``equal`` carried on.

    One scan of both counts, 16 bits each: a block has at most 8192 keys.
    """
    is_above = keys > t
    is_equal = keys == t
    counts = tl.cumsum(is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16), axis=0)
    g = above + (counts & 0xFFFF)
    e = equal + (counts >> 16)
    kept = is_above | (is_equal & (e <= quota))
    return kept, g + tl.minimum(e, quota), tl.max(g), tl.max(e)
