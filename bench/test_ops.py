"""The ops under pytest-benchmark, to compare two commits or to look at one case: ``python -m pytest bench/test_ops.py``.

Each provider of ``providers.py`` is checked against the reference and timed on one LLaVA image (``--benchmark-compare`` and the
other options of pytest-benchmark apply). Its groups put the providers of an op side by side. `make bench` writes the published
figures: it measures in turns, with cold caches and behind the noise gate, which pytest-benchmark does not.
"""

from __future__ import annotations

import pytest
import torch
from providers import providers
from registry import CASES, OPS, inputs_of
from verify import verified

CASE = CASES[0]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in providers(op)])
def test_op(benchmark, op, name):
    provider = providers(op)[name]
    if why := provider.missing(CASE):
        pytest.skip(why)
    benchmark.group = f"{op}, {CASE}, {torch.get_num_threads()} threads"
    benchmark(verified(op, provider, CASE), inputs_of(CASE)[0])
