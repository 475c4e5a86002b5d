"""Counters of Nsight Compute for the three main kernels, at three sizes, of both backends, into ncu.csv: called by gpu_ncu.sh.

ncu runs this file again (``--drive``), once for a backend and size: it calls score, select and gather once to compile, and once
more between the marks where ncu looks. What keeps ncu from its counters is one row, and no failure.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gpu_report
import harness

HERE = Path(__file__).resolve().parent
# (B, N, D): an image, a video, a long video.
SIZES = {"image": (1, 576, 4096), "video": (1, 6272, 3584), "long": (1, 65536, 4096)}
SMALL = (2, 300, 512)  # a checked run is many times slower
TINY = {"small": (1, 40, 32), "image": (1, 40, 32), "video": (1, 50, 32), "long": (1, 64, 32)}
KERNEL = re.compile(r"\w*(score|select|gather)\w*")
METRICS = {
    "gpu__time_duration.sum": ("us", 1e-3),
    "dram__bytes.sum.per_second": ("dram_gb_s", 1e-9),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("dram_percent", 1.0),
    "lts__t_sector_hit_rate.pct": ("l2_hit_percent", 1.0),
    "launch__registers_per_thread": ("registers", 1.0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy_percent", 1.0),
}
COLUMNS = ("backend", "size", "B", "N", "D", "kernel", "name", "status", *(name for name, _ in METRICS.values()),
           *harness.CONDITIONS)  # fmt: skip
MISSING, FORBIDDEN = "ncu is not installed", "no permission to read the GPU's counters (ERR_NVGPUCTRPERM)"
LEAST_SECONDS = 20  # no profile is begun with less
SECONDS = 120  # for one backend and size: ncu replays every kernel a few times, after Python and Triton have started


def drive(backend: str, size: str, dry: bool) -> None:
    """Call the three ops twice, the second time where ncu looks."""
    import torch

    import v2drop_kernels as vk

    b, n, d = (TINY if dry else SIZES | {"small": SMALL})[size]
    device = "cpu" if dry else "cuda"
    g = torch.Generator(device).manual_seed(0)
    h_prev = torch.randn(b, n, d, generator=g, device=device).bfloat16()
    h_cur = h_prev + torch.randn(b, n, d, generator=g, device=device).bfloat16()

    def ops() -> None:
        if size == "small":  # for compute-sanitizer
            vk.drop_tokens(h_prev, h_cur, n // 4, kv=h_cur.view(b, 1, n, d), backend=backend)
        scores = vk.variation_score(h_prev, h_cur, backend=backend)
        keep = vk.segmented_topk(scores, n // 4, backend=backend).indices
        vk.compact(keep, h_cur, backend=backend)

    ops()
    if not dry:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    ops()
    if not dry:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def parse(text: str) -> list[dict[str, str]]:
    """A row for every kernel of ``--csv --page raw``: a header, a line of units (of base units, as asked for), then values."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found = []
    for row in csv.DictReader(lines):
        if not row.get("ID"):  # the units
            continue
        name = KERNEL.search(row["Kernel Name"])
        if name is None or "at::" in row["Kernel Name"]:  # torch's own
            continue
        values = {}
        for metric, (column, factor) in METRICS.items():
            try:
                values[column] = f"{float(row[metric].replace(',', '')) * factor:.4g}"
            except (KeyError, ValueError):  # a counter that this GPU, or this ncu, does not have
                values[column] = ""
        found.append({"kernel": name[1], "name": name[0], "status": "measured", **values})
    return found


def reason(output: str) -> str:
    """One sentence on what kept ncu from its counters."""
    if "ERR_NVGPUCTRPERM" in output:
        return FORBIDDEN
    errors = [line.strip() for line in output.splitlines() if "==ERROR==" in line or "Error" in line]
    return f"ncu gave no figures: {' '.join((errors or ['it printed no kernel'])[-1].split())[:160]}"


def ncu(backend: str, size: str, dry: bool, seconds: float) -> tuple[list[dict[str, str]], str]:
    """The rows of one backend and size, or none and the reason."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            # Clocks stay as they are: a lent GPU is measured as it is found.
            "ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off",
            "--log-file", str(log),
            "--metrics", ",".join(METRICS), sys.executable, str(HERE / "gpu_ncu.py"), "--drive", backend, size,
            *(["--dry"] if dry else []),
        ]  # fmt: skip
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                output = process.communicate(timeout=seconds)[0]
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # this group is ncu and what it runs
                process.communicate()
                return [], f"cut after {seconds:.0f} s"
        output += log.read_text() if log.exists() else ""
        rows = parse(log.read_text()) if log.exists() else []
    return rows, "" if rows else reason(output)


def profile(out: Path, size: str, backend: str, seconds: float, dry: bool) -> str | None:
    """Replace the rows of one size and backend in ncu.csv; why there are no figures, None where there are.

    Nothing that goes wrong here is an error of the caller's.
    """
    found, why = ncu(backend, size, dry, min(seconds, SECONDS)) if shutil.which("ncu") else ([], MISSING)
    b, n, d = map(str, (TINY if dry else SIZES)[size])
    base = {"backend": backend, "size": size, "B": b, "N": n, "D": d} | harness.conditions("dry" if dry else "full")
    rows = [base | row for row in found] or [base | {"status": why}]
    replace_rows(out / "ncu.csv", COLUMNS, rows, ("backend", "size"))
    print(f"ncu, {size}, {backend}: {why or f'{len(found)} kernels measured'}", flush=True)
    return why or None


def replace_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]], key: Sequence[str]) -> None:
    """Put rows into a CSV file in place of those with the same key."""
    old = gpu_report.read(path) if path.exists() else []
    ours = {tuple(row[c] for c in key) for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([row for row in old if tuple(row[c] for c in key) not in ours] + list(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, for tests")
    parser.add_argument("--drive", nargs=2, metavar=("BACKEND", "SIZE"), help="what ncu runs")
    options = parser.parse_args(arguments)
    if options.drive:
        drive(*options.drive, options.dry)
        return 0
    if options.out is None:
        if options.dry:
            parser.error("--dry needs a folder")
        from gpu_timer import CudaTimer

        options.out = HERE.parent / "build" / "gpu-results" / CudaTimer().name
    options.out.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        for backend in ("triton", "cuda"):
            if profile(options.out, size, backend, SECONDS, options.dry) in (MISSING, FORBIDDEN):  # for one, so for all
                break
    gpu_report.rewrite(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
