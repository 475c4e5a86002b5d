# SPDX-License-Identifier: Apache-2.0
"""The compiled library: loads the module ``_C``, says why it is not there, and gives the codes that it defines.

Nothing here imports an array library. ``_C`` is documented in ``csrc/python/module.cpp``, the C interface behind it in
``csrc/include/v2drop/v2drop.h``; arguments are tuples of addresses and integers.

``METRICS``, ``ORDERS``, ``MODES``, ``HEADS``, ``QUERIES``, ``DTYPES``, ``PLACES``, ``LAUNCH_MODES``, ``TIES`` and
``MERGED_ORDERS`` map the words of an argument to the codes of the library, and ``SEGMENT_FIELDS`` names the columns of a table of
segments. They are read from ``_C`` at first use.

For developers, ``V2DROP_NATIVE_MODULE=/path/to/_C.*.so`` loads another build of the module, which finds its own libv2drop.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

_FROM_LIBRARY = (
    "METRICS",
    "ORDERS",
    "MODES",
    "HEADS",
    "QUERIES",
    "DTYPES",
    "PLACES",
    "LAUNCH_MODES",
    "TIES",
    "MERGED_ORDERS",
    "SEGMENT_FIELDS",
)

# Fresh memory of this size is mapped anew by every call, and faulting it in by pages of 4 KB costs more than the rest of a drop.
HUGE_BYTES = 4 << 20


@functools.cache
def load_library() -> tuple[ModuleType | None, str]:
    """The module ``_C`` and ``""``, or None and the reason why there is none."""
    try:
        if path := os.environ.get("V2DROP_NATIVE_MODULE"):
            return _module_at(path), ""
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            return None, "not built: the package was installed without its C++ library (reinstall with a C++17 compiler)"
        return None, f"built, but it cannot be loaded: {error}"
    return _C, ""


def _module_at(path: str) -> ModuleType:
    name = f"{__package__}._C"
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.machinery.ModuleSpec(name, loader, origin=path)
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
    return module


def __getattr__(name: str) -> Any:
    if name not in _FROM_LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(lib(), name)  # found directly from now on
    return value


def available() -> tuple[bool, str]:
    """Whether the library can be used, and if not, why."""
    module, reason = load_library()
    return module is not None, reason


def lib() -> Any:
    """The module ``_C``.

    Raises
    ------
    RuntimeError
        The library is not there; the message says why.
    """
    module, reason = load_library()
    if module is None:
        raise RuntimeError(f"the native library is {reason}")
    return module


@functools.cache
def reads(tensor_type: type) -> bool:
    """Whether the functions of ``_C`` take tensors of this type themselves, by the exchange API of DLPack; for one type only."""
    module, _ = load_library()
    # A build of an earlier version, which V2DROP_NATIVE_MODULE may name, does not have all of these functions.
    return module is not None and hasattr(module, "prepare_gathers") and bool(module.set_tensor_type(tensor_type))


def isa() -> str:
    """The instruction set in use: ``"avx512bf16"``, ``"avx512"``, ``"avx2"`` or ``"baseline"``; ``V2DROP_ISA`` limits it."""
    return str(lib().isa())


def version() -> str:
    """The version of libv2drop."""
    return str(lib().version())


def cuda_archs() -> str:
    """The GPU architectures that this build has kernels for, ``"emulated"``, or ``""`` for none."""
    return str(lib().cuda_archs())


@functools.cache
def _place(name: str) -> int:
    return int(lib().PLACES[name])


def cpu_context(threads: int) -> tuple[int, ...]:
    """The context of a call on the CPU with up to ``threads`` threads (0: all), as the functions of ``_C`` take it."""
    return (_place("cpu"), threads, 0, 0, 0, 0, 0)


def cuda_context(
    stream: int, workspace: int = 0, workspace_bytes: int = 0, launch_mode: int = 0, segments: int = 0
) -> tuple[int, ...]:
    """The context of a call on the current CUDA device, as the functions of ``_C`` take it.

    Parameters
    ----------
    stream : int
        The ``cudaStream_t``.
    workspace, workspace_bytes : int
        Address and size of scratch memory on the device, aligned to 256 bytes; see ``workspace_bytes`` of ``_C``.
    launch_mode : int
        A code of ``LAUNCH_MODES``; 0 chooses by size and device.
    segments : int
        Address of a copy of the segments on the device, or 0.
    """
    return (_place("cuda"), 0, stream, workspace, workspace_bytes, launch_mode, segments)
