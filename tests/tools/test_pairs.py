"""The cases that tests run on by default hold every pair of values, and every combination of the parameters named together."""

from __future__ import annotations

import itertools
import math

import pytest
from support.pairs import all_pairs

SIZES = [(2, 2), (5,), (6, 6, 5, 3, 2), (23, 7, 2), (3, 3, 3, 3, 3, 3, 3), (11, 5, 4), (1, 4, 1, 9), (2,) * 12]


def axes(sizes):
    return [[f"{i}.{j}" for j in range(n)] for i, n in enumerate(sizes)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_pair_is_there(sizes):
    given = axes(sizes)
    cases = all_pairs(given)
    assert len(cases) == len(set(cases)) <= math.prod(sizes)
    for case in cases:
        assert all(value in values for value, values in zip(case, given, strict=True))
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(given[i], given[j]))
    assert cases == all_pairs(given)


@pytest.mark.parametrize(("sizes", "most"), [((6, 6, 5, 3, 2), 48), ((23, 7, 2), 161), ((3,) * 7, 20), ((2,) * 12, 12)], ids=str)
def test_the_cases_are_few(sizes, most):
    """The two largest axes make the lower bound; a greedy cover of equal axes needs a few more."""
    assert len(all_pairs(axes(sizes))) <= most


def test_one_axis_and_empty_axes():
    assert all_pairs([[1, 2, 3]]) == [(1,), (2,), (3,)]
    assert all_pairs([[1, 2], [], [3]]) == []
    assert all_pairs([]) == [()]


def test_equal_values_are_told_apart_by_their_place():
    assert len(all_pairs([[0, 0], [1, 1], [2]])) == 4


def test_axes_named_together_occur_in_every_combination():
    given = axes((3, 4, 3, 2, 5))
    cases = all_pairs(given, together=(3, 0, 2))
    assert {(case[3], case[0], case[2]) for case in cases} == set(itertools.product(given[3], given[0], given[2]))
    assert len(cases) <= 24 < math.prod(map(len, given))
    for i, j in itertools.combinations(range(5), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(given[i], given[j]))
