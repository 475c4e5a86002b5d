"""TokenDropper with tensor parallelism, DDP and FSDP2: two gloo processes."""

from __future__ import annotations

import functools

import pytest
from support.ranks import outcomes

pytest.importorskip("transformers")

CHECKS = (
    "check_tensor_parallel", "check_group_is_found", "check_tensor_parallel_soft", "check_ilvas", "check_data_parallel",
    "check_average_gradients",
)  # fmt: skip


@functools.cache
def found():
    return outcomes(2, "distributed.model_checks", CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_models(check):
    for rank, outcome in enumerate(found()[check]):
        assert outcome == "ok", f"rank {rank}: {outcome}"
