"""compute-sanitizer over score, select, gather and a whole drop of both backends, into sanitizer.csv.

A figure of a kernel that reads past its inputs, or races, is worth nothing; the tests cannot see either on a GPU. Every tensor gets
an allocation of its own, since an access past its end would otherwise fall into PyTorch's pool and pass.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import harness
from gpu_ncu import HERE, replace_rows

TOOLS = ("memcheck", "racecheck", "synccheck")
COLUMNS = ("tool", "backend", "status", "summary", *harness.CONDITIONS)
MISSING = "compute-sanitizer is not installed"
SECONDS = 150
ERRORS = 9  # the exit code that stands for errors found


def check(out: Path, tool: str, backend: str, seconds: float, dry: bool) -> str | None:
    """Run one tool on one backend; why there is no verdict, or what it found, None where it found nothing."""
    command = [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERRORS), "--print-limit", "20", sys.executable,
        str(HERE / "gpu_ncu.py"), "--drive", backend, "small", *(["--dry"] if dry else []),
    ]  # fmt: skip
    status, output = MISSING, ""
    if shutil.which("compute-sanitizer"):
        environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                output = process.communicate(timeout=min(seconds, SECONDS))[0]
                status = {0: "clean", ERRORS: "errors found"}.get(process.returncode, f"ended with code {process.returncode}")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # this group is compute-sanitizer and what it runs
                output = process.communicate()[0]
                status = f"cut after {min(seconds, SECONDS):.0f} s"
        (out / "logs").mkdir(exist_ok=True)
        (out / "logs" / f"{tool}-{backend}.log").write_text(output)
    lines = [line.strip() for line in output.splitlines() if line.startswith("=========")] or output.splitlines()[-1:]
    row = {"tool": tool, "backend": backend, "status": status, "summary": (lines or [""])[-1].strip("= ")[:200]}
    replace_rows(out / "sanitizer.csv", COLUMNS, [row | harness.conditions("dry" if dry else "full")], ("tool", "backend"))
    print(f"{tool}, {backend}: {status}", flush=True)
    return None if status == "clean" else status
