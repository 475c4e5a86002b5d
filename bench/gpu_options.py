"""What the GPU check and its tuning share at their start: the options, the results folder, the timer, and env.json."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_state
import harness
import provenance
import torch
from gpu_timer import CudaTimer, HostTimer

RESULTS = harness.ROOT / "build" / "gpu-results"  # ignored by git; see CONTRIBUTING.md for how results are committed
ORDER = (
    "smoke", "image", "host", "constants", "video", "long", "select", "kv", "backward", "ragged", "model", "score", "attention",
    "compile", "sizes", "ncu", "sanitizer", "policies", "tests",
)  # fmt: skip


def environment(timer: HostTimer, command: str) -> dict[str, Any]:
    """What env.json says about the machine."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("torch", "triton", "numpy", "jax", "jaxlib", "transformers", "cupy-cuda12x", "cupy-cuda13x", "flashinfer-python")
    return {
        "command": command,
        "gpu": timer.facts,
        "machine": harness.machine(),
        "commit": provenance.commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "versions": {name: version(name) for name in packages} | {"python": sys.version.split()[0]},
    }


def begin(about: str, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, HostTimer, Path, float]:
    """The options of a run, its timer, its results folder and when it must be over."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time in all, the build included (default: 9)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"keep {gpu_state.ARCHIVE} there, rewritten after every unit")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of the results (default: build/gpu-results/<device>)")
    parser.add_argument(
        "--resume", type=Path, metavar="ARCHIVE", help="begin with the results of this archive, where the folder has none"
    )
    parser.add_argument("--from", dest="begin", choices=ORDER, default=ORDER[0], help="leave out the steps before this one")
    parser.add_argument(
        "--only", type=_steps, metavar="STEP,...", help=f"these steps, again where they are done: {', '.join(ORDER)}"
    )
    parser.add_argument("--fresh", action="store_true", help="remove earlier results of this device first")
    parser.add_argument(
        "--build", choices=("gpu", "emulate", "none"), help="the native library (default: gpu, and none with --dry)"
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: no measurement; needs --results")
    parser.add_argument("--spent", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes - options.spent
    committed = harness.ROOT / "bench" / "results"
    if options.dry:
        if options.results is None or committed in [options.results.resolve(), *options.results.resolve().parents]:
            parser.error("--dry needs --results with a folder outside bench/results, which holds measurements")
    elif not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry runs the same without one")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 would measure Triton's interpreter")
    timer = HostTimer() if options.dry else CudaTimer()
    folder = options.results or RESULTS / timer.name
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if options.resume and not (folder / "state.json").exists():
        gpu_state.unpack(options.resume, folder)
    return options, timer, folder, deadline


def _steps(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in ORDER]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no step {unknown[0]!r}, only {', '.join(ORDER)}")
    return names
