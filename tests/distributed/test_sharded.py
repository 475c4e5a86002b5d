"""v2drop_kernels.distributed in groups of 2, 3 and 4 gloo processes, and its parts that need no process group."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import outcomes

from v2drop_kernels.distributed import Sharding, segmented_topk

CHECKS = (
    "check_topk", "check_drop", "check_stages", "check_gradients", "check_counts", "check_disagreement", "check_absent_rank",
    "check_compiled",
)  # fmt: skip


@functools.cache
def of_world(world):
    return outcomes(world, "distributed.sharded_checks", CHECKS if world == 2 else [x for x in CHECKS if x != "check_compiled"])


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("check", CHECKS)
def test_sharded(world, check):
    if check in of_world(world):  # compilation is checked in one world
        for rank, outcome in enumerate(of_world(world)[check]):
            assert outcome == "ok", f"rank {rank}: {outcome}"


def test_shardings():
    assert Sharding.zigzag([3, 4]).ranges == (((0, 2), (6, 7)), ((2, 4), (4, 6)))
    assert Sharding.even(7, 3).sizes == (3, 2, 2)
    for kind in ("contiguous", "zigzag"):
        for rows in range(9):
            even = Sharding.even(rows, 3, kind)
            assert sorted(i for own in even.ranges for a, b in own for i in range(a, b)) == list(range(rows))
            assert max(even.sizes) - min(even.sizes) <= 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sharding((((0, 2),), ((3, 4),))), "every row of the sequence once"),
        (lambda: Sharding.contiguous([2, -1]), r"sizes\[1\] must be >= 0"),
        (lambda: Sharding.contiguous([]), "one entry per rank"),
        (lambda: Sharding.even(4, 0), "ranks must be at least 1"),
        (lambda: Sharding.even(4, 2, "striped"), "kind must be one of"),
    ],
)
def test_wrong_shardings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_without_a_process_group():
    with pytest.raises(ValueError, match="group must be given"):
        segmented_topk(None, 3)


def test_the_example_runs():
    """DeepSpeed-Ulysses with a drop; it compares with one process itself."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "examples.sequence_parallel"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "96 rows on 2 ranks became 44, as on one process" in ran.stdout
