"""Which backends a process can run, and memory that shows when an element of a result was never written.

Every test of an op takes the fixture ``on``. The main process runs it on ``reference``, ``cpu`` and, where there is a
GPU, ``triton`` and ``cuda``; the processes of tests/interpreter and tests/emulated run the same test functions on ``triton``
and on ``cuda`` with CPU tensors.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from v2drop_kernels import _native

# Processes of their own, collected only when named: Triton reads TRITON_INTERPRET once, when it is imported, and a process has
# one native library.
collect_ignore = ["interpreter", "compile_only", "emulated"]


class On(NamedTuple):
    """A backend, and the device of the tensors that it is given."""

    backend: str
    device: str


def _backends() -> list[object]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [pytest.param(On("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter)]
    archs = _native.cuda_archs() if _native.available()[0] else ""
    if archs == "emulated":
        return [pytest.param(On("cuda", "cpu"), id="emulated")]
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
    no_nvidia = pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs a CUDA device")
    no_kernels = pytest.mark.skipif(not archs, reason="the native library was built without CUDA")
    return [
        pytest.param(On("reference", "cpu"), id="reference"),
        pytest.param(On("cpu", "cpu"), id="cpu"),
        pytest.param(On("triton", "cuda"), id="triton", marks=[pytest.mark.gpu, no_gpu]),
        pytest.param(On("cuda", "cuda"), id="cuda", marks=[pytest.mark.gpu, no_nvidia, no_kernels]),
    ]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(*names): run the test on these backends only, where `on` is taken")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "on" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("backends")
        params = [p for p in _backends() if only is None or p.values[0].backend in only.args]
        if not params:
            elsewhere = pytest.mark.skip(reason=f"runs in the other process ({', '.join(only.args)})")
            params = [pytest.param(None, id="elsewhere", marks=elsewhere)]
        metafunc.parametrize("on", params, indirect=True)


@pytest.fixture
def poison():
    """Fill what ``torch.empty`` returns with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on(request: pytest.FixtureRequest, poison: None) -> On:
    return request.param
