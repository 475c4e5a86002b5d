"""The pytest-benchmark suite: every provider of every op on every case, checked, then timed, then written as one CSV row.

``pytest bench`` runs it; ``--quick`` on tiny shapes (a dry run, not a measurement), ``--csv FILE`` keeps the rows.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from providers import (
    CASES,
    DRY_CASES,
    OPS,
    Case,
    Provider,
    WrongResult,
    inputs_of,
    moved_bytes,
    providers,
    rotated,
    settings,
    verified,
)

COLUMNS = (
    "op", "B", "N", "D", "dtype", "k", "threads", "cache", "provider", "check", "min_us", "median_us", "p20_us", "p80_us",
    "rounds", "bytes", "gb_s", "copy_share", "quiet", *harness.CONDITIONS,
)  # fmt: skip
SECONDS, LEAST, MOST = 0.5, 5, 300

_rows: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny shapes and three rounds: a dry run, not a measurement")
    parser.addoption("--run", default="full", help="what the rows say of the run: full or ungated")
    parser.addoption("--csv", type=Path, help="write the rows to this file")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = metafunc.module.OP
    cases = DRY_CASES if metafunc.config.getoption("--quick") else CASES
    params = [
        pytest.param(provider, case, threads, cache, id=f"{case}-t{threads}-{cache}-{provider.name}")
        for case in cases
        for threads, cache in settings(op, case)
        for provider in providers(op).values()
    ]
    metafunc.parametrize("provider,case,threads,cache", params)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that is measured on one case comes together, so that its inputs are made once."""
    items.sort(key=lambda item: ([*CASES, *DRY_CASES].index(item.callspec.params["case"]), OPS.index(item.module.OP)))


def pytest_sessionstart(session: pytest.Session) -> None:
    _rows.clear()
    harness.recycle_memory()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--csv"):
        write(path, _rows, "dry" if session.config.getoption("--quick") else session.config.getoption("--run"))


def write(path: Path, rows: list[dict[str, Any]], run: str) -> None:
    """The rows as CSV, with the share of the copy that was measured in the same setting."""
    setting = lambda row: tuple(row[c] for c in COLUMNS[: COLUMNS.index("provider")])
    copies = {setting(row): row["median_us"] for row in rows if row["provider"] == "copy"}
    conditions = harness.conditions(run)
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        out.writeheader()
        for row in rows:
            copy = copies.get(setting(row))
            share = {"copy_share": round(copy / row["median_us"], 3)} if copy and row.get("median_us") else {}
            out.writerow({**row, **share, **conditions})


@pytest.fixture(scope="session")
def gate(request: pytest.FixtureRequest) -> harness.Gate:
    return harness.Gate(copied=1 << 16 if request.config.getoption("--quick") else 0)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, gate: harness.Gate) -> Iterator[Any]:
    """Check one provider on one case, then time it. A red check leaves a row without numbers."""
    dry = request.config.getoption("--quick")
    before = torch.get_num_threads()

    def run(op: str, provider: Provider, case: Case, threads: int, cache: str) -> None:
        if why := provider.missing(case):
            pytest.skip(f"{provider.name}: {why}")
        # The inputs, and three float32 temporaries of eager PyTorch, which malloc does not always place in the same memory.
        if 8 * case.input_bytes > harness.available_memory():
            pytest.skip(f"{case}: needs {8 * case.input_bytes / 1e9:.1f} GB of free memory")
        torch.set_num_threads(threads)
        row: dict[str, Any] = {
            "op": op, "B": case.batch, "N": case.n, "D": case.d, "dtype": str(case.dtype).removeprefix("torch."), "k": case.k,
            "threads": threads, "cache": cache, "provider": provider.name, "bytes": moved_bytes(op, case),
        }  # fmt: skip
        _rows.append(row)
        try:
            call = verified(op, provider, case)
        except WrongResult as wrong:
            row["check"] = f"wrong: {wrong}"
            pytest.fail(str(wrong))
        row["check"] = "equal" if provider.rounding is not None else "none"
        inputs = rotated(op, case) if cache == "cold" and not dry else [inputs_of(case)[0]]
        turn = itertools.cycle(inputs)
        for _ in inputs:
            call(next(turn))
        once = harness.timed(lambda: call(next(turn)))
        rounds = 3 if dry else min(MOST, max(LEAST, int(SECONDS / once)))
        quiet = gate.settle(0.0 if dry else 0.5)
        benchmark.pedantic(lambda: call(next(turn)), rounds=rounds, iterations=1, warmup_rounds=1)
        times = benchmark.stats.stats.data
        p20, median, p80 = (harness.quantile(times, q) * 1e6 for q in (0.2, 0.5, 0.8))
        row |= {
            "min_us": round(min(times) * 1e6, 2), "median_us": round(median, 2), "p20_us": round(p20, 2),
            "p80_us": round(p80, 2), "rounds": len(times), "gb_s": round(row["bytes"] / median / 1e3, 2),
            "quiet": "yes" if gate.quiet(quiet, gate.sample()) else "no",
        }  # fmt: skip

    yield run
    torch.set_num_threads(before)
    harness.release_memory()
