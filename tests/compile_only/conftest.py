"""By default a kernel is compiled for sm_90 and for one of the other targets, in turn; V2DROP_TEST_FULL=1 takes every target."""

from __future__ import annotations

import collections

import pytest
from support.cases import FULL

ALWAYS = "sm90"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the targets whose turn it is not."""
    if FULL:
        return
    cases: dict[tuple[object, ...], list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "target" in callspec.params:
            others = tuple(sorted((name, str(value)) for name, value in callspec.params.items() if name != "target"))
            cases[item.location[0], item.originalname, others].append(item)
    left_out = set()
    for turn, alike in enumerate(cases.values()):
        others = [item for item in alike if ALWAYS not in item.callspec.id.split("-")]
        left_out.update(item for i, item in enumerate(others) if i != turn % len(others))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
