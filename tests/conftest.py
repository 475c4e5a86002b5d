"""Which backends a process can run, and memory that shows when an element of a result was never written.

Every test of an op takes the fixture ``on``. The main process runs it on ``reference``, ``cpu`` and, where there is a
GPU, ``triton`` and ``cuda``. Two more processes run the same test functions with CPU tensors: with TRITON_INTERPRET=1 on
``triton`` (Triton reads the variable once, when it is imported), and where V2DROP_NATIVE_MODULE names a library that was
built with V2DROP_CUDA=EMULATE on ``cuda`` (a process loads one native library).
"""

from __future__ import annotations

import collections
import os
from typing import Any, NamedTuple

import pytest
import torch

from v2drop_kernels import native

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = not INTERPRETER and native.available()[0] and native.cuda_archs() == "emulated"

LEFT_OUT: collections.Counter[str] = collections.Counter()  # tests that were collected and will not run, by reason

# The compiler needs a process without TRITON_INTERPRET, and minutes: collected only when named.
collect_ignore = ["compile_only"]


class On(NamedTuple):
    """A backend, and the device of the tensors that it is given."""

    backend: str
    device: str


def _backends() -> list[object]:
    if INTERPRETER:
        return [pytest.param(On("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter)]
    if EMULATED:
        return [pytest.param(On("cuda", "cpu"), id="emulated", marks=pytest.mark.emulated)]
    found = [pytest.param(On("reference", "cpu"), id="reference"), pytest.param(On("cpu", "cpu"), id="cpu")]
    if torch.cuda.is_available():
        found.append(pytest.param(On("triton", "cuda"), id="triton", marks=pytest.mark.gpu))
        if not torch.version.hip and native.available()[0] and native.cuda_archs():
            found.append(pytest.param(On("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu))
    return found


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(*names): run the test on these backends only, where `on` is taken")
    config.addinivalue_line("markers", "elsewhere: a test whose backends another process has")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "on" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("backends")
        params = [p for p in _backends() if only is None or p.values[0].backend in only.args]
        metafunc.parametrize("on", params or [pytest.param(None, id="elsewhere", marks=pytest.mark.elsewhere)], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this process cannot run, and count it: see ``pytest_terminal_summary``."""
    mine = "interpreter" if INTERPRETER else "emulated" if EMULATED else None
    chosen = []
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            LEFT_OUT["needs a GPU"] += 1
        elif item.get_closest_marker("elsewhere") or any(
            item.get_closest_marker(x) for x in ("interpreter", "emulated") if x != mine
        ):
            LEFT_OUT["runs on backends of other processes: GPU, interpreter, emulated"] += 1
        elif mine and not item.get_closest_marker(mine):
            LEFT_OUT["runs in the main process"] += 1
        else:
            chosen.append(item)
    if len(chosen) < len(items):
        kept = set(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(chosen, key=_late)


# Files with few, long tests begin first: where processes share the files, none is left with a long one at the end.
FIRST = ("tests/distributed", "tests/native", "tests/tools", "tests/models", "tests/ops", "tests/interop")


def _late(item: pytest.Item) -> int:
    path = item.location[0]
    return next((i for i, folder in enumerate(FIRST) if path.startswith(folder)), len(FIRST))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist; all of them collect the same tests
        session.config.workeroutput["left_out"] = dict(LEFT_OUT)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for reason, n in getattr(node, "workeroutput", {}).get("left_out", {}).items():
        LEFT_OUT[reason] = n


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests did not run, by reason."""
    skipped = collections.Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    for verb, counted in (("skipped", skipped), ("left out", LEFT_OUT)):
        for reason, n in counted.most_common():
            terminalreporter.write_line(f"{n:6} {verb}: {reason}")


def _reason(report: pytest.TestReport) -> str:
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return why.removeprefix("Skipped: ")


@pytest.fixture
def poison():
    """Fill what ``torch.empty`` returns with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on(request: pytest.FixtureRequest, poison: None) -> On:
    return request.param
