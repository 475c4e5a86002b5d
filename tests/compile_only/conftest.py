"""Which target a kernel is compiled for: every one with V2DROP_TEST_FULL=1.

By default a test with one case takes sm_90 and one of the other targets. Of a test with several cases the first, third, ... are
compiled for sm_90, those between them for the other targets in turn. A CUDA source is compiled for sm_90, whose result other
tests read too, and for one of the other architectures in turn.
"""

from __future__ import annotations

import collections

import pytest
from support.cases import FULL

TARGETS = {"target", "arch"}  # the parameter of Triton kernels, and of CUDA sources
ALWAYS = {"sm90", "90"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the targets whose turn it is not."""
    if FULL:
        return
    tests: dict[tuple[str, str], dict[tuple[object, ...], list[pytest.Item]]]
    tests = collections.defaultdict(lambda: collections.defaultdict(list))
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.keys() & TARGETS:
            case = tuple(sorted((name, str(value)) for name, value in callspec.params.items() if name not in TARGETS))
            tests[item.location[0], item.originalname][case].append(item)
    chosen, turn = set(), 0
    for cases in tests.values():
        for i, alike in enumerate(cases.values()):
            others = [item for item in alike if not ALWAYS & set(item.callspec.id.split("-"))]
            both = len(cases) == 1 or "arch" in alike[0].callspec.params
            if i % 2 == 0 or both:
                chosen.update(item for item in alike if item not in others)
            if i % 2 == 1 or both:
                chosen.add(others[turn % len(others)])
                turn += 1
    left_out = {item for cases in tests.values() for alike in cases.values() for item in alike} - chosen
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
