"""What several threads bring on a CPU: ``bench/run.py --suite threads``.

Both sides run in bursts of calls, with a pause before each: the threads of torch's OpenMP look for work for milliseconds after a
call, on the processors that the other side's threads need.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from harness import ALL_CORES, available_memory
from providers import providers
from registry import CASES, Case, inputs_of, moved_bytes, rotated, settings
from targets import Call, Target, _available, _memcpy, _other
from verify import verified

BURST, CALLERS = 8, 4
LARGE = 64 << 20  # bytes

Sides = Callable[[Target[Case]], tuple[str, Call, str, Call]]


def targets(dry: bool = False) -> Iterator[Target[Case]]:
    """The targets of all processors; none where there is only one."""
    if ALL_CORES == 1:
        return
    image, tiny = (Case(1, 33, 64), Case(1, 33, 64)) if dry else (CASES[0], Case(1, 64, 64))

    def target(name: str, op: str, case: Case, limit: float, sense: str, sides: Sides) -> Target[Case]:
        return Target(name, op, case, limit, sense, sides, ALL_CORES, BURST)

    yield target("drop_tokens over one thread, in cache", "drop", image, 1.3, "at least", _threads(ALL_CORES, 1))
    most = 4 * ALL_CORES
    yield target("drop_tokens with four threads a processor against one", "drop", image, 1.2, "at most", _threads(most, ALL_CORES))
    yield target(f"drop_tokens by {CALLERS} callers against one thread each", "drop", image, 1.2, "at most", _callers)
    yield target("drop_tokens of few tokens against one thread", "drop", tiny, 1.1, "at most", _threads(ALL_CORES, 1))
    yield target("selection against eager PyTorch", "select", image, 1.0, "at most", _other("eager"))
    for case in (image,) if dry else CASES:
        if 8 * case.input_bytes > available_memory():  # as in the suite
            continue
        for mode in (mode for threads, mode in settings("drop", case) if threads == ALL_CORES):
            yield target(f"drop_tokens over torch.compile, {mode}", "drop", case, 1.0, "at least", _compiled(mode))
        if dry or moved_bytes("drop", case) >= LARGE:
            yield target("drop_tokens against torch's copy of the same bytes", "drop", case, 1.1, "at most", _memcpy)


def _native(target: Target[Case]) -> Call:
    inputs, _ = inputs_of(target.case)
    call = verified(target.op, _available(providers(target.op)["native"], target.case), target.case)
    return lambda: call(inputs)


def _with(threads: int, call: Call, restored: int) -> Call:
    def run() -> None:
        torch.set_num_threads(threads)
        call()
        torch.set_num_threads(restored)

    return run


def _threads(threads: int, other: int) -> Sides:
    """This package with some threads beside the same with others."""

    def sides(target: Target[Case]) -> tuple[str, Call, str, Call]:
        ours, as_before = _native(target), target.threads
        return f"{threads} threads", _with(threads, ours, as_before), f"{other} threads", _with(other, ours, as_before)

    return sides


def _callers(target: Target[Case]) -> tuple[str, Call, str, Call]:
    """Several callers at once, each of which may use all processors, beside the same where each has its own thread only."""
    ours, callers = _native(target), ThreadPoolExecutor(CALLERS)

    def together(threads: int) -> Call:
        def one(_: int) -> None:
            torch.set_num_threads(threads)  # of the calling thread
            for _ in range(4):
                ours()

        return lambda: list(callers.map(one, range(CALLERS)))

    return f"{ALL_CORES} threads", together(ALL_CORES), "1 threads", together(1)


def _compiled(mode: str) -> Sides:
    """As in the suite: ``cold`` rotates the inputs, ``warm`` repeats them."""

    def sides(target: Target[Case]) -> tuple[str, Call, str, Call]:
        if mode == "warm":
            return _other("compile-out")(target)
        ours, other = (
            verified(target.op, _available(providers(target.op)[name], target.case), target.case)
            for name in ("native", "compile-out")
        )
        turn = itertools.cycle(rotated(target.op, target.case))  # of both sides, so that neither finds what the other has read
        return "native", lambda: ours(next(turn)), "compile-out", lambda: other(next(turn))

    return sides
