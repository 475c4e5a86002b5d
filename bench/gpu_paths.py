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
from typing import Any

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


def cuda_gather_blocks(machine: Machine, batch: int, out_rows: int, classes: Sequence[tuple[int, int]]) -> int:
    """Blocks of the gather (cut_into_blocks of compact_cuda.cu) for (tensors times planes, bytes of a row) of every class."""
    t = tuning()
    pieces = [(count * -(-width // (16 * t["kThreads"])), width) for count, width in classes]
    weights = [max(64, width // -(-width // (16 * t["kThreads"]))) for _, width in pieces]
    row_bytes = sum(count * weight for (count, _), weight in zip(pieces, weights, strict=True))
    widest = max(weights)
    share = batch * out_rows * row_bytes // (t["kBlocksPerSm"] * machine.sms)
    nbytes = min(max(share, t["kGatherBytesMin"]), t["kGatherBytes"])
    narrow = min(row_bytes, 16 * t["kThreads"] // widest * widest)
    rows = 1
    while 2 * rows <= t["kTileRows"] and 2 * rows * narrow <= nbytes and rows < out_rows:
        rows *= 2
    each = max(narrow, nbytes // rows // narrow * narrow)
    return batch * -(-out_rows // rows) * -(-row_bytes // each)


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
    blocks = cuda_gather_blocks(machine, case.batch, rows or case.k, classes)
    return Launch(cuda_kernel("gather_kernel"), blocks, tuning()["kThreads"], {}, work, after)


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
    fused = {"fused": [scored, moved._replace(kernel=cuda_kernel("select_and_gather_kernel<true>"), work=both)]}
    one = cuda_kernel("drop_kernel<BFloat16>")
    resident = machine.sms * machine.resident(one.registers, one.shared, t["kThreads"])
    if moved.blocks > resident:
        return fused | separate
    blocks = max(moved.blocks, min(scored.blocks, resident))
    every = both._replace(read=gather.read + score.read, selecting=moved.blocks)
    together = {"cooperative": [Launch(one, blocks, t["kThreads"], {}, every, "cooperative")]}
    if case.input_bytes / 2 <= t["kCooperativeBytes"]:
        return together | fused | separate
    return fused | together | separate
