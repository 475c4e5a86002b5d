"""Progress of the demos: a line per step with its seconds, on stderr, so that stdout holds the report alone."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Print ``what`` when the step begins, and its seconds when it has ended; a failed step has a line without seconds."""
    print(f"{what} ...", end="", file=sys.stderr, flush=True)
    began = time.perf_counter()
    try:
        yield
    except BaseException:
        print(file=sys.stderr, flush=True)
        raise
    print(f" {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
