"""Test files in parallel, each in a pytest of its own, for so long at most.

It needs no pytest-xdist, and the outcome of every test is on disk as soon as it is known.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness import ALL_CORES, ROOT

HERE = Path(__file__).resolve().parent
SMOKE = ("test_drop_tokens", "test_compact", "test_segmented_topk", "test_variation_score", "test_cuda_graphs")
SMOKE_SAMPLE = 40  # tests of each of these files
PROCESSES = max(1, min(ALL_CORES // 2, 8))


@dataclass
class Run:
    """One pytest over one file."""

    name: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]


def find(name: str) -> list[Path]:
    """The files of this name below tests, without those that need a process of their own."""
    return [path for path in test_files() if path.stem == name]


def test_files() -> list[Path]:
    """Every file of tests that may need a GPU, large ones first, as they take longest."""
    apart = {"compile_only", "tools"}
    found = [p for p in (ROOT / "tests").rglob("test_*.py") if not apart & set(p.relative_to(ROOT).parts)]
    return sorted(found, key=lambda path: -path.stat().st_size)


def run(
    out: Path, files: Sequence[Path], chosen: Sequence[str], seconds: float, ended: Callable[[Path, int], None] = lambda p, c: None,
    processes: int = PROCESSES,
) -> str:  # fmt: skip
    """Run these files with the options ``chosen``; returns "" or, where the time was over before the tests, a note on that.

    ``ended(file, code)`` is called for every file that came to its end, code 5 (no test of it was chosen) included.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    if os.environ.get("TRITON_INTERPRET") == "1":  # a dry run: with an emulated library the tests would run on nothing else
        environ.pop("V2DROP_NATIVE_MODULE", None)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), str(ROOT), os.environ.get("PYTHONPATH")]))
    end = time.monotonic() + seconds
    waiting: list[Path] = list(files)
    running: dict[Path, Run] = {}
    cut: list[Path] = []
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < processes:
                path = waiting.pop(0)
                running[path] = _start(out, path, chosen, environ)
            for path, one in list(running.items()):
                code = one.process.poll()
                if code is not None:
                    del running[path]
                    one.log.close()
                    ended(path, code)
            time.sleep(0.05)
    finally:
        cut = [*running, *waiting]
        for one in running.values():
            os.killpg(one.process.pid, signal.SIGKILL)  # this group is the pytest that was started above
            one.process.wait()
            one.log.close()
    return f"cut after {seconds:.0f} s with {len(cut)} of {len(files)} files unfinished" if cut else ""


def _start(out: Path, path: Path, chosen: Sequence[str], environ: dict[str, str]) -> Run:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_outcomes", "--outcomes", str(out / "tests.jsonl"),
               "-p", "no:cacheprovider", *chosen, str(path.relative_to(ROOT))]  # fmt: skip
    log = (out / "logs" / f"{name}.log").open("ab")
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True)
    return Run(name, process, log)
