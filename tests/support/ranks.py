"""Several processes that run the same checks as the ranks of a gloo group.

``outcomes(world, module, names)`` starts ``world`` processes, each of which runs the functions ``names`` of ``module`` one after
another and notes for each "ok" or its traceback. One start serves all checks of a module, because importing torch takes seconds.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

SECONDS = 300  # for all checks of a module


def outcomes(world: int, module: str, names: Sequence[str], **env: str) -> dict[str, list[str]]:
    """Per check what every rank noted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "support.ranks", folder, str(world), module, *names]
        tests = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **env}
        ranks = [
            subprocess.Popen(
                [*command[:3], str(r), *command[3:]], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for r in range(world)
        ]
        printed = []
        for process in ranks:
            try:
                printed.append(process.communicate(timeout=SECONDS)[0].decode())
            except subprocess.TimeoutExpired:
                process.kill()
                printed.append(f"not finished after {SECONDS} s: {process.communicate()[0].decode()}")
        found = {}
        for rank, text in enumerate(printed):
            path_of_notes = Path(folder) / f"{rank}.json"
            found[rank] = json.loads(path_of_notes.read_text()) if path_of_notes.exists() else dict.fromkeys(names, text)
        return {name: [found[r].get(name, printed[r]) for r in range(world)] for name in names}


def main(rank: int, folder: str, world: int, module: str, names: Sequence[str]) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout)
    checks, notes = importlib.import_module(module), {}
    for name in names:
        try:
            getattr(checks, name)()
            notes[name] = "ok"
        except BaseException:
            notes[name] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(notes))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:])
