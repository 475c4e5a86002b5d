"""How long a kernel launch takes: clocks by its instructions, microseconds by its waves and bytes, as a ``Time`` of the model.

How often a loop runs follows from its role, which its instructions tell (``role``). A kernel that moves memory takes the longer of
its bytes and of its instructions; a select takes its instructions and, for each barrier and each trip to L2, the clocks that its
warps wait.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import gpu_sass
from gpu_machine import Constants, Machine, Time

WIDE_SAMPLES = 128  # of v2drop_kernels.backends.configs
L2_SHARE_OF_CALL = 0.5  # of the L2 cache: what was just read is found there if it fits beside what else is live


class Work(NamedTuple):
    """What a launch has to do: competing rows of a segment (0: none), output bytes that it copies by class, bytes moved."""

    n: int = 0
    copied: tuple[float, ...] = ()
    read: float = 0.0
    again: float = 0.0  # bytes read that an earlier kernel of the call read or wrote
    again_of: float = 0.0  # bytes of the buffer that they are part of
    write: float = 0.0
    rounds: float = 0.0  # of a bisection, or passes of bins; 0: as many as random scores need
    selecting: int = 0  # blocks that select; 0: all
    alone_us: float = 0.0  # of one selection, where it is counted by phases; 0: by the loops of its kernel


class Launch(NamedTuple):
    """One kernel launch. ``after`` names the constant that lies between it and its predecessor."""

    kernel: gpu_sass.Kernel
    blocks: int
    threads: int
    meta: dict[str, int]
    work: Work
    after: str = "plain_edge"


def bisection_rounds(n: int) -> float:
    """Mean rounds of a bisection of random scores that ends as soon as it keeps k: 9.6 at N = 576, 13.8 at 6272, 17.7 at 65536."""
    return math.log2(max(n, 2)) + 1.3


def role(code: gpu_sass.Code) -> str:
    """What a loop does, by its instructions."""
    if code.barriers or code.cluster_barriers:
        return "place" if code.global_stores else "round"
    if code.global_stores:
        return "copy" if code.global_loads else "fill"
    return "read" if code.global_loads else "step"


def parents(kernel: gpu_sass.Kernel) -> list[int | None]:
    """For every loop the one around it."""
    found: list[int | None] = []
    for i, depth in enumerate(kernel.depths):
        found.append(next((j for j in range(i - 1, -1, -1) if kernel.depths[j] < depth), None))
    return found


class Clocks(NamedTuple):
    """Clocks of one block alone, while it selects and while it copies or scores: those of its busiest pipe, and those it waits."""

    select: float
    wait: float
    move: float


class Share(NamedTuple):
    """How often a loop of a launch runs in all, what part of its instructions is on the way, and whether it is part of a select."""

    runs: float
    part: float = 1.0
    selects: bool = True


def clocks(launch: Launch, c: Constants) -> Clocks:
    """How long one block of a launch takes, had it a multiprocessor for itself.

    The phases of a select follow one another, so each takes its own busiest pipe; blocks that move memory overlap, so theirs is
    that of all phases together.
    """
    kernel, warps = launch.kernel, launch.threads / 32
    if launch.work.alone_us:
        return Clocks(0.0, 0.0, 0.0)
    select = wait = 0.0
    move: Counter[str] = Counter()
    for code, share in zip(kernel.loops, shares(launch), strict=True):
        if share.selects:
            select += share.runs * share.part * code.clocks(warps)
            wait += share.runs * _waits(code, c)
        else:
            move += Counter({pipe: share.runs * share.part * n for pipe, n in code.pipes.items()})
    if launch.work.n:
        select += kernel.once.clocks(warps)
        wait += _waits(kernel.once, c)
    else:
        move += Counter(kernel.once.pipes)
    return Clocks(select, wait, gpu_sass.clocks(move, warps))


def _waits(code: gpu_sass.Code, c: Constants) -> float:
    value = c.values
    return (
        code.barriers * value["barrier_clocks"] + code.cluster_barriers * value["cluster_clocks"]
        + (value["load_clocks"] if code.global_loads else 0.0)
    )  # fmt: skip


def shares(launch: Launch) -> list[Share]:
    """One for every loop of a launch."""
    ups, found = parents(launch.kernel), []
    for i in range(len(launch.kernel.loops)):
        share = _share(launch, i, ups)
        up = ups[i]
        found.append(share if up is None else share._replace(runs=share.runs * found[up].runs))
    return found


def _share(launch: Launch, i: int, ups: Sequence[int | None]) -> Share:
    """Of loop ``i``; its runs for each time that the loop around it runs."""
    kind, work = role(launch.kernel.loops[i]), launch.work
    holds = {role(launch.kernel.loops[j]) for j, up in enumerate(ups) if up == i}
    if "CHUNK" in launch.meta:
        return Share(_wide_runs(launch, i, kind, ups))
    if kind == "copy":
        return Share(_copies(launch, i, ups), selects=False)
    if not work.n and kind in ("fill", "round"):  # rows around, and the search of a table of segments: there are none
        return Share(0.0, selects=False)
    if kind == "round" and "round" not in holds:
        rounds = work.rounds or bisection_rounds(work.n)
        alone = ups[i] is None and launch.kernel.loops[i].global_loads == 1  # the search of a table of segments: there is none
        return Share(0.0 if alone else rounds / 2 if launch.meta.get("CHUNKED") else rounds)
    if "round" not in holds and ((kind == "place" and holds) or _scores(launch, ups[i], ups)):
        code = launch.kernel.loops[i]  # the sums of a row's warps are added four at a time, by a loop that is unrolled
        part = launch.meta.get("PERCENT", 100) / 100 if kind == "read" and code.widest == 16 else 1.0
        return Share(float(launch.threads // 32 // max(code.shared // 4, 1)) if kind == "step" else 1.0, part, selects=False)
    if kind == "place" and not holds and work.n:
        return Share(max(1.0, -(-work.n // launch.meta.get("BLOCK", work.n))))
    if kind == "read" and launch.meta.get("KEYS"):
        return Share(work.n / launch.meta["KEYS"])
    if "copy" in holds or any("copy" in _inside(launch.kernel, j, ups) for j, up in enumerate(ups) if up == i):
        return Share(float(launch.meta.get("ITEMS", 1)) if ups[i] is None else 1.0, selects=False)
    return Share(0.0 if kind == "fill" else 1.0, selects=work.n > 0)


def _scores(launch: Launch, i: int | None, ups: Sequence[int | None]) -> bool:
    """Whether loop ``i`` is that of the rows of a score: it ends with a barrier and a store."""
    return i is not None and role(launch.kernel.loops[i]) == "place" and "round" not in _inside(launch.kernel, i, ups)


def _wide_runs(launch: Launch, i: int, kind: str, ups: Sequence[int | None]) -> float:
    """Of a select by many programs, one for each chunk of keys: three launches, which count, split and place."""
    meta, work = launch.meta, launch.work
    chunks = -(-work.n // meta["CHUNK"])
    if kind == "place":
        return meta["CHUNK"] / meta["BLOCK"]
    if "count" in launch.kernel.name:  # four steps are unrolled
        return meta["CHUNK"] / (4 * meta["LANES"])
    if "split" in launch.kernel.name:
        return max(1.0, chunks / meta["DEPTH"]) if kind == "read" else 1.0
    # A value that is tied is a sample, and then there is no bisection; else it is one of about 2 n / SAMPLES candidates, which fit
    # registers: the loops behind their bisection, which would read them again for every step, do not run.
    loops = launch.kernel.loops
    held = next(j for j, code in enumerate(loops) if role(code) == "round" and "read" not in _inside(launch.kernel, j, ups))
    if i == held:
        return 0.0 if work.rounds else bisection_rounds(2 * work.n // WIDE_SAMPLES)
    return 0.0 if kind == "fill" or i > held else 1.0


def _inside(kernel: gpu_sass.Kernel, i: int, ups: Sequence[int | None]) -> set[str]:
    return {role(kernel.loops[j]) for j, up in enumerate(ups) if up == i}


def _copies(launch: Launch, i: int, ups: Sequence[int | None]) -> float:
    """How often a block runs a loop that copies, the classes of tensors in order; of several in one loop, the widest one runs."""
    code, copied = launch.kernel.loops[i], launch.work.copied
    loops = [j for j, found in enumerate(launch.kernel.loops) if role(found) == "copy"]
    firsts = [j for j in loops if ups[j] is None or ups[j] not in [ups[other] for other in loops if other < j]]
    if i not in firsts:
        return 0.0
    which = firsts.index(i)
    nbytes = copied[which] if len(firsts) == len(copied) else sum(copied) / len(firsts)
    nbytes /= launch.meta.get("ITEMS", 1) if ups[i] is not None else 1
    return nbytes / launch.blocks / (code.global_loads * max(code.widest, 1) * launch.threads)


def time_of(launches: Sequence[Launch], machine: Machine, c: Constants, warm: bool = False) -> Time[str]:
    """The GPU time of a call inside a graph."""
    total: Time[str] = Time()
    for launch in launches:
        if launch.after == "cooperative":  # one launch with a barrier of the grid in it
            total += Time({"plain_edge": 1, "cooperative": 1, "grid_barrier": 1})
        else:
            total[launch.after if machine.pdl else "plain_edge"] += 1
        for term, amount in of_one(launch, machine, c, warm).items():
            total[term] += amount
    return total


def of_one(launch: Launch, machine: Machine, c: Constants, warm: bool = False) -> Time[str]:
    """The GPU time of one launch, without the edge before it."""
    work, alone = launch.work, clocks(launch, c)
    resident = machine.resident(launch.kernel.registers, launch.kernel.shared, launch.threads)
    busiest = -(-launch.blocks // machine.sms)
    waves = max(1, -(-launch.blocks // (resident * machine.sms)))
    found: Time[str] = Time()
    together = -(-(work.selecting or launch.blocks) // machine.sms)
    selecting = max(alone.select * together, (alone.select + alone.wait) * waves) if work.n else 0.0
    found["select"] += work.alone_us * busiest if work.alone_us else machine.clock_us(selecting)
    fits = work.again_of <= L2_SHARE_OF_CALL * machine.l2_mb * 1e6
    near, far = (work.again, 0.0) if fits else (0.0, work.again)
    if warm and work.read <= machine.l2_mb * 1e6:
        near += work.read
    else:
        far += work.read
    moved: Time[str] = Time({"kernel": machine.dram_us(far + work.write), "l2": machine.dram_us(near)})
    issued: Time[str] = Time({"select": machine.clock_us(alone.move * busiest)})
    if c.us(issued) > c.us(moved):
        moved = issued
    if far > 1e6:
        found["ramp"] += 1
    elif not work.n:
        found["select"] += machine.clock_us(2 * c.values["load_clocks"])  # keep, and then the rows, from L2
    for term, amount in moved.items():
        found[term] += amount
    return found
