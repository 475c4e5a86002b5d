"""Find launch sizes for the GPU that is here, and which design and backend is fastest where: ``bench/gpu_check.sh --tune``.

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_report
import torch
from gpu_build import Build
from gpu_candidates import Candidate, eager_gather, ours, run_drop
from gpu_check import begin, environment
from gpu_checks import EXACT, kept, same
from gpu_inputs import FP32, QUARTER, bind, rotations, scaled, tiny
from gpu_measure import Check
from gpu_outcomes import Outcomes
from gpu_registry import Group
from gpu_targets import Times
from gpu_timer import Call, HostTimer
from harness import ROOT
from registry import Case, moved_bytes
from schema import RESULTS
from tables import duration, table
from verify import same_scores

import v2drop_kernels as vk

SHIPPED = ROOT / "v2drop_kernels" / "backends" / "tuned.json"
LEAST_GAIN = 1.02  # less is noise, and a table of noise would be long
WARPS = (1, 2, 4, 8, 16, 32)
SHAPES = [Case(b, n, d, QUARTER) for n, d in ((576, 4096), (6272, 3584), (65536, 4096)) for b in (1, 8, 32)]
Values = dict[str, int]
Entries = dict[str, list[dict[str, Any]]]


# --- candidates


def power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def key_of(kind: str, case: Case) -> Values:
    """The key of an entry that a case is launched with."""
    n, itemsize = power(case.n), case.dtype.itemsize
    return {
        "score": {"itemsize": itemsize, "d": case.d}, "select": {"n": n}, "fused": {"n": n},
        "gather": {"kept": power(case.batch * case.k)}, "launches": {"n": n, "batch": case.batch},
    }[kind]  # fmt: skip


def candidates_of(kind: str, case: Case) -> list[Values]:
    """What to try: sizes around the rule's, whose keys per thread (4 to 32) stay within reason."""
    threads = lambda keys: [w for w in WARPS if 4 <= keys // (32 * w) <= 32] or [1]
    if kind == "score":
        warp = 32 * 16 // case.dtype.itemsize
        made = []
        for shared, warps in ((1, 4), (2, 4), (4, 4), (2, 8), (4, 8), (8, 8), (16, 16)):
            block = min(warp * shared, power(case.d))
            made.append({"rows": min(warps * warp // block, 256), "block_d": block, "num_warps": warps})
    elif kind == "select":
        held = {power(case.n)} if case.n <= 16384 else {4096, 8192, 16384}
        made = [{"keys": k, "block": min(k, b), "num_warps": w} for k in held for w in threads(k) for b in (2048, 4096)]
    elif kind == "fused":
        made = [{"num_warps": w} for w in threads(power(case.n))]
    elif kind == "gather":
        made = [{"rows": r, "programs": p, "items": i} for r in (4, 8, 16) for p, i in ((1024, 8), (2048, 4), (512, 16))]
    else:
        made = [{"launches": 2}, {"launches": 3}]
    rule = rule_of(kind, case)  # tried anyway; a second time it could win by noise
    return [dict(found) for found in dict.fromkeys(tuple(m.items()) for m in made) if dict(found) != rule]


def rule_of(kind: str, case: Case) -> Values:
    """What holds without a table."""
    from v2drop_kernels.backends import configs

    with configs.using({}):
        found = {
            "score": configs.score_tile(case.d, case.dtype.itemsize),
            "select": configs.select_blocks(case.n, False),
            "fused": configs.fused_select_block(case.n, False)[1:],
            "gather": (configs.gather_rows(case.batch * case.k), 1024, 8),
            "launches": (2 if configs.fuses_select(case.n, case.batch) else 3,),
        }[kind]
    return dict(zip(configs.KINDS[kind][1], found, strict=True))


def named(values: Values) -> str:
    return "triton@" + ",".join(f"{name}={value}" for name, value in values.items())


def values_of(name: str) -> Values:
    return {key: int(value) for key, value in (part.split("=") for part in name.removeprefix("triton@").split(","))}


def under(entries: Entries, run: Callable[[], Any]) -> Any:
    """A call with these entries and no others."""
    from v2drop_kernels.backends import configs

    with configs.using(entries):
        return run()


# --- what is launched, per kind


def score(case: Case, timer: HostTimer) -> tuple[list[Call], Any]:
    xs = rotations(case, timer)
    run = lambda x: vk.variation_score(x.h_prev, x.h_cur, backend="triton")
    return bind(run, xs), lambda found: same_scores(found, xs[0].scores.cpu(), EXACT)


def select(case: Case, timer: HostTimer) -> tuple[list[Call], Any]:
    g = torch.Generator(timer.device).manual_seed(0)
    scores = torch.randn(case.batch, case.n, generator=g, device=timer.device)
    run = lambda: vk.segmented_topk(scores, case.k, backend="triton").indices
    return [run], same(vk.segmented_topk(scores, case.k, backend="reference").indices, "indices")


def gather(case: Case, timer: HostTimer) -> tuple[list[Call], Any]:
    g = torch.Generator(timer.device).manual_seed(0)
    keep = torch.rand(case.batch, case.n, generator=g, device=timer.device).topk(case.k).indices.sort().values
    rows = [scaled(case, timer)[1]]
    while len(rows) * case.batch * case.k * case.row_bytes < timer.cold_bytes and len(rows) < 64:
        rows.append(rows[0].clone())
    run = lambda h: vk.compact(keep, h, backend="triton").hidden
    return [functools.partial(run, h) for h in rows], same(eager_gather(rows[0], keep), "copied rows")


def drop(case: Case, timer: HostTimer) -> tuple[list[Call], Any]:
    xs = rotations(case, timer)
    return bind(functools.partial(run_drop, case.k, "triton"), xs), kept(xs[0], EXACT)


LAUNCHED = {"score": score, "select": select, "fused": drop, "gather": gather, "launches": drop}
OPS = {"score": "score", "select": "select", "fused": "drop", "gather": "compact", "launches": "drop"}


def tried(kind: str, chosen: Entries, case: Case, timer: HostTimer) -> list[Candidate]:
    """The rule and its rivals on one case; entries that were chosen before hold for all of them."""
    from v2drop_kernels.backends import choice

    missing = choice.why_not("triton", timer.device.type, case.dtype)
    if missing:
        return [Candidate("triton", missing=missing)]
    calls, check = LAUNCHED[kind](case, timer)
    key = key_of(kind, case)
    fixed = {name: entries for name, entries in chosen.items() if name != kind}
    if kind == "fused":  # its sizes matter where two launches are made
        fixed["launches"] = [{"n": power(case.n), "batch": case.batch, "launches": 2}]
    made = [Candidate("triton", [functools.partial(under, fixed, call) for call in calls], check)]
    for values in candidates_of(kind, case):
        entries = {**fixed, kind: [{**key, **values}]}
        made.append(Candidate(named(values), [functools.partial(under, entries, call) for call in calls], check))
    return made


def builder(kind: str, chosen: Entries) -> Callable[[Case, HostTimer], list[Candidate]]:
    # A function of its own for every kind: a dry run tries each kind once.
    return KINDS[kind](chosen)


def _of(kind: str) -> Callable[[Entries], Callable[[Case, HostTimer], list[Candidate]]]:
    def build(chosen: Entries, case: Case, timer: HostTimer) -> list[Candidate]:
        return tried(kind, chosen, case, timer)

    return lambda chosen: functools.partial(build, chosen)


KINDS = {kind: _of(kind) for kind in LAUNCHED}


def sweeps() -> list[tuple[str, list[Case]]]:
    """Kinds with the cases that share a key, most important first; the choice of design comes after the sizes that it rests on."""
    wide = [Case(1, -(-256_000_000 // (2 * d * 2)), d, QUARTER) for d in (2560, 5120, 8192)]
    full = [Case(1, -(-256_000_000 // (2 * d * 4)), d, QUARTER, FP32) for d in (4096, 3584)]
    few = [case for case in SHAPES if case.n <= 8192]
    return [
        ("score", [case for case in SHAPES[:7] if case.d == 4096]),
        ("score", [case for case in SHAPES[:7] if case.d == 3584]),
        *(("select", [case for case in SHAPES if case.n == n]) for n in (576, 6272, 65536)),
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


# --- designs of CUDA C++, and the backends side by side


def versus(chosen: Entries, case: Case, timer: HostTimer) -> list[Candidate]:
    """Both backends as they are, every design of CUDA C++, and Triton with what was chosen."""
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
            "## Designs of CUDA C++",
            self.designs(),
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

    def designs(self) -> str:
        """Where one launch beats two, two beat three: what csrc/core/tuning_cuda.h decides by size."""
        lines, wins, losses = [], [], []
        for case, modes in self.sides:
            t = modes.get("cold", {})
            names = [f"cuda-{design}" for design in ("cooperative", "fused", "separate")]
            if any(name in t for name in names):
                fastest = min((n for n in names if n in t), key=lambda n: t[n])
                lines.append([str(case), *(_us(t.get(n, math.nan)) for n in names), fastest.removeprefix("cuda-")])
                if names[0] in t:
                    (wins if fastest == names[0] else losses).append(case.input_bytes // 2)
        if not lines:
            return "Not measured."
        mib = lambda sizes, pick: f"{pick(sizes) / 2**20:.1f} MiB" if sizes else "no size tried"
        head = ["drop_tokens", "cooperative", "fused", "separate", "fastest"]
        return (
            f"{table(head, lines)}\n\nSuggested kCooperativeBytes, not applied: cooperative won up to {mib(wins, max)} of one "
            f"hidden state, and lost from {mib(losses, min)} on."
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
        if time.monotonic() - start > 0.7 * (deadline - start):  # the comparison of designs and backends gets the rest
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
