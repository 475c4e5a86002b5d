"""A small set of test cases that holds every pair of values of any two parameters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def all_pairs(axes: Sequence[Sequence[Any]], together: Sequence[int] = ()) -> list[tuple[Any, ...]]:
    """Cases, one value per axis, in which every two values of two different axes occur together at least once.

    The axes numbered in ``together`` occur in every combination of their values as well. Greedy and deterministic: a case begins
    with such a combination, later with the first pair that no case holds yet; every further axis takes the value that adds most new
    pairs, and among those the one used least. Two axes give their full product, one axis its values.
    """
    if len(axes) < 2 or not all(axes):
        return list(itertools.product(*axes))
    numbers = [range(len(values)) for values in axes]
    combinations = list(itertools.combinations(range(len(axes)), 2))
    # A dict keeps the order, so that every process makes the same cases.
    missing = {(a, x, b, y): None for a, b in combinations for x, y in itertools.product(numbers[a], numbers[b])}
    used = [[0] * len(values) for values in axes]
    cases = []

    def add(chosen: dict[int, int]) -> None:
        for axis in sorted(set(range(len(axes))) - set(chosen), key=lambda i: -len(axes[i])):
            gain = [sum(_pair(axis, value, *other) in missing for other in chosen.items()) for value in numbers[axis]]
            chosen[axis] = max(numbers[axis], key=lambda value: (gain[value], -used[axis][value], -value))
        for a, b in combinations:
            missing.pop((a, chosen[a], b, chosen[b]), None)
        for axis, value in chosen.items():
            used[axis][value] += 1
        cases.append(tuple(axes[i][chosen[i]] for i in range(len(axes))))

    for values in itertools.product(*(numbers[axis] for axis in together)) if together else ():
        add(dict(zip(together, values, strict=True)))
    while missing:
        a, x, b, y = next(iter(missing))
        add({a: x, b: y})
    return cases


def _pair(a: int, x: int, b: int, y: int) -> tuple[int, int, int, int]:
    return (a, x, b, y) if a < b else (b, y, a, x)
