"""Every public op beside the shortest plain PyTorch with the same result, on one thread: ``python bench/never_slower.py``.

Results are compared first; a wrong one gets no number. Then both calls are warmed and taken in turns for :data:`SECONDS`, and
the ratio of the minima is compared with the limit: 1.0 from 576 rows on, 1.3 below. Where a row misses its limit it is
measured again, up to :data:`ATTEMPTS` times, and the lowest ratio counts: another process can slow one side down, but does not
make the other one faster. ``make bench`` runs this after the suite and writes bench/results/cpu/never_slower.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import never_slower_merges
import never_slower_rows
import schema
import torch
from never_slower_rows import Row, Sides

SECONDS, REPETITIONS, ATTEMPTS = 0.08, 3, 3


def rows(dry: bool = False) -> Iterator[Row]:
    """All rows, those of one op together; in a dry run the smallest of each op."""
    every = [*never_slower_rows.by_size(), *never_slower_merges.by_size(), *never_slower_rows.found(), *never_slower_merges.found()]
    seen: set[str] = set()
    for row in every:
        if not dry or row.op not in seen:
            seen.add(row.op)
            yield row


def same(sides: Sides) -> bool:
    """Whether both sides give the same: exactly, or as closely as the row says."""
    ours, plain = sides.ours(), sides.torch()
    if sides.compare is not None:
        return sides.compare(ours, plain)
    pairs = zip(ours, plain, strict=True) if isinstance(ours, tuple) else [(ours, plain)]
    if sides.within is None:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(torch.allclose(a.float(), b.float(), rtol=sides.within, atol=sides.within / 10) for a, b in pairs)


def measure(row: Row, dry: bool = False) -> dict[str, Any]:
    """One line of the table, without the columns of the conditions."""
    torch.manual_seed(0)
    sides = row.build()
    line: dict[str, Any] = {
        "target": f"{row.op} against torch", "what": sides.text, "asserted": "yes", "op": row.op, "case": row.case, "threads": 1,
        "mode": "warm", "backend": "cpu", "a": "v2drop_kernels", "b": "torch", "unit": "ratio", "limit": f"<= {row.limit:g}",
    }  # fmt: skip
    if not same(sides):
        return line | {"status": "wrong: the results differ"}
    found: list[dict[str, Any]] = []
    while not found or (not dry and len(found) < ATTEMPTS and min(f["value"] for f in found) > row.limit):
        a, b = harness.interleaved([sides.ours, sides.torch], 1 if dry else REPETITIONS, 0.0 if dry else SECONDS)
        found.append(
            {
                "value": round(min(a) / min(b), 3),
                "a_min_us": round(min(a) * 1e6, 2), "a_median_us": round(harness.quantile(a, 0.5) * 1e6, 2),
                "b_min_us": round(min(b) * 1e6, 2), "b_median_us": round(harness.quantile(b, 0.5) * 1e6, 2),
            }
        )  # fmt: skip
    best = min(found, key=lambda f: f["value"])
    status = "dry run" if dry else "pass" if best["value"] <= row.limit else "fail"
    return line | best | {"status": status, "attempts": len(found)}


def measure_all(path: Path, run: str, only: str = "") -> int:
    """All rows (or those whose op starts with ``only``) to ``path``; how many results were wrong."""
    dry, wrong, conditions = run == "dry", 0, harness.conditions(run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with path.open("w", newline="") as file:
            out = csv.DictWriter(file, schema.TARGETS, restval="", lineterminator="\n")
            out.writeheader()
            for row in harness.progress([r for r in rows(dry) if r.op.startswith(only)], "never slower"):
                line = measure(row, dry)
                out.writerow(line | conditions)
                wrong += line["status"].startswith("wrong")
                value = (
                    f"{line['value']:6.2f} {line['limit']}; {line['a_min_us']} us, torch {line['b_min_us']} us"
                    if "value" in line
                    else ""
                )
                print(f"{line['status']:>8}  {row.op}, {row.case}: {value}", flush=True)
                if not dry:
                    harness.release_memory()
    finally:
        torch.set_num_threads(threads)
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=harness.ROOT / "bench" / "results" / "cpu", help="folder for never_slower.csv")
    parser.add_argument("--quick", action="store_true", help="the smallest rows: a dry run, not a measurement")
    parser.add_argument("--only", default="", metavar="OP", help="only rows whose op starts so; prints, and writes nothing")
    options = parser.parse_args(arguments)
    harness.recycle_memory()
    path = Path("/dev/null") if options.only else options.out / "never_slower.csv"
    return 1 if measure_all(path, "dry" if options.quick else "ungated", options.only) else 0


if __name__ == "__main__":
    sys.exit(main())
