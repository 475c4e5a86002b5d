"""The outcome of every test as a line of JSON, written when it is known, so that a test run that is cut still tells.

A pytest plugin: ``python -m pytest -p gpu_outcomes --outcomes FILE``. ``Outcomes`` reads the file and says which figures are red.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

# What a file of tests speaks for; the whole step is made of the first ops. All other files speak for everything.
SPEAKS_FOR = {
    "test_variation_score": {"drop", "score"},
    "test_segmented_topk": {"drop", "select"},
    "test_variation_topk": {"drop", "score", "select"},
    "test_compact": {"drop", "compact"},
    "test_drop_tokens": {"drop"},
    "test_autograd": {"drop", "backward"},
    "test_attention_score": {"attention"},
    **dict.fromkeys(("test_similarity", "test_soft_topk", "test_merge"), frozenset()),  # ops without a figure here
}


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path, help="append the outcome of every test to this file")


def pytest_configure(config: Any) -> None:
    path = config.getoption("--outcomes")
    if path and not hasattr(config, "workerinput"):  # under xdist every report reaches the one process that is no worker
        config.pluginmanager.register(_Writer(path))


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = str(report.longrepr).strip().splitlines()[-1][:300] if report.failed else ""
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), "why": why}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            with self._path.open("a") as file:
                file.write(json.dumps({"test": report.nodeid, "outcome": "failed", "seconds": 0, "why": "not collected"}) + "\n")


class Outcomes:
    """The outcomes of a run, and what follows from them."""

    def __init__(self, path: Path, ended: str) -> None:
        """``ended`` tells how the run ended: "" when all tests ran."""
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.ended = ended

    def count(self, outcome: str) -> int:
        return sum(line["outcome"] == outcome for line in self.lines)

    def red(self, backend: str, op: str) -> str | None:
        """The first failed test that forbids a figure of this backend and op."""
        for line in self.lines:
            path, _, rest = line["test"].partition("::")
            named = [b for b in ("triton", "cuda", "reference") if f"[{b}" in rest or f"-{b}" in rest]
            spoken = SPEAKS_FOR.get(Path(path).stem)
            about = spoken is None or op in spoken
            if line["outcome"] == "failed" and about and (backend in named or not named):
                return str(line["test"])
        return None

    def words(self) -> str:
        """One sentence."""
        counted = collections.Counter(line["outcome"] for line in self.lines)
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counted.items())) or "none ran"
        return f"Tests: {counts}{f' ({self.ended})' if self.ended else ''}."
