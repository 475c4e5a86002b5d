"""Where the C library of this installation is, for programs that link it: ``python -m v2drop_kernels config``.

Needs neither torch nor NumPy. The folders hold what ``cmake --install`` gives: ``include``, ``lib``, ``lib/cmake`` and
``lib/pkgconfig``.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def includedir() -> str:
    """The folder for ``-I``: programs say ``#include <v2drop/v2drop.h>``."""
    return _folder("include")


def libdir() -> str:
    """The folder of ``libv2drop``, for ``-L`` and the run path."""
    return _folder("lib")


def cmakedir() -> str:
    """What CMake's ``find_package(V2Drop)`` takes as ``V2Drop_DIR``, or in ``CMAKE_PREFIX_PATH``."""
    return _folder("lib/cmake/V2Drop")


def pkgconfigdir() -> str:
    """What ``PKG_CONFIG_PATH`` needs for ``pkg-config v2drop``."""
    return _folder("lib/pkgconfig")


def cflags() -> str:
    """The flags that compile with the header."""
    return shlex.quote(f"-I{includedir()}")


def libs() -> str:
    """The flags that link the library; with the run path, as no system looks for libraries inside a Python package."""
    return shlex.join([f"-L{libdir()}", f"-Wl,-rpath,{libdir()}", "-lv2drop"])


_ANSWERS: tuple[Callable[[], str], ...] = (cmakedir, includedir, libdir, pkgconfigdir, cflags, libs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per function of this module; several are answered in the order in which they are given."""
    for answer in _ANSWERS:
        doc = (answer.__doc__ or "").replace("``", "")
        parser.add_argument(
            f"--{answer.__name__}", action="append_const", dest="answers", const=answer, help=doc[0].lower() + doc[1:-1]
        )


def run(args: argparse.Namespace) -> int:
    """Print what the flags select: all flags on one line, each folder on a line of its own."""
    if not args.answers:
        raise ValueError(f"give one of {', '.join(f'--{answer.__name__}' for answer in _ANSWERS)}")
    flags = [answer() for answer in args.answers if answer in (cflags, libs)]
    print(*[answer() for answer in args.answers if answer not in (cflags, libs)], *([" ".join(flags)] if flags else []), sep="\n")
    return 0


def _folder(name: str) -> str:
    path = _PACKAGE / name
    if not path.is_dir():
        raise RuntimeError(f"{_PACKAGE} has no C++ library: it was installed without a C++17 compiler, or is a source tree")
    return str(path)
