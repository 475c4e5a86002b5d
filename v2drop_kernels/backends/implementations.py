"""The four backends: when each serves, and where it finds the implementation of an op."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from . import native
from .protocol import Backend, Op, Placement, Run

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unserved_dtype(dtype: torch.dtype) -> str | None:
    """Why kernels do not serve hidden states of a dtype, or None where they do."""
    return None if dtype in _KERNEL_DTYPES else f"serves float32, float16 and bfloat16 hidden states, not {dtype}"


class Reference:
    """Plain PyTorch: any device, any dtype, any op."""

    name = "reference"

    def supports(self, request: Placement) -> str | None:
        return None

    def load(self, op: Op) -> Run:
        if op.reference is None:
            raise RuntimeError(f"{op.name} has no reference: autograd differentiates plain PyTorch by itself")
        return op.reference


class Triton:
    """Triton kernels: CUDA and ROCm tensors, and CPU tensors under ``TRITON_INTERPRET=1``.

    No kernel spins, counts in global memory or uses atomics; nothing synchronises with the host. The table of a plan reaches the
    device as kernel arguments (``backends/tables.py``), so a plan may be new inside a CUDA graph capture.
    """

    name = "triton"

    def supports(self, request: Placement) -> str | None:
        kind, dtype = request
        if reason := unserved_dtype(dtype):
            return reason
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if kind == "cpu":
            return None if interpreting() else "serves GPU tensors; cpu tensors only under TRITON_INTERPRET=1"
        if kind != "cuda":
            return f"serves CUDA and ROCm tensors, not {kind}"
        if interpreting():
            return "TRITON_INTERPRET=1 is set, and the interpreter serves cpu tensors"
        return None if torch.cuda.is_available() else "torch sees no GPU"

    def load(self, op: Op) -> Run:
        return getattr(importlib.import_module(".triton", op.package), op.name)


class Native:
    """The compiled library: CPU tensors (``"cpu"``), or CUDA tensors (``"cuda"``)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def supports(self, request: Placement) -> str | None:
        kind, dtype = request
        if reason := unserved_dtype(dtype):
            return reason
        return native.unavailable(self.name, kind)

    def load(self, op: Op) -> Run:
        run = getattr(importlib.import_module(".native", op.package), op.name)
        return functools.partial(run, place=self.name)


BACKENDS: dict[str, Backend] = {b.name: b for b in (Triton(), Native("cuda"), Native("cpu"), Reference())}
