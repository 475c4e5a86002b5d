"""The tables of the measured results, made from the CSV files; nothing is typed by hand.

``python bench/readme_table.py`` prints the README's headline and table, ``--write`` puts them between the README's markers
``<!-- headline:begin -->``, ``<!-- bench:begin -->``, ``<!-- gpu:begin -->`` and their ends, ``--check`` fails where the README
differs from the CSV files. The GPU part comes from all folders of bench/results but that of the CPU.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
HEADLINE, TABLE, GPU = "headline", "bench", "gpu"  # the README's markers are <!-- NAME:begin --> and <!-- NAME:end -->
COMMAND = "make bench"

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, to the right."""
    rows = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def duration(us: str) -> str:
    """Microseconds with a unit and three digits."""
    value, unit = float(us), "us"
    if value >= 1000:
        value, unit = value / 1000, "ms"
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def conditions(row: Row) -> str:
    """One sentence on where and when."""
    return f"{row['machine']}; instruction set {row['isa']}; {row['versions']}; {row['date']}, commit {row['commit']}"


def bars_table(rows: list[Row], asserted: bool) -> str:
    """The bars: what was compared, how it came out, what was asked."""
    lines = []
    for row in rows:
        if (row["asserted"] == "yes") != asserted:
            continue
        unit = " us" if row["unit"] == "us" else ""
        value = f"{float(row['value']):.2f}{unit}" if row["value"] else "-"
        limit = f"{row['limit']}{unit}" if row["limit"] else "-"
        times = [f"{row[side]} {duration(row[f'{side}_min_us'])}" if row[f"{side}_min_us"] else "-" for side in ("a", "b")]
        lines.append([row["bar"], row["case"], row["threads"], *times, value, limit, row["status"]])
    return table(["ratio", "case", "threads", "A", "B", "value", "asked", "result"], lines)


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
            found.setdefault(tuple(row[c] for c in ("B", "N", "D", "k", "threads", "cache")), {})[row["provider"]] = row
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


def readme(folder: Path) -> str:
    """What stands between the markers."""
    results, bars = read(folder / "results.csv"), read(folder / "bars.csv")
    if any(row["run"] != "full" for row in [*results, *bars]):
        raise SystemExit(f"{folder} does not hold a full, gated measurement")
    return "\n\n".join(
        [
            drop_table(results),
            f"Medians of `{COMMAND}`; GB/s counts 2 N D E + 2 k D E bytes per item, a copy of as many is 100 %. Cold inputs come "
            "from DRAM, warm ones from the last-level cache. No side pays page faults for its temporaries. The asserted ratios "
            "(minima of calls in turns, one thread):",
            bars_table(bars, asserted=True),
            f"Measured on {conditions(results[0])}. Everything: [bench/results/cpu](bench/results/cpu/report.md).",
        ]
    )


def headline(folder: Path) -> str:
    """The README's one measured number, with its conditions."""
    name = "drop_tokens over plain eager, image"
    rows = [row for row in read(folder / "bars.csv") if row["bar"] == name and row["asserted"] == "yes"]
    if len(rows) != 1 or not rows[0]["value"]:
        raise SystemExit(f"{folder}/bars.csv has no quiet figure for {name}")
    row = rows[0]
    return (
        f"On one CPU core a whole drop step on one LLaVA image ({row['case']}) takes **{duration(row['a_min_us'])}**, "
        f"**{float(row['value']):.1f} times** faster than the same step in plain PyTorch ({duration(row['b_min_us'])}; "
        f"float32 scores, minima of calls taken in turns, `{COMMAND}`, {row['machine']})."
    )


def gpus(folder: Path) -> str:
    """Every GPU that was measured, or that none was."""
    import gpu_report  # imports this module

    found = sorted(path.parent for path in folder.glob("*/env.json"))
    if not found:
        return "There are no GPU results yet: nothing here has run on one. `make gpu-check` on a machine with a GPU makes them."
    return "\n\n".join(gpu_report.readme(path) for path in found)


def updated(text: str, inner: str, name: str = TABLE) -> str:
    """The README with new text between the markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"README.md needs one {begin} and, after it, one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{inner}\n{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with results.csv and bars.csv")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="put the table into the README")
    what.add_argument("--check", action="store_true", help="exit with 1 where the README does not hold this table")
    options = parser.parse_args(arguments)
    inner = readme(options.results)
    first = headline(options.results)
    gpu = gpus(options.results.parent)
    if not (options.write or options.check):
        print(first, inner, gpu, sep="\n\n")
        return 0
    text = options.readme.read_text()
    new = updated(updated(updated(text, inner), first, HEADLINE), gpu, GPU)
    if options.write:
        options.readme.write_text(new)
    elif new != text:
        print(f"{options.readme} differs from {options.results.parent}: run python bench/readme_table.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
