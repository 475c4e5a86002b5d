"""The launches of every path of this package: those of the Triton backend as gpu_counts.json has them, and the CUDA library's.

The kernels of the library are counted as well; its grids are derived here from the constants of csrc/core/tuning_cuda.h.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import gpu_sass
import sass_count
from gpu_clocks import Launch, Work, time_of
from gpu_machine import Machine, constants
from registry import Case

COUNTS = Path(__file__).with_name("gpu_counts.json")
PHASES = Path(__file__).with_name("sass_counts.json")
PASSES = 3  # of 256 bins each: the first two leave a row or two in a bin, four are the most that 32 bits need
TUNING = Path(__file__).resolve().parents[1] / "csrc" / "core" / "tuning_cuda.h"


@functools.cache
def counts() -> dict[str, Any]:
    """gpu_counts.json."""
    return json.loads(COUNTS.read_text())


@functools.cache
def phases() -> dict[str, Any]:
    """sass_counts.json: the selections of the CUDA library by teams of blocks, phase by phase."""
    return json.loads(PHASES.read_text())


@functools.cache
def tuning() -> dict[str, int]:
    """The integer constants of tuning_cuda.h."""
    text = re.sub(r"#if defined\(__CUDA_ARCH__\).*?#else", "", TUNING.read_text(), flags=re.S)
    found: dict[str, int] = {}
    for line in re.findall(r"constexpr \w+ (.*?);", text):
        for name, value in re.findall(r"(k\w+) = ([^,]+)", re.sub(r"int64_t\{(\d+)\}", r"\1", line)):
            try:
                found[name] = int(eval(value, {"__builtins__": {}}, dict(found)))
            except (NameError, SyntaxError, TypeError):
                continue
    return found


def triton(key: str, work: dict[str, Work]) -> list[Launch]:
    """The launches of a problem of gpu_counts.json; ``work`` by the beginning of a kernel's name."""
    found = counts()["triton"]
    made: list[Launch] = []
    for item in found["launches"][key]:
        kernel = gpu_sass.from_json(found["kernels"][item["kernel"]])
        name = next(start for start in work if item["name"].startswith(start))
        made.append(Launch(kernel, item["programs"], 32 * item["meta"].get("num_warps", 4), item["meta"], work[name],
                           "pdl_edge" if item["meta"].get("WAITS") else "plain_edge"))  # fmt: skip
    return made


# --- the CUDA library


def cuda_kernel(start: str) -> gpu_sass.Kernel:
    """The kernel of the library whose name begins so."""
    found = counts()["cuda"]
    return gpu_sass.from_json(found[next(name for name in sorted(found) if name.startswith(start))])


def cuda_score(case: Case, work: Work, template: str = "BFloat16, true") -> Launch:
    t = tuning()
    warps = 1
    while warps < t["kThreads"] // 32 and warps * 512 * t["kScoreLoads"] < case.row_bytes:
        warps *= 2
    rows = t["kThreads"] // 32 // warps
    loads = -(-case.row_bytes // (512 * warps)) if case.row_bytes % 512 else case.row_bytes / (512 * warps)
    meta = {"PERCENT": round(100 * loads / (t["kScoreLoads"] * -(-loads // t["kScoreLoads"])))}  # of the loads that are unrolled
    return Launch(cuda_kernel(f"score_kernel<{template}"), -(-case.batch * case.n // rows), t["kThreads"], meta, work)


class Cut(NamedTuple):
    """How compact_cuda.cu cuts a gather into blocks (cut_into_blocks, fit_into): tiles of rows times shares of a row's bytes."""

    batch: int
    out_rows: int
    rows: int  # of a tile
    shares: int
    items: int  # of a share, each some rows of one piece of one tensor

    @property
    def blocks(self) -> int:
        return self.batch * -(-self.out_rows // self.rows) * self.shares

    def fit(self, places: int) -> Cut:
        """No more blocks than ``places``, where tiles of more rows and larger shares can do that."""
        if self.blocks <= places:
            return self
        tiles = max(1, places // (self.batch * self.shares))
        found = self._replace(rows=min(tuning()["kTileRows"], -(-self.out_rows // tiles)))
        if found.blocks <= places:
            return found
        shares = max(1, places // (self.batch * -(-found.out_rows // found.rows)))
        together = -(-self.shares // shares)
        return found._replace(items=self.items * together, shares=-(-self.shares // together))


def _piece(width: int, nbytes: int) -> tuple[int, int]:
    """Pieces of a row of ``width`` bytes in pieces of so many at most, and what one weighs."""
    vec = min(16, width & -width)
    most = min(max(nbytes // vec, 1), tuning()["kThreads"])
    pieces = -(-width // vec // most)
    return pieces, max(64, -(-width // vec // pieces) * vec)


def cuda_cut(machine: Machine, batch: int, out_rows: int, classes: Sequence[tuple[int, int]]) -> Cut:
    """The cut for (tensors times planes, bytes of a row) of every class."""
    t = tuning()
    cut = [(count, *_piece(width, 16 * t["kThreads"])) for count, width in classes]
    row_bytes = sum(count * pieces * weight for count, pieces, weight in cut)
    width = max(cut, key=lambda c: c[0] * c[1] * c[2])[2]
    nbytes = min(max(batch * out_rows * row_bytes // (t["kBlocksPerSm"] * machine.sms), t["kGatherBytesMin"]), t["kGatherBytes"])
    rows = 1
    while 2 * rows <= t["kTileRows"] and rows < out_rows:
        if 2 * rows * width > min(nbytes, t["kItemBytes"]) and 2 * rows * row_bytes > nbytes:
            break
        rows *= 2
    tiles = -(-out_rows // rows)
    rows = -(-out_rows // tiles)
    most = min(max(t["kItemBytes"] // rows, t["kPieceBytesMin"]), 16 * t["kThreads"])
    again = [(count, *_piece(width, most)) for count, width in classes]
    row_bytes, widest = sum(count * pieces * weight for count, pieces, weight in again), max(weight for _, _, weight in again)
    share = max(widest, nbytes // rows // widest * widest)
    return Cut(batch, out_rows, rows, -(-row_bytes // share), max(1, share // widest))


def cuda_select(machine: Machine, batch: int, work: Work, after: str) -> Launch:
    """The select of its own of segments of ``work.n`` rows, by the launch that the library chooses.

    Beyond the rows that a gather selects by itself, ``work.rounds`` are passes of bins. Their instructions are counted phase by
    phase by tools/sass_count.py, whose latencies stand in bench/sass_counts.json.
    """
    t = tuning()
    if work.n <= t["kFusedSelect"]:
        return Launch(cuda_kernel("select_kernel"), batch, t["kThreads"], {}, work, after)
    team, blocks = ("ClusterOfBlocks", t["kClusterBlocks"]) if machine.clusters else ("GridOfBlocks", t["kGridBlocks"])
    c = constants()
    made = []
    for name, size in (("OneBlock", 1), (team, blocks if machine.clusters else min(blocks, work.n // 1024))):
        us = sass_count.predict(
            phases()["counts"][name],
            name,
            work.n,
            {**phases()["constants"], "ghz": machine.clock_ghz},
            round(work.rounds) or PASSES,
        )
        kernel = cuda_kernel(f"select_team_kernel<{name}>")
        made.append(Launch(kernel, batch * size, t["kSelectThreads"], {}, work._replace(alone_us=us), after))
    return min(made, key=lambda launch: c.us(time_of([launch], machine, c)))


def cuda_gather(machine: Machine, case: Case, classes: Sequence[tuple[int, int]], work: Work, after: str, rows: int = 0) -> Launch:
    """The gather of given rows; ``rows`` output rows of each entry (default: k)."""
    cut = cuda_cut(machine, case.batch, rows or case.k, classes)
    return Launch(cuda_kernel("gather_kernel"), cut.blocks, tuning()["kThreads"], {"ITEMS": cut.items}, work, after)


def cuda_backward(machine: Machine, case: Case, invert: Work, gather: Work) -> list[Launch]:
    """The inverse of keep, and a gather through it."""
    t = tuning()
    blocks = case.batch * -(-case.n // t["kInvertRows"])
    return [
        Launch(cuda_kernel("invert_kernel"), blocks, t["kThreads"], {}, invert),
        cuda_gather(machine, case, [(1, case.row_bytes)], gather, "pdl_edge", case.n),
    ]


def cuda_drop(
    machine: Machine, case: Case, classes: Sequence[tuple[int, int]], score: Work, select: Work, gather: Work
) -> dict[str, list[Launch]]:
    """By launch mode, the one that the library takes first."""
    t, scored = tuning(), cuda_score(case, score)
    moved = cuda_gather(machine, case, classes, gather, "pdl_edge")
    separate = {"separate": [scored, cuda_select(machine, case.batch, select, "pdl_edge"), moved]}
    if case.n > t["kFusedSelect"]:
        return separate
    both = gather._replace(n=case.n, again=gather.again + select.again)
    small = case.input_bytes / 2 <= t["kSmallBytes"]
    cut = cuda_cut(machine, case.batch, case.k, classes)

    def fitted(name: str) -> tuple[Launch, int]:
        kernel = cuda_kernel(name)
        resident = machine.sms * machine.resident(kernel.registers, kernel.shared, t["kThreads"])
        one = cut.fit(min(resident, machine.sms) if small else resident)
        return Launch(kernel, one.blocks, t["kThreads"], {"ITEMS": one.items}, both, "pdl_edge"), resident

    fused = {"fused": [scored, fitted("select_and_gather_kernel<true>")[0]]}
    one, resident = fitted("drop_kernel<BFloat16>")
    if one.blocks > resident:
        return fused | separate if small else separate | fused
    blocks = max(one.blocks, min(scored.blocks, resident))
    every = both._replace(read=gather.read + score.read, selecting=one.blocks)
    together = {"cooperative": [one._replace(blocks=blocks, work=every, after="cooperative")]}
    return fused | together | separate if small else separate | fused | together  # a small one is fused in a graph
