"""Whether the archive of a dry GPU check holds what a GPU run must yield: ``python bench/gpu_verify.py ARCHIVE COMMIT``.

Every unit is done, every group has its rows, every target has a value for the reference, and each kind of problem was measured with
Triton's interpreter and with the emulated CUDA C++ kernels, after its results equalled the reference's.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import gpu_report
import gpu_state
from gpu_check import ORDER
from gpu_registry import Group, steps
from tables import read

SHOWN = 25  # faults that are printed
MAY_BE_MISSING = ("cupy.argpartition", "flashinfer+gather", "jax.lax.top_k")  # packages that a machine need not have


def faults(folder: Path, commit: str) -> list[str]:
    """What is wrong with the results in a folder, in words."""
    found = []
    results, targets = gpu_report.results_of(folder), gpu_report.targets_of(folder)
    state, env = (json.loads((folder / name).read_text()) for name in ("state.json", "env.json"))
    expected = {"report.md", "tests.jsonl", "model-1.json", "policies.csv", "policies.md", "ncu.csv", "sanitizer.csv",
                "predictions.csv", "fitted.json"}  # fmt: skip
    found += [f"there is no {name}" for name in sorted(expected - {path.name for path in folder.iterdir()})]
    found += [f"step {step}: no unit is done" for step in ORDER if not any(unit.startswith(f"{step}/") for unit in state["done"])]
    found += [f"{row['group']}: commit {row['commit']} and run {row['run']} in place of {commit} and dry"
              for row in results if (row["commit"], row["run"]) != (commit, "dry")][:3]  # fmt: skip
    for row in results:
        allowed = row["check"] in ("equal", "none") or (row["check"].startswith("missing") and row["provider"] in MAY_BE_MISSING)
        if not allowed and not _elsewhere(row):
            found.append(f"{row['group']}, {row['mode']}, {row['provider']}: {row['check']}")
    kinds: dict[str, set[str]] = {}
    for name, listed in steps().items():
        for one in listed:
            if isinstance(one, Group):
                timed = {(r["provider"].split("@")[0], r["mode"]) for r in results if r["group"] == one.name and r["median_us"]}
                found += [f"{name}, {one.name}: no row of the reference, {m}" for m in one.modes if ("reference", m) not in timed]
                kinds.setdefault(getattr(one.build, "func", one.build).__name__, set()).update(p for p, _ in timed)
    for kind, providers in kinds.items():
        found += [f"no group of {kind} was measured with {b}" for b in ("triton", "cuda") if b not in providers]
    for row in targets:
        value = row["value"] and math.isfinite(float(row["value"]))
        if row["backend"] == "reference" and not value:
            found.append(f"target {row['target']}, {row['what']}: no value for the reference ({row['status']})")
    predicted = read(folder / "predictions.csv") if (folder / "predictions.csv").exists() else []
    for backend in ("triton", "cuda"):
        ops = {row["group"].split()[0] for row in predicted if row["provider"].split("@")[0] == backend}
        found += [f"no {op} of {backend} stands beside its prediction" for op in ("drop", "select", "score") if op not in ops]
    judged = {row["target"] for row in targets if row["value"]}
    found += [f"target {number}: no row" for number in map(str, range(1, 16)) if number not in judged]
    constants = env.get("constants", {"all": {"value": math.nan, "how": "none is there"}})
    found += [f"constant {name}: {one['how']}" for name, one in constants.items() if math.isnan(one["value"])]
    if any(word in env["tests"] for word in (" failed", "not collected")) or " passed" not in env["tests"]:
        found.append(env["tests"])
    return found


def _elsewhere(row: dict[str, str]) -> bool:
    """Launch modes that do not apply to a problem, or to an emulator."""
    return row["provider"].startswith("cuda-") and row["check"].startswith("missing")


def main() -> int:
    archive, commit = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as scratch:
        gpu_state.unpack(archive, Path(scratch))
        found = faults(Path(scratch), commit)
    size = archive.stat().st_size
    if size > gpu_state.ARCHIVE_BYTES:
        found.append(f"the archive holds {size} bytes, more than {gpu_state.ARCHIVE_BYTES}")
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    print("\n".join([*found[:SHOWN], *more]) or f"every group yielded its rows; the archive holds {size / 1e6:.2f} MB")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
