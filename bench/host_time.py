"""Host time of one call: ``python bench/host_time.py [--against TREE]``, or ``--stub [--emulated MODULE]``.

Every op runs on the ``cpu`` backend with one thread and 64 tokens of 64 channels, so that what is measured is the Python of the
package and the call of the library. ``--against`` names another checkout with a built library, for instance a worktree of an
earlier commit: both trees are then measured in turns, each in processes of their own, and the table has one column for each. The
times are minima over all turns, in microseconds; a minimum says what a call costs, the rest is noise of the machine.

``--stub`` measures the host's part of GPU calls where there is no GPU: ``triton`` with Triton's own launcher over a driver that
does nothing (stub_driver.py), and ``cuda`` with the emulated build of the library, whose launches then run nothing
(``V2DROP_EMULATE_LAUNCHES=0``). Neither contains the driver's part of a launch.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CALLS, REPEATS = 20, 400  # short batches: one that nothing interrupts is found also on a busy machine


def measure() -> dict[str, float]:
    """Microseconds of one call of every op, in this process and with the package that it imports."""
    import torch

    import v2drop_kernels as vk

    torch.set_num_threads(1)
    torch.manual_seed(0)
    h_prev, h_cur = torch.randn(1, 64, 64), torch.randn(1, 64, 64)
    kv = [(torch.randn(1, 2, 64, 32), torch.randn(1, 2, 64, 32)) for _ in range(2)]
    ids, mask = torch.arange(64)[None], torch.ones(1, 64, dtype=torch.bool)
    scores, keep = torch.rand(1, 64), torch.arange(0, 64, 2)[None]
    calls = {
        "drop_tokens": lambda: vk.drop_tokens(h_prev, h_cur, 16, droppable=(8, 56), backend="cpu"),
        "drop_tokens, 2 layers of kv and ids": lambda: vk.drop_tokens(
            h_prev, h_cur, 16, droppable=(8, 56), kv=kv, position_ids=ids, attention_mask=mask, backend="cpu"
        ),
        "drop_tokens, 32 layers of kv": lambda: vk.drop_tokens(h_prev, h_cur, 16, droppable=(8, 56), kv=kv * 16, backend="cpu"),
        "variation_score": lambda: vk.variation_score(h_prev, h_cur, backend="cpu"),
        "variation_topk": lambda: vk.variation_topk(h_prev, h_cur, 16, backend="cpu"),
        "segmented_topk": lambda: vk.segmented_topk(scores, 16, backend="cpu"),
        "compact": lambda: vk.compact(keep, h_cur, backend="cpu"),
    }
    return times(calls)


def times(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of one of each."""
    for call in calls.values():  # compiled, remembered, recorded
        for _ in range(3):
            call()
    return {name: 1e6 * min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS for name, call in calls.items()}


def measure_stub(backend: str) -> dict[str, float]:
    """Microseconds of the host for calls of a GPU backend: 576 tokens of 4096 bfloat16 channels, a quarter of which is kept."""
    import torch

    import v2drop_kernels as vk
    from v2drop_kernels import native

    native.HUGE_BYTES = 1 << 62  # a GPU has no pages to advise the operating system about
    if backend == "triton":
        import stub_driver

        stub_driver.install()
    torch.set_num_threads(1)
    h_prev, h_cur = (torch.zeros(1, 576, 4096, dtype=torch.bfloat16) for _ in range(2))
    kv = [tuple(torch.zeros(1, 8, 576, 128, dtype=torch.bfloat16) for _ in range(2)) for _ in range(32)]
    return times(
        {
            "drop_tokens": lambda: vk.drop_tokens(h_prev, h_cur, 144, backend=backend),
            "drop_tokens, 64 tensors of kv": lambda: vk.drop_tokens(h_prev, h_cur, 144, kv=kv, backend=backend),
            "variation_topk": lambda: vk.variation_topk(h_prev, h_cur, 144, backend=backend),
        }
    )


def in_process(tree: Path, *options: str, **environment: str) -> dict[str, float]:
    """One measurement in a new process that imports the package of ``tree``."""
    given = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(Path(__file__).resolve()), "--once", *options]
    done = subprocess.run(command, env=given, cwd=tree, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def stub_times(turns: int, emulated: str | None) -> dict[str, dict[str, float]]:
    """The minima of the GPU backends over so many processes each, by backend."""
    import stub_driver

    # Freed memory stays with the process, as with the caching allocator of a GPU: no system call for every large result.
    allocator = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        environments = {"triton": stub_driver.build(Path(folder))}
        if emulated:
            environments["cuda"] = {"V2DROP_NATIVE_MODULE": str(Path(emulated).resolve()), "V2DROP_EMULATE_LAUNCHES": "0"}
        for _ in range(turns):
            for backend, environment in environments.items():
                found = best.setdefault(backend, {})
                for call, time in in_process(ROOT, "--backend", backend, **allocator, **environment).items():
                    found[call] = min(time, found.get(call, time))
    return best


def cpu_times(turns: int, against: Path | None) -> dict[str, dict[str, float]]:
    """The minima of the ``cpu`` backend over so many processes each, by tree."""
    trees = {"this tree": ROOT}
    if against is not None:
        trees = {"against": against.resolve(), **trees}
    best: dict[str, dict[str, float]] = {name: {} for name in trees}
    for _ in range(turns):
        for name, tree in trees.items():
            for call, time in in_process(tree).items():
                best[name][call] = min(time, best[name].get(call, time))
    return best


def write(path: Path, best: dict[str, dict[str, float]], turns: int) -> None:
    """The table as a file of results, with the conditions of the measurement."""
    from harness import conditions

    rows = [
        {"call": call, "column": column, "min_us": f"{time:.2f}", **conditions(f"{turns} processes")}
        for column, found in best.items()
        for call, time in found.items()
    ]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout with a built library")
    parser.add_argument("--stub", action="store_true", help="the host's part of GPU calls, without a GPU")
    parser.add_argument("--emulated", metavar="MODULE", help="with --stub: _C of a build with V2DROP_CUDA=EMULATE, to measure cuda")
    parser.add_argument("--turns", type=int, default=10, help="processes for each column (default 10)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table to a file as well")
    parser.add_argument("--once", action="store_true", help="one measurement in this process, as JSON")
    parser.add_argument("--backend", help="with --once: of the stub")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure_stub(options.backend) if options.backend else measure()))
        return
    best = stub_times(options.turns, options.emulated) if options.stub else cpu_times(options.turns, options.against)
    print(f"{'microseconds of the host per call':38}" + "".join(f"{name:>12}" for name in best))
    for call in next(reversed(best.values())):
        print(f"{call:38}" + "".join(f"{found[call]:12.2f}" for found in best.values()))
    if options.csv:
        write(options.csv, best, options.turns)


if __name__ == "__main__":
    main()
