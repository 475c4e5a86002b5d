"""The merge kernels, compiled for real targets without a GPU, exactly as their launchers would."""

from __future__ import annotations

import pytest
import torch
from support.compiled import SM90, compile_for, every_target, hidden, recorded, specialize

from v2drop_kernels.ops.weighted_merge.triton import row_dots, weighted_merge

pytestmark = pytest.mark.compile_only
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def lists(n: int, k: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty(1, k + 1, dtype=torch.int64), torch.empty(1, count, dtype=torch.int64), torch.empty(1, count)


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("weighted", "mean"), [(True, False), (True, True), (False, False), (False, True)])
def test_weighted_merge(target, dtype, weighted, mean):
    offsets, rows, weights = lists(576, 64, 2112)
    with recorded(target) as launches:
        weighted_merge(hidden(576, 4096, dtype), offsets, rows, weights if weighted else None, mean)
    assert [x.name for x in launches] == ["weighted_merge_fwd"]
    assert launches[0].programs == 64 * 8
    compiled = compile_for(target, launches[0])
    if target.backend == "cuda":
        # Rows move by 16 bytes (a program stores 512 columns: 4 of 2 bytes per thread are 8). Narrower are the lists.
        assert "128" in compiled.accesses("LDG")
        assert set(compiled.accesses("STG")) <= {"128", "64"}


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_dots(target, dtype):
    _, rows, _ = lists(576, 64, 2112)
    with recorded(target) as launches:
        row_dots(hidden(576, 4096, dtype), hidden(64, 4096, torch.float32), rows, rows)
    assert [x.name for x in launches] == ["row_dots"]
    compiled = compile_for(target, launches[0])
    if target.backend == "cuda":
        assert "128" in compiled.accesses("LDG")


@every_target
def test_odd_widths(target):
    """D = 577 has no aligned rows, and D = 1 is that of sums of weights."""
    for d in (577, 1):
        offsets, rows, weights = lists(50, 7, 90)
        with recorded(target) as launches:
            weighted_merge(hidden(50, d), offsets, rows, weights, True)
            row_dots(hidden(50, d), hidden(7, d), rows, rows)
        for item in launches:
            compile_for(target, item)


def test_new_lengths_do_not_recompile():
    sources = []
    for n, k, count in ((576, 64, 640), (577, 65, 641), (1000, 1, 16)):
        offsets, rows, weights = lists(n, k, count)
        with recorded(SM90) as launches:
            weighted_merge(hidden(n), offsets, rows, weights, False)
            row_dots(hidden(n), hidden(k), rows, rows)
        sources.append([specialize(SM90, x)[0].hash() for x in launches])
    assert sources[0] == sources[1] == sources[2]
