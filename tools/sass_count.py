"""Count the instructions of a GPU kernel by pipe, and predict from them what a selection takes. Needs nvcc, but no GPU.

    python tools/sass_count.py                            # the selections of csrc/core, and bench/sass_counts.json
    python tools/sass_count.py --cubin FILE --kernel NAME # the innermost loops of any kernel, also of one that Triton compiled

The counts are those of the machine code for sm_90, so they are facts of the compiler. The times are predictions: counts, multiplied
with the rates and latencies of ``H200`` below, each of which names where it comes from.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "sass_counts.json"
FLAGS = ("-std=c++17", "-O3", "--fmad=false", '-DV2DROP_CUDA_ARCHS_STRING="counted"')
WARPS, HELD = 16, 16  # kSelectThreads / 32 and kHeldOrdinals of csrc/core/tuning_cuda.h

H200 = {
    "ghz": 1.98,  # boost clock, NVIDIA's data sheet
    "sms": 132,
    "copy_bytes_per_s": 4.3e12,  # read and written, measured by others
    # Warp instructions that an SM can start in a cycle: results a cycle of compute capability 9.0 in the CUDA programming guide,
    # by 32; shared atomics at half the rate of loads, for conflicts of banks, is an estimate.
    "rates": {"issue": 4.0, "alu": 2.0, "fma": 2.0, "xu": 0.5, "redux": 0.5, "lsu": 1.0, "atoms": 0.5, "global": 1.0},
    # Cycles. Published microbenchmarks of H100 (shared memory 29, shuffle 23, SM to SM 180, L2 about 270 ns); the barriers and the
    # pace of dependent instructions are estimates.
    "latency": {
        "step": 4.5,
        "bar": 30,
        "shfl": 23,
        "redux": 23,
        "lds": 29,
        "remote": 200,
        "cluster": 190,
        "membar": 535,
        "l2": 535,
    },
    "l2_bytes": 64.0,  # that an SM gets from L2 in a cycle
    "grid_us": 1.2,  # a barrier of a cooperative launch: an estimate
}

PIPES = (
    (
        "control",
        r"BRA|EXIT|NOP|BSSY|BSYNC|WARPSYNC|CALL|RET|PREEXIT|ACQBULK|ERRBAR|CGAERRBAR|YIELD|DEPBAR|BREAK|R2UR|S2R|S2UR|CS2R",
    ),
    ("bar", r"BAR\."),
    ("cluster", r"UCGABAR_WAIT"),
    ("membar", r"MEMBAR"),
    ("atoms", r"ATOMS"),
    ("remote", r"LD\.E|LDG\.E.*STRONG\.GPU"),
    ("global", r"LDG|STG|ST\.E|RED|ATOM|CCTL"),
    ("lds", r"LDS|STS"),
    ("shfl", r"SHFL"),
    ("redux", r"REDUX|CREDUX"),
    ("xu", r"POPC|MUFU|FLO|I2F|F2I"),
    ("fma", r"IMAD|FFMA|FMUL|FADD|HADD2|HFMA2"),
    ("uniform", r"U[A-Z]"),
    ("alu", r""),  # compare, select, shift, logic, minimum, vote, add, move
)


class Instruction(NamedTuple):
    address: int
    opcode: str
    operands: str

    @property
    def pipe(self) -> str:
        return next(name for name, pattern in PIPES if re.match(pattern, self.opcode))

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode == "BRA" else None
        return int(found.group(1), 16) if found else None


class Loop(NamedTuple):
    """The instructions from the target of a backward branch to the branch."""

    first: int
    last: int


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    import triton

    return str(triton.knobs.nvidia.cuobjdump.path)


def compile_source(source: Path, arch: int = 90) -> Path:
    out = Path(tempfile.mkdtemp()) / f"{source.stem}.cubin"
    includes = [f"-I{ROOT / 'csrc' / x}" for x in ("include", "core")]
    subprocess.run(["nvcc", *FLAGS, *includes, f"-arch=sm_{arch}", "-cubin", source, "-o", out], check=True)
    return out


def kernels(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of every kernel of a cubin, by mangled name."""
    text = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\bFunction : (\S+)", text)
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
    return {
        name: [Instruction(int(a, 16), opcode, operands) for a, opcode, operands in line.findall(body)]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def loops(code: list[Instruction]) -> list[Loop]:
    """All loops by the end, so that an inner one comes before those around it."""
    found = {Loop(i.target, i.address) for i in code if i.target is not None and i.target < i.address}
    return sorted(found, key=lambda loop: (loop.last, -loop.first))


def body(code: list[Instruction], loop: Loop, without: list[Loop] = ()) -> list[Instruction]:  # type: ignore[assignment]
    inside = [i for i in code if loop.first <= i.address <= loop.last]
    return [i for i in inside if not any(x.first <= i.address <= x.last for x in without)]


def pipes(code: list[Instruction]) -> Counter[str]:
    return Counter(i.pipe for i in code)


def loads_in_flight(code: list[Instruction]) -> int:
    """The most global loads of a thread that are under way before the first of them is used."""
    most, pending = 0, set()
    for i in code:
        registers = re.findall(r"\bR\d+", i.operands)
        if i.pipe in ("global", "remote") and i.opcode.startswith("LD"):
            if pending & set(registers[1:]):
                pending.clear()
            pending.add(registers[0])
            most = max(most, len(pending))
        elif pending & set(registers):
            pending.clear()
    return most


def innermost(found: list[Loop]) -> list[Loop]:
    return [x for x in found if not any(y != x and x.first <= y.first and y.last <= x.last for y in found)]


def is_ordinal_load(i: Instruction) -> bool:
    """An ordinal of the score kernel, read from L2."""
    return i.opcode.startswith("LDG") and "STRONG" in i.opcode


def without_reload(inside: list[Instruction]) -> list[Instruction]:
    """The loop without the loads of tiles that registers do not hold."""
    at = [i.address for i in inside if is_ordinal_load(i)][:HELD]  # later ones are of values
    return [i for i in inside if not at or not at[0] <= i.address <= at[-1]]


def of_computed(inside: list[Instruction]) -> list[Instruction]:
    """The loop as it reads ordinals of the score kernel: their loads, and what comes after those of all other sources."""
    at = [i.address for i in inside if is_ordinal_load(i)]
    last = max(i.address for i in inside if i.pipe == "global")
    return [i for i in inside if at[0] <= i.address <= at[-1] or i.address > last]


def without_values(inside: list[Instruction]) -> list[Instruction]:
    """The placing as a drop does it, which writes positions and no values."""
    made, skipping, stored = [], False, False
    for i in without_reload(inside):
        if not skipping:
            made.append(i)
        if i.opcode.startswith("STG.E.64"):
            stored = True
        elif stored and i.opcode == "BRA":
            skipping, stored = True, False
        elif i.opcode == "BSYNC":
            skipping = False
    return made


# --- the selection by a team of blocks (csrc/core/select_bins_cuda.cuh)


def phases(code: list[Instruction]) -> dict[str, Any]:
    """Its loops over the tiles of a block by what they do, and what surrounds them; each works on ``HELD`` ordinals a thread."""
    every = loops(code)
    count = next(x for x in every if any(i.pipe == "atoms" for i in body(code, x)))
    around = next(x for x in every if x.first < count.first and x.last > count.last)
    after = [x for x in every if x.first > around.last]
    votes = {x: sum(i.opcode.startswith("VOTE") for i in body(code, x)) for x in after}
    place = max(innermost(after), key=lambda x: votes[x])
    tally = [x for x in innermost(after) if x.last < place.first and len(body(code, x)) > 3 * HELD]
    ranges = [x for x in every if x.last < around.first and sum("MNMX" in i.opcode for i in body(code, x)) >= HELD // 2]
    chosen = {"range": ranges[-1], "bins": count, **({"count": tally[0]} if tally else {}), "place": place}
    kept = {"range": of_computed, "bins": without_reload, "count": without_reload, "place": without_values}
    found: dict[str, Any] = {}
    for name, loop in chosen.items():
        inside = body(code, loop)
        work = kept[name](inside)
        found[name] = {
            "per_key": {k: round(v / HELD, 2) for k, v in sorted(pipes(work).items())},
            "instructions_per_key": round(len(work) / HELD, 2),
            "loads_in_flight": loads_in_flight(inside),
        }
    found["pass_overhead"] = dict(sorted(pipes(body(code, around, [count])).items()))
    outside = [x for x in every if x.last < chosen["range"].first]
    found["prologue"] = len(
        [i for i in code if i.address < chosen["range"].first and not any(x.first <= i.address <= x.last for x in outside)]
    )
    found["epilogue"] = dict(
        sorted(pipes([i for i in code if i.address > around.last and i.address < place.last and i.pipe in SERIAL]).items())
    )
    return found


SERIAL = ("bar", "shfl", "redux", "lds", "remote", "cluster", "membar")


def serial_cycles(counted: dict[str, int], gpu: dict[str, Any]) -> float:
    """Code that runs once, whose instructions wait for one another; memory accesses of a kind are under way together."""
    lat, one = gpu["latency"], ("remote", "lds")
    cycles = lat["step"] * sum(counted.values())
    return cycles + sum(lat[k] * (1 if k in one else counted[k]) for k in SERIAL if counted.get(k))


def loop_cycles(per_key: dict[str, float], keys: float, gpu: dict[str, Any]) -> float:
    """Cycles of an SM for a loop over so many keys: of the busiest pipe, or of the issue of all instructions."""
    rates, warps = gpu["rates"], keys / 32
    pipe = {"lds": "lsu", "shfl": "lsu", "remote": "lsu", "bar": "issue", "control": "issue", "uniform": "issue"}
    used: Counter[str] = Counter()
    for name, n in per_key.items():
        used[pipe.get(name, name)] += n
        used["issue"] += n if pipe.get(name) != "issue" else 0
    return max(n * warps / rates.get(name, rates["issue"]) for name, n in used.items())


def predict(found: dict[str, Any], team: str, n: int, gpu: dict[str, Any] = H200, passes: int = 3) -> float:
    """Microseconds of one selection from n rows, without the start of the kernel: ``passes`` passes by bins (four at the most)."""
    blocks = {"OneBlock": 1, "ClusterOfBlocks": 8, "GridOfBlocks": min(16, max(2, n // 1024))}[team]
    keys = -(-n // blocks)
    held = keys <= 32 * WARPS * HELD
    lat = gpu["latency"]
    again = 0.0 if held else lat["l2"] + 4 * keys / gpu["l2_bytes"]  # each later phase reads the keys from L2
    cycles = lat["step"] * found["prologue"] + lat["l2"] + 4 * keys / gpu["l2_bytes"]
    cycles += loop_cycles(found["range"]["per_key"], keys, gpu)
    cycles += passes * (serial_cycles(found["pass_overhead"], gpu) + loop_cycles(found["bins"]["per_key"], keys, gpu) + again)
    for name in ("count", "place"):
        if name in found:
            cycles += loop_cycles(found[name]["per_key"], keys, gpu) + again
    cycles += serial_cycles(found["epilogue"], gpu)
    meetings = passes + 2 if team == "GridOfBlocks" else 0
    return cycles / gpu["ghz"] / 1000 + meetings * gpu["grid_us"]


# --- an item of the gather (csrc/core/gather_cuda.cuh)


ITEM_BYTES, ITEM_WARPS = 16 << 10, 8  # kItemBytes of csrc/core/tuning_cuda.h, kThreads / 32


def gather_item(code: list[Instruction], gpu: dict[str, Any] = H200) -> dict[str, Any]:
    """What a thread does for 16 KB of one tensor, at the most: to find the item, and to move it by 16 bytes at a time.

    ``issue_cycles`` is what an SM needs to start these instructions, ``memory_cycles`` what its share of the bandwidth needs.
    """
    every = loops(code)
    moves = [x for x in innermost(every) if any(i.opcode.startswith("STG") for i in body(code, x))]
    (wide,) = [x for x in moves if any(i.opcode.endswith(".128") for i in body(code, x))]
    items = next(x for x in every if all(x.first <= y.first and y.last <= x.last for y in moves))
    found = len(body(code, items, [x for x in moves if x != wide]))
    return {
        "instructions": found,
        "loads_in_flight": loads_in_flight(body(code, wide)),
        "issue_cycles": round(found * ITEM_WARPS / gpu["rates"]["issue"]),
        "memory_cycles": round(2 * ITEM_BYTES / (gpu["copy_bytes_per_s"] / gpu["sms"] / gpu["ghz"] / 1e9)),
    }


TEAMS = ("OneBlock", "ClusterOfBlocks", "GridOfBlocks")


def selections(cubin: Path) -> dict[str, dict[str, Any]]:
    code = kernels(cubin)
    return {team: phases(next(c for name, c in code.items() if "select_team_kernel" in name and team in name)) for team in TEAMS}


def report(found: dict[str, dict[str, Any]], gather: Path) -> dict[str, Any]:
    sizes = (2304, 6272, 16384, 65536, 262144)
    us = {team: {str(n): round(predict(x, team, n), 2) for n in sizes} for team, x in found.items()}
    worst = {team: {str(n): round(predict(x, team, n, passes=4), 2) for n in sizes} for team, x in found.items()}
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    nvcc = re.search(r"release ([\d.]+)", version).group(1)  # type: ignore[union-attr]
    return {
        "arch": "sm_90",
        "nvcc": nvcc,
        "gpu": "H200",
        "constants": H200,
        "counts": found,
        "predicted_us": us,
        "predicted_us_four_passes": worst,
        "gather_item": gather_item(next(code for name, code in kernels(gather).items() if "13gather_kernel" in name)),
    }


COUNTED = ("select_segments_cuda.cu", "compact_cuda.cu")  # the sources of the report


def of_cubins(select: Path, gather: Path) -> dict[str, Any]:
    """The report on the compiled sources ``COUNTED``."""
    return report(selections(select), gather)


def show(cubin: Path, kernel: str) -> None:
    for name, code in kernels(cubin).items():
        if kernel not in name:
            continue
        print(f"{name}: {len(code)} instructions")
        for loop in innermost(loops(code)):
            inside = body(code, loop)
            by_pipe = ", ".join(f"{n} {pipe}" for pipe, n in pipes(inside).most_common())
            print(f"  {loop.first:#x}-{loop.last:#x}: {len(inside)} ({by_pipe}), {loads_in_flight(inside)} loads in flight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cubin", type=Path, help="a compiled file in place of csrc/core/select_segments_cuda.cu")
    parser.add_argument("--kernel", default="", help="with --cubin: part of the names of the kernels")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.cubin:
        show(options.cubin, options.kernel)
        return
    made = of_cubins(*(compile_source(ROOT / "csrc/core" / name) for name in COUNTED))
    for team, found in made["counts"].items():
        print(team)
        for name in ("range", "bins", "count", "place"):
            if name in found:
                x = found[name]
                counted = f"{x['instructions_per_key']:6.2f} instructions a key, {x['loads_in_flight']:2} loads in flight"
                print(f"  {name:6} {counted}: {x['per_key']}")
        print(f"  a pass around its loop: {found['pass_overhead']}")
        print(f"  predicted us on an H200, 3 passes: {made['predicted_us'][team]}; 4: {made['predicted_us_four_passes'][team]}")
    print(f"16 KB of a gather: {made['gather_item']}")
    options.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
