"""Targets that are no ratio of times: replays that differ, memory, host time, launches."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_inputs import BF16, IMAGE, LONG, QUARTER, scaled
from gpu_timer import HostTimer
from registry import Case

import v2drop_kernels as vk


class Trial(NamedTuple):
    """A target on one own backend by itself: ``run(backend, timer, tiny)`` gives its value."""

    number: str
    text: str
    op: str
    sense: str
    limit: float
    unit: str
    run: Callable[[str, HostTimer, Callable[[Case], Case]], float]


def _step(backend: str, case: Case, timer: HostTimer, **given: Any) -> Callable[[], Any]:
    h_prev, h_cur = scaled(case, timer)
    return functools.partial(vk.drop_tokens, h_prev, h_cur, case.k, backend=backend, **given)


def repeated(backend: str, timer: HostTimer, tiny: Callable[[Case], Case]) -> float:
    """Replays, of 100, whose results differ in a bit from the first."""
    case = tiny(Case(2, 1500, 1000, QUARTER))
    step, found = _step(backend, case, timer), []
    run = timer.graph([lambda: found.append(step())], 1)  # a capture's own results come last
    first, differing = None, 0
    for _ in range(5 * timer.calls):
        run()
        timer.synchronize()
        now = [found[-1].keep, found[-1].hidden]
        first = first or [t.clone() for t in now]
        differing += not all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
    return differing


def relengthed(backend: str, timer: HostTimer, tiny: Callable[[Case], Case]) -> float:
    """Wrong results of one captured graph when the lengths change on the device."""
    case = tiny(Case(1, 900, 512, QUARTER))
    n = case.n
    # Small integers: every order of summation gives the same scores, many of which tie.
    h_prev, h_cur = torch.randint(-3, 4, (2, n, case.d), device=timer.device).to(case.dtype)
    ks = [max(n // 9, 1), 0, max(n // 7, 1)]
    offsets = torch.tensor([0, n // 3, n // 2, n], dtype=torch.int32, device=timer.device)
    found: list[Any] = []
    step = functools.partial(vk.drop_tokens, h_prev, h_cur, ks, cu_seqlens=offsets, backend=backend)
    run = timer.graph([lambda: found.append(step())], 1)
    wrong = 0
    for cu in ([0, n // 3, n // 2, n], [0, n // 2, n // 2, n], [0, 3, 4, n], [0, 0, 0, n]):
        offsets.copy_(torch.tensor(cu, dtype=torch.int32))
        run()
        timer.synchronize()
        want = vk.drop_tokens(h_prev, h_cur, ks, cu_seqlens=cu, backend="reference")
        used = len(want.keep)
        wrong += not (torch.equal(found[-1].keep[:used], want.keep) and torch.equal(found[-1].hidden[:used], want.hidden))
    return wrong


def memory(backend: str, timer: HostTimer, tiny: Callable[[Case], Case]) -> float:
    """Bytes per token at the peak, beyond the outputs."""
    case = tiny(LONG)
    return timer.extra_bytes(_step(backend, case, timer)) / (case.batch * case.n)


def host(backend: str, timer: HostTimer, tiny: Callable[[Case], Case]) -> float:
    """Microseconds that the host spends on one call: the median of batches of calls."""
    count = 10 * timer.calls
    run = timer.eager([_step(backend, tiny(Case(1, 64, 4096, QUARTER)), timer)], count)
    return statistics.median(timer.host_seconds(run) for _ in range(timer.rounds)) / count * 1e6


def launches(case: Case, backend: str, timer: HostTimer, tiny: Callable[[Case], Case]) -> float:
    return len(timer.launches(_step(backend, tiny(case), timer)))


def more_launches(backend: str, timer: HostTimer, tiny: Callable[[Case], Case]) -> float:
    """Launches that K and V of eight layers add."""
    case = tiny(IMAGE)
    kv = [torch.randn(case.batch, 4, case.n, 128, device=timer.device).to(BF16) for _ in range(16)]
    return len(timer.launches(_step(backend, case, timer, kv=kv))) - len(timer.launches(_step(backend, case, timer)))
