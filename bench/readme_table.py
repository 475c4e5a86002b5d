"""The tables of measured results in README.md and docs/results, made from the CSV files; no figure is typed by hand.

``python bench/readme_table.py`` prints them. ``--write`` puts each between its markers ``<!-- NAME:begin -->`` and
``<!-- NAME:end -->`` in the file that :data:`FILES` gives, and ``--check`` fails where a file differs from the CSV files. The GPU
part comes from every folder of bench/results that holds an ``env.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import gpu_report
from tables import Row, conditions, duration, read, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
HEADLINE, SUMMARY, TABLE, OTHERS, SLOWER = "headline", "results", "bench", "others", "slower"
ACCURACY, MODEL, GPU = "accuracy", "model", "gpu"
FILES = {
    HEADLINE: "README.md",
    SUMMARY: "README.md",
    TABLE: "docs/results/cpu.md",
    OTHERS: "docs/results/cpu.md",
    SLOWER: "docs/results/cpu.md",
    ACCURACY: "docs/results/accuracy.md",
    MODEL: "docs/results/model.md",
    GPU: "docs/results/gpu.md",
}
COMMAND = "make bench"
WIDTH = 110  # columns of a line outside of tables


def targets_table(rows: list[Row], asserted: bool) -> str:
    """The ratios: what was compared, the measured value, and the target."""
    lines = []
    for row in rows:
        if (row["asserted"] == "yes") != asserted:
            continue
        unit = " us" if row["unit"] == "us" else ""
        value = f"{float(row['value']):.2f}{unit}" if row["value"] else "-"
        limit = f"{row['limit']}{unit}" if row["limit"] else "-"
        times = [f"{row[side]} {duration(row[f'{side}_min_us'])}" if row[f"{side}_min_us"] else "-" for side in ("a", "b")]
        lines.append([row["target"], row["case"], row["threads"], *times, value, limit, row["status"]])
    return table(["ratio", "case", "threads", "A", "B", "value", "target", "result"], lines)


def drop_table(rows: list[Row]) -> str:
    """``drop_tokens`` on every shape: time, bandwidth, share of a copy, and how many times faster than the others."""
    others = {
        "eager": "eager",
        "eager-out": "eager, preallocated",
        "compile-out": "torch.compile",
        "v2drop": "V2Drop's code",
    }
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["op"] == "drop" and row["median_us"]:
            found.setdefault(tuple(row[c] for c in ("B", "N", "D", "k", "threads", "mode")), {})[row["provider"]] = row
    lines = []
    for (b, n, d, k, threads, cache), by in found.items():
        if "native" not in by:
            continue
        ours = by["native"]
        line = [f"[{b}, {n}, {d}], k = {k}", threads, cache, duration(ours["median_us"]), f"{float(ours['gb_s']):.0f}"]
        line.append(f"{100 * float(ours['copy_share']):.0f} %" if ours["copy_share"] else "-")
        for name in others:
            line.append(f"{float(by[name]['median_us']) / float(ours['median_us']):.1f}x" if name in by else "-")
        lines.append(line)
    head = [
        "drop_tokens, bfloat16",
        "threads",
        "cache",
        "median",
        "GB/s",
        "of a copy",
        *(f"over {about}" for about in others.values()),
    ]
    return table(head, lines)


def cpu(folder: Path) -> str:
    """The tables of docs/results/cpu.md."""
    results, targets = read(folder / "results.csv"), read(folder / "targets.csv")
    if any(row["run"] != "full" for row in [*results, *targets]):
        raise SystemExit(f"{folder} does not hold a full, gated measurement")
    return "\n\n".join(
        [
            drop_table(results),
            paragraph(
                f"Medians of `{COMMAND}`. GB/s counts 2 N D E + 2 k D E bytes per item; a copy of as many bytes is 100 %. Cold "
                "inputs come from DRAM, warm ones from the last-level cache. Freed pages are reused for all candidates. The ratios "
                "that have a target (minima of calls taken in turns, one thread):"
            ),
            targets_table(targets, asserted=True),
            paragraph(
                f"Measured on {conditions(results[0])}. Every shape, op and provider: "
                "[bench/results/cpu](../../bench/results/cpu/report.md)."
            ),
        ]
    )


def others(folder: Path) -> str:
    """The ratios of the other ops, on one thread: one table per file, with its conditions."""
    parts = []
    for name, suite in (("Attention scores and norms", "attention"), ("`soft_topk`", "soft_topk"), ("Merging", "merge")):
        rows = [row for row in read(folder / f"{suite}.csv") if row["threads"] == "1" and row["value"]]
        lines = []
        for row in rows:
            verdict = {"pass": "met", "fail": "missed", "reported": "-"}[row["status"]]
            times = [f"{row[side]} {duration(row[f'{side}_min_us'])}" for side in ("a", "b")]
            lines.append([row["target"], row["case"], *times, f"{float(row['value']):.2f}", row["limit"] or "-", verdict])
        gate = "without the noise gate, on " if rows[0]["run"] == "ungated" else "on "
        parts += [
            f"### {name}",
            table(["ratio", "case", "A", "B", "value", "target", "result"], lines),
            paragraph(
                f"Measured {gate}{conditions(rows[0])}. Every row: "
                f"[bench/results/cpu/{suite}.csv](../../bench/results/cpu/{suite}.csv)."
            ),
        ]
    return "\n\n".join(parts)


def slower(folder: Path) -> str:
    """Every op beside the shortest plain PyTorch: for each size the higher ratio of both batches, then the other shapes."""
    rows = [row for row in read(folder / "never_slower.csv") if row["value"]]
    sizes = ("16", "64", "576", "6272", "65536")
    by_op: dict[str, dict[str, list[Row]]] = {}
    rest = []
    for row in rows:
        shape = row["case"].strip("[]").split(", ")
        if row["case"].endswith("]") and shape[1] in sizes and "channel" not in row["op"]:
            by_op.setdefault(row["op"], {}).setdefault(shape[1], []).append(row)
        else:
            times = [duration(row[f"{side}_min_us"]) for side in ("a", "b")]
            rest.append([f"{row['op']}, {row['case']}", *times, _ratio([row])])
    lines = [[op, next(iter(by.values()))[0]["what"], *(_ratio(by.get(n, [])) for n in sizes)] for op, by in by_op.items()]
    passed = sum(row["status"] == "pass" for row in rows)
    return "\n\n".join(
        [
            paragraph(f"Of {len(rows)} rows {passed} are within their limit, which is 1.0 from 576 rows on and 1.3 below."),
            table(["time over that of PyTorch", "the PyTorch", *(f"N = {n}" for n in sizes)], lines),
            table(["other shapes", "ours", "PyTorch", "ratio"], rest),
            paragraph(
                "The ratio of minima of calls in turns on one thread, in float32, the higher one of batches 1 and 32; bold: over "
                "the limit. Rows have 1024 channels, or fewer where a tensor would exceed 64 MB (at least 8); every width is in "
                "[bench/results/cpu/never_slower.csv](../../bench/results/cpu/never_slower.csv). Measured without the noise gate, "
                f"on {conditions(rows[0])}."
            ),
        ]
    )


def _ratio(rows: list[Row]) -> str:
    if not rows:
        return "-"
    worst = max(rows, key=lambda row: float(row["value"]))
    missed = any(row["status"] == "fail" for row in rows)
    return f"**{float(worst['value']):.2f}**" if missed else f"{float(worst['value']):.2f}"


def paragraph(text: str) -> str:
    """Text in lines of at most :data:`WIDTH` columns."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def asserted(rows: Iterable[Row], target: str) -> Row:
    """The first ratio of this name that has a target and a value."""
    for row in rows:
        if row["target"] == target and row["asserted"] == "yes" and row["value"]:
            return row
    raise SystemExit(f"there is no valid figure for {target!r}")


def headline(folder: Path) -> str:
    """The README's first figure, with its conditions."""
    row = asserted(read(folder / "targets.csv"), "drop_tokens over plain eager, image")
    cpu, ours = row["machine"].split(";")[0], duration(row["a_min_us"])
    return paragraph(
        f"On one CPU core ({cpu}) the drop step for one LLaVA-1.5 image takes **{ours}**, "
        f"**{float(row['value']):.1f} times** as fast as eager PyTorch ({row['case']}, minima of calls in turns, `{COMMAND}`)."
    )


def summary(results: Path) -> str:
    """The README's six rows, misses included."""
    ratios = [
        ("drop_tokens over plain eager", "`drop_tokens`, times as fast as eager PyTorch"),
        ("drop_tokens over torch.compile, preallocated", "`drop_tokens`, times as fast as `torch.compile`"),
        ("drop_tokens against a memcpy of the same bytes", "`drop_tokens`, time over that of a memcpy of the same bytes"),
        ("score against a read-only sum of the same bytes", "`variation_score`, time over that of reading its inputs"),
        ("attention_score against reading the keys once", "`attention_score`, time over that of reading the keys"),
    ]
    rows = [*read(results / "cpu" / "targets.csv"), *read(results / "cpu" / "attention.csv")]
    lines = []
    for target, what in ratios:
        row = asserted(rows, target)
        verdict = {"pass": "met", "fail": "**missed**"}[row["status"]]
        lines.append([what, row["case"], f"{float(row['value']):.2f}", row["limit"], verdict])
    costs = {row["method"]: row for row in read(results / "policies" / "llava" / "policies.csv")}
    row = costs["variation L2"]
    lines.append(
        [
            "prefill of a narrow LLaVA with V2Drop, times as fast as undropped",
            f"{row['average_tokens']} of {costs['nothing dropped']['average_tokens']} tokens per block",
            f"{float(row['speedup']):.2f}",
            f"{float(row['predicted']):.2f} by FLOPs",
            "-",
        ]
    )
    rows = read(results / "accuracy" / "tiny_vlm" / "accuracy.csv")
    progressive = [row for row in rows if not row["shape"] or (row["shape"], row["positions"]) == ("progressive", "persistent")]
    found: dict[str, list[float]] = {}
    for row in progressive:
        if row["budget"] in ("", "33.0"):
            found.setdefault(row["policy"], []).append(float(row["accuracy"]))
    right = {policy: f"{statistics.fmean(values):.1f} %" for policy, values in found.items()}
    return "\n\n".join(
        [
            table(["on one CPU thread", "case", "measured", "target", "result"], lines),
            paragraph(
                "Accuracy depends on model and method. On the small trained model of `examples/tiny_vlm`, at 33 % of the tokens "
                f"from the first drop on, the share of correct answers is {right['variation L2']} with V2Drop's L2 ranking, "
                f"{right['random']} with a random one, {right['last-token attention']} with last-token attention, and "
                f"{right['none']} undropped. "
                "[All results](docs/results/accuracy.md)."
            ),
        ]
    )


def accuracy(results: Path) -> str:
    """Every method at a budget of 33 %, the best first."""
    rows = [row for row in read(results / "accuracy" / "tiny_vlm" / "accuracy.csv") if row["budget"] in ("", "33.0")]
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["policy"], row["shape"], row["positions"]), []).append(row)
    mean = lambda group, column: statistics.fmean(float(row[column]) for row in group)
    lines = [
        [
            policy,
            shape or "-",
            f"{positions} ids" if positions else "-",
            f"{mean(group, 'accuracy'):.1f}",
            f"{mean(group, 'agreement'):.1f}",
        ]
        for (policy, shape, positions), group in sorted(found.items(), key=lambda item: -mean(item[1], "accuracy"))
    ]
    return "\n\n".join(
        [
            table(["ranking", "shape", "position ids", "accuracy, %", "agreement with the undropped model, %"], lines),
            paragraph(
                f"Random rankings are means over their seeds. Measured on {conditions(rows[0])}, by `python bench/accuracy`."
            ),
        ]
    )


def model(results: Path) -> str:
    """Prefill of the narrow LLaVA with each preset, from the raw output of the model level."""
    lines = []
    for threads, name in (("1", "cpu-1-thread.txt"), ("2", "cpu-2-threads.txt")):
        for line in (results / "model" / name).read_text().splitlines():
            cells = line.split()
            if (
                len(cells) == 14 and cells[0].startswith("LLaVA") and cells[5] == "1"
            ):  # a schedule, no token generated after the first
                _, policy, schedule, _, _, _, prefill, _, cache, tokens, speedup, _, predicted, reached = cells
                lines.append(
                    [
                        f"{policy}, {schedule}",
                        threads,
                        tokens,
                        f"{float(prefill):.0f} ms",
                        f"{speedup}x",
                        f"{predicted}x",
                        reached,
                        f"{cache} MB",
                    ]
                )
    head = ["ranking, schedule", "threads", "tokens per block", "prefill", "speed-up", "by FLOPs", "reached", "KV cache"]
    return table(head, lines)


def gpus(folder: Path) -> str:
    """Every GPU that was measured, or that none was."""
    found = sorted(path.parent for path in folder.glob("*/env.json"))
    if not found:
        return "There are no GPU results yet: nothing has been run on a GPU."
    return "\n\n".join(gpu_report.readme(path) for path in found)


def updated(text: str, inner: str, name: str = TABLE) -> str:
    """A file's text with new text between the markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{FILES.get(name, 'the file')} needs one {begin} and, after it, one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{inner}\n{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with results.csv and targets.csv")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with README.md and docs/results")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="put the tables into README.md and docs/results")
    what.add_argument("--check", action="store_true", help="exit with 1 where a file does not hold its table")
    options = parser.parse_args(arguments)
    table_of_cpu = cpu(options.results)  # first: it refuses a measurement that is not full
    inner = {
        HEADLINE: headline(options.results),
        SUMMARY: summary(options.results.parent),
        TABLE: table_of_cpu,
        OTHERS: others(options.results),
        SLOWER: slower(options.results),
        ACCURACY: accuracy(options.results.parent),
        MODEL: model(options.results.parent),
        GPU: gpus(options.results.parent),
    }
    if not (options.write or options.check):
        print(*inner.values(), sep="\n\n")
        return 0
    differ = False
    for name, text in inner.items():
        path = options.root / FILES[name]
        old = path.read_text()
        new = updated(old, text, name)
        if options.write:
            path.write_text(new)
        elif new != old:
            differ = True
            print(f"{path} differs from {options.results.parent}: run python bench/readme_table.py --write", file=sys.stderr)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
