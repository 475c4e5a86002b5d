"""Triton's own launcher over a CUDA driver that does nothing (stub_driver.c): host time of ``triton`` without a GPU.

Kernels are compiled for sm_90 and their launches are real up to the driver, which returns at once. What a GPU machine adds is
the driver's part of a launch, the caching allocator in place of the CPU's, and the look-up of the current device and stream.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("stub_driver.c")


def build(folder: Path) -> dict[str, str]:
    """Compile the driver into a folder; return the environment of processes that load it as ``libcuda.so.1``."""
    target = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", f"-Wl,-soname,{target.name}", "-o", target, SOURCE], check=True)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]))
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": path}


def install() -> None:
    """Make Triton launch through the driver, and the ``triton`` backend take CPU tensors for those of an sm_90 GPU."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from v2drop_kernels.backends import choice, implementations, launch

    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: 0
    active.get_device_capability = lambda device=0: (9, 0)
    triton.runtime.driver.set_active(active)
    implementations.Triton.supports = lambda self, request: None  # type: ignore[method-assign]
    launch.has_pdl = launch.is_nvidia = lambda device: True  # type: ignore[assignment]
    choice.why_not.cache_clear()
