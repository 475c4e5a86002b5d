"""The CPU suite: every provider of every op on every case, checked, then timed, then one row of results.csv."""

from __future__ import annotations

import csv
import gc
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from providers import Provider, providers
from registry import CASES, DRY_CASES, OPS, Case, inputs_of, moved_bytes, rotated, settings
from schema import RESULTS
from verify import WrongResult, verified

SETTING = ("op", "B", "N", "D", "dtype", "k", "threads", "mode")  # the columns that a row shares with its copy
SECONDS, LEAST, MOST = 0.5, 5, 300  # of one measurement: seconds that are aimed at, rounds at least and at most


class Setting(NamedTuple):
    """One row of the suite: who computes what, on how many threads, with inputs from DRAM (cold) or from the cache (warm)."""

    op: str
    provider: Provider
    case: Case
    threads: int
    mode: str

    def __str__(self) -> str:
        return f"{self.op}, {self.provider.name}, {self.case}, {self.threads} thread(s), {self.mode}"


def listed(dry: bool, ops: Sequence[str] = OPS) -> list[Setting]:
    """All rows; those of one case together, so that its inputs are made once."""
    return [
        Setting(op, provider, case, threads, mode)
        for case in (DRY_CASES if dry else CASES)
        for op in ops
        for threads, mode in settings(op, case)
        for provider in providers(op).values()
    ]


def measure(path: Path, run: str, chosen: Sequence[Setting] | None = None) -> int:
    """Measure the suite into ``path``; how many providers gave a wrong result, which leaves a row without numbers."""
    dry, rows, wrong = run == "dry", list[dict[str, Any]](), 0
    gate = harness.NoiseGate(**harness.DRY_GATE if dry else {})
    threads, skipped = torch.get_num_threads(), dict[tuple[str, str], None]()
    try:
        for setting in harness.progress(listed(dry) if chosen is None else chosen, "suite"):
            row = one(setting, gate, dry)
            if "skipped" in row:
                skipped[setting.provider.name, row["skipped"]] = None
                continue
            rows.append(row)
            if row["check"].startswith("wrong"):
                wrong += 1
                print(f"{setting}: {row['check']}", flush=True)
            if not dry:  # a collection takes longer than a dry measurement
                harness.release_memory()
    finally:
        torch.set_num_threads(threads)
    for name, why in skipped:
        print(f"{name}: skipped: {why}", flush=True)
    write(path, rows, run)
    return wrong


def one(setting: Setting, gate: harness.NoiseGate, dry: bool) -> dict[str, Any]:
    """Check one provider on one case, then time it."""
    op, provider, case, threads, mode = setting
    if why := provider.missing(case):
        return {"skipped": why}
    # The inputs, and three float32 temporaries of eager PyTorch, which malloc does not always place in the same memory.
    if 8 * case.input_bytes > harness.available_memory():
        return {"skipped": f"needs {8 * case.input_bytes / 1e9:.1f} GB of free memory"}
    torch.set_num_threads(threads)
    row: dict[str, Any] = {
        "op": op, "B": case.batch, "N": case.n, "D": case.d, "dtype": str(case.dtype).removeprefix("torch."), "k": case.k,
        "threads": threads, "mode": mode, "provider": provider.name, "bytes": moved_bytes(op, case),
    }  # fmt: skip
    try:
        call = verified(op, provider, case)
    except WrongResult as wrong:
        return row | {"check": f"wrong: {wrong}"}
    inputs = rotated(op, case) if mode == "cold" and not dry else [inputs_of(case)[0]]
    turn = itertools.cycle(inputs)
    for _ in inputs:
        call(next(turn))
    once = harness.timed(lambda: call(next(turn)))
    rounds = 3 if dry else min(MOST, max(LEAST, int(SECONDS / once)))
    before = gate.settle(0.0 if dry else 0.5)
    times = timed(lambda: call(next(turn)), rounds)
    p20, median, p80 = (harness.quantile(times, q) * 1e6 for q in (0.2, 0.5, 0.8))
    return row | {
        "check": "equal" if provider.rounding is not None else "none", "min_us": round(min(times) * 1e6, 2),
        "median_us": round(median, 2), "p20_us": round(p20, 2), "p80_us": round(p80, 2), "rounds": len(times),
        "gb_s": round(row["bytes"] / median / 1e3, 2), "quiet": "yes" if gate.quiet(before, gate.sample()) else "no",
    }  # fmt: skip


def timed(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of every round after one to warm up, without the garbage collector."""
    call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        return [harness.timed(call) for _ in range(rounds)]
    finally:
        if collecting:
            gc.enable()


def write(path: Path, rows: list[dict[str, Any]], run: str) -> None:
    """The rows as CSV, with the share of the copy that was measured in the same setting."""
    setting = lambda row: tuple(row[c] for c in SETTING)
    copies = {setting(row): row["median_us"] for row in rows if row["provider"] == "copy"}
    conditions = harness.conditions(run)
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, RESULTS, restval="", lineterminator="\n")
        out.writeheader()
        for row in rows:
            copy = copies.get(setting(row))
            share = {"copy_share": round(copy / row["median_us"], 3)} if copy and row.get("median_us") else {}
            out.writerow({**row, **share, **conditions})
