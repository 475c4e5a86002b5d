"""The outcome of every test as a line of JSON, written when it is known, so that a test run that is cut still tells.

A pytest plugin: ``python -m pytest -p gpu_outcomes --outcomes FILE``; ``--sample N`` runs N tests of each file and backend, spread
evenly. ``Outcomes`` reads the file and says which figures the failing tests forbid.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BACKENDS = ("triton", "cuda", "reference")
NOTHING: frozenset[str] = frozenset()
# The ops whose figures a file of tests forbids when it fails; a whole drop is made of the first ops. Files that are not listed
# forbid every op.
SPEAKS_FOR: dict[str, frozenset[str]] = {
    "test_variation_score": frozenset({"drop", "score"}),
    "test_segmented_topk": frozenset({"drop", "select"}),
    "test_variation_topk": frozenset({"drop", "score", "select"}),
    "test_compact": frozenset({"drop", "compact"}),
    "test_drop_tokens": frozenset({"drop"}),
    "test_autograd": frozenset({"drop", "backward"}),
    "test_attention_score": frozenset({"attention"}),
    # No figure comes from these ops, nor through NumPy, CuPy or JAX.
    **dict.fromkeys(("test_similarity", "test_soft_topk", "test_merge", "test_array", "test_jax", "test_linking"), NOTHING),
}
ELSEWHERE = {"models", "interop", "tools"}  # folders of tests that forbid no figure of an op


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, help="append the outcome of every test to this file")
    parser.addoption("--sample", type=int, help="run so many tests of each file and backend, spread evenly")


def pytest_configure(config: Any) -> None:
    path = config.getoption("--outcomes")
    if path and not hasattr(config, "workerinput"):  # under xdist every report reaches the one process that is no worker
        config.pluginmanager.register(_Writer(path))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    count = config.getoption("--sample")
    if not count:
        return
    groups: dict[tuple[str, ...], list[Any]] = {}
    for item in items:
        path, _, rest = item.nodeid.partition("::")
        groups.setdefault((path, *_named(rest)), []).append(item)
    taken = {id(item) for group in groups.values() for item in group[:: -(-len(group) // count)]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in taken])
    items[:] = [item for item in items if id(item) in taken]


def _named(rest: str) -> list[str]:
    """The backends in the name of a test."""
    return [b for b in BACKENDS if f"[{b}" in rest or f"-{b}" in rest]


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path

    def _append(self, test: str, outcome: str, seconds: float, why: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "why": why}
        with self._path.open("a") as file:  # one write of one line, so that several processes may append to one file
            file.write(json.dumps(line) + "\n")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = str(report.longrepr).strip().splitlines()[-1][:300] if report.failed else ""
            self._append(report.nodeid, report.outcome, report.duration, why)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._append(report.nodeid, "not collected", 0, str(report.longrepr).strip().splitlines()[-1][:300])


class Outcomes:
    """The outcomes so far, the last one of every test, and what follows from them."""

    def __init__(self, path: Path, ended: str = "") -> None:
        """``ended`` tells how a run ended: "" when it was not cut."""
        lines = path.read_text().splitlines() if path.exists() else []
        found = (_parsed(line) for line in lines)
        self.lines = list({line["test"]: line for line in found if line}.values())
        self.ended = ended

    def count(self, *outcomes: str) -> int:
        """How many tests have one of these outcomes."""
        return sum(line["outcome"] in outcomes for line in self.lines)

    def failing(self, backend: str, op: str) -> str | None:
        """The first failed test that forbids a figure of this backend and op.

        A test that names backends forbids theirs, any other one those of all. A file that could not be collected, for want of a
        package for example, forbids nothing: no test of it ran, and every result is compared with the reference before it is timed.
        """
        for line in self.lines:
            if line["outcome"] != "failed":
                continue
            path, _, rest = line["test"].partition("::")
            spoken = SPEAKS_FOR.get(Path(path).stem)
            if spoken is None and ELSEWHERE & set(Path(path).parts):
                continue
            named = _named(rest)
            if (spoken is None or op in spoken) and (backend in named or not named):
                return str(line["test"])
        return None

    def forbidden(self, backends: Iterable[str], ops: Iterable[str]) -> dict[tuple[str, str], str]:
        """By backend and op, the test that forbids its figures."""
        ops = list(ops)
        found = {(b, op): self.failing(b, op) for b in backends for op in ops}
        return {key: test for key, test in found.items() if test}

    def words(self) -> str:
        """One sentence."""
        counted = collections.Counter(line["outcome"] for line in self.lines)
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counted.items())) or "none ran"
        return f"Tests: {counts}{f' ({self.ended})' if self.ended else ''}."


def _parsed(line: str) -> dict[str, Any] | None:
    """A line, or None where a process that was killed left half of one."""
    try:
        return json.loads(line)
    except ValueError:
        return None
