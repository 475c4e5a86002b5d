"""Differential fuzzing of the public API, and of the C interface: ``python tools/fuzz --seconds 60 --seed 0``.

Every property draws inputs with hypothesis, calls the package, and compares with an oracle in NumPy that was written from the
docstrings (``oracles.py``). The properties take turns until the time is over; a failing input is made smaller and printed. The same
seed draws the same inputs. ``--c-api PROGRAM`` runs ``csrc/tests/test_fuzz_cuda.cpp`` for that time instead, which compares random
calls of the C interface on the CPU with those on the emulated CUDA kernels; ``make fuzz`` builds it with AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import torch
from hypothesis import strategies as st
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

# The folder of this file is on the path already; the package of this checkout shall be the one that is imported.
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

Property = Callable[[str], None]


def properties(names: Sequence[str]) -> list[Property]:
    """The properties of the given names, or all."""
    import scores
    import selection
    import wrong

    found = {p.__name__: p for p in (*selection.ALL, *scores.ALL, *wrong.ALL)}
    if odd := sorted(set(names) - set(found)):
        raise SystemExit(f"--only must be among {', '.join(found)}, got {odd[0]!r}")
    return [found[name] for name in names] if names else list(found.values())


def attempt(check: Property, backend: str, seed: int, examples: int) -> str | None:
    """One turn of a property; the text of the smallest failure, or None."""
    settings = hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink), report_multiple_bugs=False,
    )  # fmt: skip
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(data=st.data())(check)))(backend)
    except Exception as error:  # an assertion, or whatever the package raised where it should not have
        return "".join([*traceback.format_exception(error), *(f"{note}\n" for note in getattr(error, "__notes__", ()))])
    return None


def run(chosen: list[Property], backends: Sequence[str], seconds: float, seed: int, examples: int = 40) -> int:
    """Take turns for ``seconds``; 1 if a property failed."""
    end, turn, done = time.monotonic() + seconds, 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("fuzz", total=seconds)
        while time.monotonic() < end:
            for check in chosen:
                backend = backends[turn % len(backends)]
                progress.update(task, completed=seconds - (end - time.monotonic()), description=f"{check.__name__} on {backend}")
                if failure := attempt(check, backend, seed + turn, examples):
                    progress.stop()
                    print(failure)
                    again = f"--only {check.__name__} --backends {backend} --seed {seed + turn} --seconds 1"
                    print(f"{check.__name__} failed on {backend}; once more: python tools/fuzz {again}")
                    return 1
                done += 1
                if time.monotonic() >= end and turn:
                    break
            turn += 1
    what = f"{done} turns of up to {examples} examples, {len(chosen)} properties on {', '.join(backends)}, seed {seed}"
    print(f"fuzz: {what}: no failure")
    return 0


def run_c_api(program: str, seconds: float, seed: int, calls: int = 25) -> int:
    """Random calls of the C interface for ``seconds``, ``calls`` a process; the exit status of the first process that fails."""
    end, first = time.monotonic() + seconds, seed
    while True:
        status = subprocess.run([program, str(calls), str(first)], stdout=subprocess.DEVNULL, check=False).returncode
        if status:
            subprocess.run([program, str(calls), str(first)], check=False)
            print(f"the C interface failed; once more: {program} {calls} {first}")
            return status
        first += calls
        if time.monotonic() >= end:
            print(f"fuzz: {first - seed} random calls of the C interface, seed {seed}: no failure")
            return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="names of properties; default: all")
    parser.add_argument(
        "--backends", default="cpu,reference", help="comma-separated; triton needs TRITON_INTERPRET=1 where no GPU is"
    )
    parser.add_argument("--examples", type=int, default=40, help="inputs that a property draws in one turn")
    parser.add_argument("--c-api", metavar="PROGRAM", help="the built test_fuzz_cuda: fuzz the C interface instead")
    given = parser.parse_args()
    if given.c_api:
        return run_c_api(given.c_api, given.seconds, given.seed)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return run(properties(given.only), given.backends.split(","), given.seconds, given.seed, given.examples)


if __name__ == "__main__":
    sys.exit(main())
