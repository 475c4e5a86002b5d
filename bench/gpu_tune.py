"""Find launch sizes for the GPU that is here, and which launch mode and backend is fastest where: ``bench/gpu_check.sh --tune``.

Every candidate is one entry of the table that v2drop_kernels/backends/configs.py reads; it is timed in a captured graph, in turns
with the rule that holds without a table, after its result equalled the reference's. Into the folder ``tune`` beside the results
go results.csv (every time), tuned.json (the entries that gain at least 2 %) and tune.md, which also says where CUDA C++ is faster
than Triton and where one launch beats two. Nothing of it is applied by itself: ``python bench/gpu_tune.py --ship FOLDER`` merges
the table of a folder into the package's. A run that is cut leaves what it has.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_report
import torch
from gpu_build import Build
from gpu_candidates import Candidate, ours, run_drop
from gpu_checks import EXACT, kept
from gpu_inputs import FP32, QUARTER, rotations, tiny
from gpu_launch_sizes import OPS, Entries, builder, key_of, under, values_of
from gpu_measure import Check
from gpu_options import begin, environment
from gpu_outcomes import Outcomes
from gpu_registry import Group
from gpu_targets import Times
from gpu_timer import HostTimer
from harness import ROOT
from registry import Case, moved_bytes
from schema import RESULTS
from tables import duration, table

SHIPPED = ROOT / "v2drop_kernels" / "backends" / "tuned.json"
LEAST_GAIN = 1.02  # less is noise, and a table of noise would be long
SHAPES = [Case(b, n, d, QUARTER) for n, d in ((576, 4096), (6272, 3584), (65536, 4096)) for b in (1, 8, 32)]


def sweeps() -> list[tuple[str, list[Case]]]:
    """Kinds with the cases that share a key, most important first; the number of launches comes after the sizes it rests on."""
    wide = [Case(1, -(-256_000_000 // (2 * d * 2)), d, QUARTER) for d in (2560, 5120, 8192)]
    full = [Case(1, -(-256_000_000 // (2 * d * 4)), d, QUARTER, FP32) for d in (4096, 3584)]
    few = [case for case in SHAPES if case.n <= 8192]
    return [
        ("score", [case for case in SHAPES[:7] if case.d == 4096]),
        ("score", [case for case in SHAPES[:7] if case.d == 3584]),
        *(("select", [case for case in SHAPES if case.n == n]) for n in (576, 6272, 65536)),
        *(("wide", [case]) for case in SHAPES if case.n > 2048),
        *(("fused", [case for case in few if case.n == n and case.batch < 32]) for n in (576, 6272)),
        *(("gather", cases) for cases in by_key("gather", SHAPES[:7])),
        *(("launches", [case]) for case in few),
        *(("score", [case]) for case in (*wide, *full)),
    ]


def by_key(kind: str, cases: Sequence[Case]) -> list[list[Case]]:
    found: dict[tuple[int, ...], list[Case]] = {}
    for case in cases:
        found.setdefault(tuple(key_of(kind, case).values()), []).append(case)
    return list(found.values())


def best(times: Sequence[Times]) -> tuple[str, float]:
    """The candidate that was timed on every case with the largest geometric mean of gains over the rule, and that mean."""
    if not times or any("triton" not in t for t in times):
        raise KeyError("the rule has no time")
    common = [name for name in times[0] if all(name in t for t in times)]
    gains = {name: math.prod(t["triton"] / t[name] for t in times) ** (1 / len(times)) for name in common}
    name = max(gains, key=lambda n: gains[n])
    return name, gains[name]


# --- launch modes of CUDA C++, and the backends side by side


def versus(chosen: Entries, case: Case, timer: HostTimer) -> list[Candidate]:
    """Both backends as they are, every launch mode of CUDA C++, and Triton with what was chosen."""
    xs = rotations(case, timer)
    run, check = functools.partial(run_drop, case.k), kept(xs[0], EXACT)
    made = ours(case, timer, xs, run, check, launch_modes=True)
    mine = next(c for c in made if c.name == "triton")
    return [*made, mine._replace(name="triton-tuned", calls=[functools.partial(under, chosen, c) for c in mine.calls])]


def rivals() -> list[Case]:
    """Where the choice is close, beside the shapes of the model: around one wave of rows, and up to 2048 competing rows."""
    close = [Case(b, 576, 4096, QUARTER) for b in (2, 3, 4)]
    more = [Case(b, n, 4096, QUARTER) for n in (1024, 2048) for b in (1, 8)]
    return [*SHAPES[:5], *close, *more, SHAPES[6], SHAPES[5], *SHAPES[7:]]


# --- the run and what it leaves


class Tuning:
    """What was found so far, and its files."""

    def __init__(self, check: Check, measured: Mapping[str, Any]) -> None:
        self.check, self.measured = check, measured
        self.entries: Entries = {}
        self.lines: list[list[str]] = []  # of the table of sweeps
        self.sides: list[tuple[Case, dict[str, Times]]] = []
        self.late: list[str] = []

    def sweep(self, kind: str, cases: Sequence[Case]) -> None:
        """Try all candidates of a key, and keep the best if it gains enough."""
        build, times = builder(kind, dict(self.entries)), []
        for case in cases:
            found = {} if self.check.late() else self.check.do(self.group(f"tune {kind} {case}", OPS[kind], case, build))
            if not found:
                self.late.append(f"{kind} {case}")
                return
            times.append(found["cold"])
        key = key_of(kind, tiny(cases[0]) if self.check.dry else cases[0])
        words = [kind, ", ".join(f"{k} {v}" for k, v in key.items()), str(len(times[0]))]
        try:
            name, gain = best(times)
        except KeyError as error:
            self.lines.append([*words, "-", "-", str(error.args[0])])
            return
        taken = name != "triton" and gain >= LEAST_GAIN
        if taken:
            self.entries.setdefault(kind, []).append({**key, **values_of(name), "gain": round(gain, 3)})
        self.lines.append([*words, name.removeprefix("triton@"), f"{gain:.2f}x", "in the table" if taken else "the rule stays"])

    def group(self, name: str, op: str, case: Case, build: Any, modes: tuple[str, ...] = ("cold",)) -> Group:
        # Inputs, what the reference makes of them to compare with, results in as many graphs as there are candidates.
        needs = 2 * case.input_bytes + 8 * case.batch * case.k * case.row_bytes if op in ("score", "drop") else 0
        return Group(name, op, case, build, modes, (), moved_bytes(op, case), needs)

    def compare(self, case: Case) -> None:
        build = functools.partial(versus, dict(self.entries))
        found = {} if self.check.late() else self.check.do(self.group(f"versus {case}", "drop", case, build, ("cold", "eager")))
        if found:
            self.sides.append((case, found))
        else:
            self.late.append(f"versus {case}")

    def write(self) -> None:
        """tuned.json and tune.md, as far as things are known."""
        device = self.check.conditions["gpu"]
        about = "Launch sizes of the Triton kernels by device name, written by bench/gpu_check.sh --tune and read by configs.py"
        text = dumps({"about": about, "devices": {device: {"measured": dict(self.measured), **self.entries}}})
        (self.check.out / "tuned.json").write_text(text)
        parts = [
            f"# Tuning: {device}",
            ", ".join(f"{name} {value}" for name, value in self.measured.items()),
            "Gain: how many times faster than the rule without a table, geometric mean over the cases of the key, GPU time of a "
            f"graph over rotated inputs. {LEAST_GAIN}x makes an entry of tuned.json; all results equalled the reference's.",
            table(["kernel", "key", "candidates", "best", "gain", "outcome"], self.lines) if self.lines else "Nothing yet.",
            "## Triton and CUDA C++",
            self.backends(),
            "## Launch modes of CUDA C++",
            self.launch_modes(),
            f"Not reached, or without a result: {', '.join(self.late)}." if self.late else "",
        ]
        (self.check.out / "tune.md").write_text("\n\n".join(filter(None, parts)) + "\n")

    def backends(self) -> str:
        """The dispatch rule that the figures suggest."""
        lines, faster = [], {"cuda": [], "triton": []}
        for case, modes in self.sides:
            line = [str(case)]
            for mode in ("cold", "eager"):
                t = modes.get(mode, {})
                sides = {s: min((v for n, v in t.items() if n in names), default=math.nan) for s, names in (
                    ("triton", ("triton", "triton-tuned")), ("cuda", ("cuda",)),
                )}  # fmt: skip
                ratio = sides["triton"] / sides["cuda"]
                line += [_us(sides["triton"]), _us(sides["cuda"]), "-" if math.isnan(ratio) else f"{ratio:.2f}"]
                if mode == "cold" and not math.isnan(ratio) and not 1 / LEAST_GAIN < ratio < LEAST_GAIN:
                    faster["cuda" if ratio > 1 else "triton"].append(str(case))
            lines.append(line)
        if not lines:
            return "Not measured."
        rule = "; ".join(f"{side} was faster in GPU time at {', '.join(cases) or 'no shape'}" for side, cases in faster.items())
        head = ["drop_tokens", "Triton", "CUDA C++", "ratio", "Triton, wall", "CUDA C++, wall", "ratio"]
        return f"{table(head, lines)}\n\nSuggested rule of dispatch, not applied: {rule}; elsewhere they are within 2 %."

    def launch_modes(self) -> str:
        """Where one launch beats two, two beat three: what csrc/core/tuning_cuda.h decides by size."""
        lines, wins, losses = [], [], []
        for case, modes in self.sides:
            t = modes.get("cold", {})
            names = [f"cuda-{mode}" for mode in ("cooperative", "fused", "separate")]
            if any(name in t for name in names):
                fastest = min((n for n in names if n in t), key=lambda n: t[n])
                lines.append([str(case), *(_us(t.get(n, math.nan)) for n in names), fastest.removeprefix("cuda-")])
                if names[0] in t:
                    (losses if fastest == names[2] else wins).append(case.input_bytes // 2)
        if not lines:
            return "Not measured."
        mib = lambda sizes, pick: f"{pick(sizes) / 2**20:.1f} MiB" if sizes else "no size tried"
        head = ["drop_tokens", "cooperative", "fused", "separate", "fastest"]
        return (
            f"{table(head, lines)}\n\nSuggested kSmallBytes, not applied: one or two launches won up to {mib(wins, max)} of one "
            f"hidden state, and three from {mib(losses, min)} on."
        )


def _us(seconds: float) -> str:
    return "-" if math.isnan(seconds) else duration(str(seconds * 1e6))


def dumps(tables: Mapping[str, Any]) -> str:
    """JSON with one line for an entry."""
    lines = [f' "about": {json.dumps(tables["about"])},', ' "devices": {']
    for i, (device, kinds) in enumerate(tables["devices"].items()):
        inner = []
        for kind, entries in kinds.items():
            listed = ",\n".join(f"    {json.dumps(e)}" for e in entries) if kind != "measured" else ""
            inner.append(f"   {json.dumps(kind)}: " + (f"[\n{listed}\n   ]" if listed else json.dumps(entries)))
        comma = "," if i + 1 < len(tables["devices"]) else ""
        lines.append(f"  {json.dumps(device)}: {{\n" + ",\n".join(inner) + f"\n  }}{comma}")
    return "\n".join(["{", *lines, " }", "}"]) + "\n"


def ship(folder: Path, to: Path = SHIPPED) -> None:
    """Merge the measured table of a folder into the package's; the entries of its device are replaced."""
    from v2drop_kernels.backends import configs

    new = json.loads((folder / "tuned.json").read_text())
    old = json.loads(to.read_text()) if to.exists() else {"devices": {}}
    for device, kinds in new["devices"].items():
        if kinds["measured"].get("run") != "full":
            raise SystemExit(f"{folder} holds no measurement of a GPU")
        configs.parse(kinds, f"{folder}: {device}")
    to.write_text(dumps({"about": new["about"], "devices": {**old["devices"], **new["devices"]}}))


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--ship"] and len(given) == 2:
        ship(Path(given[1]))
        return 0
    options, timer, out, deadline = begin(__doc__, given)
    if not options.dry and options.build != "none":
        major, minor = torch.cuda.get_device_capability(0)
        build = Build(f"{major}{minor}", ["-DV2DROP_CUDA=ON"])
        build.wait(deadline - time.monotonic())
        print(f"build: {build.note}", flush=True)
    out = out / "tune"
    out.mkdir(exist_ok=True)
    env = environment(timer, f"bench/gpu_check.sh --tune --minutes {options.minutes:g}")
    run = "dry" if options.dry else "full"
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    measured = {"run": run, **{name: env[name] for name in ("date", "commit", "command")}, "versions": versions}
    # The tests of a check before this one, if there was one, forbid figures here as well.
    check = Check(out, timer, Outcomes(out.parent / "tests.jsonl"), deadline, run, {"results.csv": RESULTS})
    tuning = Tuning(check, measured)
    start = time.monotonic()
    for kind, cases in sweeps():
        if time.monotonic() - start > 0.7 * (deadline - start):  # the comparison of launch modes and backends gets the rest
            tuning.late.append(f"{kind} {', '.join(map(str, cases))}")
            continue
        tuning.sweep(kind, cases)
        tuning.write()
    for case in rivals():
        tuning.compare(case)
        tuning.write()
    gpu_report.rewrite(out.parent)
    print(f"{out}: tuned.json, tune.md; {check.broken} broken", flush=True)
    return 1 if check.broken else 0


if __name__ == "__main__":
    sys.exit(main())
