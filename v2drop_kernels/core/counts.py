"""Ratios to counts: the one place where a share of tokens becomes a number of tokens."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

from .arguments import one_of, shown


def n_keep(n: int, ratio: float, rounding: str = "floor", at_least: int = 0) -> int:
    """Turn a keep ratio into a count. Every ratio in this package is converted here.

    Parameters
    ----------
    n : int
        Tokens in the segment.
    ratio : float
        Share that is kept, in [0, 1]. A float is read as the simplest fraction that rounds to it, so 0.29 is 29/100, ``1 / 3``
        a third and ``64 / 576`` a ninth: ``n_keep(100, 0.29)`` is 29, although ``int(100 * 0.29)`` is 28.
    rounding : {"floor", "round", "ceil"}
        ``"round"`` sends halves to the even count, as Python's ``round``.
    at_least : int
        Lower bound of the result, itself bounded by ``n``. The released V2Drop code keeps one token at "drop 100 %":
        ``at_least=1``.

    Returns
    -------
    int
        The number of tokens to keep, ``0 <= result <= n``.

    Raises
    ------
    ValueError
        ``n`` or ``at_least`` is not an int >= 0, ``ratio`` lies outside [0, 1], or ``rounding`` is unknown.

    Examples
    --------
    >>> n_keep(576, 0.28), n_keep(576, 64 / 576), n_keep(576, 0.0, at_least=1)
    (161, 64, 1)
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be an int >= 0, got {shown(n)}")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float | Fraction) or not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be a number in [0, 1], got {shown(ratio)}")
    if isinstance(at_least, bool) or not isinstance(at_least, int) or at_least < 0:
        raise ValueError(f"at_least must be an int >= 0, got {shown(at_least)}")
    ways: dict[str, Any] = {"floor": math.floor, "round": round, "ceil": math.ceil}
    one_of("rounding", rounding, tuple(ways))
    return min(n, max(at_least, ways[rounding](n * _fraction(ratio))))


@functools.lru_cache(maxsize=1024)
def _fraction(ratio: float | Fraction) -> Fraction:
    """The ratio itself, or of the fractions that round to a float the one with the smallest denominator."""
    if not isinstance(ratio, float):
        return Fraction(ratio)
    exact = Fraction(ratio)
    low, high = ((exact + Fraction(math.nextafter(ratio, to))) / 2 for to in (-1.0, 2.0))
    return exact if ratio == 0 else _simplest(low, high)


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction between two positive ones with the smallest denominator, from their continued fractions."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    below = whole - 1
    return below + 1 / _simplest(1 / (high - below), 1 / (low - below))
