"""Measure and write it down: ``make bench``, or ``python bench/run.py --device gpu`` for what ``make gpu-check`` does.

On the CPU first the targets (targets.py), then the suite (suite.py), then every op beside plain PyTorch (never_slower.py), all in
this process. Five files come of it: targets.csv, results.csv, never_slower.csv, report.md and roofline.png. Takes about twelve
minutes; nothing else should run meanwhile. ``--suite NAME`` measures the attention scores, the merges, soft_topk, what threads
bring or never_slower alone, into NAME.csv. On a GPU all further arguments are those of gpu_check.py.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import harness
import never_slower
import readme_table
import schema
import suite
import tables
import targets
import torch
from providers import providers
from registry import OPS

SUITES = ("attention", "merge", "soft_topk", "threads", "never_slower")  # targets_NAME lists the targets of each but the last


def measure_targets(
    path: Path, run: str, chosen: Callable[[bool], Iterable[targets.Target[Any]]] = targets.targets
) -> tuple[bool, int]:
    """All targets to ``path``; whether every asserted one passed, and how many results were wrong."""
    dry = run == "dry"
    gate = harness.NoiseGate(math.inf if run == "ungated" else 0.10, **harness.DRY_GATE if dry else {})
    conditions = harness.conditions(run)
    passed, wrong = True, 0
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, schema.TARGETS, restval="", lineterminator="\n")
        out.writeheader()
        for target in harness.progress(chosen(dry), "targets"):
            row = targets.measure(target, gate, dry)
            out.writerow({**row, **conditions})
            passed &= not target.asserted or row["status"] == "pass"
            wrong += row["status"].startswith("wrong")
            print(f"{row['status']:>8}  {row['target']}, {row['case']}, {row['threads']} thread(s): {_words(row)}", flush=True)
    return passed, wrong


def _words(row: dict[str, Any]) -> str:
    if row["value"] == "":
        return "no number"
    asked = f" (asked {row['limit']})" if row["limit"] else ""
    return (
        f"{row['value']}{' us' if row['unit'] == 'us' else ''}{asked}; {row['a']} {row['a_min_us']:.6g} us, {row['b']} "
        f"{row['b_min_us']:.6g} us; {row['quiet_attempts']} of {row['attempts']} attempts quiet"
    )


def roofline(rows: list[tables.Row]) -> str:
    """Every op, shape and provider: bytes, time, GB/s and the share of the copy beside it."""
    lines = []
    for row in rows:
        shape = f"[{row['B']}, {row['N']}, {row['D']}], k = {row['k']}"
        start = [f"{row['op']}, {row['provider']}", shape, row["threads"], row["mode"], f"{float(row['bytes']) / 1e6:.4g}"]
        if not row["median_us"]:
            lines.append([*start, row["check"], "-", "-", "-", "-"])
            continue
        spread = f"{tables.duration(row['p20_us'])} to {tables.duration(row['p80_us'])}"
        share = f"{100 * float(row['copy_share']):.0f} %" if row["copy_share"] else "-"
        lines.append([*start, tables.duration(row["median_us"]), spread, row["gb_s"], share, row["quiet"]])
    head = ["op, provider", "hidden", "threads", "cache", "MB", "median", "p20 to p80", "GB/s", "of a copy", "quiet"]
    return tables.table(head, lines)


def plot(rows: list[tables.Row], path: Path) -> None:
    """GB/s over bytes: this package, the other providers, and the copy that is the roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "copy": ("0.6", "--", ""), "native": ("tab:blue", "-", "o"), "triton": ("tab:cyan", "-", "o"),
        "compile-out": ("tab:green", ":", "s"), "eager-out": ("tab:orange", ":", "^"), "eager-out-lean": ("tab:olive", ":", "v"),
        "eager": ("tab:red", ":", "x"), "v2drop": ("tab:purple", ":", "+"),
    }  # fmt: skip
    figure, axes = pyplot.subplots(1, len(OPS), figsize=(14, 4), sharey=True)
    for axis, op in zip(axes, OPS, strict=True):
        for name, (colour, line, marker) in styles.items():
            mine = [r for r in rows if r["op"] == op and r["provider"] == name and r["threads"] == "1" and r["median_us"]]
            mine = [r for r in mine if op == "select" or r["mode"] == "cold"]
            points = sorted((float(r["bytes"]), float(r["gb_s"])) for r in mine)
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linestyle=line, marker=marker, markersize=5, label=name)
        axis.set(xscale="log", yscale="log", xlabel="bytes that must move", title=op)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s of those bytes, one thread")
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def report(folder: Path, memory: str, seconds: float) -> str:
    """report.md, from the two CSV files."""
    results, measured = tables.read(folder / "results.csv"), tables.read(folder / "targets.csv")
    first = measured[0]
    kind = {"dry": ": a dry run on tiny shapes, no measurement", "ungated": ": no noise gate, not to be quoted"}
    noisy = sum(row["quiet"] == "no" for row in results)
    about = {p.name: p.about for op in OPS for p in providers(op).values()}
    used = {row["provider"] for row in results}
    return "\n\n".join(
        [
            f"# CPU measurements{kind.get(first['run'], '')}",
            f"{tables.conditions(first)}. Memory: {memory}. Made by `{readme_table.COMMAND}` in {seconds / 60:.1f} minutes.",
            "## Targets",
            f"Two calls in turns in one process, at least {targets.REPETITIONS} times over at least {targets.SECONDS:g} s, with "
            "the same inputs on every turn; the value is the ratio of the minima (for the host overhead: the median call). An "
            "attempt counts only where a fixed loop of 20 ms ran within 10 % of its best before and after and other processes used "
            f"less than a tenth of a core; up to {targets.ATTEMPTS} attempts, the first quiet one that passes counts. Baselines "
            "named torch, numpy or libc are the fastest of several. A memcpy of the same bytes copies N D E + k D E bytes, so that "
            "it reads and writes as much as the step.",
            readme_table.targets_table(measured, asserted=True),
            "Reported, not asserted:",
            readme_table.targets_table(measured, asserted=False),
            "## drop_tokens",
            readme_table.drop_table(results),
            "## Providers",
            "\n".join(f"- `{name}`: {about[name]}." for name in about if name in used),
            "Every provider's result was compared with `v2drop_kernels.reference` before it was timed; the kept sets of those that "
            "round otherwise may differ only in tokens whose scores round into the cut. A wrong one has no number.",
            "## Roofline",
            "![GB/s over bytes](roofline.png)",
            "Bytes that must move, E bytes per element: score 2 B N D E + 4 B N; select 4 B N + 12 B k; compact 2 B k D E + 8 B k; "
            "drop 2 B N D E + 2 B k D E + 8 B k. The copy reads and writes as many in the same process. Cold: inputs rotated over "
            f"four times the last-level cache. {noisy} of {len(results)} rows were taken while the machine was not quiet.",
            roofline(results),
        ]
    ) + "\n"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    device, arguments = first.parse_known_args(arguments)
    if device.device == "gpu":
        return subprocess.run(["bash", str(harness.ROOT / "bench" / "gpu_check.sh"), *arguments], check=False).returncode
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="what to measure (default: cpu)")
    parser.add_argument("--out", type=Path, help="folder for the results, default bench/results/cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a dry run, not a measurement; needs --out")
    parser.add_argument("--ungated", action="store_true", help="believe noisy attempts too, on a busy machine; needs --out")
    parser.add_argument("--assert", dest="strict", action="store_true", help="exit with 1 where an asserted target does not pass")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--only", choices=["targets", "suite"], help="measure this half; no report")
    half.add_argument("--suite", choices=SUITES, help="measure the targets of another op instead, into NAME.csv; no report")
    options = parser.parse_args(arguments)
    if (options.quick or options.ungated) and options.out is None:
        parser.error("--quick and --ungated need --out: they must not replace measured results")
    run = "dry" if options.quick else "ungated" if options.ungated else "full"
    if os.environ.get("TRITON_INTERPRET") == "1" and not options.quick:
        parser.error("TRITON_INTERPRET=1 would measure Triton's interpreter")
    uncompiled = (None, "threads")  # compilation would take most of the time; a test traces every compiled provider
    if options.quick and options.suite in uncompiled:
        torch.compiler.set_stance("force_eager")
    out = options.out or readme_table.RESULTS
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    memory = harness.recycle_memory()
    passed, broken = True, 0
    # A run that is cut short must not leave half of its files beside those of an older one.
    with tempfile.TemporaryDirectory() as scratch:
        done = Path(scratch)
        if options.suite == "never_slower":
            broken = never_slower.measure_all(done / "never_slower.csv", run)
        elif options.suite:
            chosen = importlib.import_module(f"targets_{options.suite}").targets
            passed, broken = measure_targets(done / f"{options.suite}.csv", run, chosen)
        elif options.only != "suite":
            passed, broken = measure_targets(done / "targets.csv", run)
        if options.only != "targets" and not options.suite:
            broken += suite.measure(done / "results.csv", run)
        if options.only is None and not options.suite:
            if not options.quick:
                broken += never_slower.measure_all(done / "never_slower.csv", run)
            plot(tables.read(done / "results.csv"), done / "roofline.png")
            (done / "report.md").write_text(report(done, memory, time.monotonic() - start))
        for file in sorted(done.iterdir()):
            (out / file.name).write_bytes(file.read_bytes())
            print(out / file.name)
    return 1 if broken or (options.strict and not passed) else 0


if __name__ == "__main__":
    sys.exit(main())
