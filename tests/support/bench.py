"""Scripts of bench/ in the process of the test, which has imported torch already: a process of their own takes seconds for that."""

from __future__ import annotations

import contextlib
import importlib
import io
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


class Ended(NamedTuple):
    """As of a process."""

    returncode: int
    stdout: str
    stderr: str


def run_script(script: Path, *arguments: Any) -> Ended:
    """Run a script as its command would, and leave modules, threads, streams and the allocator as they were."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "path", [str(script.parent), str(BENCH), *sys.path])
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        patch.setattr(importlib.import_module("harness"), "recycle_memory", lambda: "the C library's own")
        status: Any = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            status = end.code
        finally:
            torch.compiler.set_stance("default")
            torch.set_num_threads(threads)
            for name, module in list(sys.modules.items()):
                if BENCH in Path(getattr(module, "__file__", None) or "/").parents:
                    del sys.modules[name]
    if isinstance(status, str):
        return Ended(1, out.getvalue(), f"{err.getvalue()}{status}\n")
    return Ended(status or 0, out.getvalue(), err.getvalue())
