"""Which backend serves a call, and why the others do not.

Order per device: ``cpu`` tensors go to the C++ library, GPU tensors to Triton, then to CUDA C++; plain PyTorch (``reference``)
serves what is left. ``cuda`` is the fallback for as long as no committed measurement shows a size where it is the faster of the
two. ``with backend(...)``, ``backend=`` and ``V2DROP_BACKEND`` force one; a forced backend that cannot serve raises with its
reason, the automatic choice falls through.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .. import native

BACKENDS = ("triton", "cuda", "cpu", "reference")
_MODULES = {"triton": "..ops._triton", "cuda": ".._cuda", "cpu": ".._native"}
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("v2drop_backend", default=None)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found.

    Attributes
    ----------
    chosen : str
        The backend that runs.
    rejected : dict
        The reason of every one that does not.
    """

    chosen: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.chosen}: runs", *(f"{b}: {why}" for b, why in self.rejected.items())])


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block.

    Parameters
    ----------
    name : {"triton", "cuda", "cpu", "reference"}

    Returns
    -------
    context manager

    Raises
    ------
    ValueError
        Unknown name. A known backend that cannot serve a call raises (RuntimeError) when that call is made.

    Examples
    --------
    >>> import v2drop_kernels as vk
    >>> with vk.backend("reference"):
    ...     scores = vk.variation_score(torch.zeros(1, 4, 8), torch.ones(1, 4, 8))
    """
    token = _forced.set(_known(name, "name"))
    try:
        yield
    finally:
        _forced.reset(token)


def explain(tensor: torch.Tensor | None = None, *, device: Any = None, dtype: torch.dtype | None = None) -> Explanation:
    """Tell which backend would serve a call on this tensor (or device and dtype), and why not the others.

    Parameters
    ----------
    tensor : Tensor, optional
        For instance ``h_cur``.
    device, dtype
        Instead of a tensor; default the CPU and float32.

    Returns
    -------
    Explanation
        ``chosen`` (name), ``rejected`` (name to reason); prints as lines.

    Raises
    ------
    RuntimeError
        A forced backend cannot serve; the message has its reason.

    Examples
    --------
    >>> print(explain(torch.zeros(1, 4, 8, dtype=torch.float64)).chosen)
    reference
    """
    if tensor is not None:
        device, dtype = tensor.device, tensor.dtype
    kind = torch.device(device or "cpu").type
    dtype = dtype or torch.float32
    forced = forced_name(None)
    chosen = choose_name(kind, dtype, forced)
    rejected = {}
    for name in BACKENDS:
        if name != chosen:
            why = why_not(name, kind, dtype)
            rejected[name] = why or (f"{forced!r} is forced" if forced else f"{chosen!r} comes first for {kind} tensors")
    return Explanation(chosen, rejected)


def forced_name(argument: str | None) -> str | None:
    """The forced backend: ``backend=``, else the ``with`` block, else ``V2DROP_BACKEND``, else None."""
    if argument is not None:
        return _known(argument, "backend")
    name = _forced.get()
    if name is not None:
        return name
    name = os.environ.get("V2DROP_BACKEND")
    return _known(name, "V2DROP_BACKEND") if name else None


def traced_choice(kind: str, dtype: torch.dtype, argument: str | None) -> str:
    """The choice as a constant of a compiled graph."""
    return choose_name(kind, dtype, forced_name(argument))


# What torch.compiler.assume_constant_result sets; calling it here would import all of dynamo (2 s) with the package.
traced_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def choose_name(kind: str, dtype: torch.dtype, forced: str | None) -> str:
    """The backend for tensors of this device kind and dtype."""
    if forced is not None:
        why = why_not(forced, kind, dtype)
        if why:
            raise RuntimeError(f"backend {forced!r} cannot serve {kind} tensors of {dtype}: {why}")
        return forced
    for name in ("cpu", "reference") if kind == "cpu" else ("triton", "cuda", "reference"):
        if why_not(name, kind, dtype) is None:
            return name
    raise AssertionError("the reference serves everything")


@functools.lru_cache(maxsize=256)
def why_not(name: str, kind: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve, or None when it can."""
    if name == "reference":
        return None
    if dtype not in _KERNEL_DTYPES:
        return f"serves float32, float16 and bfloat16 hidden states, not {dtype}"
    if name == "cpu":
        if kind != "cpu":
            return f"serves cpu tensors, not {kind}"
        served, reason = native.available()
        return None if served else reason
    if name == "cuda":
        return load("cuda").why_not(kind)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if kind == "cpu":
        return None if interpreting() else "serves GPU tensors; cpu tensors only under TRITON_INTERPRET=1"
    if kind != "cuda":
        return f"serves CUDA and ROCm tensors, not {kind}"
    if interpreting():
        return "TRITON_INTERPRET=1 is set, and the interpreter serves cpu tensors"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=8)
def load(name: str) -> ModuleType:
    """The module that implements a compiled backend."""
    return importlib.import_module(_MODULES[name], __package__)


def _known(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name
