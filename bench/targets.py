"""The asserted ratios: two calls in one process, in turns, one thread, minima, believed only when the machine was quiet.

An attempt takes both calls in turns at least 50 times over at least 2 seconds. It is discarded when the fixed loop beside it
ran more than 10 % off its best before or after. Up to five attempts are made and the first quiet one that passes counts; where
none passes, the best quiet one is shown. Results of both sides were compared with the reference before; a wrong one has no
ratio. The same ratios with all cores are reported and never asserted.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy
import torch
from harness import ALL_CORES, CONDITIONS, LLC, NoiseGate, interleaved, quantile, release_memory, touch
from providers import Provider, providers
from registry import Case, Inputs, inputs_of
from schema import TARGETS
from verify import WrongResult, verified

import v2drop_kernels as vk

Call = Callable[[], Any]
ATTEMPTS, REPETITIONS, SECONDS = 5, 50, 2.0


class Problem(NamedTuple):
    """A case that is no ``registry.Case``: what the table says, the bytes of its inputs, and its sizes."""

    text: str
    input_bytes: int
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.text


class Sized(Protocol):
    """What a target needs to know of its case; ``str`` of it stands in the table."""

    @property
    def input_bytes(self) -> int: ...


C = TypeVar("C", bound=Sized)


@dataclasses.dataclass(frozen=True)
class Target(Generic[C]):
    """One line of the table. ``sides`` builds the two calls, A always this package.

    ``sense`` "at most": A's time over B's is at most the limit. "at least": B's time over A's is at least the limit. "us": the
    time of one call of A, in microseconds, is at most the limit.
    """

    name: str
    op: str
    case: C
    limit: float | None
    sense: str
    sides: Callable[[Target[C]], tuple[str, Call, str, Call]]
    threads: int = 1
    burst: int = 1  # how many calls ``harness.interleaved`` takes in one turn; more than one where threads are compared

    @property
    def asserted(self) -> bool:
        return self.limit is not None and (self.threads == 1 or self.burst > 1)


def dram_case() -> Case:
    """Hidden states that together fill at least four times the last-level cache, or 1.8 GiB where that would be more."""
    n = 16384
    while 2 * n * 3584 * 2 < 4 * LLC and n < 131072:
        n *= 2
    return Case(1, n, 3584)


def targets(dry: bool = False) -> Iterator[Target[Case]]:
    """All targets; in a dry run the same ones on tiny shapes."""
    dram, video, image, tiny = dram_case(), Case(1, 6272, 3584), Case(1, 576, 4096), Case(1, 64, 64, Fraction(1, 4))
    if dry:
        dram = video = image = Case(1, 33, 64)
    for threads in (1, ALL_CORES) if ALL_CORES > 1 else (1,):
        yield Target("score against a read-only sum of the same bytes", "score", dram, 1.0, "at most", _read, threads)
        yield Target("drop_tokens against a memcpy of the same bytes", "drop", dram, 1.10, "at most", _memcpy, threads)
        yield Target("drop_tokens over torch.compile, preallocated", "drop", video, 1.8, "at least", _other("compile-out"), threads)
        yield Target("drop_tokens over plain eager", "drop", video, 4.0, "at least", _other("eager"), threads)
        yield Target("drop_tokens over plain eager, image", "drop", image, 2.0, "at least", _other("eager"), threads)
        if threads == 1:
            yield Target("host overhead of variation_topk", "topk", tiny, 15.0, "us", _overhead)
        for case in (video, image):
            for name in ("eager-out", "eager-out-lean", "v2drop", "compile-out"):
                if case is not video or name != "compile-out":
                    yield Target(f"drop_tokens over {name}", "drop", case, None, "at least", _other(name), threads)
        yield Target("drop_tokens against a memcpy of the same bytes, in cache", "drop", image, None, "at most", _memcpy, threads)


def _ours(target: Target[Case]) -> tuple[Call, Inputs]:
    inputs, _ = inputs_of(target.case)
    call = verified(target.op, _available(providers(target.op)["native"], target.case), target.case)
    return lambda: call(inputs), inputs


class Unavailable(Exception):
    """A side of a target cannot run here."""


def _available(provider: Provider, case: Case) -> Provider:
    why = provider.missing(case)
    if why:
        raise Unavailable(f"{provider.name}: {why}")
    return provider


def _other(name: str) -> Callable[[Target[Case]], tuple[str, Call, str, Call]]:
    def sides(target: Target[Case]) -> tuple[str, Call, str, Call]:
        ours, inputs = _ours(target)
        call = verified(target.op, _available(providers(target.op)[name], target.case), target.case)
        return "native", ours, name, lambda: call(inputs)

    return sides


def fastest(candidates: dict[str, Call]) -> tuple[str, Call]:
    """The fastest baseline of its kind: the minimum of five calls each, taken in turns."""
    times = interleaved(list(candidates.values()), repetitions=5, seconds=0.0)
    name = min(zip(candidates, times, strict=True), key=lambda c: min(c[1]))[0]
    return name, candidates[name]


def _read(target: Target[Case]) -> tuple[str, Call, str, Call]:
    """Read-only passes over both hidden states, each byte once: what a score at the speed of memory would take."""
    ours, x = _ours(target)
    pair = [t.view(-1) for t in (x.h_prev, x.h_cur)]
    as_float, as_int = [t.view(torch.float32) for t in pair], [t.view(torch.int64) for t in pair]
    arrays = [t.numpy() for t in as_int]
    candidates: dict[str, Call] = {
        "torch.sum float32": lambda: [t.sum() for t in as_float],
        "torch.sum int64": lambda: [t.sum() for t in as_int],
        "torch.dot float32": lambda: torch.dot(*as_float),  # both streams at once, as the score reads them
        "torch.vector_norm float32": lambda: [torch.linalg.vector_norm(t) for t in as_float],
    }
    if target.threads == 1:  # numpy has one thread
        candidates["numpy.sum int64"] = lambda: [numpy.add.reduce(a) for a in arrays]
    name, call = fastest(candidates)
    return "native", ours, name, call


def _memcpy(target: Target[Case]) -> tuple[str, Call, str, Call]:
    """A copy of N D E + k D E bytes between buffers that were touched before.

    The step reads 2 N D E (the score) and k D E (the kept rows) and writes k D E; the copy reads N D E + k D E and writes as
    much: 2 N D E + 2 k D E bytes on either side. The step also allocates its results, the copy does not.
    """
    ours, _ = _ours(target)
    size = (target.case.batch * (target.case.n + target.case.k) * target.case.row_bytes) // 8 * 8
    source, copied = (torch.empty(size, dtype=torch.uint8) for _ in range(2))
    touch(source, copied)
    candidates: dict[str, Call] = {"torch copy_": lambda: copied.copy_(source)}
    if target.threads == 1:
        libc = ctypes.CDLL(None)
        libc.memcpy.argtypes, libc.memcpy.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
        source_array, copied_array = source.numpy(), copied.numpy()
        candidates["libc memcpy"] = lambda: libc.memcpy(copied.data_ptr(), source.data_ptr(), size)  # and so keeps both alive
        candidates["numpy.copyto"] = lambda: numpy.copyto(copied_array, source_array)
    name, call = fastest(candidates)
    return "native", ours, name, call


def _overhead(target: Target[Case]) -> tuple[str, Call, str, Call]:
    """The public call as a user makes it, the backend chosen automatically; beside it, an empty call."""
    inputs, expected = inputs_of(target.case)
    why = providers("drop")["native"].missing(target.case)
    if why:
        raise Unavailable(f"native: {why}")
    h_prev, h_cur, k = inputs.h_prev, inputs.h_cur, target.case.k
    if not torch.equal(vk.variation_topk(h_prev, h_cur, k).indices, expected.keep):
        raise WrongResult("variation_topk: indices differ")
    return "native", lambda: vk.variation_topk(h_prev, h_cur, k), "nothing", lambda: None


def measure(target: Target[Any], gate: NoiseGate, dry: bool = False) -> dict[str, Any]:
    """One target's row, without the columns of the conditions."""
    row: dict[str, Any] = dict.fromkeys(TARGETS[: -len(CONDITIONS)], "")
    row |= {
        "target": target.name, "asserted": "yes" if target.asserted else "no", "op": target.op, "case": str(target.case),
        "threads": target.threads, "unit": "us" if target.sense == "us" else "ratio",
        "limit": "" if not target.asserted else f"{'>=' if target.sense == 'at least' else '<='} {target.limit:g}",
        "attempts": 0, "quiet_attempts": 0,
    }  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)
    try:
        row["a"], ours, row["b"], other = target.sides(target)
        return row | _attempts(target, gate, ours, other, dry)
    except WrongResult as wrong:
        return row | {"status": f"wrong: {wrong}"}
    except Unavailable as missing:
        return row | {"status": f"unavailable: {missing}"}
    finally:
        torch.set_num_threads(before)
        if not dry:
            release_memory()


def _attempts(target: Target[Any], gate: NoiseGate, ours: Call, other: Call, dry: bool) -> dict[str, Any]:
    quiet: list[dict[str, Any]] = []
    attempts = 0
    while attempts < ATTEMPTS and not any(found["status"] != "fail" for found in quiet):
        attempts += 1
        before = gate.settle(0.0 if dry else 5.0)
        a, b = interleaved([ours, other], 3 if dry else REPETITIONS, 0.0 if dry else SECONDS, target.burst)
        after = gate.sample()
        found = _judged(target, a, b)
        if dry:
            return found | {"status": "dry run", "attempts": 1}
        if gate.quiet(before, after, in_cache=2 * target.case.input_bytes <= LLC):
            quiet.append(found)
    if not quiet:
        return {"status": "noisy: no quiet attempt", "attempts": attempts, "quiet_attempts": 0}
    better = max if target.sense == "at least" else min
    return better(quiet, key=lambda f: f["value"]) | {"attempts": attempts, "quiet_attempts": len(quiet)}


def _judged(target: Target[Any], a: list[float], b: list[float]) -> dict[str, Any]:
    """The ratio of minima, and whether it is within the limit."""
    value = {"at most": min(a) / min(b), "at least": min(b) / min(a), "us": quantile(a, 0.5) * 1e6}[target.sense]
    status = "reported"
    if target.asserted:
        status = "pass" if (value >= target.limit if target.sense == "at least" else value <= target.limit) else "fail"
    found: dict[str, Any] = {"value": round(value, 3), "status": status}
    for side, times in (("a", a), ("b", b)):
        found |= {f"{side}_min_us": round(min(times) * 1e6, 2), f"{side}_median_us": round(quantile(times, 0.5) * 1e6, 2)}
    return found
