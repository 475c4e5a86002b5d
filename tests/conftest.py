"""Which backends a process can run, and memory that shows when an element of a result was never written.

Every test of an op takes the fixture ``on``. The main process runs it on ``reference``, ``cpu`` and, where there is a
GPU, ``triton`` and ``cuda``. Two more processes run the same test functions with CPU tensors: with TRITON_INTERPRET=1 on
``triton`` (Triton reads the variable once, when it is imported), and where V2DROP_NATIVE_MODULE names a library that was
built with V2DROP_CUDA=EMULATE on ``cuda`` (a process loads one native library).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from v2drop_kernels import _native

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = not INTERPRETER and _native.available()[0] and _native.cuda_archs() == "emulated"

# The compiler needs a process without TRITON_INTERPRET, and minutes: collected only when named.
collect_ignore = ["compile_only"]
if not EMULATED:
    collect_ignore.append("native/test_launches.py")


class On(NamedTuple):
    """A backend, and the device of the tensors that it is given."""

    backend: str
    device: str


def _backends() -> list[object]:
    if INTERPRETER:
        return [pytest.param(On("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter)]
    if EMULATED:
        return [pytest.param(On("cuda", "cpu"), id="emulated", marks=pytest.mark.emulated)]
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
    no_nvidia = pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs a CUDA device")
    no_kernels = pytest.mark.skipif(not _native.cuda_archs(), reason="the native library was built without CUDA")
    return [
        pytest.param(On("reference", "cpu"), id="reference"),
        pytest.param(On("cpu", "cpu"), id="cpu"),
        pytest.param(On("triton", "cuda"), id="triton", marks=[pytest.mark.gpu, no_gpu]),
        pytest.param(On("cuda", "cuda"), id="cuda", marks=[pytest.mark.gpu, no_nvidia, no_kernels]),
    ]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(*names): run the test on these backends only, where `on` is taken")
    config.addinivalue_line("markers", "elsewhere: a test whose backends another process has")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "on" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("backends")
        params = [p for p in _backends() if only is None or p.values[0].backend in only.args]
        metafunc.parametrize("on", params or [pytest.param(None, id="elsewhere", marks=pytest.mark.elsewhere)], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what another process runs: the processes of Triton's interpreter and of the emulated kernels run the tests of
    their own backend only."""
    mine = "interpreter" if INTERPRETER else "emulated" if EMULATED else None
    chosen = [x for x in items if not x.get_closest_marker("elsewhere") and (mine is None or x.get_closest_marker(mine))]
    if len(chosen) < len(items):
        left_out = set(items) - set(chosen)
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = chosen


@pytest.fixture
def poison():
    """Fill what ``torch.empty`` returns with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on(request: pytest.FixtureRequest, poison: None) -> On:
    return request.param
