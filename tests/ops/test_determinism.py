"""The same bits every time: 100 runs, any number of threads, and several callers at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.cases import BATCHES, METRICS, companions, cross, every_op, fewer, normal, random_bytes, same, to

import v2drop_kernels as vk

RUNS = fewer([100], [5])[0]
N, D = fewer([1500], [100])[0], fewer([1000], [50])[0]


@cross(metric=METRICS)
def test_every_run_gives_the_same_bits(on, metric):
    prev, cur = (
        normal((2, 90, 64), torch.bfloat16, "a").to(on.device),
        normal((2, 90, 64), torch.bfloat16, "b").to(on.device),
    )
    first = [x.clone() for x in every_op(on, prev, cur, metric, k=30)]
    for _ in range(RUNS):
        same(every_op(on, prev, cur, metric, k=30), first)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.backends("reference", "cpu")
@cross(metric=METRICS, dtype=[torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(on, metric, dtype, threads):
    """Each row is summed by one thread in one order, whatever the number of threads; large enough for all to have
    work."""
    prev, cur = normal((2, N, D), dtype, "a"), normal((2, N, D), dtype, "b")
    threads(1)
    first = every_op(on, prev, cur, metric)
    for n in (2, 3, 8):
        threads(n)
        same(every_op(on, prev, cur, metric), first)


def test_the_batch_changes_no_bit_of_a_row(on):
    """A row's score does not depend on what else is in the batch, nor on where it lies."""
    prev, cur = (
        normal((3, 67, 130), torch.bfloat16, "a").to(on.device),
        normal((3, 67, 130), torch.bfloat16, "b").to(on.device),
    )
    for metric in METRICS:
        whole = vk.variation_score(prev, cur, metric=metric, backend=on.backend)
        for i, j in ((0, 0), (1, 33), (2, 66)):
            one = vk.variation_score(prev[i : i + 1, j : j + 1], cur[i : i + 1, j : j + 1], metric=metric, backend=on.backend)
            same(one[0, 0].reshape(1), whole[i, j].reshape(1))


@pytest.mark.backends("reference", "cpu")
def test_concurrent_calls_do_not_disturb_each_other(on):
    """Eight Python threads at once: scratch memory and thread pools belong to a call, not to the process."""
    inputs = [
        (normal((1, 300 + i, 96), torch.bfloat16, i, "a"), normal((1, 300 + i, 96), torch.bfloat16, i, "b")) for i in range(8)
    ]

    def job(i):
        torch.set_num_threads(1 + i % 3)
        return every_op(on, *inputs[i % 8], METRICS[i % 3], k=50)

    want = [job(i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(job, range(24)), want, strict=True):
            same(got, expected)


@cross(b=[BATCHES[6], BATCHES[9], BATCHES[11], BATCHES[16]])
def test_ragged_batches_give_the_same_bits(on, b):
    hidden, given = random_bytes((*b.lead, 8), torch.bfloat16, "h").to(on.device), companions(b, device=on.device)
    x = torch.zeros(b.lead, device=on.device)  # all tie: the order must come from the rows alone
    run = lambda: vk.drop_tokens(None, hidden, b.k("n/3"), scores=x, backend=on.backend, **b.arguments(on.device), **given)
    first = to([run().keep, run().hidden, *run().kv[0]], "cpu")
    for _ in range(RUNS // 5):
        got = run()
        same(to([got.keep, got.hidden, *got.kv[0]], "cpu"), first)
