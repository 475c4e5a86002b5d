"""The native library, built for the GPU that is here while other things are measured."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from harness import ROOT

FOLDER = ROOT / "build" / "gpu-check"
VARIABLE = "V2DROP_NATIVE_MODULE"
REMEMBERED = {"load_library", "runner_of", "available", "why_not", "supports", "choose_name"}  # functions with a cache


class Build:
    """A build in the background. ``note`` says in one line what came of it."""

    def __init__(self, arch: str, options: Sequence[str] = (), folder: Path = FOLDER) -> None:
        """Start it; ``arch`` is the compute capability without its dot, such as ``90``."""
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.note = f"being built for architecture {arch}"
        self._arch, self._start = arch, time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._file: IO[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        if cmake is None:
            self.note = "not built: CMake was not found"
            return
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DV2DROP_BUILD_PYTHON=ON", "-DV2DROP_JAX=OFF",
                     f"-DV2DROP_CUDA_ARCHS={arch}", f"-DPython_EXECUTABLE={sys.executable}",
                     f"-Dpybind11_DIR={_pybind11()}", *(["-G", "Ninja"] if shutil.which("ninja") else []), *options]  # fmt: skip
        self._file = self.log.open("wb")
        # A shell, so that one process stands for both steps; the arguments are passed apart from the script.
        script = 'n=$1; shift; "$@" && exec "$0" --build "$n" --parallel'
        self._process = subprocess.Popen(
            ["bash", "-c", script, cmake, str(folder), *configure], stdout=self._file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def running(self) -> bool:
        """Whether it goes on; when it has just ended, its result takes effect."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        self._finish(code)
        return False

    def wait(self, seconds: float) -> bool:
        """Wait for its end, so long at most; whether it has ended."""
        if self._process is not None:
            try:
                self._process.wait(max(seconds, 0.0))
            except subprocess.TimeoutExpired:
                return False
        return not self.running()

    def stop(self) -> None:
        """End it, if it still runs."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # this group is the build that was started above
            self._process.wait()

    def _finish(self, code: int) -> None:
        self._process = None
        if self._file:
            self._file.close()
        lines = self.log.read_text(errors="replace").splitlines()
        modules = sorted(self.folder.glob("_C*.so"))
        if code or not modules:
            about = next((line.strip() for line in lines if "error" in line.lower()), (lines or ["no output"])[-1])
            self.note = f"failed: {about[:200]}"
            return
        summary = next((line[line.index("v2drop:") :] for line in lines if "v2drop:" in line), f"see {self.log.name}")
        self.note = f"for architecture {self._arch} in {time.monotonic() - self._start:.0f} s: {summary}"
        use(modules[0])


def use(module: Path) -> None:
    """Load this build of the native library from now on, here and in programs that are started."""
    os.environ[VARIABLE] = str(module)
    forget()


def forget() -> None:
    """Have the package find the native library anew: why a backend cannot serve is remembered by its functions."""
    for name, loaded in list(sys.modules.items()):
        if name.startswith("v2drop_kernels"):
            for remembered in REMEMBERED & vars(loaded).keys():
                if hasattr(value := getattr(loaded, remembered), "cache_clear"):
                    value.cache_clear()


def _pybind11() -> str:
    done = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=False)
    return done.stdout.strip()
