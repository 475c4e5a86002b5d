"""Host time of one call at a size where the work itself is small: ``python bench/host_time.py [--against TREE]``.

Every op runs on the ``cpu`` backend with one thread and 64 tokens of 64 channels, so that what is measured is the Python of the
package and the call of the library. ``--against`` names another checkout with a built library, for instance a worktree of an
earlier commit: both trees are then measured in turns, each in processes of their own, and the table has one column for each. The
times are minima over all turns, in microseconds; a minimum says what a call costs, the rest is noise of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import timeit
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CALLS, REPEATS = 300, 30


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
        "variation_score": lambda: vk.variation_score(h_prev, h_cur, backend="cpu"),
        "variation_topk": lambda: vk.variation_topk(h_prev, h_cur, 16, backend="cpu"),
        "segmented_topk": lambda: vk.segmented_topk(scores, 16, backend="cpu"),
        "compact": lambda: vk.compact(keep, h_cur, backend="cpu"),
    }
    return {name: 1e6 * min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS for name, call in calls.items()}


def in_process(tree: Path) -> dict[str, float]:
    """:func:`measure` in a new process that imports the package of ``tree``."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--once"], env=environment, cwd=tree, stdout=subprocess.PIPE, check=True
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout with a built library")
    parser.add_argument("--turns", type=int, default=10, help="processes for each tree (default 10)")
    parser.add_argument("--once", action="store_true", help="one measurement in this process, as JSON")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure()))
        return
    trees = {"this tree": ROOT}
    if options.against is not None:
        trees = {"against": options.against.resolve(), **trees}
    best: dict[str, dict[str, float]] = {name: {} for name in trees}
    for _ in range(options.turns):
        for name, tree in trees.items():
            for call, time in in_process(tree).items():
                best[name][call] = min(time, best[name].get(call, time))
    print(f"{'microseconds per call, cpu backend':38}" + "".join(f"{name:>12}" for name in trees))
    for call in best["this tree"]:
        print(f"{call:38}" + "".join(f"{best[name][call]:12.2f}" for name in trees))


if __name__ == "__main__":
    main()
