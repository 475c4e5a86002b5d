# SPDX-License-Identifier: Apache-2.0
"""Runs CMake, which builds libv2drop and the extension modules. Everything else is in pyproject.toml.

These environment variables are read:

V2DROP_NO_NATIVE=1                 install the Python files only
V2DROP_CUDA=AUTO|ON|OFF            options of CMakeLists.txt, by the same names
V2DROP_CUDA_ARCHS="80 90 120"
V2DROP_JAX=AUTO|ON|OFF             with ON, an isolated build installs jax for its headers
V2DROP_STATIC_CXX=ON|OFF
V2DROP_BUILD_DIR=DIR               build in DIR and reuse what an earlier build left there
CMAKE_ARGS                         further arguments of CMake
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPTIONS = ("V2DROP_CUDA", "V2DROP_CUDA_ARCHS", "V2DROP_JAX", "V2DROP_STATIC_CXX")


def require(tool, *names):
    """The path of the first of `names` that is installed; ends the install with one clear line if there is none."""
    for name in names:
        if path := shutil.which(name):
            return path
    sys.exit(
        f"v2drop-kernels: no {tool} was found (looked for {', '.join(names)}). Install one (Debian: apt install g++ cmake), "
        "or set V2DROP_NO_NATIVE=1 to install without the C++ CPU backend."
    )


class CMakeBuild(build_ext):
    def run(self):
        import pybind11

        cxx = os.environ.get("CXX")
        require("C++17 compiler", *([shlex.split(cxx)[0]] if cxx else ["c++", "g++", "clang++"]))
        cmake = require("cmake", "cmake")
        # An editable install uses the libraries in the source tree.
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "v2drop_kernels"
        build = Path(os.environ.get("V2DROP_BUILD_DIR") or self.build_temp).resolve()
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-DV2DROP_BUILD_PYTHON=ON"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += [f"-D{name}={os.environ[name]}" for name in OPTIONS if os.environ.get(name)]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # it may name a build environment that was deleted
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(package)], check=True)

    # Without these two, setuptools would look for files that its own compiler step had written.
    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


if os.environ.get("V2DROP_NO_NATIVE", "0") not in ("", "0"):
    setup()
else:
    headers = ["jax>=0.6"] if os.environ.get("V2DROP_JAX") == "ON" else []
    setup(ext_modules=[Extension("v2drop_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild}, setup_requires=headers)
