"""What a compiled kernel consists of: its registers, and the instructions of its straight code and of every loop, by pipe.

Reads what ``cuobjdump`` prints, which comes with Triton and with the CUDA toolkit. Loops are those of the control flow: a jump back
to a block that dominates it. Nothing is executed, so how often a loop runs is for the caller to say.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Lanes per clock and multiprocessor: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", compute capability
# 9.0, and 32 lanes for what goes through the load/store units or the constant port.
PIPES = {"alu": 64, "fma": 128, "imad": 64, "xu": 16, "lsu": 32, "shfl": 32, "reduce": 16, "constant": 32, "issue": 128}
_PIPE_OF = {
    "fma": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2",
    "imad": "IMAD IDP UIMAD",
    "xu": "MUFU F2I I2F F2F I2I FRND POPC FLO BREV S2R DADD DMUL DFMA DSETP",
    "lsu": "LDG STG LDS STS LD ST ATOM ATOMG ATOMS RED REDG LDL STL LDGSTS",
    "shfl": "SHFL",
    "reduce": "REDUX CREDUX MATCH",
    "constant": "LDC ULDC LDCU",
    "none": "BAR BRA BRX BSSY BSYNC EXIT NOP WARPSYNC RET CALL DEPBAR LDGDEPBAR MEMBAR ERRBAR CGAERRBAR CCTL ACQBULK PREEXIT YIELD "
    "UCGABAR_ARV UCGABAR_WAIT",
}
_PIPES_BY_NAME = {name: pipe for pipe, names in _PIPE_OF.items() for name in names.split()}
# What the way through alternatives is chosen by. The barrier of a cluster counts twice: that of a block lies beside it.
_COUNTED = ("LDG", "STG", "LD", "ST", "LDS", "STS", "ATOMS", "ATOM", "ATOMG", "RED", "REDG", "BAR", "SHFL", "REDUX")
_ACCESSES = dict.fromkeys(_COUNTED, 1) | {"UCGABAR_WAIT": 2}
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)\s*([^;]*);")


def clocks(pipes: Mapping[str, float], warps: float) -> float:
    """Clocks of the busiest pipe of one multiprocessor for so many warps."""
    return max((32.0 * n * warps / PIPES[pipe] for pipe, n in pipes.items()), default=0.0)


class Code(NamedTuple):
    """Instructions of a warp by pipe ("issue": all), what makes it wait, and the bytes of its widest global load."""

    pipes: dict[str, int]
    barriers: int = 0
    cluster_barriers: int = 0
    global_loads: int = 0
    global_stores: int = 0
    shared: int = 0
    shuffles: int = 0
    widest: int = 0

    def clocks(self, warps: float) -> float:
        """Clocks in which one multiprocessor issues it for so many warps."""
        return clocks(self.pipes, warps)


class Kernel(NamedTuple):
    """A compiled kernel. ``loops`` in the order of the program, each without those inside it; ``depths``: loops around it."""

    name: str
    registers: int
    shared: int
    once: Code
    loops: tuple[Code, ...]
    depths: tuple[int, ...]


def tool() -> str:
    """Triton's cuobjdump, or the one on the PATH."""
    try:
        import triton

        return str(triton.knobs.nvidia.cuobjdump.path)
    except ImportError:
        return "cuobjdump"


def kernels_of(binary: Path | bytes, wanted: str = "") -> Iterator[Kernel]:
    """The kernels of a cubin or of a library whose (mangled) name contains ``wanted``."""
    with tempfile.TemporaryDirectory() as folder:
        path = binary if isinstance(binary, Path) else Path(folder) / "kernel.cubin"
        if isinstance(binary, bytes):
            path.write_bytes(binary)
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        usage, sass = run([tool(), "-res-usage", path]).stdout, run([tool(), "-sass", path]).stdout
    used = {name: (int(regs), int(shared)) for name, regs, shared in
            re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)}  # fmt: skip
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name = part.split(None, 1)[0]
        if wanted in name:
            yield Kernel(name, *used[name], *analysed(part))


class _Block(NamedTuple):
    first: int
    instructions: list[tuple[int, str, str, str]]
    next: list[int]


def analysed(sass: str) -> tuple[Code, tuple[Code, ...], tuple[int, ...]]:
    """Straight code, loops and their depths of one kernel: of each the way that makes the most accesses to memory.

    Code for other dtypes, metrics or widths lies beside it and is not run, so among alternatives with as many accesses the shortest
    one counts; what can only be left out is not.
    """
    lines = [(int(at, 16), op, suffix, rest) for at, op, suffix, rest in _LINE.findall(sass)]
    blocks = _blocks(lines, _predicated(sass))
    bodies = _loops(blocks)
    order = sorted(bodies)
    depths = tuple(sum(head in bodies[other] and head != other for other in order) for head in order)
    codes = [_code(_way(blocks, bodies, head)) for head in (None, *order)]
    return codes[0], tuple(codes[1:]), depths


def _way(blocks: dict[int, _Block], bodies: dict[int, set[int]], head: int | None) -> list[tuple[int, str, str, str]]:
    """The instructions of the way through a loop (None: through the kernel), without those of loops inside it."""
    region = _reached(blocks) if head is None else bodies[head]
    inner = {other: body for other, body in bodies.items() if other != head and other in region and len(body) < len(region)}
    outermost = {
        first: max((other for other, body in inner.items() if first in body), key=lambda o: len(inner[o]), default=first)
        for first in region
    }  # fmt: skip
    after: dict[int, set[int]] = {}
    ends: set[int] = set()
    for first in region:
        node = outermost[first]
        inside = [n for n in blocks[first].next if n in region and n != head]
        after.setdefault(node, set()).update(outermost[n] for n in inside if outermost[n] != node)
        if (head in blocks[first].next) if head is not None else not blocks[first].next:
            ends.add(node)
    own = {node: [] if node in inner else blocks[node].instructions for node in after}
    weight = {node: (sum(_ACCESSES.get(op, 0) for _, op, *_ in own[node]), -len(own[node])) for node in after}
    best: dict[int, tuple[tuple[float, int], int | None]] = {}
    through: dict[int, set[int]] = {}  # what every way from a node goes through
    for node in _deepest_first(after, outermost[min(blocks) if head is None else head]):
        following = [n for n in after[node] if n in best]
        joins = set.intersection(*(through[n] for n in following)) if following and node not in ends else set()
        through[node] = joins | {node}
        ways = [(best[n][0], n) for n in following if best[n][0][0] > -math.inf]
        if any(n not in joins for _, n in ways):
            skips = max((value for value, n in ways if n in joins), default=(-math.inf, 0))
            ways = [way for way in ways if way[1] not in joins or skips[0] > max(v[0] for v, n in ways if n not in joins)]
        ways += [((0.0, 0), None)] if node in ends else []
        (accesses, length), then = max(ways, key=lambda way: way[0], default=((-math.inf, 0), None))
        best[node] = ((accesses + weight[node][0], length + weight[node][1]), then)
    node: int | None = outermost[min(blocks) if head is None else head]
    found: list[tuple[int, str, str, str]] = []
    while node is not None:
        found += own[node]
        node = best[node][1]
    return found


def _deepest_first(after: dict[int, set[int]], start: int) -> list[int]:
    """Nodes after all that follow them."""
    found: list[int] = []
    seen = {start}
    stack = [(start, iter(sorted(after[start])))]
    while stack:
        node, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            found.append(node)
            stack.pop()
        elif following not in seen:
            seen.add(following)
            stack.append((following, iter(sorted(after[following]))))
    return found


def _predicated(sass: str) -> set[int]:
    return {int(at, 16) for at in re.findall(r"/\*([0-9a-f]{4,})\*/\s+@", sass)}


def _blocks(lines: Sequence[tuple[int, str, str, str]], predicated: set[int]) -> dict[int, _Block]:
    at = {address: i for i, (address, *_) in enumerate(lines)}
    jumps: dict[int, int] = {}
    for address, op, suffix, rest in lines:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest.strip())
        if op == "BRA" and "DIV" not in suffix and target and int(target[1], 16) in at:
            jumps[address] = int(target[1], 16)
    # BRA.DIV leaves for what warps do whose threads have parted; ours have not.
    ends = {address for address, op, suffix, _ in lines if op in ("BRA", "EXIT", "RET", "BRX") and "DIV" not in suffix}
    starts = {lines[0][0], *jumps.values()} | {lines[i + 1][0] for i, (address, *_) in enumerate(lines[:-1]) if address in ends}
    blocks: dict[int, _Block] = {}
    for i, line in enumerate(lines):
        if line[0] in starts:
            current = blocks[line[0]] = _Block(line[0], [], [])
        current.instructions.append(line)
        last = i + 1 == len(lines) or lines[i + 1][0] in starts
        if not last:
            continue
        address, op = line[0], line[1]
        conditional = address in predicated or (op == "BRA" and ("DIV" in line[2] or re.match(r"\s*!?U?P", line[3]) is not None))
        if address in jumps:
            current.next.append(jumps[address])
        if (op not in ("BRA", "EXIT", "RET", "BRX") or conditional) and i + 1 < len(lines):
            current.next.append(lines[i + 1][0])
    return blocks


def _reached(blocks: dict[int, _Block]) -> set[int]:
    found, todo = set(), [min(blocks)]
    while todo:
        first = todo.pop()
        if first not in found:
            found.add(first)
            todo += blocks[first].next
    return found


def _loops(blocks: dict[int, _Block]) -> dict[int, set[int]]:
    """By its head, the blocks of every natural loop."""
    reached = _reached(blocks)
    before: dict[int, list[int]] = {first: [] for first in reached}
    for first in reached:
        for after in blocks[first].next:
            before[after].append(first)
    entry = min(blocks)
    dominators = {first: set(reached) for first in reached} | {entry: {entry}}
    changed = True
    while changed:
        changed = False
        for first in sorted(reached - {entry}):
            found = set.intersection(*(dominators[p] for p in before[first])) | {first}
            changed |= found != dominators[first]
            dominators[first] = found
    bodies: dict[int, set[int]] = {}
    for first in reached:
        for head in blocks[first].next:
            if head in dominators[first] and (head != first or len(blocks[first].instructions) > 1):
                body = bodies.setdefault(head, {head})
                todo = [first]
                while todo:
                    one = todo.pop()
                    if one not in body:
                        body.add(one)
                        todo += before[one]
    return bodies


def _code(instructions: Sequence[tuple[int, str, str, str]]) -> Code:
    pipes: Counter[str] = Counter()
    widest = 0
    count: Counter[str] = Counter(op for _, op, *_ in instructions)
    for _, op, suffix, _ in instructions:
        if op == "NOP":
            continue
        pipes["issue"] += 1
        pipe = _PIPES_BY_NAME.get(op, "alu")
        if pipe != "none" and not (op.startswith("U") and pipe == "alu"):  # the uniform datapath is a pipe of its own
            pipes[pipe] += 1
        if op in ("LDG", "LD"):
            widest = max(widest, *(int(b) // 8 for b in re.findall(r"\.(128|64|32|16)\b", suffix)), 4)
    stores = count["STG"] + count["ST"] + count["RED"] + count["REDG"]
    shared = count["LDS"] + count["STS"] + count["ATOMS"]
    loads = count["LDG"] + count["LD"]
    return Code(dict(pipes), count["BAR"], count["UCGABAR_WAIT"], loads, stores, shared, count["SHFL"], widest)


def as_json(kernel: Kernel) -> dict[str, Any]:
    """A kernel as plain data."""
    code = lambda c: {**c._asdict(), "pipes": dict(sorted(c.pipes.items()))}
    return {**kernel._asdict(), "once": code(kernel.once), "loops": [code(c) for c in kernel.loops], "depths": list(kernel.depths)}


def from_json(data: dict[str, Any]) -> Kernel:
    """The kernel of :func:`as_json`."""
    return Kernel(
        data["name"], data["registers"], data["shared"], Code(**data["once"]), tuple(Code(**c) for c in data["loops"]),
        tuple(data["depths"]),
    )  # fmt: skip


def demangled(name: str) -> str:
    """A C++ function with its template arguments, without namespaces and parameters."""
    found = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|v2drop::", "", found).removeprefix("void ")
